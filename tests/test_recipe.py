from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import Conditional, Recipe, Slice, Source, TensorPlan, is_embedding, layer_index

QUIET = settings(max_examples=150, derandomize=True, deadline=None, database=None)

NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(4)
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def planned(recipe: Recipe, n_layers: int = 4) -> dict[str, TensorPlan]:
    names = [name for name in NAMES if (layer_index(name) or 0) < n_layers]
    plans = recipe.plan(names, n_layers)
    result = {plan.name: plan for plan in plans}
    assert len(result) == len(plans)
    return result


def q(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def up(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def ties(**changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "compat": "paper",
        "seed": 3,
        **changes,
    }


def weights(plan: TensorPlan, name: str = "weight") -> list[Any]:
    return [values[name] for values in plan.per_input]


# ---- models, experts, names -----------------------------------------------------------------------


def test_models_and_experts_are_ordered() -> None:
    recipe = Recipe.build("ties", "base", {"z": {}, "a": {}, "m": {}})
    assert recipe.models == ("base", "z", "a", "m")
    assert recipe.experts == ("z", "a", "m")
    assert Recipe.from_dict(ties(models=[{"model": "a"}, {"model": "base"}])).models == ("base", "a")
    linear = {"merge_method": "linear", "models": [{"model": "b"}, {"model": "base"}], "base_model": "base"}
    found = Recipe.from_dict(linear)
    assert found.models == ("base", "b") and found.experts == ("b",)
    plan = planned(found)["lm_head.weight"]
    assert [model for model, _ in plan.inputs] == ["b", "base"]  # an ordinary input, in its place
    assert plan.base is None and plan.streams == (0, -1)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("transformer.h.3.attn.bias", 3),
        ("gpt_neox.layers.0.x", 0),
        ("encoder.block.5.layer.1.weight", 5),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", 3),
        ("model.blocks.2.w", 2),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
        ("experts.4.weight", None),
        ("model.layers.weight", None),
        ("layers10.2.w", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


def test_embeddings() -> None:
    for name in ("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight"):
        assert is_embedding(name)
    assert not is_embedding("lm_head.weight") and not is_embedding("layers.1.embed.weight")


# ---- planning -------------------------------------------------------------------------------------


def test_plan_of_whole_models() -> None:
    plans = planned(Recipe.from_dict(ties()))
    assert list(plans) == NAMES
    plan = plans[q(2)]
    assert plan == TensorPlan(
        name=q(2),
        method="ties",
        base=("base", q(2)),
        inputs=(("a", q(2)), ("b", q(2))),
        streams=(0, 1),
        shared={
            "lambda": 1.0,
            "normalize": True,
            "rescale": False,
            "scope": "tensor",
            "sign_election": "weighted",
            "sparsify_1d": False,
            "lines_alpha": 1.0,
            "lines_beta": 0.0,
            "lines_match": False,
        },
        per_input=({"weight": 1.0, "density": 1.0}, {"weight": 1.0, "density": 1.0}),
    )


def test_precedence_source_slice_global_default() -> None:
    recipe = Recipe.from_dict(
        {
            "merge_method": "ties",
            "base_model": "base",
            "compat": "paper",
            "parameters": {"weight": 0.1, "lambda": 0.5},
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.3}},
                        {"model": "b", "layer_range": [0, 2]},
                    ],
                    "parameters": {"weight": 0.2, "lambda": 0.7},
                },
                {"sources": [{"model": m, "layer_range": [2, 4]} for m in "ab"]},
            ],
        }
    )
    plans = planned(recipe)
    assert weights(plans[q(0)]) == [0.3, 0.2] and plans[q(0)].shared["lambda"] == 0.7
    assert weights(plans[q(3)]) == [0.1, 0.1] and plans[q(3)].shared["lambda"] == 0.5
    assert weights(plans[q(0)], "density") == [1.0, 1.0]
    assert weights(plans["model.embed_tokens.weight"]) == [0.3, 0.2]  # first slice
    assert weights(plans["model.norm.weight"]) == [0.1, 0.1]  # last slice
    assert weights(plans["lm_head.weight"]) == [0.1, 0.1]


