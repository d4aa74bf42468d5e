"""Merge methods against slow restatements, worked examples and their contracts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import registry, testing
from evomerge.errors import CandidateFailure, ConfigError, WeightsError
from evomerge.methods import (
    EXTENSION,
    Inputs,
    Method,
    PerExpert,
    Range,
    fixed_dot,
    fixed_norm1,
    keep_largest,
    keep_mask,
    merge_tensor,
    method,
)
from evomerge.recipe import Recipe, TensorPlan
from tests import slow_methods as slow

QUIET = settings(max_examples=300, derandomize=True, deadline=None, database=None)
NAMES = registry.names("methods")
NAME = "model.layers.0.mlp.up_proj.weight"
TA, TIES = registry.get("methods", "task_arithmetic"), registry.get("methods", "ties")
DARE, DARE_TIES = registry.get("methods", "dare_linear"), registry.get("methods", "dare_ties")
LINEAR, SLERP = registry.get("methods", "linear"), registry.get("methods", "slerp")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[
        tensor.element_size()
    ])  # fmt: skip


@pytest.mark.parametrize("check", testing.METHOD_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, check: Any) -> None:
    check(registry.get("methods", name))


SPECTRAL = {"doge", "iso_c", "iso_cts", "opcm", "r_tsvm", "tsv_m", "wudi"}  # seconds per matrix of this size


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SPECTRAL else n for n in NAMES])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    testing.check_threads(registry.get("methods", name))


def test_bits_do_not_depend_on_process_hash_seed_or_threads() -> None:
    testing.check_processes()


# ---- against the slow restatements, on grids where float32 and float64 agree exactly ------------

EIGHTHS = st.integers(-12, 12).map(lambda v: v / 8)
DENSITIES = st.sampled_from([0.0, 0.01, 0.125, 0.25, 0.5, 0.75, 0.99, 1.0, 1.5])


@st.composite
def merges(draw: st.DrawFn, max_experts: int = 4) -> tuple[Tensor, list[Tensor], list[float]]:
    """A base, experts on a grid of 1/16 (ties, zeros, copies are common), dyadic weights."""
    shape = draw(st.sampled_from([(), (1,), (7,), (5, 1), (1, 6), (3, 4), (2, 3, 2)]))
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


def flat(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.double().flatten().tolist()
    return values


def inputs(base: Tensor | None, experts: list[Tensor], **extra: Any) -> Inputs:
    widened = None if base is None else base.float()
    return Inputs(NAME, widened, tuple(e.float() for e in experts), **extra)


def agree(result: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    found = flat(result)
    scale = max([1.0, *map(abs, expected)])
    assert result.dtype == torch.float32
    assert np.allclose(found, expected, rtol=0, atol=tolerance * scale), (found, expected)


@QUIET
@given(merges(), EIGHTHS, st.booleans())
def test_task_arithmetic(merge: Any, lam: float, normalize: bool) -> None:
    base, experts, weights = merge
    result = TA(inputs(base, experts), weight=weights, lambda_=lam, normalize=normalize)
    deltas = slow.differences(flat(base), [flat(e) for e in experts])
    agree(result, slow.add_up(flat(base), deltas, weights, lam, normalize))


@QUIET
@given(merges(), st.data(), EIGHTHS, st.booleans(), st.booleans(), st.booleans())
def test_ties(merge: Any, data: st.DataObject, lam: float, normalize: bool, weighted: bool, whole_1d: bool) -> None:
    base, experts, weights = merge
    densities = [data.draw(DENSITIES) for _ in experts]
    result = TIES(
        inputs(base, experts),
        weight=weights,
        density=densities,
        lambda_=lam,
        normalize=normalize,
        sign_election="weighted" if weighted else "unweighted",
        sparsify_1d=not whole_1d,
    )
    if whole_1d and base.ndim < 2:
        densities = [1.0 if d > 0 else 0.0 for d in densities]
    vectors = [flat(e) for e in experts]
    expected = slow.ties(flat(base), vectors, weights, densities, lam, normalize, weighted=weighted)
    agree(result, expected)


@QUIET
@given(merges(), st.data(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans(), st.booleans())
def test_dare(merge: Any, data: st.DataObject, density: float, normalize: bool, elect: bool) -> None:
    base, experts, weights = merge
    seed = data.draw(st.integers(0, 1000))
    scaling = data.draw(st.sampled_from(["inv_prob", "none", *([] if elect else ["l1"])]))
    result = (DARE_TIES if elect else DARE)(
        inputs(base, experts, seed=seed),
        weight=weights,
        density=density,
        rescale=scaling,
        normalize=normalize,
        sparsify_1d=True,
    )
    deltas = []
    for i, delta in enumerate(slow.differences(flat(base), [flat(e) for e in experts])):
        keep = slow.keep_mask(len(delta), density, seed=seed, tensor_name=NAME, stream=i)
        deltas.append(slow.masked(delta, keep, density, scaling))
    combine = slow.elect if elect else slow.add_up
    agree(result, combine(flat(base), deltas, weights, 1.0, normalize))


@QUIET
@given(merges(), st.booleans())
def test_linear(merge: Any, normalize: bool) -> None:
    _, experts, weights = merge
    if normalize and abs(sum(weights)) < 1e-9:
        with pytest.raises(CandidateFailure, match="sum to 0") as caught:
            LINEAR(inputs(None, experts), weight=weights)
        assert caught.value.reason == "weights_cancel"
        return
    result = LINEAR(inputs(None, experts), weight=weights, normalize=normalize)
    agree(result, slow.linear([flat(e) for e in experts], weights, normalize))


@QUIET
@given(merges(max_experts=1), st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.2, 1.3]))
def test_slerp(merge: Any, t: float) -> None:
    base, (expert,), _ = merge
    agree(SLERP(inputs(base, [expert]), t=t), slow.slerp(flat(base), flat(expert), t), 3e-6)


# ---- worked examples ----------------------------------------------------------------------------

D1, D2 = torch.tensor([4, -3, 0.5, 0, 2, -1]), torch.tensor([1, 3, -2, 0.1, 2, 0])


@pytest.mark.parametrize(
    ("chosen", "parameters", "expected"),
    [
        (TA, {"lambda": 0.5}, (2.5, 0, -0.75, 0.05, 2, -0.5)),
        (TIES, {"density": 0.5}, (4, 3, -2, 0, 2, 0)),
        (TIES, {"density": 0.5, "normalize": False}, (4, 3, -2, 0, 4, 0)),
        (TIES, {"density": 0.5, "weight": [0.6, 0.4]}, (4, -3, -2, 0, 2, 0)),
        (TIES, {"density": 1.0}, (2.5, 3, -2, 0.1, 2, -1)),
        (TIES, {"density": 1.0, "weight": [0.75, 0.25]}, (3.25, -3, -2, 0.1, 2, -1)),
    ],
)
@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_micro_examples(chosen: Method, parameters: dict[str, Any], expected: tuple[float, ...], compat: str) -> None:
    for shape in ((6,), (1, 6), (6, 1), (2, 3)):
        base = torch.zeros(shape)
        x = inputs(base, [D1.reshape(shape), D2.reshape(shape)], compat=compat)
        extra = {"sparsify_1d": True} if chosen is TIES else {}
        assert torch.allclose(
            chosen(x, **parameters, **extra), torch.tensor(expected, dtype=torch.float32).reshape(shape), atol=1e-6
        )


def test_slerp_micro_example() -> None:
    x = inputs(torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 2.0])])
    assert torch.allclose(SLERP(x, t=0.25), torch.tensor([0.923880, 0.765367]), atol=1e-6)


def test_unweighted_election_ignores_the_size_of_the_weights() -> None:
    x = inputs(torch.zeros(1, 1), [torch.tensor([[1.0]]), torch.tensor([[-2.0]])])
    weight = [0.9, 0.1]
    assert TIES(x, weight=weight).item() == pytest.approx(1.0)
    assert TIES(x, weight=weight, sign_election="unweighted").item() == pytest.approx(-2.0)


def test_1d_tensors_are_trimmed_only_on_request_or_under_mergekit() -> None:
    for chosen in (TIES, DARE, DARE_TIES):
        x = inputs(torch.zeros(64), [torch.arange(1.0, 65.0)])
        whole = chosen(x, density=0.1)
        assert torch.equal(whole, x.experts[0])
        assert (chosen(x, density=0.1, sparsify_1d=True) == 0).sum() > 40
        y = inputs(torch.zeros(64), [torch.arange(1.0, 65.0)], compat="mergekit")
        assert (chosen(y, density=0.1) == 0).sum() > 40


def test_norms_too_small_for_mergekit_are_rescaled_in_our_arithmetic() -> None:
    base, expert = torch.zeros(2, 2), torch.tensor([[1e-9, 2e-9], [3e-9, 4e-9]])
    ours = TIES(inputs(base, [expert]), density=0.5, rescale=True)
    theirs = TIES(inputs(base, [expert], compat="mergekit"), density=0.5, rescale=True)
    assert ours.sum().item() == pytest.approx(1e-8) and theirs.sum().item() == pytest.approx(7e-9)


def test_dare_is_unbiased_over_seeds() -> None:
    generator = torch.Generator().manual_seed(1)
    base, expert = torch.randn((8, 8), generator=generator), torch.randn((8, 8), generator=generator)
    n, density = 600, 0.3
    draws = [DARE(inputs(base, [expert], seed=s), density=density) for s in range(n)]
    error = torch.stack(draws).mean(dim=0) - expert
    spread = (expert - base).abs() * math.sqrt((1 - density) / density / n)
    assert (error.abs() < 5 * spread + 1e-6).all()


@pytest.mark.parametrize("density", [-0.1, math.nan])
def test_a_bad_density_fails_the_candidate(density: float) -> None:
    for chosen in (TIES, DARE, DARE_TIES):
        with pytest.raises(CandidateFailure, match="density"):
            chosen(inputs(torch.zeros(2, 2), [torch.ones(2, 2)]), density=density)


# ---- mergekit's rounding, restated with explicit bfloat16 steps -----------------------------------


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rounds float32 to bfloat16, half to even, with integer arithmetic."""
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("chosen", [TA, TIES, LINEAR], ids=lambda m: m.name)
@pytest.mark.parametrize("normalize", [False, True])
def test_mergekit_rounding_in_bfloat16(chosen: Method, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn((16, 16), generator=generator).bfloat16()
    experts = [(base + 0.05 * torch.randn((16, 16), generator=generator)).bfloat16() for _ in "ab"]
    weights = [0.3, 0.9]
    x = Inputs(NAME, base, tuple(experts), compat="mergekit")
    extra = {} if chosen is LINEAR else {"lambda": 0.7}
    result = chosen(x, weight=weights, normalize=normalize, **extra)
    b, e = base.float().numpy(), [expert.float().numpy() for expert in experts]
    w = bf16(np.array(weights))
    if chosen is LINEAR:  # float32 sums with unrounded weights, one rounding
        total = sum(np.float32(v) * m for v, m in zip(weights, e, strict=True))
        expected = bf16(total / np.float32(sum(weights)) if normalize else total)
    else:
        z = [bf16(v * bf16(m - b)) for v, m in zip(w, e, strict=True)]
        if chosen is TIES:
            elected = np.where(bf16(z[0] + z[1]) >= 0, 1, -1)
            agrees = [np.sign(v) == elected for v in z]
        else:
            agrees = [np.ones_like(b, dtype=bool)] * 2
        total = bf16(z[0] * agrees[0] + z[1] * agrees[1])
        divisor = bf16(w[0] * agrees[0] + w[1] * agrees[1])
        divisor[divisor == 0] = 1
        total = bf16(total / divisor) if normalize else total
        expected = bf16(b + bf16(total * np.float32(0.7)))
    assert result.dtype == torch.bfloat16
    assert np.array_equal(result.float().numpy(), expected)


# ---- masks ----------------------------------------------------------------------------------------


@QUIET
@given(
    st.integers(-(2**70), 2**70),
    st.text(max_size=8),
    st.integers(-1, 40),
    st.sampled_from([0, 1, 1000, 2**32 - 3, 2**40 + 17]),
    st.floats(0, 1),
)
def test_keep_mask_equals_plain_integer_arithmetic(
    seed: int, name: str, stream: int, offset: int, density: float
) -> None:
    found = keep_mask(9, density, seed=seed, tensor_name=name, stream=stream, offset=offset)
    expected = slow.keep_mask(9, density, seed=seed, tensor_name=name, stream=stream, offset=offset)
    assert found.tolist() == expected


def test_keep_mask_is_part_of_the_format() -> None:
    """A change here changes the weights of every stored recipe with random masks."""
    mask = keep_mask(64, 0.5, seed=42, tensor_name="model.layers.0.mlp.up_proj.weight", stream=1)
    assert f"{int(''.join(str(int(bit)) for bit in mask), 2):016x}" == "67a0628845e9e00e"


def test_keep_mask_chunks_are_slices_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"seed": 5, "tensor_name": "t", "stream": 1}
    whole = keep_mask((37, 41), 0.4, **keys)
    parts = [keep_mask(n, 0.4, **keys, offset=o) for o, n in [(0, 1), (1, 700), (701, 816)]]
    assert whole.shape == (37, 41) and whole.dtype == torch.bool
    assert torch.equal(torch.cat(parts), whole.flatten())
    monkeypatch.setattr("evomerge.methods._masks._CHUNK", 64)
    assert torch.equal(keep_mask((37, 41), 0.4, **keys), whole)


