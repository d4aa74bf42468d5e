"""Recipe: the complete, frozen description of one merged model.

The schema is mergekit's, plus two keys: `compat` ("paper": our arithmetic, or "mergekit": its
rounding and definitions) and `seed`, from which every random mask derives. A mapping without
`compat` is mergekit's own form. A recipe knows no tensors: `plan` says for each output tensor
which source tensors and which parameter values make it.

This module needs no torch; validating or planning a recipe loads the file of its merge method.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from evomerge.errors import Problem, RecipeError
from evomerge.strict_yaml import dump_yaml, load_yaml

Scalar = float | int | bool | str
Gradient = tuple[float, ...]

_LAYER_LISTS = frozenset({"layers", "layer", "h", "blocks", "block"})
_EMBEDDINGS = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class Conditional:
    """A value for the tensors whose name contains `filter` (None or "*": every tensor).

    In a longer filter, * stands for any characters and ? for one; mergekit knows no such wildcards.
    """

    value: Scalar | Gradient
    filter: str | None = None

    def matches(self, name: str) -> bool:
        """True when this value applies to the tensor `name`."""
        if self.filter is None or self.filter == "*":
            return True
        if is_glob(self.filter):
            return _glob(self.filter).search(name) is not None
        return self.filter in name


def is_glob(pattern: str) -> bool:
    """True for a filter with wildcards; "*" alone is every tensor, in mergekit too."""
    return pattern != "*" and ("*" in pattern or "?" in pattern)


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    wild = {"*": ".*", "?": "."}
    return re.compile("".join(wild.get(char) or re.escape(char) for char in pattern))


Setting = Scalar | Gradient | tuple[Conditional, ...]
Parameters = tuple[tuple[str, Setting], ...]


@dataclass(frozen=True)
class Source:
    """One model of a slice; `layers` is [first, past last) of its layers, None for the whole."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Parameters = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", freeze_parameters(self.parameters))


