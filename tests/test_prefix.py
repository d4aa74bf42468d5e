"""Hidden states that candidates share: the same bits with and without, within a budget, and never of other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evomerge.errors import NonFinite
from evomerge.methods import Tables
from evomerge.model import LiveModel
from evomerge.moments import Observed
from evomerge.objectives import ObjectiveSpec
from evomerge.prefix import UNUSED, Prefixes, chain, late_tensors
from evomerge.racing import Race
from evomerge.recipe import Recipe
from evomerge.scale_folding import fold_scales
from evomerge.scoring import SMALLEST_BATCH, Plan, backing_off
from evomerge.weights import Weights
from evomerge.worker import Job, Worker, WorkerSpec
from tests.test_layer_path import FAMILIES, IDS, SCALES, STACKS, TOKENIZER, N, make, merged, path

Piece = tuple[str, int, int]
MODELS = ("base", "red", "blue")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("plain"))


def opened(folder: Path, budget_bytes: int = 1 << 30) -> tuple[LiveModel, Weights]:
    live = LiveModel(str(folder / "base"), tables=Tables(budget_bytes))
    return live, Weights([str(folder / model) for model in MODELS])


def requests(live: LiveModel, batch_tokens: int = 128, seed: int = 0) -> Plan:
    """Contexts with one or two continuations: rows with a mask of their own where the architecture allows it."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(8):
        context = rng.integers(1, 60, rng.integers(4, 20)).tolist()
        pairs += [(context, rng.integers(1, 60, 3).tolist()) for _ in range(rng.integers(1, 3))]
    return Plan(pairs, max_length=40, batch_tokens=batch_tokens, share=live.shareable)


def both(live: LiveModel, plan: Plan) -> list[Tensor]:
    """The logits of every batch with states reused, after they were found equal to those without."""
    plan.run(live)
    found = []
    for batch in plan._ready:
        given = (batch.outputs, batch.ids, batch.mask(live.dtype), batch.positions)
        plain, _ = live.logits_at(*given)
        again, _ = live.logits_at(*given, key=batch.key)
        assert torch.equal(plain, again)
        found.append(plain)
    with live.prefixes.paused():
        slow = plan.run(live)
    fast = plan.run(live)
    assert np.array_equal(slow.total, fast.total) and np.array_equal(slow.greedy, fast.greedy)
    return found