def test_filters_first_match_wins_and_falls_through() -> None:
    conditions = [
        {"filter": "q_proj", "value": 0.1},
        {"filter": "self_attn", "value": 0.2},
        {"filter": "layers.1", "value": 0.3},
    ]
    models = [{"model": "a", "parameters": {"weight": conditions}}, {"model": "b"}]
    plans = planned(Recipe.from_dict(ties(models=models, parameters={"weight": 0.9})))
    assert weights(plans[q(1)]) == [0.1, 0.9]
    assert weights(plans[up(1)]) == [0.3, 0.9]
    assert weights(plans[up(2)]) == [0.9, 0.9]  # no entry matches: the next level
    star = [{"filter": "*", "value": 0.5}, {"filter": "q_proj", "value": 0.6}]
    plans = planned(Recipe.from_dict(ties(parameters={"weight": star})))
    assert weights(plans[q(1)]) == [0.5, 0.5]


def test_filters_are_substrings() -> None:
    recipe = Recipe.from_dict(ties(parameters={"weight": [{"filter": "layers.1", "value": 0.5}, {"value": 0.0}]}))
    names = [f"model.layers.{i}.w" for i in range(12)]
    hit = [plan.name for plan in recipe.plan(names, 12) if weights(plan) == [0.5, 0.5]]
    assert hit == ["model.layers.1.w", "model.layers.10.w", "model.layers.11.w"]


def test_per_model_filters_see_source_names_and_shared_ones_output_names() -> None:
    recipe = Recipe.from_dict(
        {
            "merge_method": "linear",
            "compat": "paper",
            "parameters": {"normalize": [{"filter": "layers.0.", "value": False}]},
            "slices": [
                {
                    "sources": [
                        {
                            "model": "a",
                            "layer_range": [2, 4],
                            "parameters": {"weight": [{"filter": "layers.2.", "value": 0.25}]},
                        }
                    ]
                }
            ],
        }
    )
    plans = planned(recipe)
    assert plans[q(0)].inputs == (("a", q(2)),)
    assert weights(plans[q(0)]) == [0.25] and plans[q(0)].shared == {"normalize": False}
    assert weights(plans[q(1)]) == [1.0] and plans[q(1)].shared == {"normalize": True}


def test_gradients_over_whole_models() -> None:
    plans = planned(Recipe.from_dict(ties(parameters={"weight": [0.0, 1.0], "lambda": [1, 2, 4]})))
    assert [weights(plans[q(i)])[0] for i in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [plans[q(i)].shared["lambda"] for i in range(4)] == pytest.approx([1, 5 / 3, 8 / 3, 4])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert weights(plans[name]) == [0.0, 0.0]  # t = 0 outside the layers, the head included


def test_gradients_restart_in_every_slice_and_one_layer_has_t_1() -> None:
    def piece(first: int, last: int) -> dict[str, Any]:
        return {"sources": [{"model": "a", "layer_range": [first, last]}]}

    recipe = Recipe.from_dict(
        {
            "merge_method": "passthrough",
            "compat": "paper",
            "slices": [piece(0, 3), piece(3, 4)],
            "parameters": {"scale": [{"filter": "q_proj", "value": [1.0, 2.0]}, {"value": [3, 5]}]},
        }
    )
    plans = planned(recipe)
    assert [weights(plans[q(i)], "scale")[0] for i in range(4)] == [1.0, 1.5, 2.0, 2.0]
    assert weights(plans[up(3)], "scale") == [5.0]
    assert weights(plans["lm_head.weight"], "scale") == [3.0]
    single = planned(Recipe.from_dict(ties(parameters={"weight": [0.0, 1.0]})), n_layers=1)
    assert weights(single[q(0)]) == [1.0, 1.0]
    assert weights(single["model.norm.weight"]) == [0.0, 0.0]


def test_slices_renumber_layers() -> None:
    stack = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [2, 4]}]},
            {"sources": [{"model": "b", "layer_range": [0, 3]}]},
        ],
    }
    plans = planned(Recipe.from_dict(stack))
    layers = [plans[q(i)].inputs[0] for i in range(5)]
    assert layers == [("a", q(2)), ("a", q(3)), ("b", q(0)), ("b", q(1)), ("b", q(2))]
    assert plans["model.embed_tokens.weight"].inputs[0][0] == "a"
    assert plans["lm_head.weight"].inputs[0][0] == "b"