@dataclass(frozen=True)
class Slice:
    """Consecutive output layers, each merged from the same number of source layers."""

    sources: tuple[Source, ...]
    base: str | None = None
    parameters: Parameters = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "parameters", freeze_parameters(self.parameters))

    def length(self, n_layers: int) -> int:
        """Returns how many output layers the slice makes."""
        layers = self.sources[0].layers
        return n_layers if layers is None else layers[1] - layers[0]


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made.

    `base` and `inputs` are (model, tensor name) pairs; for a method that takes a base, `inputs`
    are the experts alone. `streams` numbers their random masks. `per_input` has one mapping per
    input, `shared` holds the parameters that all inputs share.
    """

    name: str
    method: str
    base: tuple[str, str] | None
    inputs: tuple[tuple[str, str], ...]
    streams: tuple[int, ...]
    shared: dict[str, Any]
    per_input: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Recipe:
    """One merged model: method, sources per slice, parameters, dtypes, arithmetic and seed.

    `slices` is one slice with `layers=None` for the whole-model form (`models:` in YAML).
    `verbatim` keeps the tokenizer keys as (key, JSON text). Use `from_dict`, `from_yaml` or
    `build`: they check everything; the constructor itself only freezes.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Parameters = ()
    dtype: str | None = None
    out_dtype: str | None = None
    compat: str = "paper"
    seed: int = 0
    verbatim: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(self.slices))
        object.__setattr__(self, "parameters", freeze_parameters(self.parameters))
        whole = [piece for piece in self.slices if any(s.layers is None for s in piece.sources)]
        if whole and (len(self.slices) > 1 or whole[0].parameters or whole[0].base is not None):
            raise ValueError("a slice of whole models stands alone, without own parameters or base")

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Builds a recipe from our form, or from mergekit's if there is no `compat` key.

        Raises:
            RecipeError: with every problem found.
        """
        from evomerge._recipe_form import read_recipe

        return read_recipe(data)

    @classmethod
    def from_yaml(cls, text: str, name: str = "<string>") -> Recipe:
        """Like `from_dict`, and every problem names `name` and the line.

        Raises:
            ConfigError: if the text is not strict YAML.
            RecipeError: with every problem found.
        """
        from evomerge._recipe_form import read_recipe

        document = load_yaml(text, name)
        return read_recipe(document.data, document.where)

    @classmethod
    def build(
        cls,
        method: str,
        base: str | None,
        experts: Mapping[str, Mapping[str, Any]],
        *,
        parameters: Mapping[str, Any] | None = None,
        compat: str = "paper",
        seed: int = 0,
        dtype: str | None = None,
        out_dtype: str | None = None,
    ) -> Recipe:
        """Builds a checked whole-model recipe; `experts` maps each path to its parameters.

        Raises:
            RecipeError: with every problem found.
        """
        models = [{"model": path, "parameters": dict(p)} for path, p in experts.items()]
        data = {
            "merge_method": method,
            "base_model": base,
            "models": models,
            "parameters": dict(parameters or {}),
            "dtype": dtype,
            "out_dtype": out_dtype,
            "compat": compat,
            "seed": seed,
        }
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data in our form, always with `compat` and `seed`."""
        from evomerge._recipe_write import write_recipe

        return write_recipe(self)

    def to_yaml(self) -> str:
        """Returns our form as YAML; `from_yaml` reads back an equal recipe."""
        return dump_yaml(self.to_dict())

    def to_mergekit(self) -> tuple[dict[str, Any], list[str]]:
        """Returns mergekit's form, and what it cannot express or computes differently."""
        from evomerge._recipe_write import write_mergekit

        return write_mergekit(self)

    @cached_property
    def fingerprint(self) -> str:
        """The hex SHA-256 of the canonical JSON: equal recipes, equal fingerprints, everywhere.

        Key order does not count, nor does 1 against 1.0 against true, nor the sign of zero.

        Raises:
            RecipeError: a parameter is NaN or infinite, in a recipe that was made without `from_dict`.
        """
        data = {**self.to_dict(), "seed": str(self.seed)}  # as text: a float would lose digits
        require_finite(data)
        text = json.dumps(_canonical(data), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Every model once: the base first if there is one, then by first appearance."""
        listed = [self.base] if self.base is not None else []
        for piece in self.slices:
            listed += [piece.base] if piece.base is not None else []
            listed += [source.model for source in piece.sources]
        return tuple(dict.fromkeys(listed))

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """The models without the base; a model's place here numbers its random masks."""
        return tuple(model for model in self.models if model != self.base)

    def plan(self, names: Iterable[str], n_layers: int) -> list[TensorPlan]:
        """Returns one plan per output tensor, for sources with tensors `names` and `n_layers`.

        Output layers are numbered through all slices. Tensors before the layers (embeddings)
        take the sources and parameters of the first slice, all others outside the layers (final
        norm, head) those of the last; for both t = 0. Within a slice of L layers, layer i has
        t = i / (L-1), and t = 1 when L = 1.

        Raises:
            RecipeError: if a slice names layers that do not exist, or a parameter has no value.
        """
        from evomerge._recipe_plan import Planner

        return Planner(self, n_layers).plan(list(names))


def layer_index(name: str) -> int | None:
    """Returns the layer that a tensor belongs to, or None for one outside the layers.

    It is the first integer component after one such as "layers", "h" or "blocks".
    """
    place = _layer_place(name)
    return None if place is None else int(name.split(".")[place])


def with_layer(name: str, index: int) -> str:
    """Returns the tensor name with its layer number replaced by `index`."""
    parts = name.split(".")
    place = _layer_place(name)
    if place is not None:
        parts[place] = str(index)
    return ".".join(parts)


def _layer_place(name: str) -> int | None:
    inside = False
    for place, part in enumerate(name.split(".")):
        if inside and part.isdecimal():
            return place
        inside = inside or part in _LAYER_LISTS
    return None


def is_embedding(name: str) -> bool:
    """True for a tensor outside the layers that comes before them; GPT-NeoX calls its head embed_out."""
    inside = layer_index(name) is not None or "embed_out" in name
    return not inside and any(part in name for part in _EMBEDDINGS)


def freeze_parameters(given: Mapping[str, Any] | Parameters) -> Parameters:
    """Returns parameters as a sorted tuple of (name, setting), hashable throughout."""
    pairs = given.items() if isinstance(given, Mapping) else given
    return tuple(sorted((name, _freeze(value)) for name, value in pairs))


def _freeze(value: Any) -> Setting:
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, (Mapping, Conditional)) for item in value):
            return tuple(map(_freeze_conditional, value))
        return tuple(float(item) + 0.0 for item in value)
    if isinstance(value, float):
        return value + 0.0  # -0.0 becomes 0.0
    frozen: Scalar = value
    return frozen


def _freeze_conditional(item: Any) -> Conditional:
    if isinstance(item, Conditional):
        return Conditional(_freeze(item.value), item.filter)  # type: ignore[arg-type]
    return Conditional(_freeze(item["value"]), item.get("filter"))  # type: ignore[arg-type]


def require_finite(data: Any, where: str = "") -> None:
    """Raise RecipeError, with its place, for the first number in plain data that is NaN or infinite."""
    if isinstance(data, float) and not math.isfinite(data):
        raise RecipeError.of([Problem(f"{data} in the recipe", where, "a finite number")])
    if isinstance(data, (list, tuple)):
        for i, item in enumerate(data):
            require_finite(item, f"{where}[{i}]")
    elif isinstance(data, Mapping):
        for key, item in data.items():
            require_finite(item, f"{where}.{key}" if where else str(key))


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (bool, int, float)):
        return float(value) + 0.0
    return value
