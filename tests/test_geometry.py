"""NuSLERP, Multi-SLERP, Karcher, Model Stock, NearSwap, Arcee Fusion, RAM: restatements, examples, contracts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import registry, testing
from evomerge.errors import CandidateFailure, ConfigError, RecipeError
from evomerge.methods import Inputs, Merge, Method, Tables, _geometry, merge_tensor
from evomerge.recipe import Recipe
from tests import slow_geometry as slow

QUIET = settings(max_examples=300, derandomize=True, deadline=None, database=None)
NAME = "model.layers.0.mlp.up_proj.weight"
NUSLERP, MULTI, KARCHER = (registry.get("methods", name) for name in ("nuslerp", "multislerp", "karcher"))
STOCK, NEAR, FUSION = (registry.get("methods", name) for name in ("model_stock", "nearswap", "arcee_fusion"))
RAM, RAMPLUS = (registry.get("methods", name) for name in ("ram", "ramplus_tl"))
EVERY = (NUSLERP, MULTI, KARCHER, STOCK, NEAR, FUSION, RAM, RAMPLUS)
OPTIONAL = (NUSLERP, MULTI, KARCHER)

WEIGHTS = st.integers(-8, 12).map(lambda v: v / 8)
SHAPES = [(), (1,), (7,), (5, 1), (1, 6), (3, 4), (2, 3, 2)]
D1, D2 = [4, -3, 0.5, 0, 2, -1], [1, 3, -2, 0.1, 2, 0]


@st.composite
def merges(draw: st.DrawFn, least: int = 1, most: int = 4) -> tuple[Tensor, list[Tensor], list[float]]:
    """A base and experts on a grid of 1/16: ties, zeros, copies, opposites, the base itself; dyadic weights."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    values = st.lists(st.integers(-6, 6), min_size=math.prod(shape), max_size=math.prod(shape))

    def tensor() -> Tensor:
        return torch.tensor(draw(values), dtype=dtype).reshape(shape) / 16

    base, experts = tensor(), []
    for _ in range(draw(st.integers(least, most))):
        kind = draw(st.sampled_from(["new", "new", "new", "base", "same", "opposite"]))
        if kind == "base":
            experts.append(base.clone())
        elif experts and kind != "new":
            experts.append(experts[0].clone() if kind == "same" else 2 * base - experts[0])
        else:
            experts.append(tensor())
    return base, experts, draw(st.lists(WEIGHTS, min_size=len(experts), max_size=len(experts)))


def inputs(base: Tensor | None, experts: list[Tensor], **extra: Any) -> Inputs:
    return Inputs(NAME, base, tuple(experts), **extra)


def vectors(*values: Any) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float32) for value in values]


