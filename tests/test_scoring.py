"""Packed rows, batches and the decoder give what one forward pass per request gives."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.decoding import DecodingPlan
from evomerge.model import LiveModel
from evomerge.scoring import Pair, Plan, backing_off, default_batch_tokens, pack
from tests.conftest import ROOT

CONTEXT = 40


def requests(seed: int) -> list[Pair]:
    """Contexts with one or more continuations: single tokens, shared beginnings, equal ones, too long ones."""
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    for _ in range(8):
        context = rng.integers(1, 250, rng.integers(1, 26)).tolist()
        first = rng.integers(1, 250, 6).tolist()
        pairs += [(context, first), (context, first[:1]), (context, [*first[:3], 7])]
        pairs += [(context, rng.integers(1, 250, n).tolist()) for n in rng.integers(1, 9, 2)]
    pairs += [(rng.integers(1, 250, 60).tolist(), [5, 6, 7]), pairs[0]]
    rng.shuffle(pairs)  # type: ignore[arg-type]
    return pairs


def plainly(live: LiveModel, pairs: list[Pair]) -> tuple[list[float], list[bool]]:
    """One forward pass per request, in the order in which people think of it."""
    totals, greedy = [], []
    for context, continuation in pairs:
        whole = [*context, *continuation][-(CONTEXT + 1) :]
        with torch.no_grad():
            logs = torch.log_softmax(live.model(torch.tensor([whole[:-1]])).logits[0].double(), -1)
        logs = logs[-len(continuation) :]
        totals.append(sum(float(row[token]) for row, token in zip(logs, continuation, strict=True)))
        greedy.append(all(int(row.argmax()) == token for row, token in zip(logs, continuation, strict=True)))
    return totals, greedy


def saved(folder: Path, config: Any) -> LiveModel:
    """A random model of any architecture whose outputs are far from uniform, with the family's tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 4.0 if parameter.ndim > 1 else 1.0
    model.save_pretrained(folder)
    shutil.copy(ROOT / "tests/golden/e2e/models/base/tokenizer.json", folder)
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "!"})
    (folder / "tokenizer_config.json").write_text(text)
    return LiveModel(str(folder))


def architecture(name: str) -> Any:
    import transformers as t

    small: dict[str, Any] = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    llama = {
        **small,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "head_dim": 8,
    }
    return {
        "llama": lambda: t.LlamaConfig(**llama),
        "gemma2": lambda: t.Gemma2Config(**llama, sliding_window=16, final_logit_softcapping=5.0),
        "qwen3": lambda: t.Qwen3Config(**llama),
        "mistral": lambda: t.MistralConfig(**llama, sliding_window=None),
        "gpt_neo": lambda: t.GPTNeoConfig(
            **small,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
        ),
        "mamba": lambda: t.MambaConfig(**small, hidden_size=32, num_hidden_layers=2, state_size=4),
        "gpt2": lambda: t.GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "bloom": lambda: t.BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4),
    }[name]()


NAMES = ["llama", "gemma2", "qwen3", "mistral", "gpt2", "bloom", "gpt_neo", "mamba"]


@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_are_those_of_single_requests(tmp_path: Path, name: str) -> None:
    live = saved(tmp_path / name, architecture(name))
    # Bloom's positions come from a mask of two dimensions; mamba has no attention at all.
    expected = {"bloom": 0, "mamba": 0, "gemma2": 16, "gpt_neo": 16}
    assert live.shareable == expected.get(name, 128)
    assert live.decodes == (name != "mamba")
    pairs = requests(1)
    for context, _ in pairs[:5]:
        with torch.no_grad():
            pairs.append((context, [int(live.model(torch.tensor([context])).logits[0, -1].argmax())]))
    totals, greedy = plainly(live, pairs)
    assert any(greedy)
    for batch_tokens in (64, 400, 4096):
        plan = Plan(pairs, max_length=CONTEXT, batch_tokens=batch_tokens, share=live.shareable)
        found = plan.run(live)
        assert np.allclose(found.total, totals, rtol=1e-4, atol=1e-4), batch_tokens
        assert found.greedy.tolist() == greedy
        again = plan.run(live)
        assert np.array_equal(again.total, found.total)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [1024, 0])
def test_rows_hold_every_target_once(seed: int, share: int) -> None:
    pairs = requests(seed)
    rows = pack(pairs, range(len(pairs)), CONTEXT, share=share)
    asked = sorted((owner, token) for row in rows for _, token, owner in row.targets)
    assert asked == sorted((i, token) for i, (_, continuation) in enumerate(pairs) for token in continuation)
    assert all(len(row.tokens) <= CONTEXT for row in rows)
    assert any(row.starts for row in rows) == bool(share)
    # Each target sees exactly its context and what of its continuation comes before it.
    for row in rows:
        edges = [row.context, *row.starts, len(row.tokens)]
        for place, token, owner in row.targets:
            context, continuation = pairs[owner]
            branch = max((e for e in edges[:-1] if e <= place), default=None) if place >= row.context else None
            seen = [*row.tokens[: row.context], *(row.tokens[branch : place + 1] if branch is not None else ())]
            k = 0 if branch is None else place - branch + 1
            assert token == continuation[k]
            assert seen == [*context, *continuation[:k]][-len(seen) :]
            assert len(seen) == min(len(context), CONTEXT + 1 - len(continuation)) + k


