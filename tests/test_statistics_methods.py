"""PCB, VaRM, Consensus, WIDEN, LiNeS, layer swapping and the averages by role and metric, against slow restatements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import registry, testing
from evomerge.errors import CandidateFailure, ConfigError
from evomerge.methods import Inputs, Merge, Method, Tables
from evomerge.methods._statistics import column_dots, quantiles
from evomerge.methods.widen import _weights as column_weights
from evomerge.recipe import Recipe, TensorPlan
from tests import slow_methods
from tests import slow_statistics as slow

QUIET = settings(max_examples=150, derandomize=True, deadline=None, database=None)
NAME = "model.layers.0.mlp.up_proj.weight"
MINE = ("pcb", "varm", "consensus", "widen", "cpt_instruction", "lines", "mwa", "layer_swap")
PCB, VARM, CONSENSUS, WIDEN, CPT, LINES, MWA, SWAP = (registry.get("methods", name) for name in MINE)
TA, TIES = registry.get("methods", "task_arithmetic"), registry.get("methods", "ties")

D1, D2 = [4, -3, 0.5, 0, 2, -1], [1, 3, -2, 0.1, 2, 0]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def flat(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.double().flatten().tolist()
    return values


def inputs(base: Tensor | None, experts: list[Tensor], **extra: Any) -> Inputs:
    return Inputs(extra.pop("name", NAME), base, tuple(experts), **extra)


def micro(shape: tuple[int, ...] = (6,)) -> Inputs:
    return inputs(torch.zeros(shape), [torch.tensor(d, dtype=torch.float32).reshape(shape) for d in (D1, D2)])


def agree(result: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    scale = max([1.0, *map(abs, expected)])
    assert result.dtype == torch.float32
    assert np.allclose(flat(result), expected, rtol=0, atol=tolerance * scale), (flat(result), expected)


@st.composite
def merges(draw: st.DrawFn, max_experts: int = 4, shapes: Any = None) -> tuple[Tensor, list[Tensor], list[float]]:
    """A base and experts on a grid of 1/16 (ties, zeros, copies are common), weights in eighths."""
    shape = draw(st.sampled_from(shapes or [(), (1,), (7,), (5, 1), (1, 6), (3, 4), (2, 3, 2)]))
    n = math.prod(shape)
    values = st.lists(st.integers(-6, 6), min_size=n, max_size=n)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    base = torch.tensor(draw(values), dtype=dtype).reshape(shape) / 16
    experts: list[Tensor] = []
    for _ in range(draw(st.integers(1, max_experts))):
        kind = draw(st.sampled_from(["new", "new", "new", "base", "same", "negated"]))
        if kind == "base":
            experts.append(base.clone())
        elif kind == "same" and experts:
            experts.append(experts[0].clone())
        elif kind == "negated" and experts:
            experts.append(2 * base - experts[0])
        else:
            experts.append(torch.tensor(draw(values), dtype=dtype).reshape(shape) / 16)
    weights = draw(st.lists(EIGHTHS, min_size=len(experts), max_size=len(experts)))
    return base, experts, weights


EIGHTHS = st.integers(-12, 12).map(lambda v: v / 8)


def float32(base: Tensor, experts: list[Tensor], **extra: Any) -> Inputs:
    """bf16 tensors give float32 results only where something is computed; pure copies keep their dtype."""
    return inputs(base.float(), [expert.float() for expert in experts], **extra)


def differences(base: Tensor, experts: list[Tensor]) -> list[list[float]]:
    return slow_methods.differences(flat(base), [flat(expert) for expert in experts])


def plus(base: Tensor, tau: list[float], lam: float = 1.0) -> list[float]:
    return [b + lam * t for b, t in zip(flat(base), tau, strict=True)]


# ---- flags, threads, worked examples ---------------------------------------------------------------


VARIANTS: list[tuple[Method, dict[str, Any]]] = [
    (PCB, {}),
    (PCB, {"version": "B", "scope": "global", "density": 0.4}),
    (VARM, {"temperature": 0.7}),
    (VARM, {"granularity": "element"}),
    (VARM, {"granularity": "element", "temperature": 0.7}),
    (CONSENSUS, {"vector": "ties"}),
    (WIDEN, {}),
    (LINES, {}),
]


@pytest.mark.parametrize(("chosen", "parameters"), VARIANTS)
def test_bits_do_not_depend_on_threads(chosen: Method, parameters: dict[str, Any]) -> None:
    # what depends on the process is covered for every method by testing.check_processes
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(chosen(testing.make_inputs(chosen, 3, (301, 333)), **parameters))
    finally:
        torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_flags() -> None:
    told = {name: (m.symmetric, m.identity, m.needs_base, m.n_experts) for name in MINE if (m := _method(name))}
    assert told == {
        "pcb": (True, False, True, (1, None)),
        "varm": (True, True, True, (1, None)),
        "consensus": (True, False, True, (1, None)),
        "widen": (True, True, True, (1, None)),
        "cpt_instruction": (False, False, True, (2, 2)),
        "lines": (True, False, True, (1, None)),
        "mwa": (True, True, False, (1, None)),
        "layer_swap": (False, False, False, (2, 2)),
    }
    assert not any(_method(name).random or _method(name).mergekit for name in MINE)


def _method(name: str) -> Method:
    found: Method = registry.get("methods", name)
    return found


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize(
    ("chosen", "parameters", "expected"),
    [
        (VARM, {}, (2.880439, -0.760879, -0.432967, 0.037319, 2, -0.626813)),
        (CONSENSUS, {"k": 2, "lambda": 1.0, "mask_lambda": 0.5}, (0, 0, 0, 0, 4, 0)),
        (CONSENSUS, {"k": 1, "lambda": 1.0, "mask_lambda": 0.5}, (5, 0, -1.5, 0.1, 4, -1)),
        # the two TALL masks 110011 and 011110, one at a time
        (CONSENSUS, {"k": 1, "lambda": 1.0, "mask_lambda": 0.5, "vote": [1, 0]}, (5, 0, 0, 0, 4, -1)),
        (CONSENSUS, {"k": 1, "lambda": 1.0, "mask_lambda": 0.5, "vote": [0, 1]}, (0, 0, -1.5, 0.1, 4, 0)),
        # a TIES vector instead of the sum: in the second element -3 + 3 elects +
        (CONSENSUS, {"k": 0, "lambda": 1.0, "vector": "ties", "density": 0.5}, (4, 3, -2, 0, 4, 0)),
        (PCB, {"density": 0.5, "clamp": 0.0}, (3.232964, 0, -2, 0, 2, -1)),
        (PCB, {"density": 0.5, "clamp": 0.0, "version": "B"}, (4, 3, -2, 0, 2, -1)),
        (PCB, {"density": 0.5, "clamp": 0.0, "scope": "global"}, (3.232964, 0, -2, 0, 2, -1)),
        (TIES, {"density": 0.5, "lines_match": True}, tuple(0.527273 * v for v in (4, 3, -2, 0, 2, 0))),
        (LINES, {}, tuple((a + b) / 2 for a, b in zip(D1, D2, strict=True))),
    ],
)
def test_micro_examples(chosen: Method, parameters: dict[str, Any], expected: tuple[float, ...], compat: str) -> None:
    for shape in ((6,), (1, 6), (6, 1), (2, 3)):
        x = micro(shape)
        x = Inputs(x.name, x.base, x.experts, compat=compat)
        extra = {"sparsify_1d": True} if chosen.parameter("sparsify_1d") is not None else {}
        assert np.allclose(flat(chosen(x, **parameters, **extra)), expected, atol=2e-6)


# ---- against the slow restatements ----------------------------------------------------------------


@QUIET
@given(
    merges(), st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.01, 0.2]),
    st.sampled_from(["A", "B"]), st.booleans(), EIGHTHS,
)  # fmt: skip
def test_pcb(merge: Any, density: float, clamp: float, version: str, whole_1d: bool, lam: float) -> None:
    base, experts, weights = merge
    x = float32(base, experts)
    given_ = {"weight": weights, "density": density, "clamp": clamp, "version": version, "lambda": lam}
    result = PCB(x, **given_, sparsify_1d=not whole_1d)
    if whole_1d and base.ndim < 2:
        density = 1.0
    tau = slow.pcb(differences(base, experts), weights, density, clamp, version)
    agree(result, plus(base, tau, lam))
    alone = PCB(x, **{**given_, "density": density}, scope="global")  # a model of one tensor
    agree(alone, plus(base, tau, lam))


@QUIET
@given(merges(), st.sampled_from([0.25, 1.0, 3.0]), st.booleans(), EIGHTHS)
def test_varm(merge: Any, temperature: float, by_element: bool, lam: float) -> None:
    base, experts, _ = merge
    granularity = "element" if by_element else "tensor"
    result = VARM(float32(base, experts), temperature=temperature, granularity=granularity, lambda_=lam)
    agree(result, plus(base, slow.varm(differences(base, experts), temperature, by_element), lam))


@QUIET
@given(
    merges(), st.data(), st.integers(0, 5), st.booleans(), st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.booleans(),
    EIGHTHS,
)  # fmt: skip
def test_consensus(
    merge: Any, data: st.DataObject, k: int, ties: bool, density: float, whole_1d: bool, lam: float
) -> None:
    base, experts, weights = merge
    limits = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in experts]
    votes = [data.draw(st.sampled_from([0.0, 1.0, 1.0, 2.0])) for _ in experts]
    result = CONSENSUS(
        float32(base, experts), weight=weights, mask_lambda=limits, k=k, vote=votes, lambda_=lam,
        vector="ties" if ties else "sum", density=density, sparsify_1d=not whole_1d,
    )  # fmt: skip
    deltas = [[w * v for v in d] for w, d in zip(weights, differences(base, experts), strict=True)]
    zero, ones = [0.0] * base.numel(), [1.0] * len(experts)
    if ties:
        shares = [1.0 if whole_1d and base.ndim < 2 else density] * len(experts)
        vector = slow_methods.ties(zero, deltas, ones, shares, normalize=False)
    else:
        vector = slow_methods.add_up(zero, deltas, ones)
    agree(result, plus(base, slow.consensus(deltas, vector, limits, k, votes), lam))


@QUIET
@given(
    merges(), st.sampled_from([0.5, 1.0, 1.25, 2.0]), st.sampled_from([0.5, 1.0, 1.5]), st.booleans(), EIGHTHS
)  # fmt: skip
def test_widen(merge: Any, ratio: float, calibration: float, embedding: bool, lam: float) -> None:
    base, experts, _ = merge
    name = "model.embed_tokens.weight" if embedding else NAME
    result = WIDEN(float32(base, experts, name=name), ratio=ratio, calibration=calibration, lambda_=lam)
    if base.ndim < 2:
        tau = slow.widen_vector(flat(base), [flat(e) for e in experts], ratio, calibration)
    else:
        rows = [t.double().reshape(-1, t.shape[-1]) for t in (base, *experts)]
        turned = embedding and base.ndim == 2
        first, *others = [(t.T if turned else t).tolist() for t in rows]
        merged = torch.tensor(slow.widen_matrix(first, others, ratio, calibration), dtype=torch.float64)
        tau = flat(merged.T if turned else merged)
    agree(result, plus(base, tau, lam))


@QUIET
@given(
    merges(max_experts=1), merges(max_experts=1), st.integers(1, 9), st.data(), st.integers(0, 5), st.integers(0, 5),
    st.integers(0, 3),
)  # fmt: skip
def test_layer_swap(
    one: Any, other: Any, n_layers: int, data: st.DataObject, bottom: int, top: int, transition: int
) -> None:
    outer, middle = one[0], torch.full_like(one[0], float(other[0].flatten()[0]))
    layer = data.draw(st.integers(0, n_layers - 1))
    x = inputs(None, [outer.float(), middle.float()], layer=layer, n_layers=n_layers)
    share = slow.outer_share(layer, n_layers, bottom, top, transition)
    result = SWAP(x, bottom=bottom, top=top, transition=transition)
    mixed = [float(share) * a + float(1 - share) * b for a, b in zip(flat(outer), flat(middle), strict=True)]
    agree(result, mixed)
    if share in (0, 1):
        assert result is x.experts[1 - int(share)]


@QUIET
@given(merges(), st.data(), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]), st.sampled_from(["loss", "step"]))
def test_mwa(merge: Any, data: st.DataObject, p: float, by: str) -> None:
    _, experts, _ = merge
    metrics = [data.draw(st.sampled_from([0.5, 0.7, 1.0, 3.0, 900.0])) for _ in experts]
    result = MWA(inputs(None, [e.float() for e in experts]), metric=metrics, p=p, by=by)
    agree(result, slow_methods.linear([flat(e) for e in experts], slow.metric_weights(metrics, p, by)))


@QUIET
@given(merges(), merges(max_experts=1), EIGHTHS, EIGHTHS)
def test_cpt_instruction(merge: Any, other: Any, domain: float, instruction: float) -> None:
    base, (first, *_), _ = merge
    second = torch.full(base.shape, float(other[0].flatten()[0]), dtype=base.dtype)
    result = CPT(float32(base, [first, second]), cpt_weight=domain, instruction_weight=instruction)
    deltas = differences(base, [first, second])
    agree(result, slow_methods.add_up(flat(base), deltas, [domain, instruction]))


# ---- exact statistics -----------------------------------------------------------------------------

CUTS = (0.0, 1e-4, 0.1, 1 / 3, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "zeros"])
def test_counted_quantiles_are_the_sorted_ones(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    make = {
        "normal": lambda n: torch.randn(n, generator=generator).double() * 1e-3,
        "ties": lambda n: torch.randint(-3, 4, (n,), generator=generator).double() / 8,
        "constant": lambda n: torch.full((n,), -1.5, dtype=torch.float64),
        "zeros": lambda n: torch.tensor([0.0, -0.0], dtype=torch.float64).repeat(n)[:n],
    }[kind]
    chunks = [[make(n), make(n)] for n in (1, 7, 0, 700, 900)]

    def series() -> Iterator[list[Tensor]]:
        return iter(chunks)

    found = [quantiles(series, CUTS, at_once) for at_once in (10_000, 1200, 100, 0)]
    assert found[1:] == found[:1] * 3
    for i, values in enumerate(found[0]):
        whole = torch.cat([chunk[i] for chunk in chunks]).tolist()
        assert values == pytest.approx([slow.quantile(whole, cut) for cut in CUTS], abs=1e-15)
        assert all(math.copysign(1.0, v) == 1.0 for v in values if v == 0.0)
    assert quantiles(lambda: iter([]), CUTS) == ()


def test_quantiles_put_nan_last_on_both_ways() -> None:
    negative = torch.tensor([float("nan")], dtype=torch.float64).copysign(torch.tensor(-1.0, dtype=torch.float64))
    values = torch.cat([negative, torch.tensor([3.0, -float("inf"), 1.0, 2.0], dtype=torch.float64)])
    for at_once in (100, 0):
        ((low, middle, high),) = quantiles(lambda: iter([[values]]), (0.25, 0.5, 1.0), at_once)
        assert (low, middle) == (1.0, 2.0) and math.isnan(high)


def test_column_sums_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(37, 5, generator=generator), torch.randn(37, 5, generator=generator)
    expected = (a.double() * b.double()).sum(dim=0)
    assert torch.allclose(column_dots(a, b), expected, atol=1e-12)
    assert torch.equal(column_dots(a.T.contiguous().T, b), column_dots(a, b))
    monkeypatch.setattr("evomerge.methods._statistics.CHUNK", 20)  # four rows at a time
    assert torch.allclose(column_dots(a, b), expected, atol=1e-12)
    assert column_dots(torch.zeros(0, 3), torch.zeros(0, 3)).tolist() == [0.0] * 3


def test_pcb_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = testing.make_inputs(PCB, 3, (31, 9))
    whole = PCB(x, scope="global"), PCB(x, version="B")
    monkeypatch.setattr("evomerge.methods.pcb.CHUNK", 50)
    monkeypatch.setattr("evomerge.methods._statistics._SORTED", 0)
    assert torch.allclose(PCB(x, scope="global"), whole[0], atol=1e-7)
    assert torch.allclose(PCB(x, version="B"), whole[1], atol=1e-7)


# ---- whole models ---------------------------------------------------------------------------------

BLOCKS = 5
NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(BLOCKS) for part in ("mlp.up_proj", "input_layernorm")),
    "model.norm.weight",
    "lm_head.weight",
)


def shape_of(name: str) -> tuple[int, ...]:
    return (6,) if "norm" in name else (8, 6)


class Models:
    """A base b and experts x, y, z whose task vectors differ in size from tensor to tensor."""

    def __init__(self, names: tuple[str, ...] = NAMES, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.names = names
        self.tensors: dict[tuple[str, str], Tensor] = {}
        for number, name in enumerate(names):
            base = torch.randn(shape_of(name), generator=generator)
            self.tensors["b", name] = base.to(dtype)
            for size, model in enumerate("xyz", start=1):
                noise = torch.randn(shape_of(name), generator=generator)
                self.tensors[model, name] = (base + 0.01 * size * (1 + number % 3) * noise).to(dtype)

    def recipe(self, method: str, each: dict[str, Any] | None = None, models: str = "xyz", **shared: Any) -> Recipe:
        experts = {m: {k: v[i] if isinstance(v, list) else v for k, v in (each or {}).items()} for i, m in
                   enumerate(models)}  # fmt: skip
        base = "b" if _method(method).needs_base else None
        return Recipe.build(method, base, experts, parameters=shared)

    def merge(self, recipe: Recipe, tables: Tables | None = None) -> dict[str, Tensor]:
        blocks = {name.split(".")[2] for name in self.names if ".layers." in name}
        plans = recipe.plan(list(self.names), n_layers=len(blocks))
        made = Merge(recipe, plans, lambda model, name: self.tensors[model, name], tables)
        return {plan.name: made.tensor(plan) for plan in plans}

    def delta(self, name: str, result: Tensor) -> Tensor:
        return result.double() - self.tensors["b", name].double()

    def deltas(self, name: str, models: str = "xyz") -> list[list[float]]:
        return [flat(self.delta(name, self.tensors[m, name])) for m in models]


def test_pcb_global_ranks_the_whole_model() -> None:
    models = Models()
    for version in ("A", "B"):
        settings_ = {"density": 0.3, "clamp": 0.01, "version": version, "lambda": 0.7}
        merged = models.merge(models.recipe("pcb", {"weight": [1.0, 0.5, 2.0]}, scope="global", **settings_))
        whole = [[v for name in NAMES for v in models.deltas(name)[i]] for i in range(3)]
        tau = slow.pcb(whole, [1.0, 0.5, 2.0], 0.3, 0.01, version)
        found = [v for name in NAMES for v in flat(models.delta(name, merged[name]))]
        assert np.allclose(found, [0.7 * v for v in tau], atol=1e-6)
        per_tensor = models.merge(models.recipe("pcb", {"weight": [1.0, 0.5, 2.0]}, **settings_))
        assert not torch.allclose(per_tensor[NAMES[0]], merged[NAMES[0]], atol=1e-4)


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_varm_of_a_block_and_of_the_model(granularity: str) -> None:
    models = Models()
    merged = models.merge(models.recipe("varm", granularity=granularity))
    for name in NAMES:
        block = name.split(".")[2] if ".layers." in name else None
        group = [n for n in NAMES if block is not None and n.startswith(f"model.layers.{block}.")] or [name]
        group = list(NAMES) if granularity == "model" else group
        weights = slow.varm_shares([math.fsum(v * v for n in group for v in models.deltas(n)[i]) for i in range(3)])
        expected = slow_methods.add_up([0.0] * math.prod(shape_of(name)), models.deltas(name), weights)
        assert np.allclose(flat(models.delta(name, merged[name])), expected, atol=1e-6)


def test_statistics_are_computed_once_per_worker() -> None:
    models, tables = Models(), Tables()
    for method, shared in (
        ("pcb", {"scope": "global"}),
        ("pcb", {}),
        ("varm", {"granularity": "model"}),
        ("widen", {}),
    ):
        models.merge(models.recipe(method, **shared), tables)
        made = tables.made
        other = models.merge(models.recipe(method, **shared, **{"lambda": 0.6}), tables)
        assert tables.made == made, method
        fresh = models.merge(models.recipe(method, **shared, **{"lambda": 0.6}))
        assert all(same(other[name], fresh[name]) for name in NAMES), method


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_tables_tell_settings_apart(scope: str) -> None:
    models, tables = Models(NAMES[:4]), Tables()
    pcb: list[dict[str, Any]] = [{}, {"density": 0.5}, {"clamp": 0.2}, {"version": "B"}]
    varm = [{"granularity": g} for g in ("tensor", "layer", "model")]
    cases = [("pcb", {"scope": scope, **p}) for p in pcb] + [("varm", p) for p in varm] + [("widen", {"ratio": 2.0})]
    for method, shared in cases:
        for experts in ("xyz", "zxy", "xy"):
            recipe = models.recipe(method, models=experts, **shared)
            shared_tables, fresh = models.merge(recipe, tables), models.merge(recipe)
            assert all(same(shared_tables[name], fresh[name]) for name in models.names), (method, shared, experts)


@pytest.mark.parametrize("method", ["pcb", "varm", "consensus", "widen", "lines"])
def test_scaling_the_task_vectors(method: str) -> None:
    # PCB A only nearly (tanh), WIDEN not at all (its ranks see the base)
    x = testing.make_inputs(_method(method), 3, (9, 7), seed=5)
    base = x.reference.double()
    extra = {"version": "B"} if method == "pcb" else {}
    deltas = [expert.double() - base for expert in x.experts]
    one, four = (_method(method)(inputs(base, [base + s * d for d in deltas]), **extra) - base for s in (1.0, 4.0))
    assert torch.allclose(4 * one, four, atol=1e-9) == (method != "widen")


def test_identical_experts() -> None:
    x = testing.make_inputs(VARM, 1, (9, 7))
    twins = inputs(x.base, [x.experts[0], x.experts[0].clone()])
    assert torch.allclose(VARM(twins), x.experts[0], atol=1e-6)
    assert torch.allclose(VARM(twins, granularity="element"), x.experts[0], atol=1e-6)
    twice = WIDEN(twins, ratio=2.0)  # nothing calibrated: the weights sum to 1
    assert torch.allclose(twice, x.experts[0], atol=1e-6)
    assert not torch.allclose(WIDEN(twins), x.experts[0], atol=1e-2)


def test_widen_does_not_see_the_size_of_a_task_vector() -> None:
    generator = torch.Generator().manual_seed(8)
    base = torch.randn(40, 500, generator=generator)
    small, other = (1e-4 * torch.randn(40, 500, generator=generator) for _ in range(2))
    huge = 1000 * small
    for ratio, expected in ((1.0, 0.735), (2.0, 0.5)):  # above 2 nothing is calibrated
        found = column_weights(inputs(base.double(), [base.double() + d.double() for d in (huge, other)]), ratio, 1.0)
        assert [float(weight.mean()) for weight in found] == pytest.approx([expected] * 2, abs=0.01)


def test_consensus_at_the_ends_of_k() -> None:
    x = testing.make_inputs(CONSENSUS, 3)
    assert torch.equal(CONSENSUS(x, k=0, lambda_=0.5), TA(x, lambda_=0.5))
    assert torch.equal(CONSENSUS(x, k=4, lambda_=0.5), x.reference)
    assert torch.equal(CONSENSUS(x, k=2, vote=0.5, lambda_=0.5), x.reference)
    assert torch.equal(CONSENSUS(x, k=2, weight=[1.0, 0.0, 0.0], lambda_=1.0), x.reference)
    ties = {"k": 0, "lambda_": 1.0, "vector": "ties"}
    assert flat(CONSENSUS(micro(), **ties, density=0.5)) == flat(CONSENSUS(micro(), **ties, density=1.0))  # 1-D
    zero = inputs(x.base, [x.experts[0], x.reference.clone()])
    assert torch.equal(CONSENSUS(zero, k=2), x.reference)  # an unchanged expert claims nothing


def test_a_specialist_from_its_tall_mask() -> None:
    generator = torch.Generator().manual_seed(9)
    tasks = [torch.zeros(30, 30) for _ in range(3)]
    for i, task in enumerate(tasks):  # tasks that live in different rows are restored exactly
        task[10 * i : 10 * i + 10] = torch.randn(10, 30, generator=generator)
    x = inputs(torch.zeros(30, 30), tasks)
    for i, task in enumerate(tasks):
        votes = [float(i == t) for t in range(3)]
        assert torch.equal(CONSENSUS(x, k=1, vote=votes, lambda_=1.0), task)


# ---- copies keep every bit ------------------------------------------------------------------------


def source(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (9, 7)) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    made.view(-1)[:5] = torch.tensor([-0.0, 0.0, tiny, -tiny, 1.0], dtype=dtype)
    return made


COPIES: list[tuple[Method, dict[str, Any], int]] = [  # -1 is the base
    (PCB, {"lambda": 0.0}, -1),
    (PCB, {"weight": 0.0}, -1),
    (PCB, {"density": 0.0}, -1),
    (VARM, {"lambda": 0.0, "granularity": "element"}, -1),
    (VARM, {"lambda": 0.0}, -1),
    (CONSENSUS, {"lambda": 0.0}, -1),
    (CONSENSUS, {"weight": 0.0}, -1),
    (CONSENSUS, {"weight": [0.0, 0.5], "lambda": 2.0, "k": 1}, 1),
    (CONSENSUS, {"weight": [1.0, 0.0], "lambda": 1.0, "k": 0, "vote": 0.0}, 0),
    (CONSENSUS, {"weight": [1.0, 0.0], "lambda": 1.0, "k": 1, "vector": "ties", "density": 1.0}, 0),
    (WIDEN, {"lambda": 0.0}, -1),
    (CPT, {"cpt_weight": 0.0}, 1),
    (CPT, {"instruction_weight": 0.0}, 0),
    (CPT, {"cpt_weight": 0.0, "instruction_weight": 0.0}, -1),
    (LINES, {"lines_alpha": 0.0}, -1),
    (LINES, {"lambda": 0.0}, -1),
    (LINES, {"weight": [0.0, 1.0], "lines_match": False}, 1),
    (MWA, {"metric": [1.0, 0.0], "by": "step"}, 0),
    (SWAP, {"outside": "outer"}, 0),
    (SWAP, {"outside": "middle"}, 1),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("chosen", "parameters", "expected"), COPIES)
def test_pure_copies(chosen: Method, parameters: dict[str, Any], expected: int, dtype: torch.dtype) -> None:
    base = source(dtype, 0) if chosen.needs_base else None
    x = inputs(base, [source(dtype, 1), source(dtype, 2)])
    assert chosen(x, **parameters) is (x.base if expected < 0 else x.experts[expected])


@pytest.mark.parametrize("chosen", [VARM, WIDEN, MWA])
def test_one_expert_is_returned_itself(chosen: Method) -> None:
    x = inputs(source(torch.bfloat16, 0) if chosen.needs_base else None, [source(torch.bfloat16, 1)])
    extra = {"metric": 0.3} if chosen is MWA else {}
    assert chosen(x, **extra) is x.experts[0]
    if chosen is VARM:
        assert chosen(x, granularity="element") is x.experts[0]


def test_pcb_always_loses_an_element() -> None:
    x = inputs(torch.zeros(2, 3), [torch.tensor(D1, dtype=torch.float32).reshape(2, 3)])
    result = PCB(x, density=1.0, clamp=0.0)
    assert flat(result) == [4, -3, 0.5, 0, 2, -1]  # the lost one is the zero here
    lost = PCB(inputs(torch.zeros(2, 2), [torch.tensor([[1.0, 2.0], [3.0, -4.0]])]), density=1.0, clamp=0.0)
    assert flat(lost) == [0, 2, 3, -4]
    for constant in (torch.full((2, 3), 0.5), torch.tensor(2.0)):
        assert torch.equal(PCB(inputs(torch.zeros_like(constant), [constant])), torch.zeros_like(constant))


@pytest.mark.parametrize("name", MINE)
def test_float64_models_are_neither_written_to_nor_narrowed(name: str) -> None:
    chosen = _method(name)
    x = testing.make_inputs(chosen, 2, (9, 7))
    wide = [None if t is None else t.double() * (1 + 1e-9) for t in (x.base, *x.experts)]
    before = [None if t is None else t.clone() for t in wide]
    y = Inputs(NAME, wide[0], (wide[1], wide[2]), layer=1, n_layers=4)
    extra = {"bottom": 1, "transition": 1} if chosen is SWAP else {}
    result = chosen(y, **{**testing.example_parameters(chosen, 2), **extra})
    assert result.dtype == torch.float64 and not torch.equal(result, result.float().double())
    assert all(a is None or torch.equal(a, b) for a, b in zip(wide, before, strict=True))


def test_nan_and_infinity_stay_visible() -> None:
    for chosen in (PCB, VARM, CONSENSUS, WIDEN):
        for version in ({}, {"scope": "global", "version": "B"}) if chosen is PCB else ({},):
            x = testing.make_inputs(chosen, 3)
            broken = x.experts[1].clone()
            broken[2, 2], broken[3, 3] = float("nan"), float("inf")
            result = chosen(inputs(x.base, [x.experts[0], broken, x.experts[2]]), **version)
            assert result[2, 2].isnan() and not result[3, 3].isfinite(), chosen.name


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "parameters", "reason", "words"),
    [
        (PCB, {"density": -0.1}, "bad_density", "density -0.1"),
        (PCB, {"clamp": 0.5}, "bad_density", "clamp 0.5"),
        (VARM, {"temperature": 0.0}, "bad_temperature", "temperature 0.0"),
        (CONSENSUS, {"vector": "ties", "density": -1.0}, "bad_density", "density -1.0"),
        (SWAP, {"top": -1}, "bad_blocks", "top is -1"),
        (MWA, {"metric": [0.0, 1.0]}, "bad_metric", "metric 0 of model 0"),
        (MWA, {"metric": [1.0, -2.0]}, "bad_metric", "metric -2 of model 1"),
        (MWA, {"metric": float("nan")}, "bad_metric", "metric nan"),
        (MWA, {"metric": float("inf")}, "bad_metric", "metric inf"),
        (MWA, {"metric": 0.0, "by": "step"}, "bad_metric", "metric 0"),
        (MWA, {"metric": [0.0, 1.0], "by": "step", "p": -1.0}, "bad_metric", "metric 0"),
    ],
)
def test_infeasible_values(chosen: Method, parameters: dict[str, Any], reason: str, words: str) -> None:
    x = inputs(torch.zeros(2, 2) if chosen.needs_base else None, [torch.ones(2, 2), torch.zeros(2, 2)])
    with pytest.raises(CandidateFailure, match=words) as caught:
        chosen(x, **parameters)
    assert caught.value.reason == reason and NAME in caught.value.message


def test_two_models_exactly() -> None:
    for chosen in (CPT, SWAP):
        with pytest.raises(ConfigError, match="exactly 2"):
            chosen(inputs(torch.zeros(2) if chosen.needs_base else None, [torch.ones(2)] * 3))
    with pytest.raises(ConfigError, match="metric"):
        MWA(inputs(None, [torch.ones(2)] * 2))


def test_mwa_sees_ratios_only_and_does_not_overflow() -> None:
    x = inputs(None, [torch.zeros(3), torch.ones(3)])
    assert flat(MWA(x, metric=[2.0, 1.0], p=2.0)) == pytest.approx([0.8] * 3)
    assert same(MWA(x, metric=[2e-9, 1e-9], p=2.0), MWA(x, metric=[2.0, 1.0], p=2.0))
    assert flat(MWA(x, metric=[1e6, 1.1e6], p=200.0, by="step")) == pytest.approx([1.0] * 3, abs=1e-7)
    assert flat(MWA(x, metric=[5.0, 0.1], p=0.0)) == [0.5] * 3
    assert flat(MWA(x, metric=[0.0, 0.1], p=0.0, by="step")) == [0.5] * 3


# ---- layer swapping over whole models -------------------------------------------------------------


def test_layer_swap_of_models() -> None:
    models = Models(dtype=torch.bfloat16)
    recipe = models.recipe("layer_swap", models="xy", bottom=1, top=1, transition=1)
    merged = models.merge(recipe)
    for name, result in merged.items():
        x, y = (models.tensors[model, name] for model in "xy")
        block = int(name.split(".")[2]) if ".layers." in name else None
        if block in (1, 3):
            assert torch.equal(result, ((x.double() + y.double()) / 2).bfloat16())
        else:
            assert result is (y if block == 2 else x)
    middle = models.merge(models.recipe("layer_swap", models="xy", bottom=1, top=1, outside="middle"))
    assert middle["lm_head.weight"] is models.tensors["y", "lm_head.weight"]


# ---- LiNeS: the modifier of every method with a base, and the ready-made method -------------------

LINE = (0.25, 0.375, 0.5, 0.625, 0.75)  # L 5, alpha 0.25, beta 0.5
WITH_LINES = [
    ("task_arithmetic", {"weight": [0.5, 1.0, 0.25]}, {"lambda": 0.8}),
    ("ties", {"weight": [0.5, 1.0, 0.25]}, {"density": 0.5}),
    ("dare_linear", {"density": 0.5}, {"lambda": 0.5}),
    ("dare_ties", {"density": 0.5}, {}),
    ("pcb", {"weight": [0.5, 1.0, 0.75]}, {"density": 0.4}),
    ("pcb", {}, {"density": 0.4, "scope": "global"}),
    ("varm", {}, {"granularity": "layer"}),
    ("varm", {}, {"granularity": "element"}),
    ("consensus", {}, {"k": 1}),
    ("widen", {}, {}),
    ("slerp", {}, {"t": 0.3}),
    ("cpt_instruction", {}, {"cpt_weight": 0.5}),
]


def case(models: Models, method: str, each: dict[str, Any], shared: dict[str, Any], **line: Any) -> Recipe:
    count = {"slerp": "x", "cpt_instruction": "xy"}.get(method, "xyz")
    return models.recipe(method, each, count, **shared, **line)


def depth(name: str, inside: tuple[float, ...], outside: float) -> float:
    return inside[int(name.split(".")[2])] if ".layers." in name else outside


@pytest.mark.parametrize(("method", "each", "shared"), WITH_LINES)
def test_a_line_scales_each_block(method: str, each: dict[str, Any], shared: dict[str, Any]) -> None:
    models = Models()
    plain = models.merge(case(models, method, each, shared))
    lined = models.merge(case(models, method, each, shared, lines_alpha=0.25, lines_beta=0.5))
    for name in NAMES:
        expected = depth(name, LINE, 0.25) * models.delta(name, plain[name])
        assert torch.allclose(models.delta(name, lined[name]), expected, atol=2e-6), name
    assert any(models.delta(name, plain[name]).abs().max() > 0.005 for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "each", "shared"), WITH_LINES)
def test_the_flat_line_leaves_every_bit(
    method: str, each: dict[str, Any], shared: dict[str, Any], dtype: torch.dtype
) -> None:
    models = Models(dtype=dtype)
    plain = models.merge(case(models, method, each, shared))
    lined = models.merge(case(models, method, each, shared, lines_alpha=1.0, lines_beta=0.0))
    assert all(same(plain[name], lined[name]) for name in NAMES)
    nothing = models.merge(case(models, method, each, shared, lines_alpha=0.0))
    assert all(same(nothing[name], models.tensors["b", name]) for name in NAMES)


@pytest.mark.parametrize(("method", "each", "shared"), WITH_LINES)
def test_a_matched_line_starts_at_the_ratio_of_the_l1_norms(
    method: str, each: dict[str, Any], shared: dict[str, Any]
) -> None:
    models = Models()
    plain = models.merge(case(models, method, each, shared))
    matched = models.merge(case(models, method, each, shared, lines_alpha=0.5, lines_beta=0.3, lines_match=True))
    chosen = {"slerp": "x", "cpt_instruction": "xy"}.get(method, "xyz")
    before = slow.norm1(
        [math.fsum(column) for name in NAMES for column in zip(*models.deltas(name, chosen), strict=True)]
    )
    after = slow.norm1([v for name in NAMES for v in flat(models.delta(name, plain[name]))])
    alpha = 0.5 * before / (len(chosen) * after)
    inside = tuple(alpha + 0.3 * block / 4 for block in range(BLOCKS))
    for name in NAMES:
        expected = depth(name, inside, alpha) * models.delta(name, plain[name])
        assert torch.allclose(models.delta(name, matched[name]), expected, atol=3e-6), name


@pytest.mark.parametrize(("normalize", "expected"), [(False, 1 / 3), (True, 1.0)])
def test_matched_alpha_of_sums_and_means(normalize: bool, expected: float) -> None:
    models = Models()
    shared = {"normalize": normalize}
    plain = models.merge(models.recipe("task_arithmetic", {"weight": 1.0}, **shared))
    matched = models.merge(models.recipe("task_arithmetic", {"weight": 1.0}, **shared, lines_match=True))
    for name in NAMES:
        assert torch.allclose(models.delta(name, matched[name]), expected * models.delta(name, plain[name]), atol=1e-6)


def test_a_line_of_one_block_ends_where_it_starts() -> None:
    models = Models(("model.layers.0.mlp.up_proj.weight", "model.norm.weight"))
    lined = models.merge(models.recipe("task_arithmetic", lines_alpha=0.25, lines_beta=0.5))
    plain = models.merge(models.recipe("task_arithmetic"))
    for name, scale in zip(models.names, (0.75, 0.25), strict=True):
        assert torch.allclose(models.delta(name, lined[name]), scale * models.delta(name, plain[name]), atol=1e-6)


def test_a_line_may_fall_and_the_head_may_have_its_own() -> None:
    models = Models()
    head = [{"filter": "lm_head", "value": 0.9}, {"value": 0.8}]
    lined = models.merge(models.recipe("ties", lines_alpha=head, lines_beta=-0.4))
    plain = models.merge(models.recipe("ties"))
    for name in NAMES:
        scale = 0.9 if name == "lm_head.weight" else depth(name, (0.8, 0.7, 0.6, 0.5, 0.4), 0.8)
        assert torch.allclose(models.delta(name, lined[name]), scale * models.delta(name, plain[name]), atol=1e-6)


def test_blocks_are_those_of_the_output() -> None:
    models = Models()
    tensors = models.tensors
    plans = [
        TensorPlan(
            f"model.layers.{at}.mlp.up_proj.weight", "task_arithmetic",
            ("b", f"model.layers.{taken}.mlp.up_proj.weight"), (("x", f"model.layers.{taken}.mlp.up_proj.weight"),),
            (0,), {"lines_alpha": 0.0, "lines_beta": 1.0}, ({},),
        )
        for at, taken in ((0, 4), (1, 3), (2, 2))
    ]  # fmt: skip
    made = Merge(models.recipe("task_arithmetic", models="x"), plans, lambda model, name: tensors[model, name])
    for plan, scale in zip(plans, (0.0, 0.5, 1.0), strict=True):
        assert plan.base is not None
        delta = tensors[plan.inputs[0]].double() - tensors[plan.base].double()
        assert torch.allclose(made.tensor(plan).double() - tensors[plan.base].double(), scale * delta, atol=1e-6)


def test_a_merge_without_a_task_vector_is_not_matched() -> None:
    x = inputs(torch.ones(2, 2), [torch.ones(2, 2)] * 2)
    assert torch.equal(TA(x, lines_match=True), x.reference)
    assert torch.equal(LINES(x), x.reference)


def test_methods_without_a_base_have_no_line() -> None:
    for chosen in (MWA, SWAP):
        with pytest.raises(ConfigError, match="no parameter lines_alpha"):
            chosen(inputs(None, [torch.ones(2)] * 2), metric=1.0, lines_alpha=0.5) if chosen is MWA else chosen(
                inputs(None, [torch.ones(2)] * 2), lines_alpha=0.5
            )


def test_the_lines_method_is_task_arithmetic_with_a_matched_line() -> None:
    names = [param.name for param in LINES.parameters]
    assert names == ["weight", "lambda", "lines_alpha", "lines_beta", "lines_match"]
    models = Models()
    each = {"weight": [0.5, 1.0, 0.25]}
    ready = models.merge(models.recipe("lines", each))
    spelt = models.merge(models.recipe("task_arithmetic", each, lines_alpha=1.0, lines_beta=0.5, lines_match=True))
    assert all(same(ready[name], spelt[name]) for name in NAMES)
    uniform = models.merge(models.recipe("lines"))
    inside = tuple(1 / 3 + 0.5 * block / 4 for block in range(BLOCKS))
    for name in NAMES:
        total = torch.tensor(models.deltas(name), dtype=torch.float64).sum(0).reshape(shape_of(name))
        assert torch.allclose(models.delta(name, uniform[name]), depth(name, inside, 1 / 3) * total, atol=1e-6)
    alone = LINES(testing.make_inputs(LINES, 2), lines_match=False, lines_beta=0.0)
    assert same(alone, TA(testing.make_inputs(LINES, 2)))
