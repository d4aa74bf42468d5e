"""Tests of spaces that choose among merge methods: the gene "method", the union of parameters, recipes and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import registry
from evomerge._space_levels import NEUTRAL
from evomerge.errors import CandidateFailure, ConfigError
from evomerge.feasible import drops_at_random, infeasible_share
from evomerge.methods import Method
from evomerge.recipe import Recipe
from evomerge.space import SearchSpace, known_recipes
from evomerge.testing import example_parameters, make_inputs

QUIET = settings(deadline=None, derandomize=True, max_examples=40)
EXPERTS = {"math": "models/math", "code": "models/code"}
LAYERS = 4
NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
]
THREE = ["task_arithmetic", "ties", "dare_ties"]


def space(spec: dict[str, Any], experts: dict[str, str] = EXPERTS, seed: int = 3) -> SearchSpace:
    return SearchSpace.from_dict(spec, "models/base", experts, LAYERS, seed)


def problems(spec: Any, **kwargs: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        space(spec, **kwargs)
    return {p.where: f"{p.message} {p.hint}" for p in caught.value.problems}


OPEN = {
    "method": THREE,
    "genes": {"weight": {"low": 0.0, "high": 1.2}, "density": {"low": 0.1, "high": 0.9, "scale": "logit"}},
}
LAYERED = {
    "method": ["ties", "task_arithmetic", "dare_linear"],
    "layer_groups": 2,
    "components": ["attention", "rest"],
    "genes": {
        "weight": {"low": 0.0, "high": 1.2},
        "density": {"per_expert": False},
        "lambda": {"low": 0.5, "high": 1.5},
    },
    "fixed": {"sign_election": "unweighted", "normalize": False},
}


def test_the_method_is_the_first_gene_and_starts_with_the_first_listed() -> None:
    made = space(OPEN)
    assert [g.name for g in made.genes] == ["method", "math.weight", "code.weight", "math.density", "code.density"]
    assert made.methods == tuple(THREE)
    assert made.start()["method"] == "task_arithmetic"
    assert made.genes[0].domain == THREE
    assert made.encode(made.start())[0] == pytest.approx(0.5 / 3)
    assert [start["method"] for start in made.starts()] == THREE


def test_a_recipe_has_the_parameters_of_its_method_only() -> None:
    made = space(LAYERED)
    for start in made.starts():
        recipe = made.recipe(start)
        method: Method = registry.get("methods", str(start["method"]))
        assert recipe.method == method.name
        written = recipe.to_dict()
        named = set(written["parameters"]) | {name for model in written["models"] for name in model["parameters"]}
        wanted = {"weight", "density", "lambda", "sign_election", "normalize"}
        assert named == {name for name in wanted if method.parameter(name) is not None}


def test_points_that_differ_in_what_the_method_ignores_are_one_recipe() -> None:
    made = space(OPEN)
    point = made.start() | {"math.weight": 0.7}
    recipe = made.recipe(point)
    assert made.recipe(point | {"math.density": 0.2, "code.density": 0.8}).fingerprint == recipe.fingerprint
    plain = space({"method": "task_arithmetic", "genes": {"weight": {"low": 0.0, "high": 1.2}}})
    assert plain.recipe({"math.weight": 0.7, "code.weight": 0.5}).fingerprint == recipe.fingerprint
    ties = made.recipe(point | {"method": "ties"})
    assert made.recipe(point | {"method": "ties", "math.density": 0.2}).fingerprint != ties.fingerprint


@QUIET
@given(st.lists(st.floats(0, 1), min_size=16, max_size=16), st.sampled_from(["flat", "layered"]))
def test_points_and_recipes_round_trip_with_every_method(x: list[float], which: str) -> None:
    made = space(OPEN if which == "flat" else LAYERED)
    params = made.decode(np.resize(x, made.dim))
    assert made.decode(made.encode(params)) == params
    recipe = made.recipe(params)
    assert len(recipe.plan(NAMES, LAYERS)) == len(NAMES)
    point = made.point_of(recipe)
    assert point is not None and made.recipe(point).fingerprint == recipe.fingerprint
    taken = made.parameters_of(recipe.method) | {"method"}
    for gene, slot in zip(made.genes, made.slots, strict=True):
        assert point[gene.name] == (params[gene.name] if slot.param in taken else gene.start)


def test_known_recipes_of_every_method_are_points() -> None:
    made = space(OPEN)
    points = {label: made.point_of(recipe) for label, recipe in known_recipes("models/base", EXPERTS, 3)}
    assert all(point is not None for point in points.values())
    assert (points["ties 0.2"] or {})["method"] == "ties" and (points["ties 0.2"] or {})["code.density"] == 0.2
    assert (points["math"] or {})["method"] == "task_arithmetic"
    other = Recipe.build("dare_linear", "models/base", {path: {"weight": 0.5} for path in EXPERTS.values()}, seed=3)
    assert made.point_of(other) is None  # not listed


def test_the_seed_counts_for_the_methods_that_draw_masks() -> None:
    made, other = space(OPEN), space(OPEN, seed=4)
    ties, dare = (made.recipe(made.start() | {"method": name}) for name in ("ties", "dare_ties"))
    assert other.point_of(ties) is not None and other.point_of(dare) is None


def test_the_method_alone_can_be_searched() -> None:
    made = space({"method": ["task_arithmetic", "ties"], "fixed": {"weight": 0.5, "density": 0.3}})
    assert [g.name for g in made.genes] == ["method"]
    assert made.recipe({"method": "ties"}).to_dict()["models"][0]["parameters"] == {"weight": 0.5, "density": 0.3}
    assert made.recipe({"method": "task_arithmetic"}).to_dict()["models"][0]["parameters"] == {"weight": 0.5}


def test_methods_with_and_without_a_base_can_stand_together() -> None:
    made = space({"method": ["linear", "task_arithmetic"], "genes": {"weight": {"low": 0.1, "high": 1.0}}})
    bases = [made.recipe(start).base for start in made.starts()]
    assert bases == [None, "models/base"]
    assert made.facts().zero is None
    assert "experts.a" in problems({"method": ["linear", "ties"], "genes": {"weight": "search"}},
                                   experts={"a": "models/base", "b": "B"})  # fmt: skip


def test_the_range_is_that_of_the_first_method_that_has_the_parameter() -> None:
    genes = {"weight": "search", "lambda": "search"}
    one, two = (
        space({"method": pair, "genes": genes}).genes[-1] for pair in (["ties", "dare_linear"], ["dare_linear", "ties"])
    )
    assert (one.low, one.high) == (0.3, 2.5) and (two.low, two.high) == (0.3, 1.5)


def test_a_range_must_be_allowed_by_all_methods() -> None:
    spec = {"method": ["ramplus_tl", "opcm"], "genes": {"alpha": "search"}}
    assert space(spec).genes[-1].high == 0.999  # ramplus_tl's own range ends at 1, which opcm forbids
    found = problems({**spec, "genes": {"alpha": {"high": 1.0}}})
    assert "outside what alpha may be" in found["genes.alpha.high"]


def test_choices_are_those_that_all_methods_know() -> None:
    made = space({"method": ["dare_ties", "ties"], "genes": {"weight": "search", "rescale": "search"}})
    assert "inv_prob" not in made.genes[-1].choices and {"l1", "l2"} <= set(made.genes[-1].choices)
    for start in made.starts():
        for choice in made.genes[-1].choices:
            recipe = made.recipe(start | {"rescale": choice})
            assert (made.point_of(recipe) or {})["rescale"] == choice


def test_what_callers_need_of_such_a_space() -> None:
    """`prepare` looks for methods that draw masks, and for points that cannot be merged."""
    made = space(OPEN)
    plans = [plan for start in made.starts() for plan in made.recipe(start).plan(NAMES, LAYERS)]
    assert drops_at_random(plans, OPEN["genes"]) and not drops_at_random(plans[: len(NAMES)], OPEN["genes"])
    assert infeasible_share(made, NAMES, 8) == (0.0, "")


@pytest.mark.parametrize(
    ("spec", "where", "said"),
    [
        ({"method": [], "genes": {"weight": "search"}}, "method", "two methods"),
        ({"method": ["ties"], "genes": {"weight": "search"}}, "method", "name alone"),
        ({"method": ["ties", "tise"], "genes": {"weight": "search"}}, "method[1]", "did you mean ties"),
        ({"method": ["ties", "ties"], "genes": {"weight": "search"}}, "method[1]", "listed twice"),
        ({"method": ["ties", 3], "genes": {"weight": "search"}}, "method[1]", "not a name"),
        ({"method": {"a": 1}, "genes": {"weight": "search"}}, "method", "not a name"),
        ({"method": THREE, "genes": {"gamma": "search"}}, "genes.gamma", "task_arithmetic or ties or dare_ties has no"),
        ({"method": ["ties", "slerp"], "genes": {"weight": "search", "t": "search"}}, "experts", "exactly 1"),
        ({"method": ["ties", "mwa"], "genes": {"weight": "search"}}, "genes", "mwa needs 'metric'"),
        ({"method": ["ties", "pcb"], "genes": {"density": "search"}}, "genes.density", "per expert in ties"),
        ({"method": ["ties", "pcb"], "genes": {"weight": "search"}, "fixed": {"density": 0.5}}, "fixed.density", "pcb"),
        ({"method": THREE, "genes": {"density": {"high": 1.5}}}, "genes.density.high", "outside"),
        ({"method": THREE, "genes": {"rescale": {"choices": ["l1", "inv_prob"]}}}, "genes.rescale.choices", "inv_prob"),
        ({"method": THREE, "genes": {"weight": "search"}, "fixed": {"density": "x"}}, "fixed", ""),
        ({"method": THREE, "genes": {}}, "genes", "needs genes"),
        ({"method": THREE, "genes": {"method": "search"}}, "genes.method", "has no parameter"),
    ],
)  # fmt: skip
def test_refused(spec: Any, where: str, said: str) -> None:
    assert said in problems(spec)[where]


def test_all_problems_of_several_methods_are_listed_at_once() -> None:
    found = problems(
        {
            "method": ["ties", "tise", "dare_ties"],
            "genes": {"weigth": "search", "density": {"scale": "logit"}, "weight": {"low": 2}},
            "fixed": {"topk": 3},
        }
    )
    assert set(found) == {"method[1]", "genes.weigth", "genes.density.high", "genes.weight.low", "fixed.topk"}


def test_no_method_has_a_parameter_called_method() -> None:
    for name in registry.names("methods"):
        assert registry.get("methods", name).parameter("method") is None


@pytest.mark.parametrize("name", [n for n in registry.names("methods") if registry.get("methods", n).needs_base])
def test_weights_lambda_or_t_of_zero_give_the_base(name: str) -> None:
    """What `Facts.zero` relies on, whatever the other parameters are."""
    method: Method = registry.get("methods", name)
    x = make_inputs(method, 1 if method.n_experts[1] == 1 else max(2, method.n_experts[0]))
    for param in NEUTRAL:
        if method.parameter(param) is not None:
            merged = method(x, **{**example_parameters(method, len(x.experts)), param: 0.0})
            assert x.base is not None and np.array_equal(merged.numpy(), x.base.numpy()), param


def test_failures_of_a_method_stay_its_own() -> None:
    """A point that one method refuses is a failed candidate, not a space that cannot be read."""
    made = space({"method": ["task_arithmetic", "linear"], "genes": {"weight": {"low": 0.0, "high": 1.0}}})
    linear: Method = registry.get("methods", "linear")
    with pytest.raises(CandidateFailure):
        linear(make_inputs(linear, 2), weight=[0.0, 0.0])
    assert made.recipe(dict.fromkeys(("math.weight", "code.weight"), 0.0) | {"method": "linear"}).method == "linear"