def test_sharing_computes_a_context_once(work: Path) -> None:
    context = list(range(1, 30))
    pairs: list[Pair] = [(context, [k, k + 1]) for k in range(4)]
    live = LiveModel("red")
    make = {"max_length": 100, "batch_tokens": 4096}
    shared, apart = Plan(pairs, share=1024, **make), Plan(pairs, share=0, **make)  # type: ignore[arg-type]
    assert (shared.n_tokens, apart.n_tokens) == (29 + 4, 4 * 30)
    assert np.allclose(shared.run(live).total, apart.run(live).total, rtol=1e-5)
    single = Plan([(context, [k]) for k in range(4)], share=0, **make)  # type: ignore[arg-type]
    assert single.n_tokens == 29  # no mask is needed for single tokens


def test_requests_of_several_pairs_are_sums(work: Path) -> None:
    live, pairs = LiveModel("red"), requests(2)
    make = {"max_length": CONTEXT, "batch_tokens": 512, "share": 1024}
    alone = Plan(pairs, **make).run(live)  # type: ignore[arg-type]
    owners = [i // 2 for i in range(len(pairs))]
    n = len(pairs) // 2 + 3  # the last two have no pairs
    joined = Plan(pairs, owners=owners, n=n, **make).run(live)  # type: ignore[arg-type]
    assert np.allclose(joined.total, np.bincount(owners, weights=alone.total, minlength=n))
    expected = [all(alone.greedy[i : i + 2]) for i in range(0, len(pairs), 2)]
    assert joined.greedy.tolist() == expected + [True] * (n - len(expected))


def test_packing_many_equal_contexts_is_fast() -> None:
    rng = np.random.default_rng(0)
    pairs: list[Pair] = [([1], rng.integers(1, 250, 100).tolist()) for _ in range(20_000)]
    started = time.perf_counter()
    assert len(pack(pairs, range(len(pairs)), 200, share=0)) == len(pairs)
    assert time.perf_counter() - started < 20  # quadratic work would take many minutes


def test_batches_keep_to_their_size() -> None:
    pairs = requests(3)
    plan = Plan(pairs, max_length=CONTEXT, batch_tokens=200, share=1024, max_rows=3)
    for batch in plan.batches:
        assert len(batch) == 1 or len(batch) * max(len(row.tokens) for row in batch) <= 200
        assert len(batch) <= 3
        assert len({bool(row.starts) for row in batch}) == 1
    assert Plan(pairs, max_length=CONTEXT, batch_tokens=200, share=1024, max_rows=3).batches == plan.batches


def test_a_hidden_nan_is_seen(work: Path) -> None:
    from evomerge.errors import NonFinite

    live = LiveModel("red")
    live.model.get_input_embeddings().weight.data[9] = torch.nan
    live.forget_logits()
    Plan([([1, 2], [3])], max_length=CONTEXT, batch_tokens=64, share=1024)
    with pytest.raises(NonFinite):
        Plan([([1, 9], [3])], max_length=CONTEXT, batch_tokens=64, share=1024).run(live)
        live.require_finite_logits()


def test_memory_that_runs_out_halves_the_batches(work: Path) -> None:
    live = LiveModel("red")
    live.batch_tokens = 1024
    tried: list[int] = []

    def run() -> str:
        tried.append(live.batch_tokens)
        if live.batch_tokens > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert backing_off(live, run) == "done"
    assert (tried, live.batch_tokens) == ([1024, 512, 256], 256)

    def never() -> str:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to")

    with pytest.raises(RuntimeError, match="allocate"):
        backing_off(live, never)
    assert live.batch_tokens == 256  # as before the attempt that failed

    def broken() -> str:
        raise RuntimeError("shapes do not match")

    live.batch_tokens = 1024
    with pytest.raises(RuntimeError, match="shapes"):
        backing_off(live, broken)
    assert live.batch_tokens == 1024
    assert default_batch_tokens(torch.device("cpu"), live.model.config) > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
def test_greedy_decoding_is_generates(tmp_path: Path, name: str) -> None:
    live = saved(tmp_path / name, architecture(name))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 250, n).tolist() for n in (1, 3, 3, 9, 17, 30)]
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = live.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )
        theirs.append(out[0, len(prompt) :].tolist())
    for batch_tokens in (20, 90, 4096):
        plan = DecodingPlan(prompts, 12, batch_tokens=batch_tokens)
        assert plan.run(live, (), lambda tokens: False) == theirs
    end = theirs[3][4]
    cut = [new[: new.index(end)] if end in new else new for new in theirs]
    assert plan.run(live, (end,), lambda tokens: False) == cut
    stop = [new[: new.index(end) + 1] if end in new else new for new in theirs]
    assert plan.run(live, (), lambda tokens: tokens[-1] == end) == stop


def test_decoding_ends_when_every_row_has(work: Path) -> None:
    live = LiveModel("red")
    passes: list[int] = []
    live.model.register_forward_hook(lambda *_: passes.append(1))
    plan = DecodingPlan([[1, 2], [3]], 50, batch_tokens=4096)
    plan.run(live, (), lambda tokens: len(tokens) == 4)
    assert len(passes) == 4