def test_keep_mask_densities_are_nested_and_exact_at_the_ends() -> None:
    keys = {"seed": 5, "tensor_name": "t", "stream": 1}
    masks = [keep_mask(4096, d / 50, **keys) for d in range(51)]
    assert not masks[0].any() and masks[-1].all()
    assert not keep_mask(9, -1.0, **keys).any() and keep_mask(9, 2.0, **keys).all()
    for low, high in pairwise(masks):
        assert not (low & ~high).any()


def test_keep_mask_is_uniform() -> None:
    n = 1 << 18
    for density in (0.01, 0.1, 0.5, 0.9):
        mask = keep_mask(n, density, seed=1, tensor_name="t", stream=0).double()
        spread = math.sqrt(density * (1 - density))
        assert abs(mask.mean() - density) < 5 * spread / math.sqrt(n)
        for step in (1, 2, 64, 1024, 4096):  # neighbours along rows and columns are independent
            product = ((mask[:-step] - density) * (mask[step:] - density)).mean()
            assert abs(product) < 5 * spread**2 / math.sqrt(n - step)
        blocks = mask.reshape(256, -1).sum(dim=1)
        chi2 = ((blocks - 1024 * density) ** 2 / (1024 * spread**2)).sum()
        assert abs(chi2 - 256) < 5 * math.sqrt(2 * 256)


