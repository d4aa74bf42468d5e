"""Tests of curves and lines over depth, whole-number and choice genes, ready-made components and name patterns."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import registry
from evomerge._recipe_plan import evaluate
from evomerge._space_form import _GENE, _TOP
from evomerge._space_genes import Gene, cut, from_depth, in_slice, over_depth
from evomerge._space_parts import PRESETS, REST, read_components
from evomerge.errors import ConfigError, RecipeError
from evomerge.methods import Method
from evomerge.recipe import Conditional, Recipe, is_embedding, layer_index
from evomerge.space import SearchSpace, _melted, known_recipes
from evomerge.strict_yaml import load_yaml
from evomerge.study import Header, Study
from evomerge.testing import example_parameters, make_inputs

QUIET = settings(deadline=None, derandomize=True, max_examples=40)
EXPERTS = {"math": "models/math", "code": "models/code"}
LAYERS = 6
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
PARTS = ("self_attn.q_proj", "self_attn.q_norm", "mlp.up_proj", "input_layernorm")
NAMES = (*OUTSIDE, *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in PARTS))
PRESET_LIST = ["attention", "mlp", "norms", "embeddings", "head"]


def space(spec: dict[str, Any], n_layers: int = LAYERS, names: tuple[str, ...] = (), **more: Any) -> SearchSpace:
    return SearchSpace.from_dict({**spec, **more}, "models/base", EXPERTS, n_layers, 3, names)


def problems(spec: Any, n_layers: int = LAYERS, names: tuple[str, ...] = ()) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        space(spec, n_layers, names)
    return {p.where: f"{p.message} {p.hint}" for p in caught.value.problems}


def arithmetic(gene: Any, **more: Any) -> dict[str, Any]:
    return {"method": "task_arithmetic", "genes": {"weight": gene}, **more}


def planned(recipe: Recipe, param: str, expert: int | None = None, n_layers: int = LAYERS) -> dict[str, Any]:
    """Each tensor's value of a parameter, of one expert or shared."""
    names = [*OUTSIDE, *(f"model.layers.{i}.{part}.weight" for i in range(n_layers) for part in PARTS)]
    plans = recipe.plan(names, n_layers)
    return {plan.name: (plan.shared if expert is None else plan.per_input[expert])[param] for plan in plans}


# ------------------------------------------------------------------------------------- curves


def test_a_curve_has_named_control_points_and_becomes_a_gradient() -> None:
    made = space(arithmetic({"curve": 3}))
    assert [g.name for g in made.genes][:4] == [
        "math.weight.C0", "math.weight.C1", "math.weight.C2", "code.weight.C0",
    ]  # fmt: skip
    params = made.start() | {"math.weight.C0": 0.2, "math.weight.C1": 0.8, "math.weight.C2": 0.1}
    recipe = made.recipe(params)
    first, second = recipe.to_dict()["models"]
    assert first["parameters"] == {"weight": [0.2, 0.8, 0.1]}
    assert second["parameters"] == {"weight": 0.5}  # equal control points are one number
    assert made.point_of(recipe) == params


@QUIET
@given(st.lists(st.floats(0, 1.2), min_size=4, max_size=4), st.integers(4, 9))
def test_a_curve_is_piecewise_linear_over_the_depth(points: list[float], n_layers: int) -> None:
    made = space(arithmetic({"curve": 4, "per_expert": False}), n_layers)
    params = {f"weight.C{k}": round(value, 4) for k, value in enumerate(points)}
    found = planned(made.recipe(params), "weight", 1, n_layers)
    knots = [k / 3 for k in range(4)]
    for name, value in found.items():
        layer = layer_index(name)
        depth = 0.0 if layer is None else layer / (n_layers - 1)  # outside the layers: the first control point
        assert value == pytest.approx(np.interp(depth, knots, list(params.values())), abs=1e-12)


SPLIT = {
    "method": "task_arithmetic",
    "layer_groups": [1, 3, 2],
    "components": {"attn": ["self_attn"], "mlp": ["mlp"], "rest": ["*"]},
    "genes": {"weight": {"curve": 3}, "lambda": {"per_group": True}},
}


@QUIET
@given(st.lists(st.floats(0, 1), min_size=21, max_size=21))
def test_beside_layer_groups_a_curve_still_runs_over_the_whole_depth(x: list[float]) -> None:
    made = space(SPLIT)
    assert made.dim == 21
    params = made.decode(x)
    mixed = made.recipe(params)
    alone = space({**SPLIT, "layer_groups": 1, "genes": {"weight": {"curve": 3}}})
    plain = alone.recipe({name: value for name, value in params.items() if "lambda" not in name})
    for expert in range(2):
        assert planned(mixed, "weight", expert) == planned(plain, "weight", expert)  # bit for bit
    lambdas = planned(mixed, "lambda")
    for layer, group in ((0, "L00-00"), (1, "L01-03"), (3, "L01-03"), (4, "L04-05"), (5, "L04-05")):
        assert lambdas[f"model.layers.{layer}.mlp.up_proj.weight"] == params[f"lambda.{group}"]
    assert lambdas["lm_head.weight"] == params["lambda.L04-05"]
    assert made.point_of(mixed) == params