def test_the_base_of_slices() -> None:
    def sliced(*sources: dict[str, Any], **more: Any) -> dict[str, Any]:
        slices = [{"sources": list(sources), **more}]
        return {"merge_method": "slerp", "base_model": "base", "slices": slices, "parameters": {"t": 0.5}}

    a = {"model": "a", "layer_range": [1, 3]}
    unlisted = Recipe.from_dict(sliced(a))
    listed = Recipe.from_dict(sliced({"model": "base", "layer_range": [1, 3]}, a))
    assert listed == unlisted and listed.fingerprint == unlisted.fingerprint
    plan = planned(listed)[q(0)]
    assert plan.base == ("base", q(1)) and plan.inputs == (("a", q(1)),)
    shifted = Recipe.from_dict(sliced({"model": "base", "layer_range": [0, 2]}, a))
    assert planned(shifted)[q(0)].base == ("base", q(0))
    itself = Recipe.from_dict(
        sliced({"model": "base", "layer_range": [0, 2]}, {"model": "base", "layer_range": [2, 4]})
    )
    plan = planned(itself)[q(1)]
    assert plan.base == ("base", q(1)) and plan.inputs == (("base", q(3)),)
    other = Recipe.from_dict(sliced(a, base_model="other"))
    assert planned(other)[q(0)].base == ("other", q(1))
    assert other.models == ("base", "other", "a")
    two = {"merge_method": "ties", "base_model": "base", "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [2, 4]}]}
    ]}  # fmt: skip
    with pytest.raises(RecipeError, match="which layers of the base"):
        Recipe.from_dict(two)


def test_one_model_twice_keeps_both_sources() -> None:
    data = {
        "merge_method": "linear",
        "compat": "paper",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.1}},
                    {"model": "a", "layer_range": [2, 4], "parameters": {"weight": 0.9}},
                ]
            }
        ],
    }
    plan = planned(Recipe.from_dict(data))[q(1)]
    assert plan.inputs == (("a", q(1)), ("a", q(3)))
    assert weights(plan) == [0.1, 0.9] and plan.streams == (0, 0)


def test_layers_past_the_last_are_planned_like_the_head() -> None:
    extra = "model.layers.4.eh_proj.weight"  # a multi-token prediction head
    recipe = Recipe.from_dict(ties(parameters={"weight": [0.25, 1.0]}))
    plans = {plan.name: plan for plan in recipe.plan([*NAMES, extra], 4)}
    assert weights(plans[extra]) == [0.25, 0.25]


def test_planning_refuses_layers_that_do_not_exist() -> None:
    data = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 5]}]}],
    }
    with pytest.raises(RecipeError, match="which has 4 layers"):
        planned(Recipe.from_dict(data))


def test_a_required_parameter_without_a_value_names_the_tensor() -> None:
    recipe = Recipe.build("slerp", "b", {"a": {}}, parameters={"t": [{"filter": "mlp", "value": 1}]})
    with pytest.raises(RecipeError, match=r"'t' has no value.*embed_tokens"):
        planned(recipe)


# ---- reading --------------------------------------------------------------------------------------


def test_mergekit_form_is_recognised_by_the_missing_compat() -> None:
    data = ties()
    del data["compat"], data["seed"]
    recipe = Recipe.from_dict(data)
    assert recipe.compat == "mergekit" and recipe.seed == 0
    assert Recipe.from_dict({**data, "compat": "paper"}).compat == "paper"
    assert Recipe.from_dict({**data, "seed": 4}).compat == "mergekit"


def test_what_mergekit_ignores_on_purpose() -> None:
    data = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "base", "parameters": {"weight": 1.0}},
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
        ],
        "parameters": {"int8_mask": 1.0, "normalize": 0.0, "rescale": 1.0},
        "dtype": "torch.bfloat16",
    }
    recipe = Recipe.from_dict(data)
    assert recipe.experts == ("a",) and recipe.dtype == "bfloat16"
    shared = planned(recipe)[q(0)].shared
    assert shared["normalize"] is False and shared["rescale"] is True
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({**data, "compat": "paper"})
    assert {"parameters.int8_mask"} == {p.where for p in caught.value.problems}
    del data["parameters"]["int8_mask"]
    with pytest.raises(RecipeError, match="is the base, its parameters have no effect"):
        Recipe.from_dict({**data, "compat": "paper"})