def edited(rng: np.random.Generator, steps: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """A path with one random edit: a repeat, a skip, a splice from another model, or two layers swapped."""
    at, kind = int(rng.integers(1, len(steps))), rng.integers(4)
    if kind == 0 and len(steps) < 2 * N:
        return [*steps[: at + 1], *steps[at:]]
    if kind == 1 and len(steps) > 2:
        return [*steps[:at], *steps[at + 1 :]]
    if kind == 2 and at + 1 < len(steps):
        return [*steps[:at], steps[at + 1], steps[at], *steps[at + 2 :]]
    return [*steps[:at], (str(rng.choice(MODELS)), int(rng.integers(N))), *steps[at + 1 :]]


def random_paths(n: int, seed: int = 0) -> Iterator[list[Piece]]:
    """Children of the identity path and of each other."""
    rng = np.random.default_rng(seed)
    known: list[list[tuple[str, int]]] = [[("base", layer) for layer in range(N)]]
    for _ in range(n):
        yield [(model, layer, layer + 1) for model, layer in known[-1]]
        known.append(edited(rng, known[int(rng.integers(max(0, len(known) - 3), len(known)))]))


def untouched(live: LiveModel) -> bool:
    layers = live.layers.modules
    return not any("forward" in layer.__dict__ or layer._forward_pre_hooks for layer in layers)


def test_random_paths_have_the_same_bits_in_every_family(models: Path) -> None:
    live, weights = opened(models)
    plan = requests(live)
    for pieces in random_paths(14):
        live.install(path(models, *pieces), weights)
        both(live, plan)
        assert untouched(live)
    report = live.prefixes.report()
    assert live.prefixes.problem == "" and live.prefixes.hits > 30
    assert 0.2 < report["prefix_saved"] < 1.0 and report["prefix_bytes"] > 0


def test_scaled_paths_share_what_comes_before_the_first_scale(llama: Path) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    stack = path(llama, ("base", 0, 2), ("red", 1, 3), ("base", 2, 4))
    for scales in ((1.0,) * 6, SCALES, (*SCALES[:4], 0.7, 1.1), (1.0,) * 6, (0.5, *SCALES[1:])):
        live.install(fold_scales(stack, scales, "llama"), weights)
        both(live, plan)
    live.install(path(llama, ("base", 0, 3), ("red", 1, 4)), weights)
    before = live.prefixes.hits
    both(live, plan)
    assert live.prefixes.hits > before and live.prefixes.problem == ""


@pytest.mark.parametrize("name", ["Bloom", "GPTJ", "Falcon", "Olmo2"])
def test_layers_that_give_tuples(tmp_path: Path, name: str) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    more: dict[str, dict[str, Any]] = {
        "Bloom": {"hidden_size": 32, "n_layer": N, "n_head": 4},
        "GPTJ": {"n_embd": 32, "n_layer": N, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
        "Falcon": {"hidden_size": 32, "num_hidden_layers": N, "num_attention_heads": 4, "max_position_embeddings": 64},
        "Olmo2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N, "num_attention_heads": 4},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **more[name])
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    shutil.copy(TOKENIZER, tmp_path / "base" / "tokenizer.json")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "!"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(special))
    live, weights = LiveModel(str(tmp_path / "base")), Weights([str(tmp_path / "base")])
    plan = requests(live)
    for stack in (("base", 0, 4),), STACKS["repeat"], STACKS["skip"], STACKS["swap"], STACKS["repeat"]:
        live.install(path(tmp_path, *stack), weights)
        both(live, plan)
    assert live.prefixes.problem == "" and live.prefixes.hits > 0


def test_changed_batch_sizes_and_parts_have_batches_of_their_own(llama: Path) -> None:
    live, weights = opened(llama)
    plans = [requests(live, size, seed) for size, seed in ((128, 0), (64, 0), (256, 0), (128, 1))]
    for i, pieces in enumerate(random_paths(8)):
        live.install(path(llama, *pieces), weights)
        both(live, plans[i % 4])
        both(live, plans[0])
    assert live.prefixes.hits > 0


def test_a_batch_is_named_by_what_its_layers_read(llama: Path) -> None:
    live, _ = opened(llama)
    first, second, other = requests(live), requests(live), requests(live, seed=1)
    for plan in (first, second, other):
        plan.run(live)
    keys = [batch.key for batch in first._ready]
    assert keys == [batch.key for batch in second._ready] and len(set(keys)) == len(keys)
    assert not set(keys) & {batch.key for batch in other._ready}
    assert {batch.branch is None for batch in first._ready} == {True, False}
    apart, shared = ([3, 4, 5], [6, 7]), ([3, 4, 5], [8, 9])
    plain = Plan([([3, 4, 5, 8, 6], [1])], max_length=40, batch_tokens=64, share=0)
    masked = Plan([apart, shared], max_length=40, batch_tokens=64, share=40)
    for plan in (plain, masked):
        plan.run(live)
    assert torch.equal(plain._ready[0].ids, masked._ready[0].ids) and plain._ready[0].key != masked._ready[0].key


def test_after_failures_and_ordinary_recipes_the_bits_are_right(llama: Path) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    expected = {}
    recipes = {name: path(llama, *stack) for name, stack in STACKS.items()} | {"own": path(llama, ("red", 0, N))}
    for name, recipe in recipes.items():
        fresh, _ = opened(llama)
        fresh.install(recipe, weights)
        plan.run(fresh)
        with fresh.prefixes.paused():
            expected[name] = both(fresh, plan)
    sound = merged(llama, "task_arithmetic", (0, 4), weight=0.5).to_dict()
    broken = Recipe.from_dict({**sound, "parameters": {"weight": 1e38, "lambda": 1e38}})
    for _ in range(2):
        for name, recipe in recipes.items():
            live.install(recipe, weights)
            found = both(live, plan)
            assert all(torch.equal(a, b) for a, b in zip(found, expected[name], strict=True)), name
            with pytest.raises(NonFinite):
                live.install(broken, weights)
            passes = live.prefixes.passes
            plan.run(live)  # weights of which nobody knows what they are
            assert live.prefixes.passes == passes
    assert live.prefixes.hits > 0


def test_a_candidate_whose_logits_are_not_finite_switches_nothing_off(llama: Path) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    scale = [{"filter": "q_proj", "value": 1e36}, {"filter": "k_proj", "value": 1e36}, {"value": 1}]
    for pieces in (STACKS["swap"], STACKS["skip"], STACKS["repeat"]):
        live.install(path(llama, *pieces, scale=scale), weights)
        live.forget_logits()
        plan.run(live)
        with pytest.raises(NonFinite):
            live.require_finite_logits()
        live.install(path(llama, *pieces), weights)
        live.forget_logits()
        both(live, plan)
        live.require_finite_logits()
    assert live.prefixes.problem == "" and live.prefixes.hits > 0


def test_generation_and_passes_with_a_cache_are_left_alone(llama: Path) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    for name in ("repeat", "swap", "repeat"):
        live.install(path(llama, *STACKS[name]), weights)
        plan.run(live)
    passes = live.prefixes.passes
    fresh, _ = opened(llama)
    fresh.install(path(llama, *STACKS["repeat"]), weights)
    made = [m.model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False) for m in (live, fresh)]
    assert torch.equal(*made)
    batch = plan._ready[0]
    live.logits_at(batch.outputs, batch.ids, batch.mask(live.dtype), batch.positions, keep_cache=True, key=batch.key)
    assert live.prefixes.passes == passes


def test_merged_layers_are_never_shared_and_cost_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    monkeypatch.setattr("evomerge.prefix.chain", lambda *args: pytest.fail("hashed"))
    found = []
    for weight in (0.4, 0.6, 0.4):
        live.install(merged(llama, "task_arithmetic", (0, 3), (1, 4), weight=weight), weights)
        found.append(plan.run(live).total)
        live.install(merged(llama, "task_arithmetic", (0, 4), weight=weight), weights)
        plan.run(live)
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])
    state = live.prefixes
    assert not state._seen and not state._batches and state._late is None and state.report() == {}