def test_beside_equal_layer_groups_a_curve_is_the_plain_gradient() -> None:
    made = space(SPLIT)
    params = made.start() | {"math.weight.mlp.C1": 0.9}
    recipe = made.recipe(params)
    assert len(recipe.slices) == 1 and recipe.slices[0].sources[0].layers is None
    assert made.point_of(recipe) == params
    flat = made.recipe({**made.start(), "lambda.L01-03": 0.5})
    assert [piece.sources[0].layers for piece in flat.slices] == [(0, 1), (1, 4), (4, 6)]


def test_fixed_gradients_run_over_the_whole_depth_too() -> None:
    gradient = [0.0, 0.5, 1.0]
    made = space(
        {
            "method": "task_arithmetic",
            "layer_groups": 2,
            "genes": {"lambda": {"per_group": True}},
            "fixed": {"weight": [{"filter": "mlp", "value": gradient}, {"value": 0.25}]},
        }
    )
    recipe = made.recipe({"lambda.L00-02": 0.4, "lambda.L03-05": 0.6})
    found = planned(recipe, "weight", 0)
    for layer in range(LAYERS):
        expected = np.interp(layer / 5, [0, 0.5, 1], gradient)
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(expected, abs=1e-15)
        assert found[f"model.layers.{layer}.input_layernorm.weight"] == 0.25
    assert made.point_of(recipe) == {"lambda.L00-02": 0.4, "lambda.L03-05": 0.6}


def test_a_shared_parameter_can_be_a_curve_per_component() -> None:
    made = space(
        {
            "method": "task_arithmetic",
            "components": {"attn": ["self_attn"], "rest": ["*"]},
            "genes": {"lambda": {"curve": 2, "per_component": True}},
            "fixed": {"weight": 0.5},
        }
    )
    assert [g.name for g in made.genes] == ["lambda.attn.C0", "lambda.attn.C1", "lambda.rest.C0", "lambda.rest.C1"]
    params = dict(zip([g.name for g in made.genes], (0.25, 0.75, 0.5, 0.5), strict=True))
    recipe = made.recipe(params)
    assert dict(recipe.parameters)["lambda"] == (Conditional((0.25, 0.75), "self_attn"), Conditional(0.5))
    assert made.point_of(recipe) == params
    assert planned(recipe, "lambda")["model.layers.5.self_attn.q_proj.weight"] == 0.75


@QUIET
@given(st.integers(2, 8), st.integers(0, 6), st.data())
def test_control_points_are_found_again(points: int, more: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-2, 2), min_size=points, max_size=points))
    n_layers = points + more
    knots = np.linspace(0, 1, points)
    layers = [float(np.interp(i / (n_layers - 1), knots, values)) for i in range(n_layers)]
    assert from_depth("curve", layers, points) == pytest.approx(values, abs=1e-9)


@QUIET
@given(st.integers(2, 130), st.data())
def test_slices_of_a_curve_have_its_bits(n_layers: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n_layers - 1))
    past = data.draw(st.integers(first + 1, n_layers))
    values = data.draw(st.lists(st.floats(-2, 2), min_size=2, max_size=2))
    slices = cut(first, past, n_layers)
    assert [slices[0][0], slices[-1][1]] == [first, past]
    assert all(before[1] == after[0] for before, after in pairwise(slices))
    assert len(slices) <= 8
    for a, b in slices:
        setting = in_slice(values, a, b, n_layers)
        for layer in range(a, b):
            t = (layer - a) / (b - a - 1) if b - a > 1 else 1.0
            read = evaluate(tuple(setting), "", t) if isinstance(setting, list) else setting
            assert read == evaluate(tuple(values), "", layer / (n_layers - 1))
        if b == n_layers:
            after = evaluate(tuple(setting), "", 0.0) if isinstance(setting, list) else setting
            assert after == values[0] or after == evaluate(tuple(values), "", 0.0)


# ------------------------------------------------------------------------------------- lines


def test_a_line_is_alpha_and_a_rise() -> None:
    made = space(arithmetic({"low": 0.0, "high": 1.0, "line": True}))
    assert [g.name for g in made.genes][:2] == ["math.weight.alpha", "math.weight.beta"]
    assert made.start()["math.weight.beta"] == 0.0
    params = made.start() | {"math.weight.alpha": 0.1, "math.weight.beta": 0.7}
    recipe = made.recipe(params)
    assert recipe.to_dict()["models"][0]["parameters"] == {"weight": [0.1, 0.8]}  # not 0.7999999999999999
    found = planned(recipe, "weight", 0)
    for name, value in found.items():
        layer = layer_index(name)
        expected = 0.1 if layer is None else 0.1 + 0.7 * layer / (LAYERS - 1)  # alpha + beta l / (L - 1)
        assert value == pytest.approx(expected, abs=1e-12)
    assert made.point_of(recipe) == params


def test_a_lines_rise_has_a_range_of_its_own() -> None:
    made = space(arithmetic({"low": 0.0, "high": 1.0, "line": {"low": -0.5, "high": 2.0, "start": 1.0}}))
    beta = made.genes[1]
    assert (beta.low, beta.high, beta.start) == (-0.5, 2.0, 1.0)
    params = made.start() | {"math.weight.alpha": 0.5, "math.weight.beta": -0.5}
    assert made.recipe(params).to_dict()["models"][0]["parameters"] == {"weight": [0.5, 0.0]}
    # a density may be 0 to 1 only, so its line must stay inside
    density = {"low": 0.1, "high": 0.5}
    ties = {"method": "ties", "genes": {"weight": "search", "density": {**density, "line": True}}}
    assert space(ties).genes[3].high == 0.4
    ties["genes"]["density"] = {"low": 0.1, "high": 0.6, "line": True}
    assert "curve: 2" in problems(ties)["genes.density.line"]