def flat(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.double().flatten().tolist()
    return values


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def agree(result: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    """Same values up to `tolerance` of the largest; the values are below 1, or amplified far above."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert result.isfinite().all()
    error = (result.double().flatten() - wanted).abs().max() if len(expected) else 0.0
    assert error <= tolerance * max([1.0, *map(abs, expected)]), (flat(result), expected)


# ---- against the slow restatements ---------------------------------------------------------------


@QUIET
@given(merges(2, 2), st.booleans(), st.sampled_from([None, -1, 0]))
def test_nuslerp(merge: Any, with_base: bool, axis: int | None) -> None:
    base, experts, weights = merge
    chosen = {"nuslerp_flatten": axis is None, "nuslerp_row_wise": axis == 0}
    start = base if with_base else None
    result = NUSLERP(inputs(start, experts), weight=weights, **chosen)
    origin = flat(base) if with_base else None
    parts = slow.parts_of(base.shape, axis)
    agree(result, slow.nuslerp(origin, [flat(e) for e in experts], weights, parts), 1e-4)


@QUIET
@given(merges(), st.booleans(), st.booleans())
def test_multislerp(merge: Any, with_base: bool, normalize: bool) -> None:
    base, experts, weights = merge
    x = inputs(base if with_base else None, experts)
    if normalize and sum(weights) == 0.0 and len(experts) > 1:
        with pytest.raises(CandidateFailure, match="sum to 0"):
            MULTI(x, weight=weights)
        return
    origin = flat(base) if with_base else None
    expected = slow.multislerp(origin, [flat(e) for e in experts], weights, normalize)
    if expected is None:
        with pytest.raises(CandidateFailure, match="directions of the"):
            MULTI(x, weight=weights, normalize_weights=normalize)
    else:
        agree(MULTI(x, weight=weights, normalize_weights=normalize), expected, 3e-6)


@QUIET
@given(merges(), st.booleans(), st.integers(0, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_karcher(merge: Any, with_base: bool, max_iter: int, base_weight: float) -> None:
    base, experts, weights = merge
    weights = [abs(w) + 0.125 for w in weights]
    x = inputs(base if with_base else None, experts)
    result = KARCHER(x, weight=weights, base_weight=base_weight, max_iter=max_iter)
    points = [flat(e) for e in experts] + [flat(base)] * with_base
    agree(result, slow.karcher(points, weights + [base_weight] * with_base, max_iter), 3e-6)


@QUIET
@given(merges(2), st.booleans())
def test_model_stock(merge: Any, filter_wise: bool) -> None:
    base, experts, _ = merge
    result = STOCK(inputs(base, experts), filter_wise=filter_wise)
    parts = slow.parts_of(base.shape, -1 if filter_wise else None)
    agree(result, slow.model_stock(flat(base), [flat(e) for e in experts], parts), 3e-6)


@QUIET
@given(merges(1, 1), st.sampled_from([0.0, 1e-7, 0.0625, 0.1, 0.5, 2.0, math.inf]))
def test_nearswap(merge: Any, t: float) -> None:
    base, experts, _ = merge
    result = NEAR(inputs(base, experts), t=t)
    agree(result, slow.nearswap(flat(base), flat(experts[0]), t))
    near = (experts[0].float() - base.float()).abs() <= t
    assert torch.equal(result[near].float(), experts[0][near].float())


def test_nearswap_copies_near_elements_bit_for_bit() -> None:
    x = replace(random_inputs((30, 30)), experts=random_inputs((30, 30)).experts[:1], streams=())
    result, near = NEAR(x, t=0.2), (x.experts[0] - x.reference).abs() <= 0.2
    assert 100 < near.sum() < 800 and torch.equal(result[near], x.experts[0][near])


def test_nearswap_under_mergekit_divides_by_at_least_a_millionth() -> None:
    base, expert = torch.zeros(3), torch.tensor([4e-7, 2e-6, 1.0])
    theirs = NEAR(inputs(base, [expert], compat="mergekit"), t=5e-7)
    assert torch.allclose(theirs, torch.tensor([2e-7, 5e-7, 5e-7]), atol=1e-13)
    ours = NEAR(inputs(base, [expert]), t=5e-7)
    assert torch.allclose(ours, torch.tensor([4e-7, 5e-7, 5e-7]), atol=1e-13)


@QUIET
@given(merges(1, 1), st.sampled_from([-0.5, 0.0, 1.5]))
def test_arcee_fusion(merge: Any, factor: float) -> None:
    base, experts, _ = merge
    start, end = flat(base), flat(experts[0])
    importance = slow.importances(start, end, slow.parts_of(base.shape, -1))
    threshold = slow.fusion_threshold(importance, factor)
    result = flat(FUSION(inputs(base, experts), iqr_factor=factor))
    for b, e, value, found in zip(start, end, importance, result, strict=True):
        if abs(value - threshold) > 1e-6 * max(abs(threshold), 1e-9):  # else rounding decides
            assert found == pytest.approx(e if value >= threshold else b, abs=1e-7)


def test_arcee_fusion_without_anything_to_compare_takes_the_model() -> None:
    for shape in ((), (6, 1)):  # one column: every row's softmax is 1
        base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(FUSION(inputs(base, [base + 1.0])), base + 1.0)


def test_arcee_fusion_of_large_values_does_not_overflow() -> None:
    x = random_inputs((20, 30))
    x = inputs(x.reference.double(), [x.experts[0].double()])
    shifted = inputs(x.reference + 1000.0, [x.experts[0] + 1000.0])  # softmax knows no shift
    result = FUSION(x)
    assert not torch.equal(result, x.reference)
    assert torch.allclose(FUSION(shifted) - 1000.0, result, atol=1e-9)


@QUIET
@given(merges(), st.sampled_from([0.0, 0.1, 0.125]), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.25, 3.0]))
def test_ram(merge: Any, epsilon: float, r: float, alpha: float) -> None:
    base, experts, _ = merge
    x, points = inputs(base, experts), [flat(e) for e in experts]
    agree(RAM(x, epsilon=epsilon), slow.ram(flat(base), points, epsilon))
    agree(RAMPLUS(x, epsilon=epsilon, r=r, alpha=alpha), slow.ram(flat(base), points, epsilon, r, alpha))


# ---- worked examples and properties ----------------------------------------------------------------


def test_nuslerp_micro_example_and_delta_form() -> None:
    a, b = vectors([1, 0], [0, 2])
    expected = torch.tensor([0.923880, 0.765367])
    assert torch.allclose(NUSLERP(inputs(None, [a, b]), weight=[0.75, 0.25]), expected, atol=1e-6)
    base = torch.tensor([5.0, -7.0])
    moved = NUSLERP(inputs(base, [base + a, base + b]), weight=[3.0, 1.0])
    assert torch.allclose(moved, base + expected, atol=2e-6)


def test_nuslerp_of_tiny_weights_and_tiny_vectors() -> None:
    a, b = vectors([1e-9, 0], [0, 2e-9])
    assert torch.equal(NUSLERP(inputs(None, [a, b]), weight=[1e-7, 3e-7]), NUSLERP(inputs(None, [a, b])))
    c = torch.tensor([1e-9, 1e-9])
    ours = NUSLERP(inputs(None, [a, c]))  # 45 degrees, whatever the length
    share = math.sin(math.pi / 8) / math.sin(math.pi / 4)
    assert torch.allclose(ours, share * (a + c), rtol=1e-6, atol=0)
    theirs = NUSLERP(inputs(None, [a, c], compat="mergekit"))  # shorter than 1e-7: nearly orthogonal
    assert torch.allclose(theirs, math.sqrt(0.5) * (a + c), rtol=1e-3, atol=0)


def test_nuslerp_of_nearly_opposite_vectors_is_a_line() -> None:
    """The great circle is chosen by rounding there, and its factors grow without bound."""
    a = torch.randn(64, generator=torch.Generator().manual_seed(0))
    result = NUSLERP(inputs(None, [a, -a * (1 + 1e-6)]), weight=[0.5, 0.5])
    assert result.abs().max() < 1e-4


def test_model_stock_micro_example_and_extremes() -> None:
    first = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    second = first + torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    x = inputs(torch.zeros(2, 2), [first, second])
    assert torch.allclose(STOCK(x), 0.898979 * (first + second) / 2, atol=1e-5)
    assert slow.stock_ratio([flat(first), flat(second)]) == pytest.approx(0.898979, abs=1e-6)
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    same = base + 1.0
    assert torch.allclose(STOCK(inputs(base, [same] * 3)), same, atol=1e-6)
    apart = [base + torch.eye(6, 4).roll(i, 1) for i in range(3)]  # orthogonal changes
    for filter_wise in (False, True):
        assert STOCK(inputs(base, apart), filter_wise=filter_wise) is base


def test_model_stock_guards() -> None:
    base = torch.zeros(50)
    change = torch.randn(50, generator=torch.Generator().manual_seed(3))
    for seed in range(20):  # opposite changes: the pole, hit or missed by one rounding
        change = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        assert STOCK(inputs(base, [change, -3 * change])) is base
    # a task vector of zeros leaves its pairs out: one pair of equal vectors is left, so t = 1
    x = inputs(base, [change, change, base.clone()])
    assert torch.allclose(STOCK(x), change * 2 / 3, atol=1e-6)
    theirs = STOCK(replace(x, compat="mergekit"))  # c = 1/3, t = 3/5
    assert torch.allclose(theirs, change * 2 / 5, atol=1e-6)
    tiny = [1e-5 * change, 1e-5 * change]  # mergekit's floor takes them for nearly orthogonal
    assert torch.allclose(STOCK(inputs(base, tiny)), tiny[0])
    assert STOCK(inputs(base, tiny, compat="mergekit")).norm() < 0.1 * tiny[0].norm()


def test_karcher_of_two_is_slerp_and_of_a_triad_its_middle() -> None:
    a, b = vectors([1, 0], [0, 1])
    result = KARCHER(inputs(None, [a, b]), weight=[0.75, 0.25], max_iter=50, tol=1e-9)
    angle = math.pi / 8
    assert torch.allclose(result, torch.tensor([math.cos(angle), math.sin(angle)]), atol=1e-6)
    chord = MULTI(inputs(None, [a, b]), weight=[0.75, 0.25])
    assert torch.allclose(chord, torch.tensor([3.0, 1.0]) / math.sqrt(10), atol=1e-6)
    triad = [3.0 * torch.eye(3)[i] for i in range(3)]
    assert torch.allclose(KARCHER(inputs(None, triad)), torch.full((3,), math.sqrt(3.0)), atol=1e-6)


def test_karcher_treats_a_base_as_one_more_point() -> None:
    generator = torch.Generator().manual_seed(4)
    base, *experts = (torch.randn(5, 3, generator=generator) for _ in range(3))
    listed = KARCHER(inputs(None, [*experts, base]), weight=[0.5, 0.25, 1.0])
    for compat in ("paper", "mergekit"):
        beside = KARCHER(inputs(base, experts, compat=compat), weight=[0.5, 0.25])
        assert torch.allclose(beside, listed, atol=1e-6)
    without = KARCHER(inputs(base, experts), base_weight=0.0)
    assert torch.equal(without, KARCHER(inputs(None, experts)))
    assert KARCHER(inputs(base, experts), weight=0.0) is base


def test_karcher_drops_small_models_under_mergekit_only() -> None:
    big, small = vectors([1.0, 0.0], [0.0, 1e-6])
    ours = KARCHER(inputs(None, [big, small]))
    theirs = KARCHER(inputs(None, [big, small], compat="mergekit"))
    half = 0.5 * math.sqrt(0.5)
    assert torch.allclose(ours, torch.tensor([half, half]), atol=1e-5)
    assert torch.allclose(theirs, torch.tensor([0.5, 0.0]), atol=1e-5)
    assert torch.equal(KARCHER(inputs(None, [torch.zeros(3)] * 2)), torch.zeros(3))


def test_ram_micro_examples() -> None:
    x = inputs(torch.zeros(6), vectors(D1, D2))
    assert torch.allclose(RAM(x), torch.tensor([2.5, 0, -0.75, 0.1, 2, -1]))
    scaled = RAMPLUS(x, r=0.5, alpha=1.0)  # 4 shared changes and 1 own for each expert
    assert torch.allclose(scaled, torch.tensor([2.5, 0, -0.75, 0.15, 2, -1.5]))
    assert torch.equal(RAMPLUS(x, r=0.0), RAM(x))
    assert torch.equal(RAM(x, epsilon=10.0), x.reference)


def test_scaling_all_changes_scales_the_merged_change() -> None:
    generator = torch.Generator().manual_seed(5)
    changes = [torch.randn(6, 8, generator=generator) for _ in range(2)]
    zero = torch.zeros(6, 8)
    for chosen, given_ in ((NUSLERP, {}), (MULTI, {}), (STOCK, {}), (STOCK, {"filter_wise": True}), (RAM, {})):
        small = chosen(inputs(zero, [1e-3 * c for c in changes]), **given_)
        large = chosen(inputs(zero, changes), **given_)
        assert torch.allclose(1e3 * small, large, rtol=1e-5, atol=1e-4 if chosen is RAM else 1e-6)


# ---- identity, guards, errors ------------------------------------------------------------------------


def test_pure_copies_are_the_stored_tensors() -> None:
    generator = torch.Generator().manual_seed(6)
    base, a, b = (torch.randn(3, 4, generator=generator).bfloat16() for _ in range(3))
    for start in (None, base):
        x = inputs(start, [a, b])
        assert NUSLERP(x, weight=[0.0, 2.0]) is b and NUSLERP(x, weight=[-1.0, 0.0]) is a
        assert MULTI(x, weight=[0.5, 0.0]) is a
        assert MULTI(x, weight=[0.0, 1.0], normalize_weights=False) is b
        assert KARCHER(x, weight=[0.0, 0.25], base_weight=0.0) is b
    assert MULTI(inputs(base, [a]), weight=0.3) is a
    x = inputs(base, [a, b])
    assert MULTI(x, weight=0.0, normalize_weights=False) is base
    assert not MULTI(inputs(None, [a, b]), weight=0.0, normalize_weights=False).any()
    assert NEAR(inputs(base, [a]), t=0.0) is base
    assert STOCK(inputs(base, [base.clone(), base.clone()])) is base


@pytest.mark.parametrize("check", testing.METHOD_CHECKS[1:], ids=lambda check: check.__name__)
@pytest.mark.parametrize("chosen", OPTIONAL, ids=lambda m: m.name)
def test_contract_with_a_base(chosen: Method, check: Any) -> None:
    check(replace(chosen, needs_base=True, identity=chosen is not KARCHER))  # to karcher the base is a second point


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("chosen", EVERY, ids=lambda m: m.name)
def test_a_nan_anywhere_stays_visible(chosen: Method, compat: str) -> None:
    k = max(2, chosen.n_experts[0]) if chosen.n_experts[1] != 1 else 1
    variants: list[dict[str, Any]] = [{}]
    if chosen is STOCK:
        variants.append({"filter_wise": True})
    if chosen is NUSLERP:
        variants += [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]
    x = replace(testing.make_inputs(replace(chosen, needs_base=True), k), compat=compat)
    for place in range(-1, k):
        tensors = [x.reference, *x.experts]
        tensors[place + 1] = tensors[place + 1].clone()
        tensors[place + 1][2, 3:5] = float("nan")
        y = replace(x, base=tensors[0], experts=tuple(tensors[1:]))
        for variant in variants:
            result = chosen(y, **{**testing.example_parameters(chosen, k), **variant})
            assert result[2, 3:5].isnan().all(), (place, variant)


@pytest.mark.parametrize("shape", [*testing.SHAPES, (0, 3), (3, 0)], ids=str)
def test_options_take_every_shape(shape: tuple[int, ...]) -> None:
    for compat in ("paper", "mergekit"):
        x = replace(testing.make_inputs(STOCK, 3, shape), compat=compat)
        pair = replace(x, experts=x.experts[:2], streams=())
        results = [STOCK(x, filter_wise=True), KARCHER(x), MULTI(x, weight=[0.2, 0.5, 0.9])]
        for row_wise in (False, True):
            results.append(NUSLERP(pair, nuslerp_flatten=False, nuslerp_row_wise=row_wise))
            results.append(NUSLERP(replace(pair, base=None), nuslerp_flatten=False, nuslerp_row_wise=row_wise))
        assert all(r.shape == shape and r.isfinite().all() for r in results)


def test_zero_changes_give_the_base() -> None:
    base = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    same = inputs(base, [base.clone() for _ in range(3)])
    pair = replace(same, experts=same.experts[:2], streams=())
    assert torch.equal(MULTI(same, weight=[0.2, 0.3, 0.9]), base)
    assert torch.equal(MULTI(pair, weight=[0.2, 0.3]), base)
    assert torch.equal(NUSLERP(pair, weight=[0.2, 0.3]), base)
    assert torch.allclose(KARCHER(same), base, atol=1e-6)


def test_infeasible_parameters_fail_the_candidate() -> None:
    a, b = vectors([1.0, 0.0], [-2.0, 0.0])
    x = inputs(torch.ones(2), [a, b])
    one = replace(x, experts=(a,), streams=())
    opposite = replace(x, base=None, experts=(a, b, torch.tensor([0.0, 1.0]), torch.tensor([0.0, -3.0])), streams=())
    cases: list[tuple[Method, Inputs, dict[str, Any], str]] = [
        (MULTI, x, {"weight": [0.5, -0.5]}, "sum to 0"),
        (MULTI, opposite, {}, "directions of the 4 models cancel"),
        (KARCHER, x, {"weight": [0.5, -0.25]}, "weight is -0.25"),
        (KARCHER, x, {"weight": 0.0, "base_weight": 0.0}, "sum to 0"),
        (NEAR, one, {"t": -0.1}, "t is -0.1"),
        (NEAR, one, {"t": math.nan}, "t is nan"),
        (RAM, x, {"epsilon": -1.0}, "epsilon is -1"),
        (RAMPLUS, x, {"alpha": -1.0}, "alpha is -1"),
    ]
    for chosen, y, parameters, message in cases:
        with pytest.raises(CandidateFailure, match=message) as caught:
            chosen(y, **parameters)
        assert caught.value.hint and NAME in str(caught.value)
    assert torch.allclose(MULTI(replace(x, base=None)), (a + b) / 2)  # two opposites: their weighted sum
    assert torch.allclose(MULTI(opposite, weight=[1.0, 1.0, 0.0, 0.0]), (a + b) / 2)  # whoever else is listed


# ---- bits, dtypes, tables --------------------------------------------------------------------------------


def results_of_all(x: Inputs) -> list[Tensor]:
    pair, one = (replace(x, experts=x.experts[:k], streams=()) for k in (2, 1))
    return [
        *(NUSLERP(pair, weight=[0.3, 0.5], **options) for options in (
            {}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}
        )),
        NUSLERP(replace(pair, base=None), weight=[0.3, 0.5]),
        *(MULTI(y, weight=[0.3, 0.5, 0.9]) for y in (x, replace(x, base=None))),
        *(KARCHER(y, weight=[0.3, 0.5, 0.9]) for y in (x, replace(x, base=None))),
        *(STOCK(x, filter_wise=rows) for rows in (False, True)),
        NEAR(one, t=0.1), FUSION(one), RAM(x, epsilon=0.1), RAMPLUS(x, epsilon=0.1),
    ]  # fmt: skip


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **extra: Any) -> Inputs:
    generator = torch.Generator().manual_seed(8)
    base = torch.randn(shape, generator=generator)
    experts = [(base + 0.2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]
    return inputs(base.to(dtype), experts, **extra)


def test_bits_do_not_depend_on_threads() -> None:
    x, threads = random_inputs((1100, 1300)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results_of_all(x)
        torch.set_num_threads(4)
        together = results_of_all(x)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(alone, together, strict=True))


def test_chunks_do_not_change_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    x, line = random_inputs((37, 41)), random_inputs((1000,))
    before = [results_of_all(x), results_of_all(line)]
    products = [_geometry.gram(x, axis) for axis in (-1, 0)]
    monkeypatch.setattr(_geometry, "_CHUNK", 100)
    assert all(torch.equal(a, _geometry.gram(x, axis)) for a, axis in zip(products, (-1, 0), strict=True))
    for y, expected in zip((x, line), before, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, results_of_all(y), strict=True))


def test_inputs_that_are_not_contiguous_give_the_same() -> None:
    x = random_inputs((12, 8))
    y = inputs(x.reference.t().contiguous().t(), [e.t().contiguous().t() for e in x.experts])
    for a, b in zip(results_of_all(x), results_of_all(y), strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.shape == b.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_results(dtype: torch.dtype) -> None:
    """Ours is float32 at least; mergekit's is that of the models, rounded once from float32."""
    x = random_inputs((6, 10), dtype)
    wider = inputs(x.reference.float(), [e.float() for e in x.experts])
    ours, theirs = results_of_all(x), results_of_all(replace(x, compat="mergekit"))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(r.dtype == expected for r in ours) and all(r.dtype == dtype for r in theirs)
    for a, b in zip(ours, results_of_all(wider), strict=True):
        assert torch.allclose(a.float(), b, atol=1e-6)
    if dtype != torch.float64:
        once = [r.to(dtype) for r in results_of_all(replace(wider, compat="mergekit"))]
        assert all(torch.equal(a, b) for a, b in zip(theirs, once, strict=True))


def test_what_depends_on_the_models_alone_is_computed_once() -> None:
    tables = Tables()
    shape = (6, 10)
    source = random_inputs(shape)
    models = {"base": source.reference, **dict(zip("abc", source.experts, strict=True))}

    def merged(method: str, experts: str, base: str | None, parameters: dict[str, Any]) -> Tensor:
        recipe = Recipe.build(method, base, {name: {} for name in experts}, parameters=parameters)
        plans = recipe.plan([NAME], n_layers=1)
        return Merge(recipe, plans, lambda model, _: models[model], tables).tensor(plans[0])

    settings_ = [
        ("nuslerp", "ab", "base", "weight"), ("multislerp", "abc", "base", "weight"),
        ("karcher", "abc", "base", "base_weight"), ("arcee_fusion", "a", "base", "iqr_factor"),
        ("ramplus_tl", "abc", "base", "r"), ("model_stock", "abc", "base", "lines_alpha"),
    ]  # fmt: skip
    for method, experts, base, gene in settings_:
        first = merged(method, experts, base, {gene: 0.25})
        made = tables.made
        merged(method, experts, base, {gene: 0.75})
        assert tables.made == made, method
        assert torch.equal(first, merged(method, experts, base, {gene: 0.25}))
    made = tables.made
    merged("ramplus_tl", "abc", "base", {"epsilon": 0.2})
    merged("model_stock", "abc", "base", {"filter_wise": True})
    assert tables.made == made + 2
    with_base, without = (merged("multislerp", "abc", base, {}) for base in ("base", None))
    assert torch.equal(with_base, MULTI(source)) and torch.equal(without, MULTI(replace(source, base=None)))


# ---- an optional base in recipes ------------------------------------------------------------------------


def recipe_of(method: str, models: str, base: str | None, **extra: Any) -> Recipe:
    return Recipe.from_dict(
        {"merge_method": method, "base_model": base, "models": [{"model": m} for m in models], **extra}
    )


def test_an_optional_base_is_split_off_where_a_recipe_names_one() -> None:
    for models in ("ab", "oab", "abo"):
        (plan,) = recipe_of("nuslerp", models, "o").plan([NAME], 1)
        assert plan.base == ("o", NAME) and [model for model, _ in plan.inputs] == ["a", "b"]
    (plan,) = recipe_of("nuslerp", "ab", None).plan([NAME], 1)
    assert plan.base is None and len(plan.inputs) == len(plan.streams) == 2
    (plan,) = recipe_of("linear", "oab", "o", parameters={"weight": 1.0}).plan([NAME], 1)
    assert plan.base is None and len(plan.inputs) == 3  # a method without a base takes every model as it stands


def test_the_base_is_not_counted_and_the_recipe_survives_writing() -> None:
    with pytest.raises(RecipeError, match="exactly 2 beside the base, not 1"):
        recipe_of("nuslerp", "oa", "o")
    with pytest.raises(RecipeError, match="exactly 2"):
        recipe_of("nuslerp", "oab", None)
    recipe = recipe_of("nuslerp", "oab", "o", compat="paper", parameters={"weight": 0.5})
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and again.fingerprint == recipe.fingerprint
    data, notes = recipe.to_mergekit()
    assert data["base_model"] == "o" and [m["model"] for m in data["models"]] == ["a", "b"]
    assert not any("nuslerp" in note for note in notes)
    with pytest.raises(ConfigError, match="exactly 2"):
        NUSLERP(inputs(None, vectors([1.0])))


def test_mergekits_karcher_takes_the_base_model_as_a_point_listed_or_not() -> None:
    source = random_inputs((4, 6))
    models = dict(zip("oab", (source.reference, *source.experts[:2]), strict=True))
    results = []
    for names, base in (("ab", "o"), ("oab", "o"), ("abo", None)):
        recipe = recipe_of("karcher", names, base)
        (plan,) = recipe.plan([NAME], 1)
        results.append(merge_tensor(plan, lambda model, _: models[model], recipe))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
