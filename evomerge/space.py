"""SearchSpace: the named dimensions of a search, and the way from a point to a Recipe and back.

A point is a vector in the unit cube (what optimizers see), or a mapping from gene names to natural values (what
people, recipes and the study see). Natural values are rounded to 4 decimals, so that what a recipe says is
exactly what was merged. Layer groups become slices; equal neighbours melt into one, so a uniform
point of a layer-wise space is the plain whole-model recipe. Reading the YAML form is `_space_form`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge.errors import ConfigError, Problem
from evomerge.recipe import Conditional, Recipe, TensorPlan

Array = NDArray[np.float64]
DECIMALS = 4
EVERYTHING = "*"  # the component entry that takes every tensor


@dataclass(frozen=True)
class Gene:
    """One dimension: a range of natural values, and where a search starts."""

    name: str
    low: float
    high: float
    start: float
    log: bool = False

    def natural(self, unit: float) -> float:
        """Return the natural value at `unit` in [0, 1], rounded, inside the range."""
        share = min(1.0, max(0.0, unit))
        value = self.low + share * (self.high - self.low)
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        return self.clipped(value)

    def clipped(self, value: float) -> float:
        """Return `value` rounded to 4 decimals, then moved into the range."""
        return min(self.high, max(self.low, round(value, DECIMALS) + 0.0))

    def unit(self, value: float) -> float:
        """Return where `value` lies in the range, in [0, 1]."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Slot:
    """What a gene sets: a parameter, and the one expert, layer group and component that it is for (None: all)."""

    param: str
    expert: int | None = None
    group: int | None = None
    component: int | None = None