def test_lines_of_the_method_are_searched_like_any_number() -> None:
    made = space(
        {"method": "ties", "genes": {"lines_alpha": "search", "lines_beta": "search", "lines_match": "search"}}
    )
    params = {"lines_alpha": 0.5, "lines_beta": 0.25, "lines_match": True}
    recipe = made.recipe(params)
    assert recipe.to_dict()["parameters"] == params
    assert made.point_of(recipe) == params


# ------------------------------------------------------------------------------------- whole numbers and choices


@QUIET
@given(st.integers(1, 40), st.integers(1, 60), st.booleans(), st.floats(0, 1))
def test_whole_numbers_have_cells(low: int, span: int, log: bool, unit: float) -> None:
    gene = Gene("n", low, low + span, low, "log" if log else "linear", whole=True)
    value = gene.natural(unit)
    assert type(value) is int and low <= value <= low + span
    assert gene.natural(gene.unit(value)) == value
    assert [gene.natural(gene.unit(v)) for v in range(low, low + span + 1)] == list(range(low, low + span + 1))
    if not log:
        cells = span + 1
        assert [gene.natural((k + 0.5) / cells) for k in range(cells)] == list(range(low, low + span + 1))
        assert gene.unit(low) == pytest.approx(0.5 / cells)  # the middle of its cell
        assert gene.natural(1 / cells - 1e-9) == low and gene.natural(1 / cells + 1e-9) == low + 1
    assert not gene.holds(low + 0.5) and not gene.holds(True) and not gene.holds(str(low))


@QUIET
@given(st.lists(st.sampled_from(["a", "b", "c", True, False, 0.5]), min_size=2, unique_by=repr), st.floats(0, 1))
def test_choices_have_equal_cells(choices: list[Any], unit: float) -> None:
    gene = Gene("c", 0, len(choices) - 1, choices[0], choices=tuple(choices))
    n = len(choices)
    assert gene.natural(unit) is choices[min(n - 1, int(unit * n))]
    for k, choice in enumerate(choices):
        assert gene.unit(choice) == (k + 0.5) / n
        assert gene.natural(gene.unit(choice)) is choice
        assert gene.natural(k / n + 1e-9) is choice
    assert not gene.holds("other") and not gene.holds(1.0)


MIXED = {
    "method": "dare_ties",
    "layer_groups": 2,
    "components": {"attn": ["self_attn"], "rest": ["*"]},
    "genes": {
        "weight": {"low": 0.0, "high": 1.0, "per_component": False},
        "density": {"choices": [0.3, 0.6, 1], "per_expert": False},
        "sign_election": {"choices": ["weighted", "unweighted"], "per_group": True, "per_component": True},
        "rescale": {"choices": [True, "l1", "none"], "start": "l1"},
        "normalize": "search",
    },
}


def test_choices_reach_the_recipe_and_come_back() -> None:
    made = space(MIXED)
    assert [g.name for g in made.genes][8:] == [
        "sign_election.L00-02.attn", "sign_election.L00-02.rest",
        "sign_election.L03-05.attn", "sign_election.L03-05.rest",
        "rescale", "normalize",
    ]  # fmt: skip
    start = made.start()
    assert start["rescale"] == "l1" and start["sign_election.L00-02.attn"] == "weighted"
    params = start | {"sign_election.L03-05.attn": "unweighted", "rescale": True, "density.L00-02.rest": 1.0}
    recipe = made.recipe(params)
    found = planned(recipe, "sign_election")
    assert found["model.layers.4.self_attn.q_proj.weight"] == "unweighted"
    assert found["model.layers.4.mlp.up_proj.weight"] == found["model.layers.0.self_attn.q_proj.weight"] == "weighted"
    assert set(planned(recipe, "rescale").values()) == {True}
    assert made.point_of(recipe) == params


@QUIET
@given(st.lists(st.floats(0, 1), min_size=14, max_size=14))
def test_mixed_points_round_trip(x: list[float]) -> None:
    made = space(MIXED)
    params = made.decode(x)
    again = made.decode(made.encode(params))
    assert again == params and {k: type(v) for k, v in again.items()} == {k: type(v) for k, v in params.items()}
    back = made.point_of(made.recipe(params))
    assert back is not None and {k: repr(v) for k, v in back.items()} == {k: repr(v) for k, v in params.items()}


def test_slices_with_gradients_melt_only_while_these_run_over_the_whole_model() -> None:
    bent, flat = ([{"weight": [0.0, 1.0]}], {}), ([{"weight": 0.5}], {})
    assert len(_melted([(0, 2, *bent), (2, 4, *bent)], bent=False)) == 2
    assert _melted([(0, 2, *bent), (2, 4, *bent)]) == [(0, 4, *bent)]
    assert _melted([(0, 2, *flat), (2, 4, *flat)], bent=False) == [(0, 4, *flat)]