def test_keep_mask_streams_names_and_seeds_are_independent() -> None:
    n, density = 1 << 16, 0.3
    variants = [
        keep_mask(n, density, seed=seed, tensor_name=name, stream=stream).double() - density
        for seed in (0, 1)
        for name in ("a.weight", "b.weight")
        for stream in (0, 1, 2)
    ]
    spread = density * (1 - density) / math.sqrt(n)
    for i, first in enumerate(variants):
        for second in variants[:i]:
            assert abs((first * second).mean()) < 5 * spread


def test_keep_mask_streams_are_not_permutations_shifted_by_xor() -> None:
    """A single-round hash would make stream b the mask of stream a at index i ^ constant."""
    first, second = (keep_mask(1 << 10, 0.5, seed=0, tensor_name="t", stream=s) for s in (0, 1))
    index = torch.arange(1 << 10)
    best = max(((first[index ^ c] == second).double().mean().item()) for c in range(1 << 10))
    assert best < 0.65


@QUIET
@given(st.lists(st.integers(-5, 5), max_size=30), st.floats(0, 1.2))
def test_keep_largest(values: list[int], density: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    expected = slow.top([float(v) for v in values], density)
    assert keep_largest(delta, density).tolist() == expected


# ---- fixed sums -----------------------------------------------------------------------------------


def test_fixed_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, generator=generator) for _ in range(2))
    products = [x * y for x, y in zip(flat(a), flat(b), strict=True)]
    assert fixed_dot(a, b) == pytest.approx(math.fsum(products), rel=1e-14)
    assert fixed_norm1(a.reshape(10, 100)) == pytest.approx(math.fsum(map(abs, flat(a))), rel=1e-14)
    assert fixed_dot(a[:0], b[:0]) == 0.0