@dataclass(frozen=True)
class SearchSpace:
    """Genes and everything that turns their values into a Recipe. Make one with `from_dict`.

    `groups` are [first, past last) layers. `components` are (name, parts of tensor names); a tensor belongs to the
    first one that matches. `fixed` holds the parameters that are not searched; `per_expert` names the parameters,
    searched or fixed, that a recipe gives per expert.
    """

    method: str
    base: str
    experts: tuple[tuple[str, str], ...]
    groups: tuple[tuple[int, int], ...]
    components: tuple[tuple[str, tuple[str, ...]], ...]
    genes: tuple[Gene, ...]
    slots: tuple[Slot, ...]
    fixed: tuple[tuple[str, Any], ...]
    per_expert: frozenset[str]
    needs_base: bool
    compat: str
    seed: int
    description: str = ""

    @classmethod
    def from_dict(
        cls,
        spec: Mapping[str, Any],
        base: str,
        experts: Mapping[str, str],
        n_layers: int,
        seed: int = 0,
    ) -> SearchSpace:
        """Read the YAML form of a space for these models.

        `experts` maps short names, which gene names use, to paths, in the order that the recipes list them.

        Raises:
            ConfigError: with every problem; each names its key, such as "genes.weight.low".
        """
        from evomerge._space_form import read_space

        return read_space(spec, base, experts, n_layers, seed)

    @property
    def dim(self) -> int:
        """The number of genes."""
        return len(self.genes)

    @property
    def n_layers(self) -> int:
        """The number of layers of every model."""
        return self.groups[-1][1]

    def start(self) -> dict[str, float]:
        """Return the natural values where a search starts."""
        return {gene.name: gene.start for gene in self.genes}

    def decode(self, x: ArrayLike) -> dict[str, float]:
        """Return the natural values of a point `(dim,)`; coordinates outside [0, 1] are clipped.

        Raises:
            ValueError: a wrong shape or a NaN.
        """
        point = np.asarray(x, dtype=np.float64)
        if point.shape != (self.dim,) or np.isnan(point).any():
            raise ValueError(f"not a point of a space with {self.dim} genes: {x!r}")
        return {g.name: g.natural(float(u)) for g, u in zip(self.genes, point, strict=True)}

    def encode(self, params: Mapping[str, float]) -> Array:
        """Return the point `(dim,)` of natural values; decoding it gives the values back, rounded.

        Raises:
            ConfigError: missing or unknown genes, or values that are not numbers inside their range.
        """
        self._check(params)
        return np.array([gene.unit(params[gene.name]) for gene in self.genes])

    def recipe(self, params: Mapping[str, float]) -> Recipe:
        """Return the recipe of natural values.

        Raises:
            ConfigError: as `encode`.
        """
        self._check(params)
        values = {slot: params[g.name] for g, slot in zip(self.genes, self.slots, strict=True)}
        everywhere = {name: value for name, value in self.fixed if name not in self.per_expert}
        everywhere |= dict(self._shared(values, None))
        pieces: list[tuple[int, int, Any, Any]] = []
        for index, (first, last) in enumerate(self.groups):
            sources = [self._source(values, index, expert) for expert in range(len(self.experts))]
            shared = dict(self._shared(values, index))
            if pieces and pieces[-1][2:] == (sources, shared):
                pieces[-1] = (pieces[-1][0], last, sources, shared)
            else:
                pieces.append((first, last, sources, shared))
        data: dict[str, Any] = {
            "merge_method": self.method,
            "base_model": self.base if self.needs_base else None,
            "compat": self.compat,
            "seed": self.seed,
        }
        if len(pieces) == 1:
            _, _, data["models"], shared = pieces[0]
            data["parameters"] = everywhere | shared
        else:
            data["parameters"] = everywhere
            data["slices"] = [
                {
                    "sources": [{**source, "layer_range": [first, last]} for source in sources],
                    "parameters": shared,
                }
                for first, last, sources, shared in pieces
            ]
        return Recipe.from_dict(data)

    def _source(self, values: Mapping[Slot, float], group: int, expert: int) -> dict[str, Any]:
        """Return one entry of `models` or `sources`, without its layers."""
        parameters = {name: value for name, value in self.fixed if name in self.per_expert}
        for param in self._searched:
            if param in self.per_expert:
                parameters[param] = self._setting(values, param, expert, group)
        return {"model": self.experts[expert][1], "parameters": parameters}

    def _shared(self, values: Mapping[Slot, float], group: int | None) -> Iterator[tuple[str, Any]]:
        """Yield the parameters shared by the experts: those of one group, or those of no group."""
        for param, slot in self._searched.items():
            if param not in self.per_expert and (slot.group is None) == (group is None):
                yield param, self._setting(values, param, None, group)

    @cached_property
    def _searched(self) -> dict[str, Slot]:
        """Each searched parameter with one of its slots, in the order of the genes."""
        return {slot.param: slot for slot in self.slots}

    def _setting(self, values: Mapping[Slot, float], param: str, expert: int | None, group: int | None) -> Any:
        """Return a recipe's setting: a number, or a list with one filter per part of a component."""
        shape = self._searched[param]
        where = (None if shape.expert is None else expert, None if shape.group is None else group)
        if shape.component is None:
            return values[Slot(param, *where)]
        found = [values[Slot(param, *where, c)] for c in range(len(self.components))]
        if len(set(found)) == 1:
            return found[0]
        return [
            {"value": value} if part == EVERYTHING else {"filter": part, "value": value}
            for value, (_, parts) in zip(found, self.components, strict=True)
            for part in parts
        ]

    def point_of(self, recipe: Recipe) -> dict[str, float] | None:
        """Return the natural values that make `recipe`, or None if no point of the space does.

        Recipes are equal here if every output tensor is planned equally: spelling out a default, or splitting
        a slice, changes the fingerprint but not the model.
        """
        if (recipe.method, recipe.compat) != (self.method, self.compat):
            return None
        try:
            wanted = recipe.plan(self._probes(recipe), self.n_layers)
            params = self._read({plan.name: plan for plan in wanted})
            mine = self.recipe(params)
        except (ConfigError, KeyError, IndexError, TypeError):
            return None  # other experts, other layers, or values outside the ranges
        if mine.plan(self._probes(recipe), self.n_layers) != wanted:
            return None
        if any(gene.clipped(params[gene.name]) != params[gene.name] for gene in self.genes):
            return None  # finer than the 4 decimals of a point
        same_dtypes = (mine.dtype, mine.out_dtype) == (recipe.dtype, recipe.out_dtype)
        return params if same_dtypes and (mine.seed == recipe.seed or not self._random) else None

    @property
    def _random(self) -> bool:
        from evomerge import registry

        return bool(registry.get("methods", self.method).random)

    def _read(self, plans: Mapping[str, TensorPlan]) -> dict[str, float]:
        """Return each gene's value in a planned recipe, from one tensor that the gene governs."""
        params = {}
        for gene, slot in zip(self.genes, self.slots, strict=True):
            part = EVERYTHING if slot.component is None else self.components[slot.component][1][0]
            plan = plans[_probe(self.groups[slot.group or 0][0], part)]
            per_input = plan.per_input[slot.expert or 0] if slot.param in self.per_expert else {}
            value = per_input.get(slot.param, plan.shared.get(slot.param))
            params[gene.name] = float(value) if value is not None else math.nan
        return params

    def _probes(self, recipe: Recipe) -> list[str]:
        """Return tensor names that between them show every filter, of ours and of `recipe`, in every layer."""
        parts = {EVERYTHING: None}
        parts |= {part: None for _, names in self.components for part in names}
        levels = [recipe.parameters]
        for piece in recipe.slices:
            levels += [piece.parameters, *(source.parameters for source in piece.sources)]
        for _, setting in (pair for level in levels for pair in level):
            for item in setting if isinstance(setting, tuple) else ():
                if isinstance(item, Conditional) and item.filter is not None:
                    parts[item.filter] = None
        names = [_probe(layer, part) for layer in range(self.n_layers) for part in parts]
        outside = [f"{place}.{part}.weight" for place in ("embed", "norm") for part in parts]
        return names + outside

    def _check(self, params: Mapping[str, float]) -> None:
        known = {gene.name: gene for gene in self.genes}
        problems = [Problem("the space has no such gene", name) for name in params if name not in known]
        for name, gene in known.items():
            value: object = params.get(name)
            if value is None:
                problems.append(Problem("this gene has no value", name))
            elif not isinstance(value, (int, float)) or not gene.low <= value <= gene.high:
                message = f"{value!r} is not a number from {gene.low:g} to {gene.high:g}"
                problems.append(Problem(message, name))
        if problems:
            raise ConfigError.of(problems, "the point")