def links(live: LiveModel, recipe: Recipe) -> tuple[bytes, ...]:
    plans = recipe.plan(live.checkpoint.names, N)
    length = sum(piece.length(N) for piece in recipe.slices)
    return chain(recipe, plans, [()] * length, frozenset({"model.norm.weight", "lm_head.weight"}))


def test_a_chain_tells_prefixes_apart_by_models_layers_values_and_types(llama: Path) -> None:
    live, _ = opened(llama)

    def shared(*pieces: Piece, scale: Any = None) -> int:
        other = links(live, path(llama, *pieces, scale=scale))
        same = [a == b for a, b in zip(own, other, strict=False)]
        assert same == sorted(same, reverse=True)
        return sum(same)

    own = links(live, path(llama, ("base", 0, 4)))
    assert len(set(own)) == 4
    assert shared(("base", 0, 4)) == shared(("base", 0, 4), ("base", 3, 4)) == 4
    assert shared(("base", 0, 3), ("red", 3, 4)) == shared(("base", 0, 3), ("base", 2, 4)) == 3
    assert shared(("base", 0, 1), ("base", 2, 4)) == 1
    assert shared(("red", 0, 1), ("base", 1, 4)) == 0  # the embeddings are those of the first slice
    assert shared(("base", 0, 4), scale=[{"filter": "layers.2.mlp.down", "value": 0.5}, {"value": 1}]) == 2
    assert shared(("base", 0, 4), scale=[{"filter": "embed_tokens", "value": 0.5}, {"value": 1}]) == 0
    assert shared(("base", 0, 4), scale=[{"filter": "lm_head", "value": 0.5}, {"value": 1}]) == 4
    recipe = path(llama, ("base", 0, 4))
    plans = recipe.plan(live.checkpoint.names, N)
    mixed = chain(recipe, plans, [("full",), ("full",), ("sliding",), ("full",)], frozenset())
    full = chain(recipe, plans, [("full",)] * 4, frozenset())
    assert [a == b for a, b in zip(mixed, full, strict=True)] == [True, True, False, False]