def test_a_wider_pattern_after_a_narrower_one_is_not_hidden() -> None:
    made = space(arithmetic("search", components={"a": ["q?proj"], "b": ["q*proj"], "c": ["*"]}))
    assert [c.name for c in made.components] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("method", "choices"), [("ties", ["l1", "l2", False]), ("dare_ties", [True, "l1", "l2", "none"])]
)
def test_searching_a_choice_keeps_the_default(method: str, choices: list[Any]) -> None:
    made = space({"method": method, "genes": {"weight": "search", "density": "search", "rescale": "search"}})
    gene = made.genes[-1]
    assert list(gene.choices) == choices and gene.start == registry.get("methods", method).parameter("rescale").default
    plain = {path: {"weight": 1.0, "density": 0.5} for path in EXPERTS.values()}
    point = made.point_of(Recipe.build(method, "models/base", plain, seed=3))
    assert point is not None and point["rescale"] is gene.start


def test_true_and_false_are_the_choices_that_they_stand_for() -> None:
    switched = 0
    for name in registry.names("methods"):
        method: Method = registry.get("methods", name)
        for param in method.parameters:
            if param.accepts_bool and isinstance(param.default, bool):
                x = make_inputs(method, 2)
                given = {**example_parameters(method, 2), "density": 0.5}
                named = method(x, **{**given, param.name: param.choices[0] if param.default else "none"})
                assert torch.equal(method(x, **{**given, param.name: param.default}), named), (name, param.name)
                switched += 1
    assert switched >= 4


def whole_spec(gene: Any, **more: Any) -> dict[str, Any]:
    return {"method": "consensus", "genes": {"k": gene, **more}}


def test_a_whole_number_reaches_the_recipe_and_comes_back() -> None:
    made = space({**whole_spec({"low": 1, "high": 6, "per_group": True}), "layer_groups": 2, "fixed": {}})
    params = {"k.L00-02": 2, "k.L03-05": 5}
    recipe = made.recipe(params)
    found = planned(recipe, "k")
    assert found["model.layers.0.mlp.up_proj.weight"] == 2 and found["lm_head.weight"] == 5
    assert made.point_of(recipe) == params
    assert made.encode(params) == pytest.approx([1.5 / 6, 4.5 / 6])
    with pytest.raises(ConfigError, match="whole number from 1 to 6"):
        made.recipe({"k.L00-02": 2.5, "k.L03-05": 5})


def test_the_study_records_every_kind_and_gives_it_back(tmp_path: Path) -> None:
    made = space({**MIXED, "genes": {**MIXED["genes"], "lambda": {"curve": 2}}})  # type: ignore[dict-item]
    counted = space(whole_spec({"low": 1, "high": 6}))
    header = Header({"seed": 1}, {"acc": True}, {"text": "name: x\n"}, {"torch": "2"})
    study = Study.create(f"sqlite:///{tmp_path / 'ledger.db'}", "x", header)
    rng = np.random.default_rng(0)
    wanted = []
    for source in (made, counted, made):
        params = source.decode(rng.random(source.dim))
        study.propose(source.recipe(params), params, {g.name: g.domain for g in source.genes})
        wanted.append((source, params))
    for candidate, (source, params) in zip(study.candidates(), wanted, strict=True):
        assert candidate.params is not None
        assert {k: repr(v) for k, v in candidate.params.items()} == {k: repr(v) for k, v in params.items()}
        assert np.array_equal(source.encode(candidate.params), source.encode(params))
    frame = study.frame()
    assert set(frame["rescale"].dropna()) <= {True, "l1", "none"} and "k" in frame


# ------------------------------------------------------------------------------------- ready-made components

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox")


def tensors(family: str) -> tuple[str, ...]:
    """The tensor names of a tiny model; no memory is taken."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **({"n_embd": 8, "n_layer": 2, "n_head": 2} if family == "gpt2" else sizes))
    with torch.device("meta"):
        names = list(AutoModelForCausalLM.from_config(config).state_dict())
    tied = bool(config.tie_word_embeddings)
    return tuple(name for name in names if not (tied and name == "lm_head.weight"))


def kind_of(name: str) -> str:
    """What a tensor is, said another way than with the package's patterns."""
    words = name.replace("_", ".").split(".")
    if words[0] in ("lm", "embed") and words[1] in ("head", "out"):
        return "head"
    if any(word.endswith("norm") or word == "ln" for word in words):
        return "norms"
    if {"embed", "wte", "wpe"} & set(words):
        return "embeddings"
    return "mlp" if "mlp" in words else "attention" if {"attn", "attention"} & set(words) else "rest"


@pytest.mark.parametrize("family", FAMILIES)
def test_ready_made_components_know_the_families(family: str) -> None:
    names = tensors(family)
    made = space(arithmetic("search", components=PRESET_LIST), 2)
    fitted = space(arithmetic("search", components=PRESET_LIST), 2, names)
    kinds = {kind_of(name) for name in names}
    assert kinds >= {"norms", "embeddings", "attention", "mlp"} and "rest" not in kinds
    assert {c.name for c in fitted.components} == kinds  # tied models have no head, so no gene for one
    for chosen in (made, fitted):
        recipe = chosen.recipe({g.name: 0.1 * (1 + i) for i, g in enumerate(chosen.genes)})
        plans = {plan.name: plan.per_input[0]["weight"] for plan in recipe.plan(names, 2)}
        values = {c.name: 0.1 * (1 + i) for i, c in enumerate(chosen.components)}
        assert plans == {name: values[kind_of(name)] for name in names}
    attention = next(c for c in fitted.components if c.name == "attention")
    assert len(attention.parts) == 1  # the recipe has filters only for names that exist