def test_model_references_in_mergekits_mapping_form() -> None:
    reference = {"model": {"path": "org/m", "revision": "main"}, "lora": {"path": "org/l"}}
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": reference}]})
    assert recipe.models == ("org/m@main+org/l",)


BAD = """\
merge_method: ties
base_model: base
dtpye: bfloat16
dtype: bf16
seed: 1.5
parameters:
  lamda: 1.0
  normalize: 0.5
  lambda: {filter: mlp, value: 1}
models:
- model: a
  parameters:
    weight: heavy
    lambda: 0.5
    density: [0.1, .nan]
- model: b
  layer_range: [0, 4]
  parameters:
    weight:
    - {filter: mlp, vlaue: 1.0}
    density: []
"""


def test_every_problem_at_once_with_file_and_line() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(BAD, "bad.yaml")
    found = {(problem.where, problem.message.split(" is ")[0]) for problem in caught.value.problems}
    assert {
        ("bad.yaml:3", "unknown key 'dtpye'"),
        ("bad.yaml:4", "dtype"),
        ("bad.yaml:5", "seed"),
        ("bad.yaml:7", "ties has no parameter 'lamda'"),
        ("bad.yaml:8", "normalize"),
        ("bad.yaml:9", "lambda: a filter stands in a list"),
        ("bad.yaml:13", "weight"),
        ("bad.yaml:14", "'lambda'"),
        ("bad.yaml:15", "density"),
        ("bad.yaml:17", "unknown key 'layer_range'"),
        ("bad.yaml:20", "unknown key 'vlaue'"),
        ("bad.yaml:20", "weight"),
        ("bad.yaml:21", "density: the list"),
    } == found
    assert "dtype" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"merge_method": "tiess"}, "merge_method", "unknown method"),
        ({"merge_method": None}, "merge_method", "missing"),
        ({"compat": "papr"}, "compat", "papr"),
        ({"base_model": None}, "models", "needs a base model"),
        ({"models": None}, "", "neither"),
        ({"slices": []}, "models", "both"),
        ({"models": []}, "models", "at least one"),
        ({"models": [{"model": "base"}]}, "models", "at least 1"),
        ({"models": [{"model": 3}]}, "models[0].model", "not a model reference"),
        ({"models": ["a"]}, "models[0]", "expected a mapping"),
        ({"modules": {}}, "modules", "not supported"),
        ({"seed": True}, "seed", "True"),
        ({"parameters": {"rescale": "inv_prob"}}, "parameters.rescale", "one of l1, l2, none, true"),
        ({"parameters": {"sign_election": True}}, "parameters.sign_election", "one of weighted"),
        ({"parameters": {"normalize": [0, 1]}}, "parameters.normalize", "one value"),
        ({"parameters": {"weight": True}}, "parameters.weight", "a number"),
        ({"parameters": [1]}, "parameters", "a mapping"),
        ({"parameters": {"weight": [{"value": 1, "filter": 3}]}}, "parameters.weight[0].filter", "3"),
    ],
)
def test_single_problems(changes: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(ties(**changes))
    assert any(p.where == where and message in str(p) for p in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"model": "a", "layer_range": [2, 2]}], "layer_range"),
        ([{"model": "a"}], "layer_range"),
        ([{"model": "a", "layer_range": [0, 2.0]}], "layer_range"),
        ([{"model": "a", "layer_range": [-1, 2]}], "layer_range"),
        ([{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}], "equal"),
        ([], "a list of sources"),
    ],
)
def test_bad_slices(sources: list[Any], message: str) -> None:
    data = {"merge_method": "linear", "slices": [{"sources": sources}]}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


def test_counts_of_models() -> None:
    with pytest.raises(RecipeError, match="exactly 1 beside the base, not 2"):
        Recipe.build("slerp", "base", {"a": {}, "b": {}}, parameters={"t": 0.5})
    with pytest.raises(RecipeError, match="exactly 1, not 2"):
        Recipe.build("passthrough", None, {"a": {}, "b": {}})