def test_what_comes_behind_the_layers_is_found_in_every_family(models: Path) -> None:
    live, _ = opened(models)
    outside = {name for name in live.checkpoint.names if ".layers." not in name and ".h." not in name}
    hooks = hooks_of(live)
    late = late_tensors(live)
    early = outside - late
    assert late and early and late <= outside
    assert all("emb" in name or ".wte." in name or ".wpe." in name for name in early), early
    assert all("norm" in name or ".ln_f." in name or "head" in name or "embed_out" in name for name in late), late
    assert hooks_of(live) == hooks


def hooks_of(live: LiveModel) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in live.model.modules()]


def test_layers_that_somebody_watches_are_computed(llama: Path) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    for name in ("repeat", "swap", "repeat"):
        live.install(path(llama, *STACKS[name]), weights)
        plan.run(live)
    before = live.prefixes.passes
    with Observed(live) as seen:
        plan.run(live)
    with Observed(live) as plain, live.prefixes.paused():
        plan.run(live)
    assert live.prefixes.passes == before and live.prefixes.hits > 0
    assert seen.moments() == plain.moments() != {}


def worker_of(**more: Any) -> Worker:
    files = {"search": "text.search.txt", "validation": "text.validation.txt"}
    objectives = (
        ObjectiveSpec("pick", "lm_eval", {"file": "pick.yaml"}),
        ObjectiveSpec("text", "perplexity", {"files": {k: v for k, v in files.items() if Path(v).exists()}}),
    )
    return Worker(WorkerSpec("base", ("base", "red", "green"), objectives, **more))


def small_path(*steps: tuple[str, int]) -> Recipe:
    return path(Path(), *((model, layer, layer + 1) for model, layer in steps))


SMALL_PATHS = (
    (("base", 0), ("base", 1), ("base", 1)),
    (("base", 0), ("red", 1)),
    (("base", 0), ("red", 1), ("base", 1)),
    (("red", 0), ("red", 1), ("base", 1)),
    (("base", 0), ("red", 1), ("green", 0), ("base", 1)),
)


def test_a_worker_scores_rungs_and_splits_as_one_without_states(work: Path) -> None:
    ours, theirs = worker_of(), worker_of()
    theirs.live.prefixes.problem = "switched off"
    for number, steps in enumerate(SMALL_PATHS):
        race = Race(1, (0.25, 0.5, 1.0))
        for job in (
            Job(number, small_path(*steps), race=race),
            Job(number, small_path(*steps), batch_tokens=256, twice=number == 2),
            Job(number, small_path(*steps), parts=({"pick": [0, 2, 5], "text": None},), batch_tokens=2048),
        ):
            a, b = ours.evaluate(job), theirs.evaluate(job)
            for name, scores in a.scores["search"].items():
                assert np.array_equal(scores.items, b.scores["search"][name].items), (number, name)
            assert a.spreads == b.spreads == {}
            assert "prefix_saved" not in b.tables
    assert a.tables["prefix_hits"] >= 20 and a.tables["prefix_saved"] > 0.15
    assert a.tables["prefix_bytes"] == ours.live.prefixes.n_bytes > 0


