"""Tests of evomerge.space: genes, points, recipes, known recipes, and every refusal with its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import registry
from evomerge.errors import ConfigError
from evomerge.recipe import Recipe
from evomerge.space import Gene, SearchSpace, known_recipes
from evomerge.strict_yaml import load_yaml

EXPERTS = {"math": "models/math", "code": "models/code"}
SHIPPED = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
SHIPPED = [path for path in SHIPPED if not path.stem.startswith("path_")]  # those of layer orders: test_path_space
NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.{i}.{part}.weight" for i in range(8) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
]


def space(spec: dict[str, Any], n_layers: int = 8, experts: dict[str, str] = EXPERTS, seed: int = 3) -> SearchSpace:
    return SearchSpace.from_dict(spec, "models/base", experts, n_layers, seed)


def weights(**more: Any) -> dict[str, Any]:
    return {"method": "task_arithmetic", "genes": {"weight": "search"}, **more}


def problems(spec: Any, **kwargs: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        space(spec, **kwargs)
    return {p.where: f"{p.message} {p.hint}" for p in caught.value.problems}


COMPONENTS = {"attn": ["self_attn"], "mlp": ["mlp"], "rest": ["*"]}
FULL = {
    "method": "ties",
    "layer_groups": [3, 5],
    "components": COMPONENTS,
    "genes": {
        "weight": {"low": 0.0, "high": 1.2},
        "density": {"low": 0.1, "high": 1.0, "log": True, "per_expert": False, "per_component": False},
        "lambda": {"low": 0.5, "high": 2.0},
    },
    "fixed": {"normalize": False},
}


# ------------------------------------------------------------------------------------- genes and points


def test_gene_names_are_readable_and_ordered() -> None:
    assert [g.name for g in space(weights()).genes] == ["math.weight", "code.weight"]
    names = [g.name for g in space(FULL).genes]
    assert names[:4] == [
        "math.weight.L00-02.attn",
        "math.weight.L00-02.mlp",
        "math.weight.L00-02.rest",
        "math.weight.L03-07.attn",
    ]
    assert names[12:] == ["density.L00-02", "density.L03-07", "lambda"]
    assert space(weights(layer_groups=2), n_layers=120).genes[0].name == "math.weight.L000-059"


@pytest.mark.parametrize(
    ("groups", "n_layers", "expected"),
    [
        (1, 8, [(0, 8)]),
        (4, 8, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (3, 8, [(0, 3), (3, 6), (6, 8)]),
        ([1, 6, 1], 8, [(0, 1), (1, 7), (7, 8)]),
        (8, 8, [(i, i + 1) for i in range(8)]),
        ("each", 5, [(i, i + 1) for i in range(5)]),
    ],
)
def test_layer_groups_cover_the_layers(groups: Any, n_layers: int, expected: list[tuple[int, int]]) -> None:
    assert list(space(weights(layer_groups=groups), n_layers=n_layers).groups) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.001, 5),
    st.floats(0.001, 5),
    st.booleans(),
    st.floats(-0.5, 1.5, allow_nan=False),
)
def test_decoding_what_was_encoded_gives_it_back(low: float, span: float, log: bool, unit: float) -> None:
    gene = Gene("g", low, low + span, low, "log" if log else "linear")
    value = gene.natural(unit)
    assert gene.low <= value <= gene.high
    assert gene.natural(gene.unit(value)) == value
    digits = 4 if not log else max(4, 3 - math.floor(math.log10(value)))  # of a small value on a log scale: 4 digits
    narrow = max(0, -1 - math.floor(math.log10(span) + 1e-9))  # a narrow range has a thousand steps
    assert value in (gene.low, gene.high) or value == round(value, max(digits, 4 + narrow))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=15, max_size=15))
def test_points_and_recipes_round_trip(x: list[float]) -> None:
    made = space(FULL)
    params = made.decode(np.array(x))
    assert made.decode(made.encode(params)) == params
    assert made.point_of(made.recipe(params)) == params


def test_points_outside_the_cube_are_clipped_and_wrong_ones_refused() -> None:
    made = space(weights())
    assert made.decode([-1.0, 2.0]) == {"math.weight": 0.0, "code.weight": 1.2}
    for wrong in ([0.1], [0.1, float("nan")], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="2 genes"):
            made.decode(wrong)


def test_wrong_params_are_refused_all_at_once() -> None:
    made = space(weights())
    with pytest.raises(ConfigError) as caught:
        made.recipe({"math.weight": float("nan"), "maths.weight": 0.1})
    assert sorted(p.where for p in caught.value.problems) == ["code.weight", "math.weight", "maths.weight"]
    with pytest.raises(ConfigError, match=r"0 to 1\.2"):
        made.encode({"math.weight": 1.6, "code.weight": 0.0})


def test_the_start_is_the_uniform_mean_unless_given() -> None:
    assert space(weights()).start() == {"math.weight": 0.5, "code.weight": 0.5}
    three = space(weights(), experts={"a": "A", "b": "B", "c": "C"})
    assert set(three.start().values()) == {0.3333}
    given = space({"method": "task_arithmetic", "genes": {"weight": {"start": 0.8}}})
    assert set(given.start().values()) == {0.8}


# ------------------------------------------------------------------------------------- recipes


def test_a_point_becomes_the_values_of_each_tensor() -> None:
    made = space(FULL)
    params = {g.name: round(g.low + 0.01 * (i + 1), 4) for i, g in enumerate(made.genes)}
    plans = {plan.name: plan for plan in made.recipe(params).plan(NAMES, 8)}

    def value(tensor: str, expert: int, param: str = "weight") -> float:
        return float(plans[tensor].per_input[expert][param])

    for layer in range(8):
        group = "L00-02" if layer < 3 else "L03-07"
        for tensor, component in (("self_attn.q_proj", "attn"), ("mlp.up_proj", "mlp"), ("norm", "rest")):
            name = f"model.layers.{layer}.{tensor}.weight"
            for i, expert in enumerate(EXPERTS):
                assert value(name, i) == params[f"{expert}.weight.{group}.{component}"]
                assert value(name, i, "density") == params[f"density.{group}"]
            assert plans[name].shared == {**plans[name].shared, "lambda": params["lambda"], "normalize": False}
    assert value("model.embed_tokens.weight", 0) == params["math.weight.L00-02.rest"]
    for name in ("model.norm.weight", "lm_head.weight"):
        assert value(name, 1) == params["code.weight.L03-07.rest"]


def test_a_uniform_point_is_the_plain_recipe() -> None:
    layered = space(weights(layer_groups=4, components=COMPONENTS))
    uniform = layered.recipe({g.name: 0.4 for g in layered.genes})
    plain = Recipe.build("task_arithmetic", "models/base", {p: {"weight": 0.4} for p in EXPERTS.values()}, seed=3)
    assert uniform.fingerprint == plain.fingerprint
    assert uniform.slices[0].sources[0].layers is None


def test_equal_neighbours_melt_into_one_slice() -> None:
    made = space(weights(layer_groups=4))
    params = dict.fromkeys((g.name for g in made.genes), 0.4)
    params["math.weight.L06-07"] = 0.5
    layers = [piece.sources[0].layers for piece in made.recipe(params).slices]
    assert layers == [(0, 6), (6, 8)]


def test_a_shared_parameter_can_be_split_over_groups() -> None:
    made = space(
        {
            "method": "task_arithmetic",
            "layer_groups": 2,
            "genes": {"lambda": {"per_group": True}},
            "fixed": {"weight": 0.5},
        }
    )
    assert [g.name for g in made.genes] == ["lambda.L00-03", "lambda.L04-07"]
    plans = made.recipe({"lambda.L00-03": 0.2, "lambda.L04-07": 0.9}).plan(NAMES, 8)
    found = {plan.name: (plan.shared["lambda"], plan.per_input[0]["weight"]) for plan in plans}
    assert found["model.layers.3.norm.weight"] == (0.2, 0.5)
    assert found["model.layers.4.norm.weight"] == (0.9, 0.5)
    uniform = made.recipe({"lambda.L00-03": 0.2, "lambda.L04-07": 0.2})
    assert dict(uniform.parameters) == {"lambda": 0.2} and len(uniform.slices) == 1


def test_slerp_takes_exactly_one_expert() -> None:
    spec = {"method": "slerp", "genes": {"t": "search"}}
    made = space(spec, experts={"math": "models/math"})
    assert [g.name for g in made.genes] == ["t"]
    plan = made.recipe({"t": 0.25}).plan(NAMES, 8)[0]
    assert plan.shared["t"] == 0.25 and plan.base == ("models/base", plan.name)
    assert "exactly 1" in problems(spec)["experts"]


# ------------------------------------------------------------------------------------- known recipes


def test_known_recipes_and_their_points() -> None:
    known = dict(known_recipes("models/base", EXPERTS, seed=3))
    assert list(known) == [
        "base",
        "math",
        "code",
        "uniform soup",
        "task arithmetic 0.3",
        "task arithmetic 1",
        "ties 0.2",
        "ties 0.5",
    ]  # with two experts, task arithmetic at 0.5 is the soup
    made = space(weights(layer_groups=4))
    assert set((made.point_of(known["base"]) or {}).values()) == {0.0}
    math = made.point_of(known["math"]) or {}
    assert math["math.weight.L02-03"] == 1.0 and math["code.weight.L06-07"] == 0.0
    assert made.point_of(known["ties 0.2"]) is None
    ties = space({"method": "ties", "genes": {"weight": "search", "density": "search", "lambda": "search"}})
    point = ties.point_of(known["ties 0.5"])
    assert point == {
        "math.weight": 1.0,
        "code.weight": 1.0,
        "math.density": 0.5,
        "code.density": 0.5,
        "lambda": 1.0,  # a default that the known recipe does not spell out
    }


def test_a_single_expert_has_no_recipe_twice() -> None:
    known = known_recipes("models/base", {"math": "models/math"})
    assert len({recipe.fingerprint for _, recipe in known}) == len(known)
    assert "uniform soup" not in dict(known)


def test_recipes_outside_the_space_have_no_point() -> None:
    made = space(weights())

    def point(experts: dict[str, Any], method: str = "task_arithmetic", **more: Any) -> dict[str, float] | None:
        return made.point_of(Recipe.build(method, "models/base", experts, **{"seed": 3, **more}))

    inside = {"models/math": {"weight": 0.1}, "models/code": {"weight": 0.2}}
    assert point(inside) == {"math.weight": 0.1, "code.weight": 0.2}
    assert point(inside, seed=4) is not None  # task arithmetic draws nothing
    assert point({"models/math": {"weight": 2.0}, "models/code": {"weight": 0.2}}) is None
    assert point({"models/math": {"weight": 0.12345}, "models/code": {"weight": 0.2}}) is None
    assert point({"models/code": {"weight": 0.2}, "models/math": {"weight": 0.1}}) is None  # another order
    assert point({"models/math": {"weight": 0.1}}) is None
    assert point(inside, parameters={"lambda": 0.5}) is None
    assert point(inside, compat="mergekit") is None
    assert point(inside, dtype="float16") is None
    filtered = [{"filter": "q_proj", "value": 0.3}, {"value": 0.1}]
    assert point({"models/math": {"weight": filtered}, "models/code": {"weight": 0.2}}) is None
    sources = [{"model": p, "layer_range": [0, 6], "parameters": {"weight": 0.1}} for p in EXPERTS.values()]
    short = {"merge_method": "task_arithmetic", "base_model": "models/base", "slices": [{"sources": sources}]}
    assert made.point_of(Recipe.from_dict({**short, "compat": "paper", "seed": 3})) is None


def test_the_seed_counts_where_masks_are_drawn() -> None:
    made = space({"method": "dare_ties", "genes": {"weight": "search", "density": "search"}})
    recipe = made.recipe(made.start())
    assert made.point_of(recipe) == made.start()
    other = SearchSpace.from_dict(
        {"method": "dare_ties", "genes": {"weight": "search", "density": "search"}}, "models/base", EXPERTS, 8, 4
    )
    assert other.point_of(recipe) is None


# ------------------------------------------------------------------------------------- refusals


def test_all_problems_are_listed_at_once_with_their_places() -> None:
    found = problems(
        {
            "method": "ties",
            "layer_groups": 9,
            "layergroups": 2,
            "compat": "old",
            "genes": {
                "weigth": "search",
                "weight": {"low": 1.0, "high": 0.5},
                "density": {"low": float("nan"), "hihg": 1.0, "log": "yes"},
                "lambda": {"low": 3.0},
                "normalize": {"low": 0},
            },
            "fixed": {"weight": 1.0, "topk": 3},
        }
    )
    assert set(found) == {
        "layer_groups",
        "layergroups",
        "compat",
        "genes.weigth",
        "genes.weight.low",
        "genes.density.low",
        "genes.density.hihg",
        "genes.density.log",
        "genes.lambda.low",
        "genes.normalize.low",
        "fixed.weight",
        "fixed.topk",
    }
    assert "did you mean weight?" in found["genes.weigth"]
    assert "did you mean high?" in found["genes.density.hihg"]
    assert "not below high 2.5" in found["genes.lambda.low"]


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ([], ""),
        ({}, "method"),
        ({"method": "tise", "genes": {"weight": "search"}}, "method"),
        ({"method": "ties"}, "genes"),
        (weights(layer_groups=[4, 3]), "layer_groups"),
        (weights(layer_groups=[8, 0]), "layer_groups"),
        (weights(layer_groups=0), "layer_groups"),
        (weights(layer_groups=True), "layer_groups"),
        (weights(layer_groups="every"), "layer_groups"),
        (weights(components={"attn": ["self_attn"]}), "components"),
        (weights(components={"all": ["*"], "attn": ["self_attn"]}), "components.attn"),
        (weights(components={"a": ["mlp"], "b": ["mlp.up"], "c": ["*"]}), "components.b"),
        (weights(components={"a": "*"}), "components.a"),
        (weights(fixed={"normalize": "maybe"}), "fixed"),
        ({"method": "ties", "genes": {"density": {"high": 1.1}}}, "genes.density.high"),
        ({"method": "slerp", "genes": {"t": {"low": -0.1}}}, "genes.t.low"),
        ({"method": "task_arithmetic", "genes": {"weight": {"start": 1.6}}}, "genes.weight.start"),
        ({"method": "task_arithmetic", "genes": {"weight": {"low": 0, "log": True}}}, "genes.weight.low"),
        ({"method": "task_arithmetic", "genes": {"weight": {"high": True}}}, "genes.weight.high"),
        ({"method": "task_arithmetic", "genes": {"weight": 0.5}}, "genes.weight"),
        ({"method": "task_arithmetic", "genes": {"lambda": {"per_expert": True}}}, "genes.lambda.per_expert"),
        ({"method": "task_arithmetic", "layer_groups": 2, "genes": {"lambda": "search"}}, "layer_groups"),
        ({"method": "task_arithmetic", "components": COMPONENTS, "genes": {"lambda": "search"}}, "components"),
    ],
)
def test_refused(spec: Any, where: str) -> None:
    assert where in problems(spec)


def test_a_space_with_a_single_point_is_refused_with_what_to_write() -> None:
    """One value for a number, a whole number or a choice, one method, no gene at all."""
    for gene, key in (({"low": 0.5, "high": 0.5}, "low"), ({"choices": [0.5]}, "choices")):
        found = problems({"method": "task_arithmetic", "genes": {"weight": gene}})
        assert "written under fixed, as weight:" in found[f"genes.weight.{key}"]
    assert "fixed, as k: 2" in problems({"method": "consensus", "genes": {"k": {"low": 2, "high": 2}}})["genes.k.low"]
    assert "needs genes" in problems({"method": "ties", "genes": {}})["genes"]
    assert "two methods or more" in problems({"method": ["ties"], "genes": {"weight": "search"}})["method"]
    tiny = space({"method": "task_arithmetic", "genes": {"weight": {"low": 0.5, "high": 0.5 + 1e-9}}})
    assert len({tiny.genes[0].natural(k / 100) for k in range(101)}) == 101  # narrow, but no single point


# ------------------------------------------------------------------------------------- scales


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-4, 0.5), st.floats(1e-4, 0.499), st.floats(0, 1))
def test_a_logit_scale_treats_both_ends_alike(low: float, missing: float, unit: float) -> None:
    gene = Gene("density", low, 1 - missing, low, "logit")
    value = gene.natural(unit)
    assert isinstance(value, float) and gene.low <= value <= gene.high
    assert gene.natural(gene.unit(value)) == value == gene.snapped(value)
    assert gene.unit(value) == pytest.approx(unit, abs=2e-3)  # 4 digits of what lies nearer, 0 or 1
    assert (gene.unit(gene.low), gene.unit(gene.high)) == (0.0, 1.0)
    assert gene.domain == (gene.low, gene.high, False)  # as studies record it: Optuna knows linear and log


def test_equal_steps_on_a_logit_scale_are_equal_steps_of_the_log_odds() -> None:
    gene = Gene("density", 0.02, 0.98, 0.5, "logit")
    assert gene.unit(0.5) == pytest.approx(0.5)
    odds = [math.log(v / (1 - v)) for v in (float(gene.natural(k / 8)) for k in range(9))]
    assert np.diff(odds) == pytest.approx(np.full(8, odds[-1] / 4), abs=5e-3)


def test_scales_are_named_and_log_true_is_one_of_them() -> None:
    def gene(**settings_: Any) -> Gene:
        density = {"low": 0.1, "high": 0.9, "per_expert": False, **settings_}
        return space({"method": "ties", "genes": {"density": density}}).genes[0]

    assert gene() == gene(scale="linear") == gene(log=False)
    assert gene(log=True) == gene(scale="log") == gene(scale="log", log=True)
    assert gene(scale="log").domain == (0.1, 0.9, True)
    assert gene(scale="logit").scale == "logit"
    assert (
        space({"method": "nearswap", "genes": {"t": {"scale": "linear"}}}, experts={"a": "A"}).genes[0].domain[2]
        is False
    )


@pytest.mark.parametrize(
    ("method", "gene", "key", "said"),
    [
        ("ties", {"density": {"scale": "logit"}}, "density.high", "cannot end at 1"),
        ("ties", {"density": {"scale": "logit", "low": 0.0, "high": 0.9}}, "density.low", "cannot start from 0"),
        ("ties", {"density": {"scale": "logarithmic"}}, "density.scale", "linear, log, logit"),
        ("ties", {"density": {"scale": ["log"]}}, "density.scale", "linear, log, logit"),
        ("ties", {"density": {"scale": "logit", "high": 0.9, "log": True}}, "density.log", "contradict"),
        ("ties", {"normalize": {"scale": "log"}}, "normalize.scale", "has choices here"),
        ("consensus", {"k": {"scale": "logit"}}, "k.scale", "no logit scale"),
    ],
)
def test_scales_that_do_not_fit_are_refused(method: str, gene: dict[str, Any], key: str, said: str) -> None:
    assert said in problems({"method": method, "genes": gene})[f"genes.{key}"]


def test_unusable_experts_are_refused() -> None:
    assert "experts.a b" in problems(weights(), experts={"a b": "A"})
    assert "experts.a" in problems(weights(), experts={"a": "models/base"})
    assert set(problems(weights(), experts={"a": "A", "b": "A"})) == {"experts.a", "experts.b"}
    assert "experts" in problems(weights(), experts={})


# ------------------------------------------------------------------------------------- shipped spaces


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_spaces_are_usable(path: Path) -> None:
    spec = load_yaml(path.read_text(encoding="utf-8"), path.name).data
    listed = spec["method"] if isinstance(spec["method"], list) else [spec["method"]]
    most = min(registry.get("methods", name).n_experts[1] or 2 for name in listed)
    experts = {"math": "models/math"} if most == 1 else EXPERTS
    made = space(spec, experts=experts)
    assert made.description and made.dim >= 2
    rng = np.random.default_rng(0)
    for _ in range(5):
        params = made.decode(rng.random(made.dim))
        recipe = made.recipe(params)
        assert len(recipe.plan(NAMES, 8)) == len(NAMES)
        point = made.point_of(recipe)
        assert point is not None and made.recipe(point).fingerprint == recipe.fingerprint
        taken = made.parameters_of(recipe.method) | {"method"}
        for gene, slot in zip(made.genes, made.slots, strict=True):  # others are at their start
            assert point[gene.name] == (params[gene.name] if slot.param in taken else gene.start)


def test_the_promised_spaces_are_shipped() -> None:
    assert {p.stem for p in SHIPPED} >= {
        "task_arithmetic",
        "task_arithmetic_layers",
        "ties_layers",
        "dare_ties_layers",
        "lines",
        "task_arithmetic_line",
        "task_arithmetic_curve",
        "task_arithmetic_parts",
        "breadcrumbs",
        "della",
        "sce",
        "tsv_m",
        "iso_c",
        "consensus",
        "layer_swap",
        "pipeline",
        "nested",
        "nested_layers",
        "operators",
    }