# ---- the decorator --------------------------------------------------------------------------------


def test_the_decorator_reads_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: {} for kind in registry.KINDS})

    @method("example", source="none", n_experts=(2, 3))
    def example(
        x: Inputs,
        *,
        weight: Annotated[PerExpert, Range(0.1, 2.0, log=True)] = 1.0,
        lambda_: float,
        steps: int = 3,
        mode: Annotated[Literal["a", "b"], EXTENSION] = "a",
        rescale: bool | Literal["l1"] = True,
    ) -> Tensor:
        """First line.

        More.
        """
        return x.experts[0] * lambda_ * x.each(weight)[0]

    weight, lam, steps, mode, rescale, *depth = example.parameters
    assert [param.name for param in depth] == ["lines_alpha", "lines_beta", "lines_match"]
    assert (weight.name, weight.kind, weight.per_expert, weight.default) == (*("weight", "float", True, 1.0),)
    assert (weight.low, weight.high, weight.log) == (0.1, 2.0, True)
    assert (lam.name, lam.required, lam.low) == ("lambda", True, None)
    assert steps.kind == "int" and not steps.required
    assert mode.choices == ("a", "b") and mode.extension and not mode.accepts_bool
    assert rescale.kind == "choice" and rescale.accepts_bool and rescale.default is True
    assert example.summary == "First line." and registry.get("methods", "example") is example

    x = inputs(torch.zeros(2), [torch.ones(2), torch.ones(2)])
    assert torch.equal(example(x, **{"lambda": 2.0}, weight=[3.0, 1.0]), torch.full((2,), 6.0))
    for bad, message in [
        ({}, "needs the parameter 'lambda'"),
        ({"lambda": 1.0, "gamma": 2}, "no parameter gamma"),
        ({"lambda": 1.0, "weight": [1.0]}, "1 values for 2 experts"),
    ]:
        with pytest.raises(ConfigError, match=message):
            example(x, **bad)
    with pytest.raises(ConfigError, match="at least 2"):
        example(inputs(torch.zeros(2), [torch.ones(2)]), lambda_=1.0)
    with pytest.raises(ConfigError, match="needs a base"):
        example(inputs(None, [torch.ones(2)] * 2), lambda_=1.0)
    with pytest.raises(TypeError, match="annotation"):
        method("untyped", source="none")(lambda x, *, weight=1.0: x)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(WeightsError, match=NAME):
        inputs(torch.zeros(2, 3), [torch.zeros(3, 2)])


