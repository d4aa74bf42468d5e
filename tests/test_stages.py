"""The task-arithmetic family in stages: one compiled pass, torch operations and the slow text all agree."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import registry
from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, Merge, Tables, Target, _fused, _select, fixed_dot, fixed_norm1, keep_largest
from evomerge.methods._select import magnitude_cuts, variance_cut
from evomerge.methods._stages import Sparsify, Stages, combine
from evomerge.recipe import Recipe
from tests import slow_methods as slow

QUIET = settings(max_examples=120, derandomize=True, deadline=None, database=None)
NAME = "model.layers.3.mlp.up_proj.weight"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def flat(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.double().flatten().tolist()
    return values


def in_torch(x: Inputs, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(_fused, "usable", lambda x: False)
        patch.setattr(_fused, "readable", lambda tensor: False)
        return combine(x, stages)


def family(shape: tuple[int, ...], k: int, dtype: torch.dtype, seed: int = 0, coarse: bool = False) -> Inputs:
    """A base and k experts, not all of one dtype; `coarse` puts them on a grid, so that magnitudes tie."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        if coarse:
            return torch.randint(-6, 7, shape, generator=generator) / 16
        return torch.randn(shape, generator=generator)

    base = draw()
    experts = [(base + 0.2 * draw() if not coarse else draw()).to(dtype) for _ in range(k)]
    if k > 1:
        experts[-1] = experts[-1].float()
    return Inputs(NAME, base.to(dtype), tuple(experts), seed=seed)


SPARSE = st.one_of(
    st.builds(Sparsify),
    st.builds(
        Sparsify, st.just("magnitude"), st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]), sparsify_1d=st.booleans()
    ),
    st.builds(
        Sparsify, st.just("outliers"), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.01, 0.2]),
        scope=st.sampled_from(["tensor", "row"]), sparsify_1d=st.booleans(),
    ),
    st.builds(Sparsify, st.just("random"), st.sampled_from([0.0, 0.3, 0.9, 1.0]), sparsify_1d=st.booleans()),
    st.builds(
        Sparsify, st.just("ranked"), st.sampled_from([0.0, 0.4, 0.6, 1.0]), epsilon=st.sampled_from([0.0, 0.3]),
        sparsify_1d=st.booleans(),
    ),
)  # fmt: skip


@QUIET
@given(st.data(), st.sampled_from([(), (1,), (7,), (5, 1), (33, 65), (2, 3, 4)]), st.integers(1, 6), st.booleans())
def test_the_compiled_pass_has_the_bits_of_torch(data: st.DataObject, shape: Any, k: int, coarse: bool) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = family(shape, k, dtype, data.draw(st.integers(0, 99)), coarse)
    stages = Stages(
        weights=tuple(data.draw(st.sampled_from([0.0, 1.0, 0.3, -0.7])) for _ in range(k)),
        sparsify=tuple(data.draw(SPARSE) for _ in range(k)),
        rescale=data.draw(st.sampled_from(["none", "inv_prob", "l1", "l2"])),
        election=data.draw(st.sampled_from(["none", "weighted", "unweighted"])),
        normalize=data.draw(st.booleans()),
        lambda_=data.draw(st.sampled_from([1.0, 0.6])),
        select=data.draw(st.sampled_from([None, None, 0.1, 0.7])),
        energy_weights=data.draw(st.booleans()),
    )
    with pytest.MonkeyPatch.context() as patch:
        expected = bits(in_torch(x, stages, patch))
    assert torch.equal(bits(combine(x, stages)), expected)
    with_tables = replace(x, sources=tuple(range(k + 1)), tables=Tables())
    for _ in range(2):
        assert torch.equal(bits(combine(with_tables, stages)), expected)


