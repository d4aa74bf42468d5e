"""What methods know of a whole merge: by model, whatever order or number of models a slice lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge import registry
from evomerge.methods import Inputs, Merge, Tables, _fused
from evomerge.recipe import Recipe

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("q_proj", "norm")]


def models(k: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    base = {n: torch.randn((12, 10) if "q_proj" in n else (10,), generator=generator) for n in NAMES}
    made = {"b": base} | {
        f"m{i}": {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for i in range(k)
    }
    return {m: {n: t.to(dtype) for n, t in tensors.items()} for m, tensors in made.items()}


def merged(recipe: Recipe, given: dict[str, dict[str, Tensor]], tables: Tables | None = None) -> list[Tensor]:
    merge = Merge(recipe, recipe.plan(NAMES, 4), lambda m, t: given[m][t], tables)
    return [merge.tensor(plan) for plan in merge.plans]


def sliced(method: str, first: list[str], second: list[str], parameters: dict[str, Any]) -> Recipe:
    def piece(listed: list[str], layers: list[int]) -> dict[str, Any]:
        return {"sources": [{"model": m, "layer_range": layers} for m in listed]}

    slices = [piece(first, [0, 2]), piece(second, [2, 4])]
    data = {"merge_method": method, "base_model": "b", "compat": "paper", "slices": slices, "parameters": parameters}
    return Recipe.from_dict(data)


GLOBAL = [
    ("ties", {"scope": "global", "density": 0.3}),
    ("pipeline", {"sparsify": "magnitude", "scope": "global", "density": 0.3}),
    ("pcb", {"scope": "global"}),
    ("varm", {"granularity": "model"}),
    ("doge", {"steps": 5}),
    ("task_arithmetic", {"lines_match": True, "lines_beta": 0.5}),
]


@pytest.mark.parametrize(("method", "parameters"), GLOBAL, ids=lambda value: str(value))
def test_the_order_in_which_a_slice_lists_its_models_does_not_count(method: str, parameters: dict[str, Any]) -> None:
    given = models()
    same = merged(sliced(method, ["m0", "m1"], ["m0", "m1"], parameters), given)
    swapped = merged(sliced(method, ["m0", "m1"], ["m1", "m0"], parameters), given)
    for a, b in zip(same, swapped, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "parameters"), GLOBAL, ids=lambda value: str(value))
def test_slices_may_have_different_numbers_of_models(method: str, parameters: dict[str, Any]) -> None:
    given = models()
    few, many = ["m0", "m1"], ["m0", "m1", "m2"]
    for first, second in ((few, many), (many, few)):
        assert all(t.isfinite().all() for t in merged(sliced(method, first, second, parameters), given))


@pytest.mark.parametrize("method", ["slerp", "varm", "widen", "pcb", "tsv_m", "wudi", "iso_c", "sce", "model_stock"])
def test_arithmetics_do_not_share_tables(method: str) -> None:
    given = models()
    experts = {"m0": {}} if method == "slerp" else {"m0": {}, "m1": {}}
    parameters = {"t": 0.3} if method == "slerp" else {}
    tables = Tables()
    for dtype in ("bfloat16", "float32"):
        recipe = Recipe.build(method, "b", experts, parameters=parameters, compat="mergekit", dtype=dtype)
        for shared, alone in zip(merged(recipe, given, tables), merged(recipe, given), strict=True):
            assert torch.equal(shared, alone)
    wide = {**given, "m1": {n: t.double() for n, t in given["m1"].items()}}
    recipe = Recipe.build(method, "b", experts, parameters=parameters)
    tables = Tables()
    merged(recipe, wide, tables)
    for shared, alone in zip(merged(recipe, given, tables), merged(recipe, given), strict=True):
        assert torch.equal(shared, alone)


@pytest.mark.parametrize("spare", [-1, 0, 32, 63, 64, 1300])
def test_a_budget_that_the_variance_just_misses(spare: int) -> None:
    """The address that a loop reads is that of memory which is held, whether the table is kept or not."""
    shape = (512, 256)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    experts = tuple(base + 0.01 * torch.randn(shape, generator=generator) for _ in range(3))
    x = Inputs("w", base, experts)
    sce = registry.get("methods", "sce")
    expected = sce(x, select_topk=0.1)
    budget = 4 * base.numel() + spare
    y = Inputs("w", base, experts, sources=(("b", "w"), ("x", "w"), ("y", "w"), ("z", "w")), tables=Tables(budget))
    for _ in range(3):
        assert torch.equal(sce(y, select_topk=0.1), expected)


@pytest.mark.parametrize("compiled", [True, False])
def test_infinite_weights_stay_inside_the_counts(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(_fused, "usable", lambda x: False)
    base = torch.full((64, 64), torch.inf)
    x = Inputs("w", base, (base.clone(), base.clone() * -1))
    for name, parameters in [("sce", {"select_topk": 0.3}), ("ties", {"density": 0.3})]:
        assert not registry.get("methods", name)(x, **parameters).isfinite().any()


def test_a_density_below_the_finest_mask_keeps_nothing() -> None:
    x = Inputs("w", torch.zeros(4, 4), (torch.ones(4, 4), torch.ones(4, 4)))
    for name in ("dare_linear", "dare_ties"):
        assert registry.get("methods", name)(x, density=[1e-12, 1.0]).eq(1.0).all()


def test_a_line_scales_the_methods_own_lambda() -> None:
    x = Inputs("w", torch.zeros(4, 4), (torch.ones(4, 4), torch.ones(4, 4)))
    consensus = registry.get("methods", "consensus")
    assert torch.allclose(consensus(x, lines_alpha=0.5), 0.5 * consensus(x))


def test_karcher_with_no_tolerance_is_finite() -> None:
    a = torch.randn(5, 5)
    karcher = registry.get("methods", "karcher")
    assert karcher(Inputs("w", None, (a, a.clone())), tol=0.0).isfinite().all()
    assert karcher(Inputs("w", None, (a, torch.zeros(5, 5))), tol=0.0).isfinite().all()