def test_the_constructor_refuses_whole_models_beside_slices() -> None:
    whole, part = Slice((Source("a"),)), Slice((Source("a", (0, 1)),))
    for slices in ((whole, part), (Slice((Source("a"),), parameters={"weight": 1}),)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stands alone"):
            Recipe("linear", slices)


# ---- writing, fingerprints ------------------------------------------------------------------------

NUMBERS = st.floats(-3, 3, allow_nan=False) | st.integers(-2, 2)


def settings(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    values = numbers | st.lists(numbers, min_size=1, max_size=4)
    filters = st.sampled_from(["mlp", "*", "1e-4", "q", "no"])
    filtered = st.fixed_dictionaries({"value": values}, optional={"filter": filters})
    return values | st.lists(filtered, min_size=1, max_size=3)


SETTINGS = settings(NUMBERS)
SHARES = settings(st.floats(0, 1) | st.integers(0, 1))  # what a density may be
PATHS = st.sampled_from(["a", "b", "org/model@rev", "path with: colon", "1.0", "null", "é"])


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    per_model = st.fixed_dictionaries({}, optional={"weight": SETTINGS, "density": SHARES})
    top: dict[str, Any] = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "compat": draw(st.sampled_from(["paper", "mergekit"])),
        "seed": draw(st.integers(-(10**17), 10**17)),
        "parameters": draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "lambda": SETTINGS,
                    "weight": SETTINGS,
                    "normalize": st.sampled_from([True, False, 0, 1.0]),
                    "rescale": st.sampled_from(["l1", "none", "inv_prob", True, 0.0]),
                    "sign_election": st.sampled_from(["weighted", "unweighted"]),
                },
            )
        ),
    }
    models = draw(st.lists(PATHS, min_size=1, max_size=3, unique=True))
    if draw(st.booleans()):
        top["models"] = [{"model": path, "parameters": draw(per_model)} for path in models]
    else:
        cuts = draw(st.sampled_from([[(0, 4)], [(0, 2), (2, 4)], [(1, 4), (0, 1)]]))
        top["slices"] = [
            {
                "sources": [
                    {"model": path, "layer_range": list(cut), "parameters": draw(per_model)} for path in models
                ],
                "parameters": draw(per_model),
            }
            for cut in cuts
        ]
    if draw(st.booleans()):
        top["out_dtype"] = "bfloat16"
        top["chat_template"] = "{% for m in messages %}\n  {{ m }}\n{% endfor %}\n"
        top["tokenizer"] = {"source": "union", "tokens": {"<x>": {"source": "a", "force": True}}}
    return top


def reordered(data: Any) -> Any:
    """The same data with every mapping's keys the other way round."""
    if isinstance(data, dict):
        return {key: reordered(data[key]) for key in reversed(data)}
    return [reordered(item) for item in data] if isinstance(data, list) else data


@QUIET
@given(recipes())
def test_round_trips_and_fingerprints(data: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(data)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and hash(again) == hash(recipe)
    assert again.fingerprint == recipe.fingerprint
    assert again.to_yaml() == recipe.to_yaml()
    turned = Recipe.from_dict(reordered(data))
    assert turned.fingerprint == recipe.fingerprint
    assert planned(turned) == planned(recipe)
    if "tokenizer" in data:
        assert recipe.to_dict()["tokenizer"] == data["tokenizer"]
        assert recipe.to_dict()["chat_template"] == data["chat_template"]


OURS_ALONE = ("rescale", "sign_election", "sparsify_1d")


@QUIET
@given(recipes())
def test_mergekit_form_plans_the_same_parameters(data: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(data)
    form, notes = recipe.to_mergekit()
    assert "compat" not in form and "seed" not in form and notes
    other = Recipe.from_dict(json.loads(json.dumps(form)))
    assert other.compat == "mergekit"
    theirs = planned(other)
    for name, plan in planned(recipe).items():
        found = theirs[name]
        assert (found.base, found.inputs, found.per_input) == (plan.base, plan.inputs, plan.per_input)
        for key, value in plan.shared.items():
            assert key in OURS_ALONE or found.shared[key] == value


def test_to_mergekit_says_what_is_lost() -> None:
    parameters = {"rescale": "inv_prob", "sign_election": "unweighted", "sparsify_1d": True}
    recipe = Recipe.build("dare_ties", "base", {"a": {}}, parameters=parameters, seed=7, out_dtype="bfloat16")
    form, notes = recipe.to_mergekit()
    assert form == {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"rescale": True, "weight": 1.0},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    text = "\n".join(notes)
    for word in ("seed 7", "inv_prob", "unweighted", "sparsify_1d"):
        assert word in text
    plain = Recipe.build("linear", None, {"a": {"weight": 0.5}}, dtype="float32", compat="mergekit")
    assert plain.to_mergekit() == (
        {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.5}}], "dtype": "float32"},
        [],
    )


