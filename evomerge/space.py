"""SearchSpace: the named dimensions of a search, and the way from a point to a Recipe and back.

A point is a vector in the unit cube (what optimizers see), or a mapping from gene names to natural values (what
people, recipes and the study see). Natural values are rounded, as a rule to 4 decimals, so that what a recipe
says is exactly what was merged. Layer groups become slices; equal neighbours melt into one, so a uniform
point of a layer-wise space is the plain whole-model recipe. A space may choose among methods: a recipe then has the
parameters of its own method only. Reading the YAML form is `_space_form`'s work, nested spaces are `_space_levels`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge._space_genes import (
    DECIMALS,
    METHOD,
    Gene,
    Natural,
    Searched,
    Slot,
    bends,
    check_values,
    cut,
    from_depth,
    in_slice,
    natural_values,
    over_depth,
)
from evomerge._space_methods import method_named
from evomerge._space_parts import EVERYTHING, Component, outside_probe, probe
from evomerge.errors import ConfigError
from evomerge.recipe import Conditional, Recipe, TensorPlan

if TYPE_CHECKING:
    from evomerge.optimizers import Facts

__all__ = ["Gene", "Natural", "SearchSpace", "Slot", "known_recipes"]

Array = NDArray[np.float64]
Piece = tuple[int, int, list[dict[str, Any]], dict[str, Any]]  # layers, settings of each expert, shared settings


@dataclass(frozen=True)
class SearchSpace:
    """Genes and everything that turns their values into a Recipe. Make one with `from_dict`.

    `methods` are the merge methods; of several, the gene "method" chooses one. `groups` are [first, past last) layers.
    `searched` says how each parameter is split, `slots` what each gene sets. `fixed` holds the parameters that are not
    searched; `per_expert` names the parameters, searched or fixed, that a recipe gives per expert.
    """

    methods: tuple[str, ...]
    base: str
    experts: tuple[tuple[str, str], ...]
    groups: tuple[tuple[int, int], ...]
    components: tuple[Component, ...]
    searched: tuple[Searched, ...]
    genes: tuple[Gene, ...]
    slots: tuple[Slot, ...]
    fixed: tuple[tuple[str, Any], ...]
    per_expert: frozenset[str]
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
        names: Collection[str] = (),
    ) -> SearchSpace:
        """Read the YAML form of a space for these models.

        `experts` maps short names, which gene names use, to paths, in the order that the recipes list them.
        `names` are the models' tensors; ready-made components then leave out what the models do not have.

        Raises:
            ConfigError: with every problem; each names its key, such as "genes.weight.low".
        """
        from evomerge._space_form import read_space

        return read_space(spec, base, experts, n_layers, seed, names)

    @property
    def dim(self) -> int:
        """The number of genes."""
        return len(self.genes)

    @property
    def n_layers(self) -> int:
        """The number of layers of every model."""
        return self.groups[-1][1]

    def start(self) -> dict[str, Natural]:
        """Return the natural values where a search starts."""
        return {gene.name: gene.start for gene in self.genes}

    def starts(self) -> list[dict[str, Natural]]:
        """Return `start()` once with each method."""
        start = self.start()
        return [start if len(self.methods) == 1 else start | {METHOD: name} for name in self.methods]

    def facts(self, workers: int = 1, evaluations: int | None = None) -> Facts:
        """Return what an optimizer may know of the cube: kinds of coordinates, the base's point, nested spaces.

        `workers` and `evaluations` are passed on.
        """
        from evomerge._space_levels import space_facts

        return space_facts(self, workers, evaluations)

    def decode(self, x: ArrayLike) -> dict[str, Natural]:
        """Return the natural values of a point `(dim,)`; coordinates outside [0, 1] are clipped.

        Raises:
            ValueError: a wrong shape or a NaN.
        """
        return natural_values(self.genes, x)

    def encode(self, params: Mapping[str, Natural]) -> Array:
        """Return the point `(dim,)` of natural values; decoding it gives the values back, rounded.

        Raises:
            ConfigError: missing or unknown genes, or values that the gene does not have.
        """
        check_values(self.genes, params)
        return np.array([gene.unit(params[gene.name]) for gene in self.genes])

    # ---------------------------------------------------------------- to a recipe

    def recipe(self, params: Mapping[str, Natural]) -> Recipe:
        """Return the recipe of natural values.

        Raises:
            ConfigError: as `encode`.
        """
        check_values(self.genes, params)
        values = {slot: params[g.name] for g, slot in zip(self.genes, self.slots, strict=True)}
        method = str(params.get(METHOD, self.methods[0]))
        pieces = self._pieces(values, self.parameters_of(method))
        data: dict[str, Any] = {
            "merge_method": method,
            "base_model": self.base if method_named(method).takes_base else None,
            "compat": self.compat,
            "seed": self.seed,
        }
        models = [{"model": path} for _, path in self.experts]
        if len(pieces) == 1:
            _, _, each, data["parameters"] = pieces[0]
            data["models"] = [{**model, "parameters": own} for model, own in zip(models, each, strict=True)]
            return Recipe.from_dict(data)
        bent = {name for _, _, _, shared in pieces for name in shared if shared[name] != pieces[0][3][name]}
        sliced = bent | {s.param for s in self.searched if s.groups}
        data["parameters"] = {name: value for name, value in pieces[0][3].items() if name not in sliced}
        data["slices"] = [
            {
                "sources": [
                    {**model, "parameters": own, "layer_range": [first, last]}
                    for model, own in zip(models, each, strict=True)
                ],
                "parameters": {name: value for name, value in shared.items() if name in sliced},
            }
            for first, last, each, shared in pieces
        ]
        return Recipe.from_dict(data)

    def parameters_of(self, method: str) -> frozenset[str]:
        """Return the parameters, searched or fixed, that a method has; the others do not reach its recipes."""
        named = {how.param for how in self.searched} | {name for name, _ in self.fixed}
        return frozenset(name for name in named if method_named(method).parameter(name) is not None)

    def _pieces(self, values: Mapping[Slot, Natural], taken: Collection[str]) -> list[Piece]:
        """Return the slices, as few as can be.

        A recipe's gradients run over their slice. Where there are several, curves over the whole depth are therefore
        written with one value per layer: exactly what the whole-model gradient gives there.
        """
        pieces = _melted([(*self.groups[i], *self._settings(values, taken, i)) for i in range(len(self.groups))])
        if len(pieces) == 1 or not any(map(_bent, pieces)):
            return pieces
        n = self.n_layers

        def part(own: dict[str, Any], first: int, past: int) -> dict[str, Any]:
            return {name: in_slice(value, first, past, n) for name, value in own.items()}

        slices = [
            (a, b, [part(own, a, b) for own in each], part(shared, a, b))
            for first, past, each, shared in pieces
            for a, b in cut(first, past, n)
        ]
        return _melted(slices, bent=False)  # equal lists in two slices are not one list over both

    def _settings(
        self, values: Mapping[Slot, Natural], taken: Collection[str], group: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the parameters of each expert, and those that they share, in a layer group; only those `taken`."""
        each: list[dict[str, Any]] = [{} for _ in self.experts]
        shared: dict[str, Any] = {}
        for name, value in ((name, value) for name, value in self.fixed if name in taken):
            if name not in self.per_expert:
                shared[name] = value
                continue
            for own, (expert, _) in zip(each, self.experts, strict=True):
                own[name] = value[expert] if isinstance(value, Mapping) else value
        for how in (how for how in self.searched if how.param in taken):
            if how.param in self.per_expert:
                for index, own in enumerate(each):
                    own[how.param] = self._setting(values, how, index, group)
            else:
                shared[how.param] = self._setting(values, how, 0, group)
        return each, shared

    def _setting(self, values: Mapping[Slot, Natural], how: Searched, expert: int, group: int) -> Any:
        """Return a recipe's setting: a value, a gradient, or a list with one filter per part of a component."""
        slot = Slot(how.param, expert if how.experts else None, group if how.groups else None)
        if not how.components:
            return self._value(values, how, slot)
        found = [self._value(values, how, replace(slot, component=c)) for c in range(len(self.components))]
        if all(value == found[0] for value in found):
            return found[0]
        return [
            {"value": value} if part == EVERYTHING else {"filter": part, "value": value}
            for value, component in zip(found, self.components, strict=True)
            for part in component.parts
        ]

    def _value(self, values: Mapping[Slot, Natural], how: Searched, slot: Slot) -> Any:
        if slot.component is not None and self.components[slot.component].outside:
            return values[replace(slot, group=None)]
        if how.form == "value":
            return values[slot]
        return over_depth(how.form, [values[replace(slot, point=k)] for k in range(how.points)])

    # ---------------------------------------------------------------- from a recipe

    def point_of(self, recipe: Recipe) -> dict[str, Natural] | None:
        """Return the natural values that make `recipe`, or None if no point of the space does.

        Recipes are equal here if every output tensor is planned equally: spelling out a default, or splitting
        a slice, changes the fingerprint but not the model. Genes that the recipe's method does not have are at their
        start.
        """
        if recipe.method not in self.methods or recipe.compat != self.compat:
            return None
        try:
            wanted = recipe.plan(self._probes(recipe), self.n_layers)
            params = dict(self._read(recipe.method, {plan.name: plan for plan in wanted}))
            mine = self.recipe(params)
        except (ConfigError, KeyError, IndexError, TypeError):
            return None  # other experts, other layers, or values outside the ranges or between the decimals
        if mine.plan(self._probes(recipe), self.n_layers) != wanted:
            return None
        same_dtypes = (mine.dtype, mine.out_dtype) == (recipe.dtype, recipe.out_dtype)
        same_masks = mine.seed == recipe.seed or not method_named(recipe.method).random
        return params if same_dtypes and same_masks else None

    def _read(self, method: str, plans: Mapping[str, TensorPlan]) -> Iterator[tuple[str, Natural]]:
        """Yield each gene's value in a planned recipe, from tensors that the gene governs.

        Raises:
            KeyError: a value that its gene does not have.
        """
        forms = {how.param: how for how in self.searched}
        taken = self.parameters_of(method)
        for gene, slot in zip(self.genes, self.slots, strict=True):
            if slot.param not in taken:
                yield gene.name, method if slot.param == METHOD else gene.start
                continue
            component = Component("", (EVERYTHING,)) if slot.component is None else self.components[slot.component]
            part = component.parts[0]
            if component.outside:
                value = self._planned(plans[outside_probe(part)], slot)
            elif slot.point is None:
                value = self._planned(plans[self._governed(slot, part)], slot)
            else:
                how = forms[slot.param]
                layers = [self._planned(plans[probe(i, part)], slot) for i in range(self.n_layers)]
                value = from_depth(how.form, layers, how.points)[slot.point]
            snapped = gene.snapped(value)
            if snapped is None:
                raise KeyError(gene.name)
            yield gene.name, snapped

    def _governed(self, slot: Slot, part: str) -> str:
        """Return a tensor's name in the layers of a slot that its component takes before any other does."""
        layers = range(self.n_layers) if slot.group is None else range(*self.groups[slot.group])
        earlier = self.components[: slot.component]
        names = (probe(layer, part) for layer in layers)
        return next((n for n in names if not any(c.takes(n) for c in earlier)), probe(layers[0], part))

    def _planned(self, plan: TensorPlan, slot: Slot) -> Any:
        per_input = plan.per_input[slot.expert or 0] if slot.param in self.per_expert else plan.shared
        return per_input.get(slot.param)

    def _probes(self, recipe: Recipe) -> list[str]:
        """Return tensor names that between them show every filter, of ours and of `recipe`, in every layer."""
        outside = {part: None for component in self.components if component.outside for part in component.parts}
        parts = {EVERYTHING: None}
        parts |= {part: None for component in self.components if not component.outside for part in component.parts}
        levels = [recipe.parameters]
        for piece in recipe.slices:
            levels += [piece.parameters, *(source.parameters for source in piece.sources)]
        for _, setting in (pair for level in levels for pair in level):
            for item in setting if isinstance(setting, tuple) else ():
                if isinstance(item, Conditional) and item.filter is not None and item.filter not in outside:
                    parts[item.filter] = None
        names = [probe(layer, part) for layer in range(self.n_layers) for part in parts]
        names += [outside_probe(f"{place}.{part}") for place in ("embed", "norm") for part in parts]
        return [*names, *map(outside_probe, outside)]


def _bent(piece: Piece) -> bool:
    return any(bends(value) for own in (*piece[2], piece[3]) for value in own.values())


def _melted(pieces: list[Piece], bent: bool = True) -> list[Piece]:
    """Return the pieces with equal neighbours made one, those with gradients only if `bent`."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1][2:] == piece[2:] and (bent or not _bent(piece)):
            found[-1] = (found[-1][0], *piece[1:])
        else:
            found.append(piece)
    return found


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