def test_a_second_score_is_computed_in_full(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are kept would hide that a model's passes do not repeat."""
    import evomerge.worker as module

    worker = worker_of()
    again = module.score_again
    seen: list[int] = []

    def counted(*args: Any) -> Any:
        before = worker.live.prefixes.passes
        found = again(*args)
        seen.append(worker.live.prefixes.passes - before)
        return found

    monkeypatch.setattr(module, "score_again", counted)
    for number, steps in enumerate(SMALL_PATHS[:3]):
        worker.evaluate(Job(number, small_path(*steps), twice=True))
    assert seen == [0, 0, 0] and worker.live.prefixes.hits > 0


def test_memory_that_runs_out_takes_the_states_before_the_batch_size(llama: Path) -> None:
    live, weights = opened(llama)
    plan = requests(live)
    for name in ("repeat", "swap"):
        live.install(path(llama, *STACKS[name]), weights)
        plan.run(live)
    assert live.prefixes.n_bytes > 0
    budget, size, sizes = live.prefixes.budget_bytes, live.batch_tokens, []

    def run(failures: int) -> int:
        sizes.append((live.batch_tokens, live.prefixes.n_bytes))
        if len(sizes) <= failures:
            raise MemoryError
        plan.run(live)
        return len(sizes)

    assert backing_off(live, lambda: run(1)) == 2
    assert sizes[1] == (size, 0) and live.batch_tokens == size
    assert live.prefixes.n_bytes == 0  # none are kept until the next candidate
    assert live.prefixes.budget_bytes == budget // 2
    sizes.clear()
    assert backing_off(live, lambda: run(1)) == 2 and live.batch_tokens == size // 2
    assert live.prefixes.budget_bytes == budget // 2
    live.batch_tokens = SMALLEST_BATCH
    for name in ("repeat", "swap"):
        live.install(path(llama, *STACKS[name]), weights)
        both(live, plan)
    assert live.prefixes.n_bytes > 0
    sizes.clear()
    assert backing_off(live, lambda: run(1)) == 2  # at the smallest size too
    with pytest.raises(MemoryError):
        backing_off(live, lambda: run(99))


def test_states_stay_within_what_the_tables_leave(llama: Path) -> None:
    sizes = {}
    for budget in (0, 20_000, 60_000, 1 << 30):
        live, weights = opened(llama, budget)
        plan = requests(live)
        for pieces in random_paths(12):
            live.install(path(llama, *pieces), weights)
            both(live, plan)
            assert live.prefixes.n_bytes <= budget
        sizes[budget] = live.prefixes.n_bytes, live.prefixes.saved
        live.tables.n_bytes = budget  # another kind of recipe has filled them
        live.install(path(llama, *STACKS["swap"]), weights)
        assert live.prefixes.n_bytes == 0
    held, saved = zip(*sizes.values(), strict=True)
    assert held[0] == saved[0] == 0 and held[1] > 0
    assert list(held) == sorted(held) and list(saved) == sorted(saved) and saved[1] < saved[3]


class Toy(nn.Module):
    """Layers that are given by their numbers; with `reads` the logits need what the second layer read, too."""

    def __init__(self, path: Sequence[int], *, reads: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in path)
        for layer, number in zip(self.layers, path, strict=True):
            torch.manual_seed(number)
            nn.init.normal_(layer.weight)  # type: ignore[arg-type]
            nn.init.normal_(layer.bias)  # type: ignore[arg-type]
        self.reads = reads

    def forward(self, x: Tensor) -> Output:
        read = [x]
        for layer in self.layers:
            x = torch.tanh(layer(x))
            read.append(x)
        return Output(x + read[1] if self.reads else x)


class Output(NamedTuple):
    logits: Tensor


def toy_links(path: Sequence[int]) -> list[bytes]:
    return [json.dumps(list(path[: d + 1])).encode() for d in range(len(path))]


def follow(prefixes: Prefixes, path: Sequence[int], **more: Any) -> Toy:
    toy = Toy(path, **more)
    prefixes.leave()
    prefixes.follow(toy_links(path), list(toy.layers))
    return toy


BATCHES = {b"a": torch.randn(3, 4), b"b": torch.randn(8, 4), b"c": torch.randn(5, 4)}
STATE = 16  # bytes of a row


@settings(max_examples=60, deadline=None)
@given(
    paths=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    budget=st.integers(0, 80 * STATE),
    keys=st.lists(st.sampled_from(sorted(BATCHES)), min_size=1, max_size=4),
)
@torch.no_grad()
def test_any_sequence_of_paths_is_computed_right_within_the_budget(
    paths: list[list[int]], budget: int, keys: list[bytes]
) -> None:
    prefixes = Prefixes(Tables(budget))
    for path_ in paths:
        toy = follow(prefixes, path_)
        for key in keys:
            x = BATCHES[key]
            found = prefixes.forward(key, partial(toy, x))
            assert torch.equal(found.logits, toy(x).logits)
            kept = [state for batch in prefixes._batches.values() for state in batch.kept.values()]
            assert prefixes.n_bytes == sum(state.untyped_storage().nbytes() for state in kept) <= budget
            assert prefixes._one_each == sum(batch.size for batch in prefixes._batches.values())
    assert prefixes.problem == ""


@torch.no_grad()
def test_states_are_kept_once_two_candidates_share_them_and_the_longest_unused_goes() -> None:
    prefixes = Prefixes(Tables(2 * 3 * STATE))  # two states of one batch

    def run(*path_: int) -> tuple[int, list[int]]:
        toy = follow(prefixes, path_)
        before = prefixes.saved
        prefixes.forward(b"a", partial(toy, BATCHES[b"a"]))
        depths = {link: len(json.loads(link)) for link in prefixes._batches[b"a"].kept}
        return prefixes.saved - before, list(depths.values())

    assert run(0, 1, 2, 3, 4) == (0, [])
    assert run(0, 1, 2, 3, 5) == (0, [4, 2])  # evenly apart
    prefixes._proved |= set(range(7))
    assert run(0, 1, 2, 3, 6) == (4, [2, 4])
    assert run(0, 1, 6) == (2, [4, 2])
    assert run(0, 1, 2, 6) == (2, [2, 3])
    assert run(7, 7) == (0, [2, 3])
    assert run(7, 6) == (0, [3, 1])


@torch.no_grad()
def test_a_batch_that_no_candidate_uses_any_more_is_given_up() -> None:
    prefixes = Prefixes(Tables())
    for last in (1, 2):
        toy = follow(prefixes, (0, last))
        prefixes.forward(b"a", partial(toy, BATCHES[b"a"]))
    assert prefixes.n_bytes == 3 * STATE
    for last in range(UNUSED):
        toy = follow(prefixes, (0, last))
        prefixes.forward(b"b", partial(toy, BATCHES[b"b"]))
    assert set(prefixes._batches) == {b"a", b"b"}
    follow(prefixes, (0, 1))
    assert set(prefixes._batches) == {b"b"}


@torch.no_grad()
def test_a_model_that_cannot_start_at_a_layer_is_found_out_and_scored_in_full() -> None:
    """Its logits depend on what the second layer read, beside the hidden state."""
    prefixes = Prefixes(Tables())
    x = BATCHES[b"a"]
    for last in (1, 2, 3, 4):
        toy = follow(prefixes, (0, 5, last), reads=True)
        found = prefixes.forward(b"a", partial(toy, x)).logits
        assert torch.equal(found, Toy((0, 5, last), reads=True)(x).logits)
    assert "after 2 layers" in prefixes.problem and prefixes.n_bytes == 0 and prefixes.hits == 0


@torch.no_grad()
def test_an_error_in_a_pass_leaves_the_layers_as_they_were() -> None:
    prefixes = Prefixes(Tables())
    for last in (1, 2, 3):
        toy = follow(prefixes, (0, 5, last))
        prefixes.forward(b"a", partial(toy, BATCHES[b"a"]))
    toy.layers[2].register_forward_pre_hook(lambda *args: None).remove()
    toy = follow(prefixes, (0, 5, 4))
    toy.layers[2].weight = nn.Parameter(torch.zeros(3, 3))  # no longer fits
    with pytest.raises(RuntimeError):
        prefixes.forward(b"a", partial(toy, BATCHES[b"a"]))
    assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in toy.layers)