def _probe(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{'any' if part == EVERYTHING else part}.weight"


def known_recipes(base: str, experts: Mapping[str, str], seed: int = 0) -> list[tuple[str, Recipe]]:
    """Return the (label, recipe) pairs that every study evaluates first: its baselines.

    The base, each expert, the uniform soup (each delta at 1/K), task arithmetic at 0.3, 0.5 and 1.0, and TIES at
    densities 0.2 and 0.5. Recipes that coincide (one expert: its soup is itself) are listed once.
    """
    names = list(experts)

    def arithmetic(weights: Mapping[str, float]) -> Recipe:
        sources = {experts[name]: {"weight": weights.get(name, 0.0)} for name in names}
        return Recipe.build("task_arithmetic", base, sources, seed=seed)

    def ties(density: float) -> Recipe:
        sources = {experts[name]: {"weight": 1.0, "density": density} for name in names}
        return Recipe.build("ties", base, sources, seed=seed)

    soup = round(1.0 / len(names), DECIMALS)
    found = [("base", arithmetic({}))]
    found += [(name, arithmetic({name: 1.0})) for name in names]
    found.append(("uniform soup", arithmetic(dict.fromkeys(names, soup))))
    for scale in (0.3, 0.5, 1.0):
        found.append((f"task arithmetic {scale:g}", arithmetic(dict.fromkeys(names, scale))))
    found += [(f"ties {density:g}", ties(density)) for density in (0.2, 0.5)]
    first: dict[str, tuple[str, Recipe]] = {}
    for label, recipe in found:
        first.setdefault(recipe.fingerprint, (label, recipe))
    return list(first.values())
