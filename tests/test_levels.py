"""Tests of what an optimizer may know of a space: nested levels, kinds of coordinates, the base's point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge import registry
from evomerge.optimizers import Level
from evomerge.space import Natural, SearchSpace
from evomerge.strict_yaml import load_yaml

QUIET = settings(deadline=None, derandomize=True, max_examples=30)
EXPERTS = {"math": "models/math", "code": "models/code"}
LAYERS = 8
SHIPPED = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
SHIPPED = [path for path in SHIPPED if not path.stem.startswith("path_")]  # those of layer orders: test_path_space
Array = NDArray[np.float64]


def space(spec: dict[str, Any], n_layers: int = LAYERS, experts: dict[str, str] = EXPERTS) -> SearchSpace:
    return SearchSpace.from_dict(spec, "models/base", experts, n_layers, 3)


def shipped(path: Path) -> SearchSpace:
    spec = load_yaml(path.read_text(encoding="utf-8"), path.name).data
    listed = spec["method"] if isinstance(spec["method"], list) else [spec["method"]]
    single = any(registry.get("methods", name).n_experts[1] == 1 for name in listed)
    return space(spec, 12, {"math": "models/math"} if single else EXPERTS)


def levels(made: SearchSpace) -> dict[str, Level]:
    return {level.name: level for level in made.facts().levels}


def sizes(made: SearchSpace) -> list[tuple[str, int]]:
    return [(level.name, level.dim) for level in made.facts().levels]


WEIGHT = {"low": 0.0, "high": 1.2}
LAYERED = {"method": "task_arithmetic", "components": ["attention", "mlp", "rest"], "genes": {"weight": WEIGHT}}
PARTED = ["attention", "mlp", "norms", "embeddings", "head"]
RICH = {
    "method": ["dare_ties", "task_arithmetic", "ties"],
    "layer_groups": "each",
    "components": ["attention", "rest"],
    "genes": {
        "weight": WEIGHT,
        "density": {"low": 0.05, "high": 0.95, "scale": "logit", "per_component": False},
        "lambda": {"low": 0.5, "high": 1.5, "line": True},
        "sign_election": {"choices": ["weighted", "unweighted"], "per_group": True},
        "normalize": "search",
    },
}


# ------------------------------------------------------------------------------------- what the levels are


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"method": "task_arithmetic", "genes": {"weight": WEIGHT}}, [("model", 2)]),
        (LAYERED, [("model", 2), ("groups", 6)]),
        ({**LAYERED, "layer_groups": 3}, [("model", 2), ("groups", 18)]),
        ({**LAYERED, "layer_groups": 5}, [("model", 2), ("groups", 24), ("layers", 30)]),
        ({**LAYERED, "layer_groups": 6}, [("model", 2), ("groups", 24), ("layers", 36)]),
        ({**LAYERED, "layer_groups": "each"}, [("model", 2), ("groups", 24), ("smooth", 42), ("layers", 48)]),
        ({"method": "task_arithmetic", "genes": {"weight": {"curve": 3}}}, [("model", 2), ("groups", 6)]),
        ({"method": "task_arithmetic", "genes": {"weight": {"curve": 8}}},
         [("model", 2), ("groups", 8), ("smooth", 14), ("whole", 16)]),
        ({"method": "task_arithmetic", "genes": {"weight": {"line": True}}}, [("model", 2), ("groups", 4)]),
        ({"method": "ties", "genes": {"weight": WEIGHT, "normalize": "search"}}, [("model", 2), ("operator", 3)]),
        ({"method": "ties", "genes": {"normalize": "search"}}, [("operator", 1)]),
        ({"method": "consensus", "layer_groups": 2, "genes": {"k": {"low": 1, "high": 3, "per_group": True}}},
         [("model", 1), ("groups", 2)]),
        (RICH, [("model", 5), ("operator", 8), ("groups", 32), ("smooth", 50), ("layers", 60)]),
        # of 5 layer groups, 4 blocks leave one cosine
        ({"method": "task_arithmetic", "layer_groups": 5,
          "genes": {"weight": {"curve": 8}, "lambda": {"per_group": True}}},
         [("model", 3), ("groups", 12), ("smooth", 19), ("layers", 21)]),
        ({**LAYERED, "layer_groups": "each", "components": PARTED},
         [("model", 2), ("groups", 28), ("smooth", 46), ("layers", 52)]),
    ],
)  # fmt: skip
def test_levels_are_listed_coarse_to_fine_and_once(spec: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    made = space(spec)
    assert sizes(made) == expected
    whole = made.facts().levels[-1]
    assert np.array_equal(whole.matrix, np.eye(made.dim)) and not whole.origin.any()
    for level in made.facts().levels:
        assert np.linalg.matrix_rank(level.matrix) == level.dim  # every point has one place in the level


def test_blocks_of_depth_are_neighbouring_layer_groups() -> None:
    made = space({"method": "task_arithmetic", "layer_groups": "each", "genes": {"weight": WEIGHT}}, 10)
    z = np.arange(8) / 8
    params = made.decode(levels(made)["groups"].embed(z))
    found = [params[f"math.weight.L{i:02d}-{i:02d}"] for i in range(10)]
    assert found == [round(1.2 * z[block], 4) for block in (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)]


def test_the_smooth_level_bends_over_depth_and_is_flat_in_the_middle() -> None:
    made = space({"method": "task_arithmetic", "layer_groups": "each", "genes": {"weight": WEIGHT}}, 16)
    groups, smooth = levels(made)["groups"], levels(made)["smooth"]
    z = np.concatenate([np.full(groups.dim, 0.5), np.full(smooth.dim - groups.dim, 0.5)])
    assert smooth.embed(z) == pytest.approx(np.full(made.dim, 0.5))
    z[groups.dim] = 1.0  # the first cosine of the first expert
    bent = smooth.embed(z)
    assert bent[:16] == pytest.approx(0.5 + 0.25 * np.cos(np.pi * (np.arange(16) + 0.5) / 16))
    assert bent[16:] == pytest.approx(np.full(16, 0.5))
    z[groups.dim] = 0.0
    assert smooth.embed(z)[:16] == pytest.approx(1.0 - bent[:16])


def test_choices_and_what_the_first_method_ignores_are_fixed_until_the_operator_level() -> None:
    made = space({"method": ["task_arithmetic", "ties"], "genes": {"weight": WEIGHT, "density": "search"}})
    assert sizes(made) == [("model", 2), ("operator", 5)]
    for z in ([0.0, 1.0], [1.0, 0.25]):
        params = made.decode(levels(made)["model"].embed(np.array(z)))
        assert params == made.start() | {"math.weight": round(1.2 * z[0], 4), "code.weight": round(1.2 * z[1], 4)}


def test_a_line_is_flat_in_the_model_level_even_if_it_starts_bent() -> None:
    line = {"low": 0.0, "high": 1.0, "line": {"low": -0.5, "high": 1.0, "start": 0.5}}
    made = space({"method": "task_arithmetic", "genes": {"weight": line}})
    params = made.decode(levels(made)["model"].embed(np.array([0.25, 0.75])))
    assert params == {
        "math.weight.alpha": 0.25, "math.weight.beta": 0.0, "code.weight.alpha": 0.75, "code.weight.beta": 0.0,
    }  # fmt: skip
    rising = {"low": 0.0, "high": 1.0, "line": {"low": 0.1, "high": 0.5}}
    assert sizes(space({"method": "task_arithmetic", "genes": {"weight": rising}})) == [("model", 4)]


# ------------------------------------------------------------------------------------- nesting

NESTED = {
    "layers": {**LAYERED, "layer_groups": "each"},
    "groups": {**LAYERED, "layer_groups": 4, "components": PARTED},
    "uneven": {**LAYERED, "layer_groups": [1, 1, 1, 3, 1, 1]},
    "curve": {"method": "task_arithmetic", "components": PARTED, "genes": {"weight": {"curve": 7}}},
    "line": {
        "method": "task_arithmetic",
        "components": PARTED,
        "genes": {"weight": {"low": 0, "high": 1, "line": True}},
    },
    "rich": RICH,
}


def spot(level: Level, values: Sequence[float]) -> Array:
    return np.resize(np.array(values), level.dim)


@pytest.mark.parametrize("name", NESTED)
@QUIET
@given(st.lists(st.floats(0, 1), min_size=11, max_size=11))
def test_every_coarse_point_is_a_point_of_each_finer_level(name: str, values: list[float]) -> None:
    made = space(NESTED[name])
    for coarse, fine in combinations(made.facts().levels, 2):
        x = coarse.embed(spot(coarse, values))
        if (x != coarse.origin + spot(coarse, values) @ coarse.matrix.T).any():
            continue  # clipped: only `smooth`, whose successor is the whole cube
        z = fine.project(x)
        assert z is not None, (coarse.name, fine.name)
        assert fine.embed(z) == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("name", NESTED)
@QUIET
@given(st.lists(st.floats(0, 1), min_size=11, max_size=11))
def test_recipes_of_a_coarse_level_are_recipes_of_each_finer_one(name: str, values: list[float]) -> None:
    """As a search does it: the point is decoded, recorded as natural values, and encoded again."""
    made = space(NESTED[name])
    found = [level for level in made.facts().levels if level.name != "smooth"]  # its own points round per layer
    for coarse, fine in combinations(found, 2):
        params = made.decode(coarse.embed(spot(coarse, values)))
        x = made.encode(params)
        inside, finer = coarse.project(x), fine.project(x)
        assert inside is not None and finer is not None
        recipe = made.recipe(params)
        assert made.recipe(made.decode(coarse.embed(inside))).fingerprint == recipe.fingerprint
        assert made.recipe(made.decode(fine.embed(finer))).fingerprint == recipe.fingerprint


@QUIET
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_group_points_are_points_of_the_smooth_level(values: list[float]) -> None:
    made = space(NESTED["layers"], 16)
    groups, smooth = levels(made)["groups"], levels(made)["smooth"]
    params = made.decode(groups.embed(spot(groups, values)))
    z = smooth.project(made.encode(params))
    assert z is not None and z[groups.dim :] == pytest.approx(np.full(smooth.dim - groups.dim, 0.5), abs=1e-9)
    assert made.recipe(made.decode(smooth.embed(z))).fingerprint == made.recipe(params).fingerprint


@QUIET
@given(st.lists(st.floats(0, 1), min_size=24, max_size=24))
def test_levels_make_the_recipes_of_the_spaces_that_have_only_their_genes(values: list[float]) -> None:
    """Per-expert task arithmetic, quarters by components, and single layers: one recipe, whatever the space."""
    fine = space({**LAYERED, "layer_groups": "each"})
    plain = space({"method": "task_arithmetic", "genes": {"weight": WEIGHT}})
    quarters = space({**LAYERED, "layer_groups": 4})
    for coarse, name in ((plain, "model"), (quarters, "groups")):
        z = np.array(values[: coarse.dim])
        recipe = coarse.recipe(coarse.decode(z))
        assert fine.recipe(fine.decode(levels(fine)[name].embed(z))).fingerprint == recipe.fingerprint
        assert (fine.point_of(recipe) or {}) == fine.decode(levels(fine)[name].embed(z))
    assert quarters.recipe(quarters.decode(levels(quarters)["model"].embed(np.array(values[:2])))).fingerprint == (
        plain.recipe(plain.decode(values[:2])).fingerprint
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_levels_of_shipped_spaces_are_nested(path: Path) -> None:
    made = shipped(path)
    found = made.facts().levels
    assert [level.dim for level in found] == sorted({level.dim for level in found}) and found[-1].dim == made.dim
    rng = np.random.default_rng(1)
    for coarse, fine in combinations(found, 2):
        if coarse.name != "smooth":
            assert fine.project(made.encode(made.decode(coarse.embed(rng.random(coarse.dim))))) is not None


# ------------------------------------------------------------------------------------- the other facts


def test_facts_say_what_each_coordinate_is() -> None:
    made = space(
        {
            "method": ["ties", "dare_ties"],
            "genes": {
                "weight": WEIGHT,
                "density": {"choices": [0.1, 0.3, 0.9]},
                "lambda": {"choices": [1.0, 0.5, 2.0]},
                "normalize": "search",
            },
        }
    )
    facts = made.facts(workers=7, evaluations=300)
    kinds = dict(
        zip([g.name for g in made.genes], zip(facts.cells, facts.categorical, facts.experts, strict=True), strict=True)
    )
    assert kinds == {
        "method": (2, True, -1),
        "math.weight": (0, False, 0),
        "code.weight": (0, False, 1),
        "math.density": (3, False, -1),  # numbers in order
        "code.density": (3, False, -1),
        "lambda": (3, True, -1),  # numbers in no order
        "normalize": (2, True, -1),
    }
    assert (facts.workers, facts.evaluations) == (7, 300)
    whole = space({"method": "consensus", "genes": {"k": {"low": 1, "high": 6}, "mask_lambda": "search"}}).facts()
    assert list(whole.cells) == [6, 0, 0] and not whole.categorical.any()
    log = space({"method": "consensus", "genes": {"k": {"low": 1, "high": 6, "scale": "log"}}}).facts()
    assert list(log.cells) == [0]  # its cells are not equal


@pytest.mark.parametrize(
    "genes",
    [
        {"k": {"low": 2, "high": 7}},
        {"k": {"low": 0, "high": 1}},
        {"k": {"choices": [5, 2, 1]}},
        {"density": {"choices": [0.3, 0.5], "start": 0.5}},
        {"mask_lambda": {"choices": [0.3, 0.5], "per_expert": False}},
    ],
)
@QUIET
@given(unit=st.floats(0, 1))
def test_cells_are_as_the_facts_say(genes: dict[str, Any], unit: float) -> None:
    made = space({"method": "consensus", "genes": genes})
    assert not made.facts().categorical.any()
    cells = int(made.facts().cells[0])
    edge = abs(unit * cells - round(unit * cells)) < 1e-9
    middle = (min(cells - 1, int(unit * cells)) + 0.5) / cells
    assert edge or made.decode([unit]) == made.decode([middle])
    assert made.encode(made.decode([middle])) == pytest.approx([middle])
    assert len({tuple(made.decode([(k + 0.5) / cells]).values()) for k in range(cells)}) == cells


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        ({"method": "task_arithmetic", "genes": {"weight": WEIGHT}}, {"math.weight": 0.0, "code.weight": 0.0}),
        ({"method": "ties", "genes": {"weight": WEIGHT, "density": {"low": 0.1, "per_expert": False}}},
         {"math.weight": 0.0, "code.weight": 0.0}),
        ({"method": "ties", "genes": {"weight": {"low": 0.1}}}, None),
        ({"method": "ties", "genes": {"weight": {"low": 0.1}, "lambda": {"low": 0.0}}}, {"lambda": 0.0}),
        ({"method": "iso_c", "genes": {"lambda": {"low": 0.0, "curve": 2}}}, {"lambda.C0": 0.0, "lambda.C1": 0.0}),
        ({"method": "iso_c", "genes": {"lambda": {"low": 0.1, "curve": 2}}}, None),
        ({"method": "ties", "genes": {"weight": WEIGHT, "lambda": {"line": {"low": -0.2, "high": 0.5, "start": 0.3}}}},
         {"math.weight": 0.0, "code.weight": 0.0, "lambda.beta": 0.0}),
        ({"method": "linear", "genes": {"weight": WEIGHT}}, None),
        ({"method": "task_arithmetic", "genes": {"weight": {**WEIGHT, "low": 0.01, "scale": "log"}}}, None),
        ({"method": "task_arithmetic", "genes": {"weight": {**WEIGHT, "line": {"low": 0.1, "high": 0.5}}}}, None),
    ],
)  # fmt: skip
def test_the_point_of_the_base(spec: dict[str, Any], changed: dict[str, Natural] | None) -> None:
    made = space(spec)
    zero = made.facts().zero
    if changed is None:
        assert zero is None
        return
    assert zero is not None and made.decode(zero) == made.start() | changed
    coarse = made.facts().levels[0]
    assert coarse.project(zero) is not None


def test_many_genes_are_no_burden() -> None:
    made = space({**LAYERED, "layer_groups": "each"}, 80, {name: f"models/{name}" for name in "abcd"})
    assert made.dim == 4 * 80 * 3 and sizes(made) == [("model", 4), ("groups", 48), ("smooth", 84), ("layers", 960)]
