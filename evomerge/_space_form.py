"""Reading a search space from plain data: every problem is collected before it raises.

    description: text
    method: ties
    layer_groups: 4            # or a list of sizes; 1 (default) searches whole-model values
    components: {attn: [self_attn], mlp: [mlp], rest: ["*"]}
    genes:
      weight: search           # the method's own range
      density: {low: 0.2, high: 1.0, start: 0.5, log: false,
                per_expert: true, per_group: true, per_component: false}
    fixed: {normalize: true}
    compat: paper

A parameter that the method takes per expert is split over the experts, the layer groups and the components unless its
gene says otherwise; one that all experts share stays one gene unless its gene says otherwise.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.space import DECIMALS, EVERYTHING, Gene, SearchSpace, Slot

if TYPE_CHECKING:
    from evomerge.methods import Method, Param

_TOP = ("description", "method", "layer_groups", "components", "genes", "fixed", "compat")
_GENE = ("low", "high", "start", "log", "per_expert", "per_group", "per_component")
_WORD = re.compile(r"[A-Za-z0-9._-]+")


def read_space(spec: Mapping[str, Any], base: str, experts: Mapping[str, str], n_layers: int, seed: int) -> SearchSpace:
    """Return the checked space.

    Raises:
        ConfigError: with every problem found.
    """
    reader = _Reader(tuple(experts.items()), n_layers)
    space = reader.read(spec, base, seed)
    if space is None or reader.problems:
        raise ConfigError.of(reader.problems, "the search space")
    return space


class _Reader:
    def __init__(self, experts: tuple[tuple[str, str], ...], n_layers: int) -> None:
        self.experts = experts
        self.n_layers = n_layers
        self.problems: list[Problem] = []
        self.groups: tuple[tuple[int, int], ...] = ()
        self.components: tuple[tuple[str, tuple[str, ...]], ...] = ()
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
                self.bad(path, f"unknown key {key!r}", _suggestion(str(key), known))
        return {key: data[key] for key in known if data.get(key) is not None}

    def read(self, spec: Any, base: str, seed: int) -> SearchSpace | None:
        top = self.keys(spec, "", _TOP)
        method = self._method(top.get("method"))
        self.groups = self._groups(top.get("layer_groups", 1))
        self.components = self._components(top.get("components", {}))
        if top.get("compat", "paper") not in ("paper", "mergekit"):
            self.bad("compat", f"compat is {top['compat']!r}", "paper or mergekit")
        self._check_experts(base, method)
        if method is None:
            return None
        genes = self._genes(top.get("genes"), method)
        searched = set(top["genes"]) if isinstance(top.get("genes"), Mapping) else set()
        fixed = self._fixed(top.get("fixed", {}), method, searched)
        for param in method.parameters:
            if param.required and param.name not in searched | fixed.keys():
                self.bad("genes", f"{method.name} needs {param.name!r}: search it or fix it")
        if "groups" not in self.split and len(self.groups) > 1:
            self.bad("layer_groups", "no gene is split over the layer groups", "set per_group: true")
        if "components" not in self.split and self.components:
            self.bad("components", "no gene is split over them", "set per_component: true")
        if self.problems:
            return None
        space = SearchSpace(
            method=method.name,
            base=base,
            experts=self.experts,
            groups=self.groups,
            components=self.components,
            genes=tuple(gene for gene, _ in genes),
            slots=tuple(slot for _, slot in genes),
            fixed=tuple(fixed.items()),
            per_expert=frozenset(p.name for p in method.parameters if p.per_expert),
            needs_base=method.needs_base,
            compat=top.get("compat", "paper"),
            seed=seed,
            description=str(top.get("description", "")),
        )
        try:
            space.recipe(space.start())  # what only a recipe knows: the types of fixed parameters
        except ConfigError as error:
            self.problems += [Problem(p.message, "fixed", p.hint or p.where) for p in error.problems]
        return space

    def _method(self, name: Any) -> Method | None:
        if not isinstance(name, str):
            self.bad("method", "method is missing" if name is None else f"{name!r} is not a name")
            return None
        try:
            found: Method = registry.get("methods", name)
        except ConfigError as error:
            self.bad("method", error.message, error.hint)
            return None
        return found

    def _check_experts(self, base: str, method: Method | None) -> None:
        paths = [path for _, path in self.experts]
        for name, path in self.experts:
            if not _WORD.fullmatch(name):
                self.bad(f"experts.{name}", "an expert's name is letters, digits, dots, - and _")
            if (path == base and (method is None or method.needs_base)) or paths.count(path) > 1:
                self.bad(f"experts.{name}", f"{path!r} is the base or another expert too")
        if method is not None:
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
        elif type(given) is int and 1 <= given <= n:
            sizes = [n // given + (i < n % given) for i in range(given)]
        else:
            self.bad("layer_groups", f"{given!r} is not a number of groups", f"1 to {n} layers")
            sizes = [n]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def _components(self, given: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
        if not isinstance(given, Mapping):
            self.bad("components", f"expected a mapping, found {given!r}", "name: [part of a name]")
            return ()
        seen: list[str] = []
        for name, parts in given.items():
            where = f"components.{name}"
            if not _WORD.fullmatch(str(name)):
                self.bad(where, "a component's name is letters, digits, dots, - and _")
            if not isinstance(parts, list) or not parts or not all(isinstance(p, str) and p for p in parts):
                self.bad(where, f"{parts!r} is not a list of parts of tensor names")
                return ()
            for part in parts:
                hidden = next((other for other in seen if other == EVERYTHING or other in part), None)
                if hidden is not None:
                    self.bad(where, f"{part!r} never matches: {hidden!r} takes its tensors first")
                seen.append(part)
        if given and EVERYTHING not in seen:
            hint = 'add a last one: rest: ["*"]'
            self.bad("components", "tensors that match no component would have no value", hint)
        return tuple((str(name), tuple(parts)) for name, parts in given.items())

    def _genes(self, given: Any, method: Method) -> list[tuple[Gene, Slot]]:
        if not isinstance(given, Mapping) or not given:
            self.bad("genes", "a search space needs genes", "weight: search")
            return []
        genes: list[tuple[Gene, Slot]] = []
        for name, entry in given.items():
            where = f"genes.{name}"
            param = self._parameter(where, name, method)
            settings = {} if entry == "search" else self.keys(entry, where, _GENE)
            if param is None:
                continue
            if param.kind != "float":
                self.bad(where, f"{name} is not a number, it cannot be searched", "put it in fixed")
                continue
            limits = self._range(where, settings, param)
            if limits is not None:
                genes += self._split(where, settings, param, *limits)
        return genes

    def _parameter(self, where: str, name: Any, method: Method) -> Param | None:
        param = method.parameter(name)
        if param is None:
            known = [p.name for p in method.parameters]
            message = f"{method.name} has no parameter {name!r}"
            self.bad(where, message, _suggestion(str(name), known))
        return param

    def _range(self, where: str, settings: Mapping[str, Any], param: Param) -> tuple[float, float, float, bool] | None:
        """Return (low, high, start, log) of a gene, or None after complaining."""
        before = len(self.problems)
        for key in ("low", "high", "start"):
            if key in settings and not _finite(settings[key]):
                self.bad(f"{where}.{key}", f"{settings[key]!r} is not a finite number")
        for key in _GENE[3:]:
            if key in settings and not isinstance(settings[key], bool):
                self.bad(f"{where}.{key}", f"{settings[key]!r} is not true or false")
        low, high = settings.get("low", param.low), settings.get("high", param.high)
        for key, value in (("low", low), ("high", high)):
            if value is None:
                self.bad(f"{where}.{key}", f"{param.name} has no range of its own, give one")
        if len(self.problems) > before:
            return None
        log = bool(settings.get("log", param.log))
        if low >= high:
            self.bad(f"{where}.low", f"low {low!r} is not below high {high!r}")
        least, most = param.limits or (-math.inf, math.inf)
        for key, value, beyond in (("low", low, low < least), ("high", high, high > most)):
            if beyond:
                message = f"{value!r} is outside what {param.name} may be"
                self.bad(f"{where}.{key}", message, f"{least:g} to {most:g}")
        if log and low < 10.0**-DECIMALS:
            message = f"a log scale from {low!r}: values are rounded to {DECIMALS} decimals"
            self.bad(f"{where}.low", message, f"at least {10.0**-DECIMALS:g}")
        start = settings.get("start")
        if start is not None and not low <= start <= high:
            self.bad(f"{where}.start", f"{start!r} is outside {low!r} to {high!r}")
        if len(self.problems) > before:
            return None
        if start is None:
            start = self._default_start(param, low, high)
        return float(low), float(high), float(start), log

    def _default_start(self, param: Param, low: float, high: float) -> float:
        """The method's default; for several experts' weights 1/K each: their mean, a known recipe."""
        if param.name == "weight" and param.per_expert:
            return 1.0 / max(1, len(self.experts))
        usable = isinstance(param.default, (int, float)) and low <= param.default <= high
        return float(param.default) if usable else (low + high) / 2

    def _split(
        self, where: str, settings: Mapping[str, Any], param: Param, low: float, high: float, start: float, log: bool
    ) -> list[tuple[Gene, Slot]]:
        """Return the genes of one parameter: experts x layer groups x components."""
        own = param.per_expert
        if settings.get("per_expert") and not own:
            self.bad(f"{where}.per_expert", f"{param.name} is shared by all experts")
        experts: Sequence[int | None] = [None]
        groups: Sequence[int | None] = [None]
        components: Sequence[int | None] = [None]
        if settings.get("per_expert", own):
            experts = range(len(self.experts))
        if settings.get("per_group", own):
            self.split.add("groups")
            groups = range(len(self.groups)) if len(self.groups) > 1 else groups
        if settings.get("per_component", own):
            self.split.add("components")
            components = range(len(self.components)) if self.components else components
        width = max(2, len(str(self.n_layers - 1)))
        found = []
        for e, g, c in product(experts, groups, components):
            name = param.name if e is None else f"{self.experts[e][0]}.{param.name}"
            if g is not None:
                first, last = self.groups[g]
                name += f".L{first:0{width}d}-{last - 1:0{width}d}"
            if c is not None:
                name += f".{self.components[c][0]}"
            gene = Gene(name, low, high, low, log)
            found.append((Gene(name, low, high, gene.clipped(start), log), Slot(param.name, e, g, c)))
        return found

    def _fixed(self, given: Any, method: Method, searched: set[str]) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            self.bad("fixed", f"expected a mapping, found {given!r}")
            return {}
        for name in given:
            self._parameter(f"fixed.{name}", name, method)
            if name in searched:
                self.bad(f"fixed.{name}", f"{name!r} is searched already, under genes")
        return {str(name): value for name, value in given.items()}


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
