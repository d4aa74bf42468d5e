"""Reading a search space from plain data: every problem is collected before it raises.

    description: text
    method: ties               # or a list: the method is then a dimension, and genes are the union
    layer_groups: 4            # or a list of sizes, or each; 1 (default) searches whole-model values
    components: [attention, mlp, rest]              # or {q: [q_proj], rest: ["*"]}
    genes:
      weight: search           # the method's own range
      density: {low: 0.2, high: 0.9, start: 0.5, scale: logit,
                per_expert: true, per_group: true, per_component: false}
      lambda: {low: 0.5, high: 1.5, curve: 3}       # or line: true, or choices: [0.5, 1.0]
    fixed: {normalize: true}
    compat: paper

A parameter that the method takes per expert is split over the experts, the layer groups and the components unless its
gene says otherwise; one that all experts share stays one gene unless its gene says otherwise. A curve or line over
depth takes the place of the layer groups. The whole grammar, with examples: docs/spaces.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from evomerge._space_genes import DECIMALS, METHOD, Gene, Natural, Scale, Searched, Slot
from evomerge._space_methods import read_methods, suggestion, union_parameter
from evomerge._space_parts import WORD, Component, read_components
from evomerge.errors import ConfigError, Problem
from evomerge.space import SearchSpace

if TYPE_CHECKING:
    from evomerge.methods import Method, Param

_TOP = ("description", "method", "layer_groups", "components", "genes", "fixed", "compat")
_RANGE = ("low", "high", "start")
_SPLITS = ("per_expert", "per_group", "per_component")
_SCALES: tuple[Scale, ...] = ("linear", "log", "logit")
_GENE = (*_RANGE, "scale", "log", "choices", "curve", "line", *_SPLITS)


def read_space(
    spec: Mapping[str, Any],
    base: str,
    experts: Mapping[str, str],
    n_layers: int,
    seed: int,
    names: Collection[str] = (),
) -> SearchSpace:
    """Return the checked space.

    Raises:
        ConfigError: with every problem found.
    """
    reader = _Reader(tuple(experts.items()), n_layers)
    space = reader.read(spec, base, seed, names)
    if space is None or reader.problems:
        raise ConfigError.of(reader.problems, "the search space")
    return space


class _Reader:
    def __init__(self, experts: tuple[tuple[str, str], ...], n_layers: int) -> None:
        self.experts = experts
        self.n_layers = n_layers
        self.problems: list[Problem] = []
        self.groups: tuple[tuple[int, int], ...] = ()
        self.components: tuple[Component, ...] = ()
        self.searched: list[Searched] = []
        self.split: set[str] = set()  # per_group, per_component: asked for by some gene

    def bad(self, where: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(message, where, hint))

    def keys(self, data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
        """Return a mapping's known entries that are not null; complain about the rest."""
        if not isinstance(data, Mapping):
            self.bad(where, f"expected a mapping, found {data!r}")
            return {}
        for key in data:
            if key not in known:
                path = f"{where}.{key}" if where else str(key)
                self.bad(path, f"unknown key {key!r}", suggestion(str(key), known))
        return {key: data[key] for key in known if data.get(key) is not None}

    def read(self, spec: Any, base: str, seed: int, names: Collection[str]) -> SearchSpace | None:
        top = self.keys(spec, "", _TOP)
        methods = read_methods(top.get("method"), self.bad)
        self.groups = self._groups(top.get("layer_groups", 1))
        self.components = read_components(top.get("components", {}), top.get("compat", "paper"), names, self.bad)
        if top.get("compat", "paper") not in ("paper", "mergekit"):
            self.bad("compat", f"compat is {top['compat']!r}", "paper or mergekit")
        self._check_experts(base, methods)
        if not methods:
            return None
        genes = [*_method_gene(methods), *self._genes(top.get("genes"), methods)]
        searched = set(top["genes"]) if isinstance(top.get("genes"), Mapping) else set()
        fixed = self._fixed(top.get("fixed", {}), methods, searched)
        for method in methods:
            for param in method.parameters:
                if param.required and param.name not in searched | fixed.keys():
                    self.bad("genes", f"{method.name} needs {param.name!r}: search it or fix it")
        if "groups" not in self.split and len(self.groups) > 1:
            self.bad("layer_groups", "no gene is split over the layer groups", "set per_group: true")
        if "components" not in self.split and self.components:
            self.bad("components", "no gene is split over them", "set per_component: true")
        if self.problems:
            return None
        used = searched | fixed.keys()
        space = SearchSpace(
            methods=tuple(method.name for method in methods),
            base=base,
            experts=self.experts,
            groups=self.groups,
            components=self.components,
            searched=tuple(self.searched),
            genes=tuple(gene for gene, _ in genes),
            slots=tuple(slot for _, slot in genes),
            fixed=tuple(fixed.items()),
            per_expert=frozenset(p.name for m in methods for p in m.parameters if p.per_expert and p.name in used),
            compat=top.get("compat", "paper"),
            seed=seed,
            description=str(top.get("description", "")),
        )
        found: list[Problem] = []
        for start in space.starts():
            try:
                space.recipe(start)  # what only a recipe knows: the types of fixed parameters
            except ConfigError as error:
                found += [Problem(p.message, "fixed", p.hint or p.where) for p in error.problems]
        self.problems += dict.fromkeys(found)  # one for all the models that say the same
        return space

    def _check_experts(self, base: str, methods: Sequence[Method]) -> None:
        takes_base = not methods or any(method.takes_base for method in methods)
        paths = [path for _, path in self.experts]
        for name, path in self.experts:
            if not WORD.fullmatch(name):
                self.bad(f"experts.{name}", "an expert's name is letters, digits, dots, - and _")
            if (path == base and takes_base) or paths.count(path) > 1:
                self.bad(f"experts.{name}", f"{path!r} is the base or another expert too")
        for method in methods:
            try:
                method.check_count(len(self.experts), "experts")
            except ConfigError as error:
                self.bad("experts", error.message)

    def _groups(self, given: Any) -> tuple[tuple[int, int], ...]:
        n = self.n_layers
        if isinstance(given, list):
            sizes = [size for size in given if type(size) is int and size > 0]
            if len(sizes) != len(given) or not sizes or sum(sizes) != n:
                self.bad("layer_groups", f"{given!r}: sizes must be positive and sum to {n} layers")
                sizes = [n]
        elif given == "each":
            sizes = [1] * n
        elif type(given) is int and 1 <= given <= n:
            sizes = [n // given + (i < n % given) for i in range(given)]
        else:
            self.bad("layer_groups", f"{given!r} is not a number of groups", f"1 to {n} layers, or each")
            sizes = [n]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def _genes(self, given: Any, methods: Sequence[Method]) -> list[tuple[Gene, Slot]]:
        if given is None and len(methods) > 1:
            return []  # only the method is searched
        if not isinstance(given, Mapping) or not given:
            self.bad("genes", "a search space needs genes", "weight: search")
            return []
        genes: list[tuple[Gene, Slot]] = []
        for name, entry in given.items():
            where = f"genes.{name}"
            param = union_parameter(methods, name, where, self.bad)
            settings = {} if entry == "search" else self.keys(entry, where, _GENE)
            if param is None:
                continue
            before = len(self.problems)
            how = self._searched(where, settings, param)
            chosen = "choices" in settings or param.kind in ("bool", "choice")
            gene = self._chosen(where, settings, param) if chosen else self._range(where, settings, param)
            line = self._line(where, settings, gene, param) if gene is not None and how.form == "line" else None
            if gene is not None and len(self.problems) == before:
                genes += self._split(how, gene, line)
        return genes

    def _searched(self, where: str, settings: Mapping[str, Any], param: Param) -> Searched:
        """Return what the parameter is split over, after complaining about what does not go together."""
        own = param.per_expert
        for key in ("log", *_SPLITS):
            if key in settings and not isinstance(settings[key], bool):
                self.bad(f"{where}.{key}", f"{settings[key]!r} is not true or false")
        if settings.get("per_expert") is True and not own:
            self.bad(f"{where}.per_expert", f"{param.name} is shared by all experts")
        curve, line = settings.get("curve"), settings.get("line", False)
        bent = curve is not None or line is not False
        if bent and (param.kind != "float" or "choices" in settings):
            key = "line" if curve is None else "curve"
            self.bad(f"{where}.{key}", "only numbers can change smoothly over depth", "per_group: true")
        if curve is not None and not (type(curve) is int and 2 <= curve <= self.n_layers):
            hint = f"2 to {self.n_layers}, the number of layers"
            self.bad(f"{where}.curve", f"{curve!r} is not a number of control points", hint)
        if curve is not None and line is not False:
            self.bad(f"{where}.line", "a gene is a curve or a line, not both")
        elif line is not False and self.n_layers < 2:
            self.bad(f"{where}.line", "a line needs two layers")
        if bent and settings.get("per_group") is True:
            self.bad(f"{where}.per_group", "a curve or line runs over all layers", "leave per_group out")
        groups = bool(settings.get("per_group", own)) and not bent
        components = bool(settings.get("per_component", own))
        self.split |= {key for key, asked in (("groups", groups), ("components", components)) if asked}
        return Searched(
            param.name,
            experts=bool(settings.get("per_expert", own)),
            groups=groups and len(self.groups) > 1,
            components=components and bool(self.components),
            form="value" if not bent else "line" if curve is None else "curve",
            points=1 if not bent else curve if type(curve) is int else 2,
        )

    def _chosen(self, where: str, settings: Mapping[str, Any], param: Param) -> Gene | None:
        """Return a gene without a name for a list of choices, or None after complaining."""
        before = len(self.problems)
        for key in ("low", "high", "scale", "log"):
            if key in settings:
                self.bad(f"{where}.{key}", f"{param.name} has choices here, not a range", "choices: [...]")
        given = settings.get("choices", _all_choices(param))
        if not isinstance(given, list) or len(given) < 2:
            hint = f"one value is written under fixed, as {param.name}: VALUE"
            self.bad(f"{where}.choices", f"{given!r} is not a list of at least two choices", hint)
            return None
        before = len(self.problems)
        choices = [self._choice(f"{where}.choices", value, param) for value in given]
        if len(self.problems) == before and len({(isinstance(value, bool), value) for value in choices}) < len(choices):
            self.bad(f"{where}.choices", f"{given!r} names a choice twice")
        start = settings.get("start", param.default if "start" not in settings else None)
        same = [i for i, value in enumerate(choices) if (value, type(value) is bool) == (start, type(start) is bool)]
        if "start" in settings and not same:
            self.bad(f"{where}.start", f"{start!r} is not one of the choices")
        if len(self.problems) > before:
            return None
        usable = [value for value in choices if value is not None]
        return Gene("", 0.0, len(usable) - 1.0, usable[same[0] if same else 0], choices=tuple(usable))

    def _choice(self, where: str, value: Any, param: Param) -> Natural | None:
        """Return one choice as the parameter's type, or None after complaining."""
        if param.kind in ("bool", "choice"):
            good = value in param.choices if isinstance(value, str) else isinstance(value, bool)
            if not good or (isinstance(value, bool) and param.kind == "choice" and not param.accepts_bool):
                truth = ["true", "false"] if param.kind == "bool" or param.accepts_bool else []
                self.bad(where, f"{value!r} is not a choice", f"of {', '.join([*param.choices, *truth])}")
                return None
            chosen: Natural = value
            return chosen
        if not self._number(where, value, param):
            return None
        return int(value) if param.kind == "int" else float(value)

    def _number(self, where: str, value: Any, param: Param) -> bool:
        """True if a number is one that the parameter may be; complain otherwise."""
        least, most = param.limits or (-math.inf, math.inf)
        if not _finite(value):
            self.bad(where, f"{value!r} is not a finite number")
        elif param.kind == "int" and not float(value).is_integer():
            self.bad(where, f"{value!r} is not a whole number")
        elif not least <= value <= most:
            self.bad(where, f"{value!r} is outside what {param.name} may be", f"{least:g} to {most:g}")
        else:
            return True
        return False

    def _range(self, where: str, settings: Mapping[str, Any], param: Param) -> Gene | None:
        """Return a gene without a name for a range of numbers, or None after complaining."""
        before = len(self.problems)
        for key in _RANGE:
            if key in settings:
                self._number(f"{where}.{key}", settings[key], param)
        low, high = settings.get("low", param.low), settings.get("high", param.high)
        for key, value in (("low", low), ("high", high)):
            if value is None:
                self.bad(f"{where}.{key}", f"{param.name} has no range of its own, give one")
        if len(self.problems) > before or low is None or high is None:
            return None
        whole = param.kind == "int"
        scale = self._scale(where, settings, param, low, high)
        start = settings.get("start", self._default_start(param, low, high))
        if low >= high:
            hint = f"one value is written under fixed, as {param.name}: {low!r}" if low == high else ""
            self.bad(f"{where}.low", f"low {low!r} is not below high {high!r}", hint)
        elif not low <= start <= high:
            self.bad(f"{where}.start", f"{start!r} is outside {low!r} to {high!r}")
        if len(self.problems) > before:
            return None
        gene = Gene("", float(low), float(high), float(low), scale, whole)
        return replace(gene, start=gene.clipped(float(start)))

    def _scale(self, where: str, settings: Mapping[str, Any], param: Param, low: float, high: float) -> Scale:
        """Return a number's scale, after complaining about ranges that it cannot have; `log: true` is `scale: log`."""
        log, whole = settings.get("log", param.log and "scale" not in settings), param.kind == "int"
        scale: Scale = settings.get("scale", "log" if log is True else "linear")
        if scale not in _SCALES:
            self.bad(f"{where}.scale", f"{scale!r} is not a scale", f"one of {', '.join(_SCALES)}")
        elif "log" in settings and "scale" in settings and log is not (scale == "log"):
            self.bad(f"{where}.log", f"`log` and `scale: {scale}` contradict each other", "leave `log` out")
        elif scale == "logit" and whole:
            self.bad(f"{where}.scale", "whole numbers have no logit scale", "linear or log")
        elif scale != "linear" and (low < 1 if whole else low <= 0):
            hint = "1 or more" if whole else "a number above 0"
            self.bad(f"{where}.low", f"a {scale} scale cannot start from {low!r}", hint)
        elif scale == "logit" and high >= 1:
            self.bad(f"{where}.high", f"a logit scale cannot end at {high!r}", "a number below 1, such as 0.95")
        return scale

    def _default_start(self, param: Param, low: float, high: float) -> float:
        """The method's default; for several experts' weights 1/K each: their mean, a known recipe."""
        if param.name == "weight" and param.per_expert:
            start = 1.0 / max(1, len(self.experts))
        elif isinstance(param.default, (int, float)) and low <= param.default <= high:
            start = float(param.default)
        else:
            start = (low + high) / 2
        return min(float(high), max(float(low), start))

    def _line(self, where: str, settings: Mapping[str, Any], alpha: Gene, param: Param) -> Gene | None:
        """Return the gene, without a name, of a line's rise beta: by default up to the span of alpha's range."""
        given = settings["line"]
        own = {} if given is True else self.keys(given, f"{where}.line", _RANGE)
        for key, value in own.items():
            if not _finite(value):
                self.bad(f"{where}.line.{key}", f"{value!r} is not a finite number")
                return None
        low, high = own.get("low", 0.0), own.get("high", round(alpha.high - alpha.low, DECIMALS))
        start = own.get("start", min(high, max(low, 0.0)))
        if low >= high:
            self.bad(f"{where}.line.low", f"low {low!r} is not below high {high!r}")
            return None
        if not low <= start <= high:
            self.bad(f"{where}.line.start", f"{start!r} is outside {low!r} to {high!r}")
        least, most = param.limits or (-math.inf, math.inf)
        if alpha.low + low < least or alpha.high + high > most:
            message = f"the line's end can be {alpha.low + low:g} to {alpha.high + high:g}"
            hint = f"{param.name} may be {least:g} to {most:g}: narrow the ranges, or use curve: 2"
            self.bad(f"{where}.line", message, hint)
        beta = Gene("", float(low), float(high), float(low))
        return replace(beta, start=beta.clipped(float(start)))

    def _split(self, how: Searched, gene: Gene, line: Gene | None) -> list[tuple[Gene, Slot]]:
        """Return the genes of one parameter: experts x layer groups x components x points of a curve."""
        self.searched.append(how)
        experts: Sequence[int | None] = range(len(self.experts)) if how.experts else [None]
        groups: Sequence[int | None] = range(len(self.groups)) if how.groups else [None]
        components: Sequence[int | None] = range(len(self.components)) if how.components else [None]
        templates = {"value": [("", gene)], "curve": [(f".C{k}", gene) for k in range(how.points)]}
        if line is not None:
            templates["line"] = [(".alpha", gene), (".beta", line)]
        found: dict[Slot, Gene] = {}
        for e, g, c in product(experts, groups, components):
            outside = c is not None and self.components[c].outside
            name = how.param if e is None else f"{self.experts[e][0]}.{how.param}"
            if g is not None and not outside:
                name += self._layers(g)
            if c is not None:
                name += f".{self.components[c].name}"
            # What lies outside the layers has one value, whatever the layer groups and the depth.
            forms = templates["value" if outside else how.form]
            for point, (ending, template) in enumerate(forms):
                slot = Slot(how.param, e, None if outside else g, c, point if len(forms) > 1 else None)
                found[slot] = replace(template, name=name + ending)
        return [(made, slot) for slot, made in found.items()]

    def _layers(self, group: int) -> str:
        first, last = self.groups[group]
        width = max(2, len(str(self.n_layers - 1)))
        return f".L{first:0{width}d}-{last - 1:0{width}d}"

    def _fixed(self, given: Any, methods: Sequence[Method], searched: set[str]) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            self.bad("fixed", f"expected a mapping, found {given!r}")
            return {}
        for name, value in given.items():
            param = union_parameter(methods, name, f"fixed.{name}", self.bad)
            if name in searched:
                self.bad(f"fixed.{name}", f"{name!r} is searched already, under genes")
            if isinstance(value, Mapping) and param is not None:
                self._check_each(f"fixed.{name}", value, param)
        return {str(name): value for name, value in given.items()}

    def _check_each(self, where: str, values: Mapping[Any, Any], param: Param) -> None:
        """Check that a fixed parameter that names experts has one value for each."""
        if not param.per_expert:
            self.bad(where, f"{param.name} is shared by all experts", "one value")
        names = [name for name, _ in self.experts]
        for name in [name for name in values if name not in names]:
            self.bad(f"{where}.{name}", "there is no such expert", f"experts: {', '.join(names)}")
        if missing := [name for name in names if name not in values]:
            self.bad(where, f"no value for {', '.join(missing)}")


def _method_gene(methods: Sequence[Method]) -> list[tuple[Gene, Slot]]:
    """Return the gene that chooses among several methods, first, or nothing for one."""
    names = tuple(method.name for method in methods)
    gene = Gene(METHOD, 0.0, len(names) - 1.0, names[0], choices=names)
    return [(gene, Slot(METHOD))] if len(names) > 1 else []


def _all_choices(param: Param) -> list[Natural]:
    """Every value of a switch or choice. A default of true (the first name) or false ("none") stands for its name:
    so recipes that leave the parameter out are points of the space."""
    if param.kind == "bool":
        return [False, True]
    name = param.choices[0] if param.default is True else "none"
    return [param.default if isinstance(param.default, bool) and name == choice else choice for choice in param.choices]


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