def test_other_spellings_of_checkpoints_are_known() -> None:
    found = read_components([*PRESET_LIST, "rest"], "paper", (), _raise)

    def kind(name: str) -> str:
        return next(c.name for c in found if c.takes(name))

    assert kind("wte.weight") == kind("wpe.weight") == kind("gpt_neox.embed_in.weight") == "embeddings"
    assert kind("embed_out.weight") == kind("lm_head.bias") == "head"
    assert kind("h.0.ln_1.weight") == kind("ln_f.bias") == kind("model.decoder.final_layer_norm.weight") == "norms"
    assert kind("h.0.attn.c_attn.weight") == kind("transformer.h.1.self_attention.dense.weight") == "attention"
    assert kind("model.decoder.layers.1.fc2.bias") == kind("model.layers.0.mlp.experts.gate_up_proj") == "mlp"
    assert kind("model.layers.0.input_layernorm.weight") == "norms"
    assert kind("backbone.layers.0.mixer.A_log") == "rest"
    assert is_embedding("gpt_neox.embed_in.weight") and not is_embedding("embed_out.weight")


def _raise(where: str, message: str, hint: str = "") -> None:
    raise AssertionError(f"{where}: {message} {hint}")


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (["attention", "mlp"], ["attention", "mlp", "rest"]),
        (["mlp", "attention", "rest"], ["attention", "mlp", "rest"]),
        (PRESET_LIST, ["norms", "embeddings", "head", "attention", "mlp"]),
        ([*PRESET_LIST, "rest"], ["norms", "embeddings", "head", "attention", "mlp", "rest"]),
        ([{"q": ["q_proj"]}, "attention"], ["q", "attention", "rest"]),
        (["attention", {"others": ["*"]}, {"q": ["q_proj"]}], ["q", "attention", "others"]),
    ],
)
def test_lists_of_components(listed: list[Any], expected: list[str]) -> None:
    made = space(arithmetic("search", components=listed))
    assert [c.name for c in made.components] == expected
    assert made.components[-1].parts[-1] == "*"
    recipe = made.recipe({g.name: 0.1 for g in made.genes} | {made.genes[0].name: 0.2})
    assert len(recipe.plan(NAMES, LAYERS)) == len(NAMES)


def test_norms_inside_attention_are_norms_only_where_norms_are_listed() -> None:
    tensor = "model.layers.0.self_attn.q_norm.weight"
    for listed, expected in ((["attention"], "attention"), (["attention", "norms"], "norms")):
        found = read_components(listed, "paper", NAMES, _raise)
        assert next(c.name for c in found if c.takes(tensor)) == expected
        assert next(c.name for c in found if c.takes("model.layers.0.post_attention_layernorm.weight")) != "attention"


def test_embeddings_and_head_have_one_gene_whatever_the_layer_groups() -> None:
    made = space(arithmetic({"per_expert": False}, components=PRESET_LIST, layer_groups=2), names=NAMES)
    assert {g.name for g in made.genes} == {
        *("weight.embeddings", "weight.head"),
        *("weight.L00-02.norms", "weight.L00-02.attention", "weight.L00-02.mlp"),
        *("weight.L03-05.norms", "weight.L03-05.attention", "weight.L03-05.mlp"),
    }
    params = {g.name: round(0.1 * i, 4) for i, g in enumerate(made.genes)}
    found = planned(made.recipe(params), "weight", 0)
    assert found["model.embed_tokens.weight"] == params["weight.embeddings"]
    assert found["lm_head.weight"] == params["weight.head"]
    assert found["model.norm.weight"] == params["weight.L03-05.norms"]
    assert made.point_of(made.recipe(params)) == params
    curved = space(arithmetic({"curve": 3, "per_expert": False}, components=PRESET_LIST), names=NAMES)
    assert curved.dim == 2 + 3 * 3


def test_a_component_that_a_model_lacks_is_refused_by_name() -> None:
    plain = tuple(name for name in NAMES if "mlp" not in name)
    assert "no tensor" in problems(arithmetic("search", components=PRESET_LIST), names=plain)["components.mlp"]
    own = [{"experts": [".experts."]}, "attention"]
    assert "components.experts" in problems(arithmetic("search", components=own), names=NAMES)
    headless = tuple(name for name in NAMES if "lm_head" not in name)
    made = space(arithmetic("search", components=["attention", "head"]), names=headless)
    assert [c.name for c in made.components] == ["attention", "rest"]


# ------------------------------------------------------------------------------------- name patterns


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "anything", True),
        (None, "anything", True),
        ("layers.1?.", "model.layers.12.mlp.up_proj.weight", True),
        ("layers.1?.", "model.layers.1.mlp.up_proj.weight", False),
        ("self_attn.?_proj", "model.layers.1.self_attn.q_proj.weight", True),
        ("self_attn.?_proj", "model.layers.1.self_attn.qkv_proj.weight", False),
        ("layers.*.mlp", "model.layers.3.mlp.up_proj.weight", True),
        ("mlp*norm", "model.layers.3.norm.mlp", False),
        ("a.b*", "axbc", False),  # a dot is a dot
        ("[ab]*", "model.a.weight", False),  # brackets are no wildcards
        ("q_proj", "model.layers.1.self_attn.q_proj.weight", True),
    ],
)
def test_wildcards_in_filters(pattern: str | None, name: str, expected: bool) -> None:
    assert Conditional(1.0, pattern).matches(name) is expected


