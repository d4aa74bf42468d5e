"""From a recipe to one plan per output tensor: layer numbers, precedence, filters, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evomerge import registry
from evomerge.errors import Problem, RecipeError
from evomerge.recipe import (
    Conditional,
    Gradient,
    Recipe,
    Setting,
    Slice,
    Source,
    TensorPlan,
    is_embedding,
    layer_index,
    with_layer,
)

if TYPE_CHECKING:
    from evomerge.methods import Method, Param

_MISSING = object()


def evaluate(setting: Setting, name: str, t: float) -> Any:
    """Returns the value of a setting for one tensor at depth t, or a marker if none applies."""
    if isinstance(setting, tuple):
        if setting and isinstance(setting[0], Conditional):
            for choice in setting:
                if isinstance(choice, Conditional) and choice.matches(name):
                    return evaluate(choice.value, name, t)
            return _MISSING
        return _interpolate(setting, t)  # type: ignore[arg-type]
    return setting


def _interpolate(values: Gradient, t: float) -> float:
    place = t * (len(values) - 1)
    low = int(place)
    high = min(len(values) - 1, low + 1)
    share = place - low
    return (1.0 - share) * values[low] + share * values[high]


class Planner:
    """The work of Recipe.plan: one recipe, one number of layers."""

    def __init__(self, recipe: Recipe, n_layers: int) -> None:
        self.recipe = recipe
        self.n_layers = n_layers
        self.method: Method = registry.get("methods", recipe.method)
        self.shared = dict(recipe.parameters)
        self.streams = {model: i for i, model in enumerate(recipe.experts)}

    def plan(self, names: Sequence[str]) -> list[TensorPlan]:
        self._check_layers()
        by_layer: dict[int, list[str]] = {}
        before, after = [], []
        for name in names:
            index = layer_index(name)
            if index is not None and index < self.n_layers:
                by_layer.setdefault(index, []).append(name)
            elif is_embedding(name):
                before.append(name)
            else:  # also layers past the last, such as multi-token prediction heads
                after.append(name)
        slices = self.recipe.slices
        plans = [self._tensor(slices[0], name, name, None, 0.0) for name in before]
        output = 0
        for piece in slices:
            length = piece.length(self.n_layers)
            first = (piece.sources[0].layers or (0, length))[0]
            for i in range(length):
                t = i / (length - 1) if length > 1 else 1.0
                for name in by_layer.get(first + i, ()):
                    renamed = with_layer(name, output)
                    plans.append(self._tensor(piece, renamed, name, i, t))
                output += 1
        plans += [self._tensor(slices[-1], name, name, None, 0.0) for name in after]
        return plans

    def _check_layers(self) -> None:
        problems = [
            Problem(
                f"slice {i + 1} takes layers {source.layers[0]} to {source.layers[1]} (exclusive) "
                f"of {source.model!r}, which has {self.n_layers} layers"
            )
            for i, piece in enumerate(self.recipe.slices)
            for source in piece.sources
            if source.layers is not None and source.layers[1] > self.n_layers
        ]
        if problems:
            raise RecipeError.of(problems, "the recipe")

    def _tensor(self, piece: Slice, output: str, template: str, step: int | None, t: float) -> TensorPlan:
        """Plans one tensor; `step` counts layers from the slice's start, None outside layers."""

        def source_name(source: Source) -> str:
            if step is None or source.layers is None:
                return template
            return with_layer(template, source.layers[0] + step)

        base_source, sources = split_base(self.method, self.recipe, piece)
        base = None
        if base_source is not None:
            base = (base_source.model, source_name(base_source))
        inputs = tuple((source.model, source_name(source)) for source in sources)
        slice_parameters = dict(piece.parameters)
        shared: dict[str, Any] = {}
        per_input: tuple[dict[str, Any], ...] = tuple({} for _ in sources)
        for param in self.method.parameters:
            levels = [slice_parameters.get(param.name), self.shared.get(param.name)]
            if not param.per_expert:
                shared[param.name] = self._value(param, [(level, output) for level in levels], t)
                continue
            common = [(level, output) for level in levels]
            for source, (_, name), values in zip(sources, inputs, per_input, strict=True):
                own = dict(source.parameters).get(param.name)
                values[param.name] = self._value(param, [(own, name), *common], t)
        return TensorPlan(
            name=output,
            method=self.recipe.method,
            base=base,
            inputs=inputs,
            streams=tuple(self.streams.get(source.model, -1) for source in sources),
            shared=shared,
            per_input=per_input,
        )

    def _value(self, param: Param, levels: Sequence[tuple[Setting | None, str]], t: float) -> Any:
        for setting, name in levels:
            value = _MISSING if setting is None else evaluate(setting, name, t)
            if value is not _MISSING:
                return coerce(param, value)
        if param.required:
            message = f"parameter {param.name!r} has no value for the tensor {levels[-1][1]!r}"
            hint = f"every model needs its {param.name}" if param.per_expert else f"set parameters.{param.name}"
            raise RecipeError.of([Problem(message, hint=f"{hint}, without a filter or with one for each tensor")])
        return param.default


def split_base(method: Method, recipe: Recipe, piece: Slice) -> tuple[Source | None, tuple[Source, ...]]:
    """Returns the slice's base source and its other sources.

    A method without a base takes every source as it stands, and so does one whose base is optional
    in a recipe that names none. Otherwise the base is the first source of that model, or, if it is
    not listed, the same layers as the first source.
    """
    base = piece.base or recipe.base
    if not method.takes_base or base is None:
        return None, piece.sources
    for i, source in enumerate(piece.sources):
        if source.model == base:
            return source, piece.sources[:i] + piece.sources[i + 1 :]
    return Source(base, piece.sources[0].layers if piece.sources else None), piece.sources


def coerce(param: Param, value: Any) -> Any:
    """Returns `value` as the type of `param` (1.0 and 0.0 are booleans where one is expected)."""
    if param.kind == "bool" or (param.accepts_bool and not isinstance(value, str)):
        return bool(value)
    if param.kind == "float":
        return float(value)
    return int(value) if param.kind == "int" else value