def test_to_mergekit_lists_the_base_in_every_slice() -> None:
    data = ties(slices=[{"sources": [{"model": "a", "layer_range": [0, 4]}]}])
    del data["models"]
    form, _ = Recipe.from_dict(data).to_mergekit()
    assert [source["model"] for source in form["slices"][0]["sources"]] == ["base", "a"]


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"parameters": {"lambda": 1}}, {"parameters": {"lambda": 1.0}}),
    ({"parameters": {"normalize": True}}, {"parameters": {"normalize": 1.0}}),
    ({"parameters": {"weight": -0.0}}, {"parameters": {"weight": 0}}),
    ({"parameters": {"weight": [1, -0.0]}}, {"parameters": {"weight": [1.0, 0.0]}}),
    ({"parameters": {"lambda": None}}, {"parameters": {}}),
    ({"models": [{"model": "base"}, {"model": "a"}]}, {"models": [{"model": "a"}]}),
    ({"dtype": "torch.float32"}, {"dtype": "float32"}),
]


@pytest.mark.parametrize(("first", "second"), FORMS)
def test_equal_meaning_equal_fingerprint(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, two = Recipe.from_dict(ties(**first)), Recipe.from_dict(ties(**second))
    assert one == two and one.fingerprint == two.fingerprint


def test_the_constructor_canonicalises_numbers_too() -> None:
    made = [
        Recipe("ties", (Slice((Source("a"),)),), "base", {"normalize": one, "lambda": zero})  # type: ignore[arg-type]
        for one, zero in [(True, 0.0), (1, -0.0), (1.0, 0)]
    ]
    assert len({recipe.fingerprint for recipe in made}) == 1
    assert "-0" not in made[1].to_yaml()


def test_different_recipes_have_different_fingerprints() -> None:
    variants = [
        ties(),
        ties(seed=4),
        ties(seed=2**60),
        ties(seed=2**60 + 1),
        ties(compat="mergekit"),
        ties(dtype="bfloat16"),
        ties(out_dtype="bfloat16"),
        ties(base_model="other"),
        ties(models=[{"model": "b"}, {"model": "a"}]),
        ties(merge_method="dare_ties"),
        ties(parameters={"weight": 0.1 + 0.2}),
        ties(parameters={"weight": 0.3}),
        ties(parameters={"weight": [0.3]}),
        ties(parameters={"weight": [{"value": 0.3, "filter": "mlp"}]}),
        ties(chat_template="x"),
    ]
    assert len({Recipe.from_dict(data).fingerprint for data in variants}) == len(variants)


# A change here re-scores every stored candidate: the fingerprint is part of the format.
STORED = "0392249c8cfea13c8ab203e73503b06a5fa8e8e4351868c9c5b5eaa90703c840"


def test_fingerprint_is_the_same_in_every_process() -> None:
    data = ties(parameters={"lambda": 1, "weight": [{"filter": "mlp", "value": 0.1}, {"value": 1e-5}]})
    here = Recipe.from_dict(data).fingerprint
    code = (
        "import json, sys; from evomerge.recipe import Recipe; "
        "print(Recipe.from_dict(json.loads(sys.argv[1])).fingerprint)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, json.dumps(reordered(data))],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == here
    assert here == STORED


def test_importing_recipe_does_not_import_torch() -> None:
    code = "import sys, evomerge.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_conditionals_match_by_substring() -> None:
    assert Conditional(1.0).matches("x") and Conditional(1.0, "*").matches("x")
    assert Conditional(1.0, "mlp").matches("a.mlp.b") and not Conditional(1.0, "m.p").matches("mlp")