def test_components_take_name_patterns() -> None:
    parts = {"ends": ["layers.0.", "layers.5."], "qk": ["self_attn.?_"], "rest": ["*"]}
    made = space(arithmetic({"per_expert": False}, components=parts, layer_groups=1))
    params = {"weight.ends": 0.1, "weight.qk": 0.2, "weight.rest": 0.3}
    recipe = made.recipe(params)
    found = planned(recipe, "weight", 0)
    for name, value in found.items():
        layer = layer_index(name)
        assert value == (0.1 if layer in (0, 5) else 0.2 if "self_attn" in name else 0.3)
    assert made.point_of(recipe) == params
    _, lost = recipe.to_mergekit()
    assert any("self_attn.?_" in note for note in lost)
    assert not any("layers.0." in note for note in lost)


def test_mergekit_has_no_wildcards() -> None:
    weight = [{"filter": "q_*", "value": 0.1}, {"value": 0.2}]
    with pytest.raises(RecipeError, match="wildcards"):
        Recipe.build("task_arithmetic", "b", {"x": {"weight": weight}}, compat="mergekit")
    assert Recipe.build("task_arithmetic", "b", {"x": {"weight": weight}}).slices
    star = [{"filter": "*", "value": 0.1}]
    assert Recipe.build("task_arithmetic", "b", {"x": {"weight": star}}, compat="mergekit").slices
    found = problems(arithmetic("search", components={"q": ["q_*"], "rest": ["*"]}, compat="mergekit"))
    assert "wildcards" in found["components.q"]


# ------------------------------------------------------------------------------------- every kind with every split

GENES: list[tuple[str, dict[str, Any]]] = [
    ("weight", {"low": 0.0, "high": 1.0}),
    ("weight", {"low": 0.0, "high": 1.0, "curve": 3}),
    ("weight", {"low": 0.01, "high": 1.0, "log": True, "curve": 2}),
    ("weight", {"low": 0.0, "high": 1.0, "line": {"low": -0.5, "high": 0.5}}),
    ("weight", {"choices": [0.25, 0.5, 1.0]}),
    ("lambda", {"low": 0.0, "high": 1.0}),
    ("lambda", {"curve": 4}),
    ("lambda", {"line": True}),
    ("sign_election", {}),
    ("rescale", {"choices": ["l1", "none", True]}),
    ("lines_match", {}),
]
COMPONENTS: list[Any] = [{}, PRESET_LIST, ["attention", "rest"], {"q": ["*q_*"], "rest": ["*"]}]