def test_deltas_are_computed_once_and_handed_out_as_copies() -> None:
    x = inputs(torch.zeros(2, 2), [torch.ones(2, 2)])
    assert x.deltas is x.deltas
    x.delta(0).zero_()
    assert torch.equal(x.deltas[0], torch.ones(2, 2))


# ---- merge_tensor ---------------------------------------------------------------------------------


def source(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (9, 7)) -> Tensor:
    """Random values with signed zeros and subnormals of `dtype` in front."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    made.view(-1)[:5] = torch.tensor([-0.0, 0.0, tiny, -tiny, 1.0], dtype=dtype)
    return made


def merge(recipe: Recipe, models: dict[str, Tensor], **extra: Any) -> Tensor:
    (plan,) = recipe.plan([NAME], n_layers=1)
    return merge_tensor(plan, lambda model, name: models[model], recipe, **extra)


IDENTITIES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("task_arithmetic", {"weight": 0.0}, {}, "b"),
    ("task_arithmetic", {}, {"lambda": 0.0}, "b"),
    ("task_arithmetic", {"weight": [1.0, 0.0]}, {}, "x"),
    ("task_arithmetic", {"weight": [0.0, 2.0]}, {"lambda": 0.5}, "y"),
    ("task_arithmetic", {"weight": [0.3, 0.0]}, {"normalize": True}, "x"),
    ("ties", {"weight": 0.0}, {}, "b"),
    ("ties", {"density": 0.0}, {}, "b"),
    ("ties", {"weight": [0.0, 0.3]}, {}, "y"),
    ("ties", {"weight": [0.0, 0.25]}, {"lambda": 4.0, "normalize": False}, "y"),
    ("ties", {"density": [1.0, 0.0]}, {}, "x"),
    ("dare_linear", {"density": [1.0, 0.5], "weight": [1.0, 0.0]}, {}, "x"),
    ("dare_linear", {"density": 0.0}, {}, "b"),
    ("dare_ties", {"density": [0.0, 1.0]}, {}, "y"),
    ("dare_ties", {"weight": 0.0, "density": 0.5}, {}, "b"),
    ("linear", {"weight": [0.0, 3.0]}, {}, "y"),
    ("linear", {"weight": [1.0, 0.0]}, {"normalize": False}, "x"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "each", "shared", "expected"), IDENTITIES)
def test_pure_copies_keep_every_bit(
    name: str, each: dict[str, Any], shared: dict[str, Any], expected: str, dtype: torch.dtype
) -> None:
    models = {key: source(dtype, i) for i, key in enumerate("bxy")}
    experts = {model: {k: v[i] if isinstance(v, list) else v for k, v in each.items()} for i, model in enumerate("xy")}
    base = None if name == "linear" else "b"
    result = merge(Recipe.build(name, base, experts, parameters=shared), models)
    assert result.dtype == dtype and torch.equal(bits(result), bits(models[expected]))
    assert result is models[expected]  # documented: a pure copy is the source itself


def test_slerp_ends_are_pure_copies() -> None:
    models = {key: source(torch.bfloat16, i) for i, key in enumerate("bx")}
    for t, expected in ((0.0, "b"), (1.0, "x")):
        recipe = Recipe.build("slerp", "b", {"x": {}}, parameters={"t": t})
        assert torch.equal(bits(merge(recipe, models)), bits(models[expected]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paper_arithmetic_rounds_once(dtype: torch.dtype) -> None:
    models = {key: source(dtype, i, (64, 64)) for i, key in enumerate("bxy")}
    recipe = Recipe.build("task_arithmetic", "b", {"x": {"weight": 0.3}, "y": {"weight": 0.7}})
    b, x, y = (models[key].double() for key in "bxy")
    exact = (b + 0.3 * (x - b) + 0.7 * (y - b)).to(dtype)
    result = merge(recipe, models)
    assert result.dtype == dtype
    assert (result != exact).double().mean() < 0.002  # only halves within a float32 step
    rounded_throughout = b.to(dtype) + (x - b).to(dtype) * 0.3 + (y - b).to(dtype) * 0.7
    assert (rounded_throughout != exact).double().mean() > 0.1  # the test can tell the difference


def test_output_dtypes() -> None:
    models = {"b": source(torch.bfloat16, 0), "x": source(torch.float32, 1)}

    def build(**extra: Any) -> Recipe:
        return Recipe.build("task_arithmetic", "b", {"x": {"weight": 0.5}}, **extra)

    assert merge(build(), models).dtype == torch.bfloat16
    assert merge(build(dtype="float16"), models).dtype == torch.float16
    assert merge(build(dtype="float16", out_dtype="float32"), models).dtype == torch.float32
    assert merge(build(out_dtype="float32"), models, out_dtype=torch.float16).dtype == torch.float16
    assert merge(build(compat="mergekit"), models).dtype == torch.float32  # promoted
    assert merge(build(compat="mergekit", dtype="bfloat16"), models).dtype == torch.bfloat16
    both = build(compat="mergekit", dtype="float32", out_dtype="bfloat16")
    assert merge(both, models).dtype == torch.bfloat16
    half = {key: value.bfloat16() for key, value in models.items()}
    rounding = build(compat="mergekit")
    assert not torch.equal(merge(rounding, half), merge(build(), half))


def test_float64_inputs_are_not_narrowed() -> None:
    models = {key: source(torch.float64, i) for i, key in enumerate("bx")}
    recipe = Recipe.build("task_arithmetic", "b", {"x": {"weight": 0.5}})
    expected = models["b"] + 0.5 * (models["x"] - models["b"])
    assert torch.equal(merge(recipe, models), expected)


def test_buffers_are_copied() -> None:
    recipe = Recipe.build("task_arithmetic", "b", {"x": {}})
    numbers = {"b": torch.tensor([1, 2]), "x": torch.tensor([3, 4])}
    assert merge(recipe, numbers) is numbers["b"]
    rotary = {"b": torch.ones(3), "x": torch.zeros(3)}
    (plan,) = recipe.plan(["model.layers.0.self_attn.rotary_emb.inv_freq"], 1)
    assert merge_tensor(plan, lambda model, name: rotary[model], recipe) is rotary["b"]


def test_merge_tensor_passes_seed_streams_and_names() -> None:
    models = {key: source(torch.float32, i, (64, 64)) for i, key in enumerate("bxy")}
    recipe = Recipe.build("dare_linear", "b", {"x": {"weight": 0}, "y": {"density": 0.5}}, seed=9)
    delta = (merge(recipe, models) - models["b"]).view(-1)
    mask = keep_mask(64 * 64, 0.5, seed=9, tensor_name=NAME, stream=1)
    moved = models["y"].view(-1) != models["b"].view(-1)
    assert torch.equal(delta.abs() > 1e-9, mask & moved)


def test_shape_mismatch_names_the_tensor() -> None:
    recipe = Recipe.build("task_arithmetic", "b", {"x": {}})
    with pytest.raises(WeightsError, match=NAME):
        merge(recipe, {"b": torch.zeros(2, 2), "x": torch.zeros(2, 3)})


def test_plans_can_take_one_model_twice() -> None:
    tensors = {"model.layers.0.w": torch.full((2, 2), 1.0), "model.layers.2.w": torch.full((2, 2), 5.0)}
    plan = TensorPlan(
        "model.layers.0.w", "linear", None, (("m", "model.layers.0.w"), ("m", "model.layers.2.w")),
        (0, 0), {}, ({"weight": 1.0}, {"weight": 3.0}),
    )  # fmt: skip
    recipe = Recipe.build("linear", None, {"m": {}})
    assert torch.equal(merge_tensor(plan, lambda m, t: tensors[t], recipe), torch.full((2, 2), 4.0))
