"""Number-by-number comparison with mergekit 0.1.5; tests/golden/README.md describes the data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from evomerge import registry
from evomerge.methods import Inputs, Method, keep_largest, keep_mask, merge_tensor
from evomerge.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
PUBLIC = json.loads((GOLDEN / "public" / "index.json").read_text())
E2E = json.loads((GOLDEN / "e2e" / "index.json").read_text())["recipes"]
KNOWN = registry.names("methods")

CASES = [case for case in PUBLIC["cases"] if case["method"] in KNOWN]
MISSING = sorted({case["method"] for case in PUBLIC["cases"]} - set(KNOWN))
STATISTICS = [entry for entry in PUBLIC["statistics"] if entry["method"] in KNOWN]


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "public" / PUBLIC["tensor_file"])


def inputs_of(case: dict[str, Any], **extra: Any) -> Inputs:
    found = tensors()
    return Inputs(
        name=case["id"],
        base=found[case["base"]] if case["base"] else None,
        experts=tuple(found[name] for name in case["models"]),
        compat="mergekit",
        **extra,
    )


def parameters_of(method: Method, case: dict[str, Any]) -> dict[str, Any]:
    """The case's settings with nulls (mergekit's "not given") replaced by our defaults."""
    result = {}
    for name, value in case["params"].items():
        param = method.parameter(name)
        assert param is not None, name
        if isinstance(value, list):
            value = [param.default if item is None else item for item in value]
        result[name] = value
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_tensor_case(case: dict[str, Any]) -> None:
    found = tensors()
    masks = case.get("masks")

    def recorded(i: int) -> torch.Tensor | None:
        name = masks[i] if masks else None
        return found[name] if name else None

    method: Method = registry.get("methods", case["method"])
    x = inputs_of(case, keep=recorded)
    before = [tensor.clone() for tensor in (*x.experts, *([] if x.base is None else [x.base]))]
    result = method(x, **parameters_of(method, case))
    expected = found[case["output"]]
    assert result.dtype == expected.dtype and result.shape == expected.shape
    difference = (result.double() - expected.double()).abs()
    if "fragile" in case:
        difference[found[case["fragile"]].bool()] = 0
    assert difference.max() <= case["atol"]
    after = [*x.experts, *([] if x.base is None else [x.base])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


TRIMMED = [case for case in CASES if case["method"] == "ties"]


@pytest.mark.parametrize("case", TRIMMED, ids=lambda case: case["id"])
def test_own_selection_of_ties(case: dict[str, Any]) -> None:
    """Without the recorded masks: equal where magnitudes do not tie, else equal to the rule."""
    found = tensors()
    base = found[case["base"]]
    for i, (name, density) in enumerate(zip(case["models"], case["params"]["density"], strict=True)):
        size = (found[name] - base).abs()
        mask = keep_largest(found[name] - base, density)
        recorded = case["masks"][i] if case.get("masks") else None
        if density >= 1 or density <= 0:
            assert mask.sum() == (size > 0).sum() * (density >= 1)
            continue
        k = max(1, int(density * size.numel()))
        assert mask.sum() == min(k, int((size > 0).sum()))
        cutoff = size.flatten().sort(descending=True).values[k - 1]
        assert mask[(size > cutoff)].all() and not mask[size < cutoff].any()
        if recorded and "selection_ties" not in case:
            assert torch.equal(mask, found[recorded].bool() & (size > 0))
    if "selection_ties" not in case:
        method: Method = registry.get("methods", "ties")
        result = method(inputs_of(case), **parameters_of(method, case))
        difference = (result - found[case["output"]]).abs()
        if "fragile" in case:
            difference[found[case["fragile"]].bool()] = 0
        assert difference.max() <= case["atol"]


@pytest.mark.parametrize("entry", STATISTICS, ids=lambda entry: entry["id"])
def test_statistics_of_random_methods(entry: dict[str, Any]) -> None:
    found = tensors()
    method: Method = registry.get("methods", entry["method"])
    settings = parameters_of(method, entry)
    draws = 300
    results = torch.stack([method(inputs_of(entry, seed=seed), **settings) for seed in range(draws)])
    mean, std = found[entry["mean"]], found[entry["std"]]
    error = (results.double().mean(dim=0) - mean).abs()
    assert (error <= 5 * std * np.sqrt(1 / draws + 1 / entry["draws"]) + 1e-6).all()
    assert torch.allclose(results.double().std(dim=0), std.double(), rtol=0.3, atol=1e-6)
    kept = torch.stack(
        [keep_mask(64, entry["params"]["density"][0], seed=seed, tensor_name="t", stream=0) for seed in range(draws)]
    ).float()
    spread = entry["kept_fraction_std"]
    assert abs(kept.mean() - entry["kept_fraction_mean"]) < 5 * spread / np.sqrt(draws)


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("entry", E2E, ids=lambda entry: entry["name"])
def test_whole_checkpoint(entry: dict[str, Any]) -> None:
    if entry["method"] not in KNOWN:
        pytest.skip(f"the registry has no method {entry['method']!r} yet")
    folder = GOLDEN / "e2e"
    recipe = Recipe.from_yaml((folder / entry["config"]).read_text(), entry["config"])
    assert recipe.compat == "mergekit" and recipe.method == entry["method"]
    models = {path: read_model(folder / path) for path in recipe.models}
    plans = recipe.plan(models[recipe.models[0]], n_layers=4)
    result = {plan.name: merge_tensor(plan, lambda m, t: models[m][t], recipe) for plan in plans}
    assert len(result) == len(plans)
    expected = load_file(folder / entry["expected"])
    assert result.keys() == expected.keys() and len(result) == entry["tensors"]
    fragile = load_file(folder / entry["fragile"]) if "fragile" in entry else {}
    unequal = total = 0
    for name, reference in expected.items():
        assert result[name].dtype == reference.dtype == getattr(torch, entry["dtype"])
        assert result[name].shape == reference.shape
        ours, theirs = result[name].double().flatten(), reference.double().flatten()
        if name in fragile:
            ours[fragile[name].long()] = theirs[fragile[name].long()]
        limit = entry["atol"] + entry["rtol"] * theirs.abs()
        assert ((ours - theirs).abs() <= limit).all(), name
        unequal += int((ours != theirs).sum())
        total += ours.numel()
    assert unequal <= entry["max_unequal_fraction"] * total


def test_what_is_left_out_is_exactly_what_does_not_exist() -> None:
    assert not MISSING
    assert {case["method"] for case in CASES} >= {
        *("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough")
    }