@settings(deadline=None, derandomize=True, max_examples=120)
@given(
    st.sampled_from(GENES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(COMPONENTS),
    st.sampled_from([1, 2, [1, 4, 1]]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_kind_of_gene_splits_every_way(
    gene: tuple[str, dict[str, Any]],
    per_expert: bool,
    per_group: bool,
    per_component: bool,
    components: Any,
    groups: Any,
    known: bool,
    random: Any,
) -> None:
    name, settings_ = gene
    entry: dict[str, Any] = {**settings_, "per_component": per_component}
    if name == "weight":
        entry["per_expert"] = per_expert
    bent = bool({"curve", "line"} & entry.keys())
    if not bent:
        entry["per_group"] = per_group
    # a second parameter keeps the layer groups and the components in use
    genes = {name: entry, "density": {"low": 0.1, "high": 1.0, "per_expert": False}}
    made = space(
        {"method": "dare_ties", "layer_groups": groups, "components": components, "genes": genes},
        names=NAMES if known else (),
    )
    assert len({g.name for g in made.genes}) == made.dim == len(set(made.slots))
    for x in ([random.random() for _ in made.genes], [0.3] * made.dim):
        params = made.decode(x)
        assert made.decode(made.encode(params)) == params
        recipe = made.recipe(params)
        assert made.point_of(recipe) == params
        assert Recipe.from_yaml(recipe.to_yaml()).fingerprint == recipe.fingerprint
        assert len(recipe.plan(NAMES, LAYERS)) == len(NAMES)


def test_coarse_points_are_expressible_in_finer_spaces() -> None:
    coarse = space(arithmetic("search"))
    layered = space(arithmetic("search", layer_groups=2))
    finer = [
        space(arithmetic({"curve": 3})),
        space(arithmetic({"line": True})),
        space(arithmetic({"curve": 3}, components=PRESET_LIST)),
        space(arithmetic("search", components=PRESET_LIST, layer_groups=2), names=NAMES),
        space(SPLIT),
    ]
    point = {"math.weight": 0.3, "code.weight": 0.7}
    for fine in finer:
        params = fine.point_of(coarse.recipe(point))
        assert params is not None
        for expert in range(2):
            assert planned(fine.recipe(params), "weight", expert) == planned(coarse.recipe(point), "weight", expert)
    steps = {g.name: 0.1 * (1 + i) for i, g in enumerate(layered.genes)}
    steps = {name: round(value, 4) for name, value in steps.items()}
    fine = finer[3]
    found = fine.point_of(layered.recipe(steps))
    assert found is not None
    assert found["math.weight.head"] == steps["math.weight.L03-05"]
    assert found["math.weight.embeddings"] == steps["math.weight.L00-02"]
    assert all(made.point_of(known_recipes("models/base", EXPERTS, 3)[0][1]) is not None for made in finer)


def test_recipes_between_the_decimals_have_no_point() -> None:
    made = space(arithmetic({"curve": 3}))
    gradient = {"weight": [0.1, 0.2, 0.3]}
    inside = Recipe.build("task_arithmetic", "models/base", {"models/math": gradient, "models/code": {"weight": 0.5}})
    assert (made.point_of(inside) or {})["math.weight.C1"] == 0.2
    for wrong in ([0.1, 0.23456, 0.3], [0.1, 0.2, 0.3, 0.9], [0.1, 0.2, 9.0]):
        experts = {"models/math": {"weight": wrong}, "models/code": {"weight": 0.5}}
        assert made.point_of(Recipe.build("task_arithmetic", "models/base", experts)) is None


def test_small_values_keep_four_digits() -> None:
    small = Gene("epsilon", 1e-6, 1e-2, 1e-5, "log")
    values = [small.natural(k / 200) for k in range(201)]
    assert len(set(values)) == 201
    for value in values:
        assert float(f"{value:.3e}") == value == small.natural(small.unit(value)) == small.snapped(value)
    narrow = Gene("clamp", 0.0, 0.01, 0.001)
    assert len({narrow.natural(k / 500) for k in range(501)}) == 501
    assert narrow.natural(narrow.unit(0.00123)) == 0.00123
    made = space({"method": "ties", "genes": {"density": {"low": 0.001, "high": 0.1, "log": True}}})
    params = {"math.density": 0.001234, "code.density": 0.05678}
    assert made.point_of(made.recipe(params)) == params


def test_a_fixed_value_may_differ_per_expert() -> None:
    spec = {"method": "ties", "genes": {"lambda": "search"}, "fixed": {"weight": {"code": 0.2, "math": 0.7}}}
    made = space(spec)
    assert planned(made.recipe({"lambda": 1.0}), "weight", 0)["lm_head.weight"] == 0.7
    assert planned(made.recipe({"lambda": 1.0}), "weight", 1)["lm_head.weight"] == 0.2
    assert made.point_of(made.recipe({"lambda": 1.0})) == {"lambda": 1.0}
    found = problems({**spec, "fixed": {"weight": {"maths": 0.7, "code": 1.0}, "normalize": {"math": True}}})
    assert set(found) == {"fixed.weight", "fixed.weight.maths", "fixed.normalize"}


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (arithmetic({"curve": 1}), "genes.weight.curve"),
        (arithmetic({"curve": 7}), "genes.weight.curve"),
        (arithmetic({"curve": True}), "genes.weight.curve"),
        (arithmetic({"curve": "3"}), "genes.weight.curve"),
        (arithmetic({"curve": 2, "line": True}), "genes.weight.line"),
        (arithmetic({"curve": 2, "per_group": True}), "genes.weight.per_group"),
        (arithmetic({"line": "yes"}), "genes.weight.line"),
        (arithmetic({"line": {"low": 1.0, "high": 0.0}}), "genes.weight.line.low"),
        (arithmetic({"line": {"high": math.inf}}), "genes.weight.line.high"),
        (arithmetic({"line": {"hgih": 1.0}}), "genes.weight.line.hgih"),
        (arithmetic({"line": {"start": 9.0}}), "genes.weight.line.start"),
        (arithmetic({"curve": 2}, layer_groups=2), "layer_groups"),
        (arithmetic({"choices": [0.5]}), "genes.weight.choices"),
        (arithmetic({"choices": 0.5}), "genes.weight.choices"),
        (arithmetic({"choices": [0.5, 0.5]}), "genes.weight.choices"),
        (arithmetic({"choices": [0.5, "x"]}), "genes.weight.choices"),
        (arithmetic({"choices": [0.5, 1.0], "low": 0.1}), "genes.weight.low"),
        (arithmetic({"choices": [0.5, 1.0], "start": 0.7}), "genes.weight.start"),
        (arithmetic({"choices": [0.5, 1.0], "curve": 2}), "genes.weight.curve"),
        ({"method": "ties", "genes": {"density": {"choices": [0.5, 1.5]}}}, "genes.density.choices"),
        ({"method": "ties", "genes": {"normalize": {"low": 0}}}, "genes.normalize.low"),
        ({"method": "ties", "genes": {"normalize": {"choices": [True, "yes"]}}}, "genes.normalize.choices"),
        ({"method": "dare_ties", "genes": {"rescale": {"choices": ["l1", "l3"]}}}, "genes.rescale.choices"),
        ({"method": "dare_ties", "genes": {"sign_election": {"choices": ["weighted", True]}}},
         "genes.sign_election.choices"),
        ({"method": "dare_ties", "genes": {"rescale": {"line": True}}}, "genes.rescale.line"),
        (whole_spec({"low": 1.5}), "genes.k.low"),
        (whole_spec({"low": 0, "high": 3, "log": True}), "genes.k.low"),
        (whole_spec({"low": 1, "high": 3, "start": 2.5}), "genes.k.start"),
        (whole_spec({"curve": 2}), "genes.k.curve"),
        (arithmetic("search", components=["attention", "attn"]), "components[1]"),
        (arithmetic("search", components=["attention", "attention"]), "components.attention"),
        (arithmetic("search", components=["attention", {"a": ["x"], "b": ["y"]}]), "components[1]"),
        (arithmetic("search", components=[{"q": "q_proj"}]), "components.q"),
        (arithmetic("search", components=[{"a": ["*"]}, "rest"]), "components.rest"),
        (arithmetic("search", components=[{"a": ["attn"]}, "attention"]), "components.attention"),
        (arithmetic("search", components={"a": ["q_*"], "b": ["q_*"], "c": ["*"]}), "components.b"),
        (arithmetic("search", components={"a": ["?_proj"], "b": ["q_proj"], "c": ["*"]}), "components.b"),
        (arithmetic("search", components="attention"), "components"),
    ],
)  # fmt: skip
def test_refused(spec: Any, where: str) -> None:
    assert where in problems(spec)


def test_every_problem_of_the_new_kinds_is_listed_at_once() -> None:
    found = problems(
        {
            "method": "dare_ties",
            "components": ["attn", "mlp"],
            "genes": {
                "weight": {"curve": 99, "per_group": True},
                "density": {"line": True},
                "normalize": {"choices": ["x", True]},
            },
        }
    )
    assert set(found) == {
        "components[0]",
        "genes.weight.curve",
        "genes.weight.per_group",
        "genes.density.line",
        "genes.normalize.choices",
    }


def test_helpers_of_depth() -> None:
    assert over_depth("curve", [0.5, 0.5]) == 0.5 and over_depth("curve", [0.1, 0.2]) == [0.1, 0.2]
    assert over_depth("line", [0.1, 0.2]) == [0.1, 0.3] and over_depth("line", [0.1, 0.0]) == 0.1
    assert [in_slice([0.0, 1.0], a, b, 5) for a, b in cut(0, 5, 5)] == [[0.0, 0.25, 0.5, 0.75], [0.0, 1.0]]
    assert in_slice(True, 0, 3, 3) is True and in_slice("l1", 2, 3, 3) == "l1"


def test_equal_lists_in_neighbouring_slices_stay_two_slices() -> None:
    made = space({**SPLIT, "layer_groups": 3, "components": {}, "genes": {"lambda": {"per_group": True}},
                  "fixed": {"weight": [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]}})  # fmt: skip
    recipe = made.recipe({"lambda.L00-01": 0.5, "lambda.L02-03": 0.5, "lambda.L04-05": 0.75})
    found = planned(recipe, "weight", 0)
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(6)] == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    four = space({**SPLIT, "layer_groups": 4, "components": {}, "genes": {"lambda": {"per_group": True}},
                  "fixed": {"weight": [0.0, 1.0] * 4}}, n_layers=8)  # fmt: skip
    zigzag = four.recipe({"lambda.L00-01": 0.1, "lambda.L02-03": 0.2, "lambda.L04-05": 0.1, "lambda.L06-07": 0.1})
    found = planned(zigzag, "weight", 0, 8)
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(8)] == [0.0, 1.0] * 4
    assert all(math.isnan(value) for value in from_depth("curve", [0.1, None, 0.3], 2))