@pytest.mark.parametrize("kind", ["none", "magnitude", "outliers", "random", "ranked"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_tensors_and_threads(kind: Any, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than two chunks, cut between threads, written to bfloat16 in place."""
    x = family((3 * 700 + 11, 1024), 2, torch.bfloat16)
    how = Sparsify(kind, 0.5, 0.01 if kind == "outliers" else 0.0, 0.2)
    stages = Stages((0.6, 0.5), (how, replace(how, density=0.3)), "inv_prob", "weighted", normalize=True)
    expected = in_torch(x, stages, monkeypatch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(bits(combine(x, stages)), bits(expected))
        target = Target(torch.empty(x.reference.shape, dtype=torch.bfloat16))
        result = combine(replace(x, target=target), stages)
    finally:
        torch.set_num_threads(before)
    assert result is target.tensor and target.finite
    assert torch.equal(bits(result), bits(expected.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_pass_sees_what_is_not_finite(dtype: torch.dtype) -> None:
    x = family((40, 40), 2, torch.float32)
    largest = 3e38  # finite in float32; twice that is not, and 3.4e38 rounds up to infinity in bfloat16
    for value, finite in [(math.nan, False), (math.inf, False), (1.0, True), (largest, True)]:
        expert = x.experts[0].clone()
        expert[7, 9] = value
        target = Target(torch.empty(40, 40, dtype=dtype))
        y = replace(x, experts=(expert, x.experts[1]), target=target)
        sparse = Sparsify("random", 0.5)
        combine(y, Stages((1.0, 0.5), (sparse, sparse), election="weighted"))
        dropped = bool(target.tensor[7, 9] == x.reference[7, 9].to(dtype))
        assert target.finite is (finite or (dropped and math.isfinite(value))), value


def test_round_to_nearest_even_as_torch_does() -> None:
    every = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    every = torch.cat([every, -every, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, 3.4e38])])
    every = every[~every.isnan()]
    target = Target(torch.empty(every.shape, dtype=torch.bfloat16))
    x = Inputs(NAME, None, (every,), target=target)
    result = _fused.blend(x, [every], [1.0])
    assert torch.equal(bits(result), bits(every.to(torch.bfloat16)))


# ---- selection ----------------------------------------------------------------------------------------


@QUIET
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=60),
    st.integers(0, 61),
    st.booleans(),
    st.sampled_from([1.0, 1e-30]),
)  # fmt: skip
def test_cuts_keep_exactly_k(values: list[int], k: int, in_torch: bool, unit: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32) * unit
    x = Inputs(NAME, torch.zeros_like(delta), (delta,))
    with pytest.MonkeyPatch.context() as patch:
        if in_torch:
            patch.setattr(_fused, "usable", lambda x: False)
        (cut,) = magnitude_cuts(x, [min(k, len(values))])
    size = delta.abs()
    order = sorted(range(len(values)), key=lambda j: (-float(size[j]), j))[: min(k, len(values))]
    expected = [j in order and float(size[j]) > 0.0 for j in range(len(values))]
    assert cut.mask(size).tolist() == expected
    if 0 < k < len(values):
        assert expected == keep_largest(delta, (k + 0.5) / len(values)).tolist()


def test_a_new_density_reads_the_table_and_repeats_nothing() -> None:
    x = family((64, 64), 2, torch.bfloat16)
    x = replace(x, sources=(("b", NAME), ("x", NAME), ("y", NAME)), tables=Tables())
    combine(x, Stages((1.0, 1.0), (Sparsify("magnitude", 0.3),) * 2))
    made = x.tables.made
    assert made == 3  # the buckets, the cuts, and the (empty) cuts of outliers
    combine(x, Stages((0.5, 0.2), (Sparsify("magnitude", 0.3),) * 2))
    assert x.tables.made == made
    combine(x, Stages((0.5, 0.2), (Sparsify("magnitude", 0.4),) * 2))
    assert x.tables.made == made + 1


@QUIET
@given(st.integers(0, 50), st.sampled_from([0.05, 0.2, 0.5, 1.0]), st.booleans(), st.booleans())
def test_variance_cut(seed: int, share: float, in_torch: bool, coarse: bool) -> None:
    x = family((9, 7), 3, torch.float32, seed, coarse)
    variance = np.var([np.array(flat(x.deltas[i])) for i in range(3)], axis=0)
    varying = int((variance > 1e-9).sum())
    with pytest.MonkeyPatch.context() as patch:
        if in_torch:
            patch.setattr(_fused, "usable", lambda x: False)
        cut = variance_cut(x, share)
        mask = cut.mask(_select.torch_variance(x))
    assert int(mask.sum()) == max(1, math.floor(share * varying)) or share == 1.0
    assert variance[mask.flatten().numpy()].min() >= np.sort(variance)[::-1][int(mask.sum()) - 1] * (1 - 1e-5)


# ---- against the slow text ----------------------------------------------------------------------------


def call(name: str, x: Inputs, **parameters: Any) -> list[float]:
    return flat(registry.get("methods", name)(x, **parameters))


def close(found: list[float], expected: list[float], tolerance: float = 2e-6) -> None:
    scale = max([1.0, *map(abs, expected)])
    assert np.allclose(found, expected, rtol=0, atol=tolerance * scale)


@QUIET
@given(st.data(), st.sampled_from([(7,), (5, 1), (1, 6), (3, 4)]), st.integers(1, 4), st.booleans())
def test_breadcrumbs(data: st.DataObject, shape: Any, k: int, elect: bool) -> None:
    x = family(shape, k, torch.float32, data.draw(st.integers(0, 999)), coarse=data.draw(st.booleans()))
    weights = [data.draw(st.integers(-6, 12)) / 8 for _ in range(k)]
    densities = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])) for _ in range(k)]
    gamma = data.draw(st.sampled_from([0.0, 0.01, 0.2, 0.5]))
    normalize = data.draw(st.booleans())
    deltas = slow.differences(flat(x.reference), [flat(e) for e in x.experts])
    kept = [slow.breadcrumbs(d, rho, gamma) for d, rho in zip(deltas, densities, strict=True)]
    live = [w if rho > 0 else 0.0 for w, rho in zip(weights, densities, strict=True)]
    combine_slowly = slow.elect if elect else slow.add_up
    if not elect and normalize:
        live = weights
    expected = combine_slowly(flat(x.reference), kept, live, normalize=normalize)
    name = "breadcrumbs_ties" if elect else "breadcrumbs"
    found = call(
        name, x, weight=weights, density=densities, gamma=gamma, normalize=normalize, sparsify_1d=True
    )  # fmt: skip
    close(found, expected)


@QUIET
@given(st.data(), st.sampled_from([(7,), (5, 1), (3, 9)]), st.booleans())
def test_della(data: st.DataObject, shape: Any, elect: bool) -> None:
    x = family(shape, 2, torch.float32, data.draw(st.integers(0, 999)), coarse=data.draw(st.booleans()))
    density, epsilon = data.draw(st.sampled_from([(0.5, 0.25), (0.3, 0.2), (0.7, 0.0)]))
    weights = [0.75, -0.5]
    deltas = slow.differences(flat(x.reference), [flat(e) for e in x.experts])
    row = shape[-1]
    sparse = [
        slow.della(d, row, density, epsilon, seed=x.seed, tensor_name=x.name, stream=i) for i, d in enumerate(deltas)
    ]
    combine_slowly = slow.elect if elect else slow.add_up
    expected = combine_slowly(flat(x.reference), sparse, weights, normalize=elect)
    found = call(
        "della" if elect else "della_linear", x, weight=weights, density=density, epsilon=epsilon, sparsify_1d=True
    )  # fmt: skip
    close(found, expected, 1e-5)


def test_della_keep_probabilities_of_the_worked_example() -> None:
    from evomerge.methods._sparsify import probability_line, torch_ranks

    delta = torch.tensor([[4.0, -3.0, 0.5, 0.0, 2.0, -1.0]])
    x = Inputs(NAME, torch.zeros_like(delta), (delta,))
    lowest, step = probability_line(Sparsify("ranked", 0.5, epsilon=0.25), delta.shape)
    ranks = torch_ranks(x, 0)[0].numpy()
    assert np.allclose(lowest + step * ranks, [0.75, 0.65, 0.35, 0.25, 0.55, 0.45])
    assert ranks.tolist() == _fused.row_ranks(x, 0).tolist()


def test_della_refuses_probabilities_outside_the_unit_interval() -> None:
    x = family((4, 4), 1, torch.float32)
    with pytest.raises(CandidateFailure, match=r"0 to 0\.6"):
        call("della", x, density=0.3, epsilon=0.3)
    call("della", x, density=0.3, epsilon=0.95, window="relative")
    call("della", x, density=1.0, epsilon=0.3)


@QUIET
@given(st.data(), st.sampled_from([(7,), (5, 1), (3, 4), ()]), st.integers(1, 4), st.booleans())
def test_sce(data: st.DataObject, shape: Any, k: int, everything: bool) -> None:
    x = family(shape, k, torch.float32, data.draw(st.integers(0, 999)))
    share = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    deltas = slow.differences(flat(x.reference), [flat(e) for e in x.experts])
    expected = slow.sce(flat(x.reference), deltas, share, sum_all=everything)
    close(call("sce", x, select_topk=share, sum_scope="all" if everything else "selected"), expected, 1e-5)


def worked() -> Inputs:
    first = torch.tensor([[4.0, -3.0, 0.5, 0.0, 2.0, -1.0]])
    second = torch.tensor([[1.0, 3.0, -2.0, 0.1, 2.0, 0.0]])
    return Inputs(NAME, torch.zeros(1, 6), (first, second))


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("sce", {"select_topk": 0.5}, [3.142857, 3, 0, 0, 0, 0]),
        ("sce", {"select_topk": 0.5, "sum_scope": "all"}, [3.142857, 3, -2, 0.1, 2, -1]),
        ("ties", {"density": 0.5}, [4, 3, -2, 0, 2, 0]),
        ("ties", {"density": 0.5, "normalize": False}, [4, 3, -2, 0, 4, 0]),
        ("ties", {"density": 0.5, "weight": [0.6, 0.4]}, [4, -3, -2, 0, 2, 0]),
        ("ties", {"weight": [0.75, 0.25]}, [3.25, -3, -2, 0.1, 2, -1]),
        ("task_arithmetic", {"lambda": 0.5}, [2.5, 0, -0.75, 0.05, 2, -0.5]),
    ],
)
def test_worked_examples(name: str, parameters: dict[str, Any], expected: list[float]) -> None:
    assert np.allclose(call(name, worked(), **parameters), expected, atol=1e-6)


def test_breadcrumbs_worked_example() -> None:
    x = replace(worked(), experts=worked().experts[:1])
    x = replace(x, streams=(0,))
    assert call("breadcrumbs", x, density=0.5, gamma=0.17) == [0, -3, 0, 0, 2, -1]


def test_sce_of_experts_that_agree_is_that_expert() -> None:
    expert = torch.randn(8, 8)
    x = Inputs(NAME, torch.zeros(8, 8), (expert, expert.clone()))
    assert np.allclose(call("sce", x, select_topk=0.1), flat(expert), atol=1e-6)


# ---- a whole model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_1d", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.2, 0.61, 1.0])
@pytest.mark.parametrize("how", ["compiled", "torch"])
def test_ties_over_the_whole_model(with_1d: bool, density: float, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trimmed like one long vector, ties to the first tensor: against a sort of everything."""
    if how == "torch":
        monkeypatch.setattr(_fused, "usable", lambda x: False)
    generator = torch.Generator().manual_seed(5)
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("q_proj", "norm")]
    shapes = [(6, 8), (8,)] * 3
    models = {
        m: {n: torch.randint(-9, 10, s, generator=generator) / 16 for n, s in zip(names, shapes, strict=True)}
        for m in ("b", "x", "y")
    }
    recipe = Recipe.build(
        "ties", "b", {"x": {"density": density}, "y": {"density": 1.0}},
        parameters={"scope": "global", "sparsify_1d": with_1d},
    )  # fmt: skip
    merge = Merge(recipe, recipe.plan(names, 3), lambda m, t: models[m][t])
    taking = [n for n in names if with_1d or "norm" not in n]
    long = torch.cat([(models["x"][n] - models["b"][n]).flatten() for n in taking])
    pieces = (long * keep_largest(long, density)).split([models["b"][n].numel() for n in taking])
    kept = dict(zip(taking, pieces, strict=True))
    for plan in merge.plans:
        base, other = models["b"][plan.name], models["y"][plan.name]
        own = kept.get(plan.name, (models["x"][plan.name] - base).flatten())
        expected = slow.elect(flat(base), [flat(own), flat(other - base)], [1.0, 1.0])
        close(flat(merge.tensor(plan)), expected)


def test_sums_have_one_order() -> None:
    """Compiled and torch sums agree to the bit, over several chunks and a ragged end."""
    a, b = torch.randn((1 << 20) * 2 + 70001), torch.randn((1 << 20) * 2 + 70001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "readable", lambda tensor: False)
        slowly = fixed_dot(a, b), fixed_norm1(a)
    assert slowly == (fixed_dot(a, b), fixed_norm1(a))
    assert math.isclose(slowly[0], float((a.double() * b.double()).sum()), rel_tol=1e-9, abs_tol=1e-6)
    assert fixed_dot(torch.empty(0), torch.empty(0)) == 0.0


@pytest.mark.parametrize(
    ("name", "own", "stages"),
    [
        ("task_arithmetic", {"normalize": True}, {"normalize": True}),
        ("ties", {"density": 0.4}, {"sparsify": "magnitude", "density": 0.4, "combine_by": "elect", "normalize": True}),
        (
            "dare_linear",
            {"density": 0.4},
            {"sparsify": "random", "density": 0.4},
        ),
        (
            "della",
            {"density": 0.4, "epsilon": 0.5, "window": "relative"},
            {"sparsify": "ranked", "density": 0.4, "epsilon": 0.5, "combine_by": "elect",
             "normalize": True},
        ),
        (
            "breadcrumbs",
            {"density": 0.4, "gamma": 0.05, "scope": "row"},
            {"sparsify": "outliers", "density": 0.4, "gamma": 0.05, "scope": "row"},
        ),
        (
            "sce",
            {"select_topk": 0.3},
            {"select_topk": 0.3, "energy_weights": True, "combine_by": "elect", "sign_election": "unweighted",
             "normalize": True},
        ),
        ("consensus", {"k": 2, "mask_lambda": 0.4}, {"agree": 2, "importance": 0.4}),
    ],
)  # fmt: skip
def test_the_family_is_a_pipeline(name: str, own: dict[str, Any], stages: dict[str, Any]) -> None:
    x = family((33, 65), 3, torch.bfloat16)
    weight = {} if name == "consensus" else {"weight": [0.6, 0.3, -0.2]}
    ours = call(name, x, **weight, **own, **{"lambda": 0.7})
    assert np.allclose(call("pipeline", x, **weight, **stages, **{"lambda": 0.7}), ours, rtol=0, atol=1e-6)


def test_pipeline_counts_each_tensor_where_the_scope_is_anothers() -> None:
    x = family((8, 9), 2, torch.float32)
    for kind in ("random", "ranked", "magnitude", "outliers"):
        plain = call("pipeline", x, sparsify=kind, density=0.5)
        other = {"magnitude": "row", "outliers": "global"}.get(kind, "global")
        assert call("pipeline", x, sparsify=kind, density=0.5, scope=other) == plain
    assert call("pipeline", x, sparsify="outliers", density=0.5, scope="row") != plain


def test_compiled_code_is_stale_as_soon_as_any_of_its_files_changes() -> None:
    from evomerge.methods import _kernel_tables, _kernels

    for module in (_kernels, _kernel_tables):
        for loop in vars(module).values():
            cache = getattr(loop, "_cache", None)
            if hasattr(cache, "_cache_file"):
                assert cache._cache_file._source_stamp == _kernels._STAMP
    assert _kernels.sweep._cache._cache_file is not None
    blocks = (_fused.CHUNK, _fused.LANES, _fused.STRIP)
    assert all(size % _kernels.BLOCK == 0 for size in blocks)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", ["grid", "continuous", "both", "zeros"])
def test_heavy_buckets_are_counted_exactly(case: str, threads: int) -> None:
    """Every range of the table holds as many scores as a plain count finds; cuts equal a sort's."""
    generator = torch.Generator().manual_seed(3)
    n = (1 << 20) * 2 + 4097
    grid = torch.randint(-40, 41, (n,), generator=generator) / 1024
    smooth = torch.rand(n, generator=generator) * 0.001 + 0.5
    delta = {
        "grid": grid,
        "continuous": smooth,
        "both": torch.where(torch.rand(n, generator=generator) < 0.5, grid, smooth),
        "zeros": grid * (torch.rand(n, generator=generator) < 0.001),
    }[case]
    x = Inputs(NAME, torch.zeros(n), (delta,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        (table,) = _select._buckets(x, variance=False)
        cuts = {k: magnitude_cuts(x, [k])[0] for k in (1, n // 50, n // 3, n - 5)}
    finally:
        torch.set_num_threads(before)
    size = delta.abs().view(torch.int32).numpy()
    assert table.n == n and (table.spans[table.lows > 0] == 1).any() == (case not in ("continuous", "zeros"))
    edges = np.searchsorted(np.sort(size), np.stack([table.lows, table.lows + table.spans]))
    assert (edges[1] - edges[0] == table.counts).all()
    for k, cut in cuts.items():
        order = np.argsort(-size.astype(np.int64), kind="stable")[:k]
        expected = np.zeros(n, bool)
        expected[order] = True
        assert (cut.mask(delta.abs()).numpy() == (expected & (size > 0))).all(), k
