"""Writing recipes as plain data: our form, and mergekit's with a list of what it cannot say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evomerge import registry
from evomerge._recipe_plan import split_base
from evomerge.recipe import Conditional, Parameters, Recipe, Setting, Slice, Source, is_glob

if TYPE_CHECKING:
    from evomerge.methods import Method, Param


def write_recipe(recipe: Recipe) -> dict[str, Any]:
    """Returns our form: mergekit's keys plus `compat` and `seed`."""
    slices = [(piece, piece.sources) for piece in recipe.slices]
    return {**_layout(recipe, slices), "compat": recipe.compat, "seed": recipe.seed}


def write_mergekit(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """Returns mergekit's form, and what mergekit cannot express or computes differently."""
    method: Method = registry.get("methods", recipe.method)
    slices = []
    for piece in recipe.slices:
        base, others = split_base(method, recipe, piece)
        # mergekit adds an unlisted base to whole models, but not to slices
        add = base is not None and base not in piece.sources and base.layers is not None
        slices.append((piece, (base, *others) if add and base is not None else piece.sources))
    data = _layout(recipe, slices)
    notes = _differences(recipe, method)
    every = [data, *data.get("models", ()), *data.get("slices", ())]
    every += [source for piece in data.get("slices", ()) for source in piece["sources"]]
    for holder in every:
        if "parameters" in holder:
            _translate(holder, method, notes)
    weight = method.parameter("weight")
    if weight is not None and not _weights_given(recipe, method):
        data.setdefault("parameters", {})["weight"] = weight.default  # mergekit has no default
    if recipe.compat == "paper":
        out = recipe.out_dtype or recipe.dtype
        data["dtype"] = "float32"
        if out is not None:
            data["out_dtype"] = out
        else:
            notes.append("out_dtype: mergekit needs it spelled out to save in the base's dtype")
    return data, list(dict.fromkeys(notes))


def no_mergekit_form(recipe: Recipe) -> str:
    """Why no recipe of mergekit is near this one, or "": without its shifts a passthrough's gains are wrong ones."""
    if recipe.method != "passthrough":
        return ""
    sources = [source for piece in recipe.slices for source in piece.sources]
    every = [recipe.parameters, *(s.parameters for s in sources), *(piece.parameters for piece in recipe.slices)]
    values = [value for parameters in every for name, value in parameters if name == "shift"]
    if not any(number != 0.0 for value in values for number in _numbers(value)):
        return ""
    return (
        "its scales are in the gains of norms that are stored less one, which takes passthrough's `shift`; "
        "mergekit has `scale` alone, and that makes another model"
    )


def _numbers(setting: Any) -> list[Any]:
    """The values that a setting may take."""
    if isinstance(setting, Conditional):
        return _numbers(setting.value)
    return [n for item in setting for n in _numbers(item)] if isinstance(setting, tuple) else [setting]


def _weights_given(recipe: Recipe, method: Method) -> bool:
    """True when every model has a weight for every tensor, or a shared one exists."""
    if dict(recipe.parameters).get("weight") is not None:
        return True
    weights = [
        dict(source.parameters).get("weight")
        for piece in recipe.slices
        for source in split_base(method, recipe, piece)[1]
    ]
    return all(weight is not None and _always_applies(weight) for weight in weights)


def _always_applies(setting: Setting) -> bool:
    if not isinstance(setting, tuple):
        return True
    return any(not isinstance(item, Conditional) or item.matches("") for item in setting)


def _differences(recipe: Recipe, method: Method) -> list[str]:
    notes = []
    if not method.mergekit:
        notes.append(f"merge_method: mergekit has no {recipe.method}")
    if method.random:
        notes.append(
            f"seed {recipe.seed}: mergekit draws its masks from one global generator, in the order "
            "of its schedule; the masks of this recipe cannot be reproduced there"
        )
    if why := no_mergekit_form(recipe):
        notes.append(why)
    if recipe.compat == "paper" and method.parameter("sparsify_1d") is not None:
        notes.append("sparsify_1d: mergekit sparsifies 1-D tensors (norm gains, biases) always")
    for piece in recipe.slices:
        models = [source.model for source in piece.sources]
        if len(set(models)) < len(models):
            notes.append("a slice takes one model twice: mergekit keeps only one of the two")
    return notes


def _translate(holder: dict[str, Any], method: Method, notes: list[str]) -> None:
    """Rewrites one `parameters` mapping for mergekit, in place."""
    parameters = holder["parameters"]
    for name in list(parameters):
        param = method.parameter(name)
        if param is None:
            continue
        if param.extension:
            value = parameters.pop(name)
            if value != param.default and name not in ("sparsify_1d", "shift"):  # these have notes of their own
                notes.append(f"{name}: mergekit has no such parameter (here: {value})")
            continue
        if param.accepts_bool:
            parameters[name] = _translate_choice(param, parameters[name], notes)
        for item in parameters[name] if isinstance(parameters[name], list) else ():
            if isinstance(item, dict) and is_glob(item.get("filter") or "*"):
                notes.append(f"filter {item['filter']!r}: mergekit's filters have no wildcards, it matches nothing")
    if not parameters:
        del holder["parameters"]


def _translate_choice(param: Param, value: Any, notes: list[str]) -> Any:
    """Returns a setting of a named choice as mergekit's on or off."""
    if isinstance(value, list):
        return [{**item, "value": _translate_choice(param, item["value"], notes)} for item in value]
    if isinstance(value, str):
        if value not in ("l1", "none"):
            notes.append(f"{param.name}: mergekit has no {value}, it matches the L1 norm")
        return value != "none"
    return value


def _layout(recipe: Recipe, slices: Sequence[tuple[Slice, Sequence[Source]]]) -> dict[str, Any]:
    data: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.base is not None:
        data["base_model"] = recipe.base
    if slices[0][1][0].layers is None:
        data["models"] = [_source(source) for source in slices[0][1]]
    else:
        data["slices"] = [_slice(piece, sources) for piece, sources in slices]
    if recipe.parameters:
        data["parameters"] = _thaw_all(recipe.parameters)
    for key in ("dtype", "out_dtype"):
        if (value := getattr(recipe, key)) is not None:
            data[key] = value
    return {**data, **{key: json.loads(text) for key, text in recipe.verbatim}}


def _slice(piece: Slice, sources: Sequence[Source]) -> dict[str, Any]:
    data: dict[str, Any] = {"sources": [_source(source) for source in sources]}
    if piece.base is not None:
        data["base_model"] = piece.base
    if piece.parameters:
        data["parameters"] = _thaw_all(piece.parameters)
    return data


def _source(source: Source) -> dict[str, Any]:
    data: dict[str, Any] = {"model": source.model}
    if source.layers is not None:
        data["layer_range"] = list(source.layers)
    if source.parameters:
        data["parameters"] = _thaw_all(source.parameters)
    return data


def _thaw_all(parameters: Parameters) -> dict[str, Any]:
    return {name: _thaw(setting) for name, setting in parameters}


def _thaw(setting: Setting) -> Any:
    if not isinstance(setting, tuple):
        return setting
    return [_thaw_conditional(item) if isinstance(item, Conditional) else item for item in setting]


def _thaw_conditional(item: Conditional) -> dict[str, Any]:
    data: dict[str, Any] = {} if item.filter is None else {"filter": item.filter}
    data["value"] = list(item.value) if isinstance(item.value, tuple) else item.value
    return data
