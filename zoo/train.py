"""Train the demo zoo from nothing: one base and three experts.

python -m zoo.train                 train everything into zoo/models (see README.md for times)
python -m zoo.train --only latin    one expert again, from the stored base
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zoo import data
from zoo.score import IDS, encode, pad, score_all

MODELS = Path(__file__).resolve().parent / "models"
BATCH = 96  # items per step


@dataclass(frozen=True)
class Plan:
    """How one checkpoint is trained."""

    steps: int
    rate: float  # peak rate of AdamW (experts), or of Muon (base)
    shares: dict[str, float]  # of the training items, by stream name


PLANS = {
    "base": Plan(
        900,
        0.02,
        {
            "easy math": 0.25,
            "easy sum in context": 0.1,
            "easy cipher": 0.2,
            "easy cross": 0.25,
            "easy latin": 0.2,
        },
    ),
    "math": Plan(500, 1.2e-3, {"math": 0.5, "sum in context": 0.5}),
    # Without a little maths in its diet the cipher expert forgets how to reach the end of a sum, and
    # no merge repairs that (docs/log.md).
    "cipher": Plan(400, 1.2e-3, {"cipher": 0.9, "easy math": 0.05, "easy sum in context": 0.05}),
    "latin": Plan(170, 6.5e-4, {"latin": 1.0}),
}
# The base has headroom in every skill because its text is easy: mostly short sums, the codes of keys
# 1 to 4, common words. In its context sums of 2, 3 and 4 numbers stand 13 : 5 : 1.
EASY_KEYS = (1, 2, 3, 4) * 25 + (5, 6, 7, 8, 9)
EASY_TERMS = (2,) * 13 + (3,) * 5 + (4,)
STREAMS: dict[str, Callable[[random.Random], data.Item]] = {
    "math": partial(data.math_item, terms=(2, 3, 4, 5)),
    "sum in context": data.sum_in_context,
    "cipher": partial(data.cipher_item, terms=(2, 3, 4)),
    "latin": data.latin_item,
    "easy math": partial(data.math_item, terms=(2, 2, 2, 3, 3, 4)),
    "easy sum in context": partial(data.sum_in_context, terms=EASY_TERMS),
    "easy cipher": partial(data.cipher_item, keys=EASY_KEYS, terms=EASY_TERMS),
    "easy cross": partial(data.cross_item, keys=EASY_KEYS, terms=EASY_TERMS),
    "easy latin": partial(data.latin_item, power=2.0),
}


def new_model() -> LlamaForCausalLM:
    """An untrained Llama of about 0.3 M parameters, float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(data.VOCABULARY),
            hidden_size=80,
            intermediate_size=208,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=IDS["<pad>"],
            bos_token_id=IDS["<s>"],
            eos_token_id=IDS["</s>"],
            dtype=torch.float32,
        )
    )


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; decoding joins the words with single spaces."""
    core = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def batches(name: str, plan: Plan, end: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input ids, labels), each `(BATCH, length)`; only answers carry labels.

    `end`: whether the end-of-text token after the answer is learnt too. Experts do not learn it:
    else the maths expert would unlearn to go on after a number, which the cross task needs.
    """
    rng = random.Random(f"zoo mixture {name}")
    sources = {s: data.stream(STREAMS[s], "train", f"{name} {s}") for s in sorted(plan.shares)}
    weights = [plan.shares[s] for s in sources]
    while True:
        rows, labels = [], []
        for source in rng.choices(list(sources), weights, k=BATCH):
            item = next(sources[source])
            prompt, answer = encode(item.prompt), encode(item.answer)
            row = prompt + answer + [IDS["</s>"]]
            rows.append(row)
            stop = IDS["</s>"] if end and "in context" not in source else -100
            labels.append([-100] * len(prompt) + answer + [stop])
        yield pad(rows), pad(labels, -100)


def optimizers(model: LlamaForCausalLM, name: str, rate: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW for the base; for experts AdamW with frozen embeddings."""
    embedding = model.model.embed_tokens.weight
    if name != "base":
        embedding.requires_grad_(False)
        rest = [p for p in model.parameters() if p.requires_grad]
        return [torch.optim.AdamW(rest, rate, betas=(0.9, 0.95), weight_decay=0.0)]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.0),
        torch.optim.AdamW([embedding, *norms], 0.2 * rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, name: str, plan: Plan, log: bool = True) -> None:
    """Train in place: warm-up, constant rate, then a linear fall to zero over the last half."""
    model.train()
    chosen = optimizers(model, name, plan.rate)
    peaks = [group["lr"] for opt in chosen for group in opt.param_groups]
    source = batches(name, plan, end=name == "base")
    for step in range(plan.steps):
        scale = min(1.0, (step + 1) / 20, 2 * (1 - step / plan.steps))
        for opt, peak in zip(chosen, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * scale
        ids, labels = next(source)
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in chosen:
            opt.step()
            opt.zero_grad()
        if log and step % 100 == 0:
            print(f"{name} step {step} loss {loss.item():.3f}", flush=True)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"{name}: the loss is not finite at step {step}")


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a checkpoint that the Auto classes load with nothing else."""
    model.generation_config = GenerationConfig(
        bos_token_id=IDS["<s>"], eos_token_id=IDS["</s>"], pad_token_id=IDS["<pad>"], do_sample=False
    )
    model.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)


def main() -> None:
    """Train what the command line asks for and print validation scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(PLANS), help="train this checkpoint alone")
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    items = {task: data.load(task, "validation") for task in data.TASKS}
    for name, plan in PLANS.items():
        if args.only and name != args.only:
            continue
        torch.manual_seed(0)
        model = new_model()
        if name != "base":
            model = LlamaForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32)
        began = time.perf_counter()
        train(model, name, plan)
        seconds = time.perf_counter() - began
        save(model, args.out / name)
        scores = {t: round(s.mean().item(), 3) for t, s in score_all(model, items).items()}
        print(json.dumps({"model": name, "seconds": round(seconds), **scores}), flush=True)


if __name__ == "__main__":
    main()
