"""Reading recipes from plain data, in our form and in mergekit's.

Every problem is collected before the error is raised. In mergekit's form what mergekit ignores on
purpose is ignored too (parameters of the base, `int8_mask`); what it ignores silently because it
does not know it (unknown keys and parameters) is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge import registry
from evomerge._recipe_plan import coerce, split_base
from evomerge.errors import ConfigError, Problem, RecipeError
from evomerge.recipe import Conditional, Parameters, Recipe, Setting, Slice, Source, is_glob

if TYPE_CHECKING:
    from evomerge.methods import Method, Param

Path = tuple[str | int, ...]
Where = Callable[[Path], str]

_VERBATIM = ("tokenizer_source", "tokenizer", "chat_template")
_TOP = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("compat", "seed", *_VERBATIM),
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_IGNORED_BY_MERGEKIT_FORM = ("int8_mask",)  # changes how mergekit stores masks, never a value


def read_recipe(data: Any, where: Where | None = None) -> Recipe:
    """Returns the recipe that `data` describes, with every check done.

    Raises:
        RecipeError: with every problem found; `where` turns a path into a place.
    """
    reader = _Reader(where or _dotted)
    recipe = reader.recipe(data)
    if reader.problems or recipe is None:
        raise RecipeError.of(reader.problems, "the recipe")
    return recipe


def _dotted(path: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".")


class _Reader:
    def __init__(self, where: Where) -> None:
        self.where = where
        self.problems: list[Problem] = []
        self.method: Method | None = None
        self.mergekit_form = False
        self.compat = "paper"

    def bad(self, path: Path, message: str, hint: str = "") -> None:
        self.problems.append(Problem(message, self.where(path), hint))

    def keys(self, data: Any, path: Path, known: Sequence[str]) -> dict[str, Any]:
        """Returns `data` if it is a mapping, without its nulls; complains about unknown keys."""
        if not isinstance(data, Mapping):
            self.bad(path, f"expected a mapping, found {_shown(data)}")
            return {}
        for key in data:
            if key not in known:
                self.bad((*path, key), f"unknown key {key!r}", f"known: {', '.join(known)}")
        return {key: value for key, value in data.items() if value is not None and key in known}

    def recipe(self, data: Any) -> Recipe | None:
        if isinstance(data, Mapping) and "modules" in data:
            self.bad(("modules",), "recipes with several modules are not supported")
            data = {key: value for key, value in data.items() if key != "modules"}
        top = self.keys(data, (), _TOP)
        self.mergekit_form = "compat" not in top
        self.compat = top.get("compat", "mergekit")
        if self.compat not in ("paper", "mergekit"):
            self.bad(("compat",), f"compat is {_shown(self.compat)}", "paper or mergekit")
        self.method = self._method(top.get("merge_method"))
        base = self._model(top["base_model"], ("base_model",)) if "base_model" in top else None
        recipe = Recipe(
            method=str(top.get("merge_method")),
            slices=tuple(self._slices(top)),
            base=base,
            parameters=self._parameters(top.get("parameters"), ("parameters",), own=False),
            dtype=self._dtype(top, "dtype"),
            out_dtype=self._dtype(top, "out_dtype"),
            compat=self.compat,
            seed=self._seed(top.get("seed", 0)),
            verbatim=tuple((key, _json(top[key])) for key in _VERBATIM if key in top),
        )
        return self._with_base_settled(recipe)

    def _method(self, name: Any) -> Method | None:
        if not isinstance(name, str):
            self.bad(("merge_method",), "merge_method is missing" if name is None else "not a name")
            return None
        try:
            found: Method = registry.get("methods", name)
        except ConfigError as error:
            self.bad(("merge_method",), error.message, error.hint)
            return None
        if self.mergekit_form and not found.mergekit:
            message = f"mergekit has no method {name}, and a recipe without `compat` is mergekit's"
            self.bad(("merge_method",), message, "add `compat: paper`")
        return found

    def _seed(self, seed: Any) -> int:
        if isinstance(seed, bool) or not isinstance(seed, int):
            self.bad(("seed",), f"seed is {_shown(seed)}", "an integer")
            return 0
        return seed

    def _dtype(self, top: Mapping[str, Any], key: str) -> str | None:
        if key not in top:
            return None
        name = str(top[key]).removeprefix("torch.")
        if name not in _DTYPES:
            self.bad((key,), f"{key} is {_shown(top[key])}", f"one of {', '.join(_DTYPES)}")
        return name

    def _model(self, value: Any, path: Path) -> str:
        """Returns a model reference as text; mergekit's mapping form becomes path@rev+lora@rev."""
        if isinstance(value, Mapping):
            texts = []
            for key in ("model", "lora"):
                part = value.get(key)
                if isinstance(part, Mapping) and isinstance(part.get("path"), str):
                    revision = part.get("revision")
                    texts.append(part["path"] + (f"@{revision}" if revision else ""))
                elif isinstance(part, str):
                    texts.append(part)
            extra = [key for key in value if key not in ("model", "lora") and value[key] is not None]
            if value.get("model") is not None and texts and not extra:
                return "+".join(texts)
        elif isinstance(value, str) and value:
            return value
        self.bad(path, f"{_shown(value)} is not a model reference", "the path of a checkpoint")
        return "?"

    def _slices(self, top: Mapping[str, Any]) -> list[Slice]:
        given = [key for key in ("models", "slices") if key in top]
        if len(given) != 1:
            found = "both" if given else "neither"
            self.bad((given[0],) if given else (), f"needs models or slices, has {found}")
            return []
        kind = given[0]
        entries = top[kind]
        if not isinstance(entries, list) or not entries:
            empty = ": an empty path" if kind == "slices" and entries == [] else ""
            self.bad((kind,), f"{kind} is {_shown(entries)}{empty}", "a list with at least one entry")
            return []
        if kind == "slices":
            return [self._slice(entry, (kind, i)) for i, entry in enumerate(entries)]
        sources = [self._source(entry, (kind, i), ("model", "parameters")) for i, entry in enumerate(entries)]
        return [Slice(tuple(sources))]

    def _slice(self, entry: Any, path: Path) -> Slice:
        found = self.keys(entry, path, ("sources", "base_model", "parameters", "residual_weight"))
        if "residual_weight" in found:
            self.bad((*path, "residual_weight"), "residual_weight has no effect, in mergekit too")
        entries = found.get("sources")
        if not isinstance(entries, list) or not entries:
            self.bad((*path, "sources"), f"sources is {_shown(entries)}", "a list of sources")
            entries = []
        known = ("model", "layer_range", "parameters")
        sources = [self._source(item, (*path, "sources", i), known) for i, item in enumerate(entries)]
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers is not None}
        if len(lengths) > 1:
            self.bad(path, f"the sources of a slice have {sorted(lengths)} layers", "equal numbers")
        base = found.get("base_model")
        return Slice(
            tuple(sources),
            None if base is None else self._model(base, (*path, "base_model")),
            self._parameters(found.get("parameters"), (*path, "parameters"), own=False),
        )

    def _source(self, entry: Any, path: Path, known: Sequence[str]) -> Source:
        found = self.keys(entry, path, known)
        layers = None
        if "layer_range" in known:
            layers = self._layers(found.get("layer_range"), (*path, "layer_range"))
        model = self._model(found.get("model"), (*path, "model"))
        own = self._parameters(found.get("parameters"), (*path, "parameters"), own=True)
        return Source(model, layers, own)

    def _layers(self, value: Any, path: Path) -> tuple[int, int]:
        if isinstance(value, (list, tuple)) and len(value) == 2:
            first, last = value
            whole = type(first) is int and type(last) is int
            if whole and 0 <= first < last:
                return first, last
            if whole and first == last:
                self.bad(path, f"layer_range is {_shown(value)}: an empty path", "[first, past last], as in [0, 8]")
                return 0, 1
        self.bad(path, f"layer_range is {_shown(value)}", "[first, past last], as in [0, 8]")
        return 0, 1

    def _parameters(self, given: Any, path: Path, *, own: bool) -> Parameters:
        """Checks one `parameters` mapping; `own` says that it belongs to one model."""
        if given is None or self.method is None:
            return ()
        if not isinstance(given, Mapping):
            self.bad(path, f"parameters is {_shown(given)}", "a mapping")
            return ()
        result: list[tuple[str, Setting]] = []
        for name, value in given.items():
            at = (*path, name)
            param = self.method.parameter(name)
            if name in _IGNORED_BY_MERGEKIT_FORM and self.compat == "mergekit":
                continue
            if param is None:
                known = ", ".join(p.name for p in self.method.parameters)
                message = f"{self.method.name} has no parameter {name!r}"
                self.bad(at, message, f"it has {known}")
            elif param.extension and self.mergekit_form and self.method.mergekit:
                message = f"mergekit has no parameter {name!r}, and a recipe without `compat` is mergekit's"
                self.bad(at, message, "add `compat: paper`, or `compat: mergekit` for its rounding")
            elif own and not param.per_expert:
                self.bad(at, f"{name!r} is shared by all models", "move it to parameters")
            elif value is not None:
                result.append((name, self._setting(param, value, at)))
        return tuple(result)

    def _setting(self, param: Param, value: Any, path: Path) -> Setting:
        if isinstance(value, Mapping):
            self.bad(path, f"{param.name}: a filter stands in a list", "- {filter: ..., value: ...}")
            return 0.0
        if not isinstance(value, (list, tuple)):
            scalar: Setting = self._scalar(param, value, path)
            return scalar
        if not value:
            self.bad(path, f"{param.name}: the list is empty")
            return 0.0
        if not any(isinstance(item, Mapping) for item in value):
            return self._gradient(param, value, path)
        return tuple(self._conditional(param, item, (*path, i)) for i, item in enumerate(value))

    def _conditional(self, param: Param, item: Any, path: Path) -> Conditional:
        found = self.keys(item, path, ("filter", "value"))
        pattern = found.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            self.bad((*path, "filter"), f"filter is {_shown(pattern)}", "part of a tensor name")
            pattern = None
        if pattern is not None and self.compat == "mergekit" and is_glob(pattern):
            message = f"filter {_shown(pattern)} matches nothing: mergekit's filters have no wildcards"
            self.bad((*path, "filter"), message, "part of a tensor name, or compat: paper")
        value = found.get("value")
        if isinstance(value, (list, tuple)) and value:
            return Conditional(self._gradient(param, value, (*path, "value")), pattern)
        return Conditional(self._scalar(param, value, (*path, "value")), pattern)

    def _gradient(self, param: Param, values: Sequence[Any], path: Path) -> tuple[float, ...]:
        if param.kind != "float":
            self.bad(path, f"{param.name} takes one value, not a list over the layers")
            return (0.0,)
        return tuple(float(self._scalar(param, value, path)) for value in values)

    def _scalar(self, param: Param, value: Any, path: Path) -> Any:
        """Returns one checked value as the parameter's type."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not math.isfinite(value):
            self.bad(path, f"{param.name} is {value}", "a finite number")
            return 0.0
        truth = isinstance(value, bool) or (number and value in (0, 1))
        if param.kind == "choice":
            good = value in param.choices if isinstance(value, str) else truth and param.accepts_bool
            wanted = [*param.choices, *(["true", "false"] if param.accepts_bool else [])]
            expected = f"one of {', '.join(wanted)}"
        elif param.kind == "bool":
            good, expected = truth, "true or false"
        elif param.kind == "int":
            good, expected = number and float(value).is_integer(), "an integer"
        else:
            good, expected = number, "a number"
        if not good:
            self.bad(path, f"{param.name} is {_shown(value)}", expected)
            return 0.0
        least, most = param.limits or (-math.inf, math.inf)
        if number and self.compat == "paper" and not least <= value <= most:  # mergekit knows no limits
            self.bad(path, f"{param.name} is {value:g}, outside what it may be", f"{least:g} to {most:g}")
        return coerce(param, value)

    def _with_base_settled(self, recipe: Recipe) -> Recipe | None:
        """Takes the base out of the sources where the method knows it, and counts the rest."""
        if self.method is None:
            return None
        sound = not self.problems
        slices = []
        for i, piece in enumerate(recipe.slices):
            if not piece.sources:
                continue
            whole = piece.sources[0].layers is None
            path: Path = ("models",) if whole else ("slices", i, "sources")
            if self.method.needs_base and (piece.base or recipe.base) is None:
                self.bad(path, f"{self.method.name} needs a base model", "set base_model")
                continue
            if sound:  # or the sources' layers cannot be trusted
                piece = self._without_base(recipe, piece, path)
            try:
                self.method.check_count(len(split_base(self.method, recipe, piece)[1]), _dotted(path))
            except ConfigError as error:
                self.bad(path, error.message, error.hint)
            slices.append(piece)
        return Recipe(**{**vars(recipe), "slices": tuple(slices)}) if sound else None

    def _without_base(self, recipe: Recipe, piece: Slice, path: Path) -> Slice:
        assert self.method is not None
        base = piece.base or recipe.base
        source, others = split_base(self.method, recipe, piece)
        listed = source in piece.sources
        ranges = {other.layers for other in others}
        if source is None or not others:
            return piece
        if not listed:
            if len(ranges) > 1:
                hint = f"list {base!r} among the sources with its layer_range"
                self.bad(path, f"which layers of the base {base!r} belong to this slice?", hint)
            return piece
        if source.parameters and not self.mergekit_form:
            at = (*path, piece.sources.index(source))
            self.bad(at, f"{base!r} is the base, its parameters have no effect", "remove them")
        if ranges == {source.layers}:
            return Slice(others, piece.base, piece.parameters)
        kept = tuple(Source(s.model, s.layers) if s is source else s for s in piece.sources)
        return Slice(kept, piece.base, piece.parameters)


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