# ------------------------------------------------------------------------------------- the documentation

PAGE = (Path(__file__).parent.parent / "docs" / "spaces.md").read_text(encoding="utf-8")
EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL) if "path:" not in text]


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_the_documentation_work(text: str) -> None:
    made = space(load_yaml(text).data, n_layers=32)
    for start in made.starts():
        params = made.decode(np.random.default_rng(0).random(made.dim)) | {k: start[k] for k in start if k == "method"}
        recipe = made.recipe(params)
        point = made.point_of(recipe)
        assert point is not None and made.recipe(point).fingerprint == recipe.fingerprint
        assert point == params or recipe.method == "task_arithmetic"  # which has no density


def test_the_documentation_counts_the_levels() -> None:
    text = next(text for text in EXAMPLES if "layer_groups: each" in text)
    three = {**EXPERTS, "chat": "models/chat"}
    made = SearchSpace.from_dict(load_yaml(text).data, "models/base", three, 32)
    found = [(level.name, level.dim) for level in made.facts().levels]
    assert found == [("model", 3), ("groups", 36), ("smooth", 63), ("layers", 288)]
    assert "3, 36, 63 and 288 dimensions" in PAGE and all(f"| `{name}` |" in PAGE for name, _ in found)


def test_the_documentation_says_how_many_genes() -> None:
    split = next(text for text in EXAMPLES if "experts x 4 x 3 genes" in text)
    names = [g.name for g in space(load_yaml(split).data, n_layers=32).genes]
    assert [sum(part in name for name in names) for part in ("weight", "density", "lambda")] == [2 * 4 * 3, 4, 3]


def test_the_documentation_names_every_key_and_component() -> None:
    for word in (*_TOP, *_GENE, *PRESETS, REST):
        assert f"`{word}" in PAGE, word


def test_the_python_of_the_documentation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    monkeypatch.chdir(Path(__file__).parent.parent)
    exec(compile(text, "docs/spaces.md", "exec"), {})
