"""Genes: the dimensions of a search space, what they set, and values that change over depth.

A gene is a range of numbers, a range of whole numbers, or a list of choices. Of the unit interval, a whole number
or a choice has a cell; encoding gives the cell's middle. On a linear scale and for choices, cells are equal.
Equal steps of the unit interval are equal steps of the value, of its logarithm, or of log(v / (1 - v)): its scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from evomerge._recipe_plan import evaluate
from evomerge.errors import ConfigError, Problem

DECIMALS = 4
METHOD = "method"  # the gene that chooses among merge methods
Natural = float | str  # a number (whole or not), a truth value, or a name
Scale = Literal["linear", "log", "logit"]
_SAME = 1e-12  # far below the last decimal of a value, far above the rounding of a curve


@dataclass(frozen=True)
class Gene:
    """One dimension: its natural values, and where a search starts.

    With `choices`, these are the values, and `low` and `high` their first and last place; with `whole`, the values
    are the whole numbers from `low` to `high`.
    """

    name: str
    low: float
    high: float
    start: Natural
    scale: Scale = "linear"
    whole: bool = False
    choices: tuple[Natural, ...] = ()

    @property
    def _ends(self) -> tuple[float, float]:
        """The range that the unit interval stands for: each whole number has half a unit on either side."""
        return (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)

    def natural(self, unit: float) -> Natural:
        """Return the natural value at `unit` in [0, 1]; numbers are rounded, and inside the range."""
        share = min(1.0, max(0.0, unit))
        if self.choices:
            return self.choices[min(len(self.choices) - 1, int(share * len(self.choices)))]
        low, high = self._ends
        if self.scale == "log":
            return self.clipped(math.exp(math.log(low) + share * math.log(high / low)))
        if self.scale == "logit":
            return self.clipped(1.0 / (1.0 + math.exp(-_logit(low) - share * (_logit(high) - _logit(low)))))
        return self.clipped(low + share * (high - low))

    def clipped(self, value: float) -> float:
        """Return a number rounded, then moved into the range.

        To 4 decimals; to more where they are needed for 4 digits of a small value on a log scale (on a logit scale: of
        what is missing to 1 too), or for a thousand steps in a narrow range.
        """
        if self.whole:
            return min(int(self.high), max(int(self.low), math.floor(value + 0.5)))
        size, inside = self.high - self.low, min(self.high, max(self.low, value))
        if self.scale != "linear":
            size = min(size, inside, 1.0 - inside if self.scale == "logit" else inside)
        decimals = max(DECIMALS, DECIMALS - 1 - math.floor(math.log10(size) + _SAME))  # 1.2 - 1.1 is 0.1
        return min(self.high, max(self.low, round(value, decimals) + 0.0))

    def unit(self, value: Natural) -> float:
        """Return where `value` lies, in [0, 1]: the middle of its cell if it has one."""
        if self.choices:
            return (self._place(value) + 0.5) / len(self.choices)
        number = float(value)
        low, high = self._ends
        if self.scale == "log" and self.whole:
            share = math.log(math.sqrt((number - 0.5) * (number + 0.5)) / low) / math.log(high / low)
        elif self.scale == "log":
            share = math.log(max(number, low) / low) / math.log(high / low)
        elif self.scale == "logit":
            share = (_logit(min(high, max(low, number))) - _logit(low)) / (_logit(high) - _logit(low))
        else:
            share = (number - low) / (high - low)
        return min(1.0, max(0.0, share))

    def holds(self, value: object) -> bool:
        """True for a natural value of this gene."""
        if self.choices:
            return any(_equal(value, choice) for choice in self.choices)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        return not self.whole or float(value).is_integer()

    @property
    def expected(self) -> str:
        """The natural values in words."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        return f"a {'whole ' if self.whole else ''}number from {self.low:g} to {self.high:g}"

    @property
    def domain(self) -> list[Natural] | tuple[float, float, bool]:
        """What a study records: the choices, or (low, high, whether the scale is log), whole numbers as int."""
        if self.choices:
            return list(self.choices)
        log = self.scale == "log"
        return (int(self.low), int(self.high), log) if self.whole else (self.low, self.high, log)

    @property
    def categorical(self) -> bool:
        """True for choices without an order: not all numbers, or numbers that neither rise nor fall."""
        if not all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.choices):
            return True
        return list(self.choices) not in (sorted(self.choices), sorted(self.choices, reverse=True))

    @property
    def cells(self) -> int:
        """Of how many equal cells the unit interval consists; 0 for numbers, and for whole ones on a log scale."""
        if self.choices:
            return len(self.choices)
        return int(self.high - self.low) + 1 if self.whole and self.scale == "linear" else 0

    def snapped(self, value: Any) -> Natural | None:
        """Return the natural value that equals `value` but for rounding, or None."""
        if self.choices:
            return next((choice for choice in self.choices if _equal(value, choice)), None)
        if value is None or isinstance(value, str) or not math.isfinite(value):
            return None
        for candidate in (self.clipped(value), self.low, self.high):
            if abs(candidate - value) <= _SAME:
                return candidate
        return None

    def _place(self, value: Natural) -> int:
        return next(i for i, choice in enumerate(self.choices) if _equal(value, choice))


def natural_values(genes: Sequence[Gene], x: ArrayLike) -> dict[str, Natural]:
    """Return the natural values of a point `(d,)`; coordinates outside [0, 1] are clipped.

    Raises:
        ValueError: a wrong shape or a NaN.
    """
    point = np.asarray(x, dtype=np.float64)
    if point.shape != (len(genes),) or np.isnan(point).any():
        raise ValueError(f"not a point of a space with {len(genes)} genes: {x!r}")
    return {g.name: g.natural(float(u)) for g, u in zip(genes, point, strict=True)}


def check_values(genes: Sequence[Gene], params: Mapping[str, Natural]) -> None:
    """Refuse natural values that these genes do not have.

    Raises:
        ConfigError: missing or unknown genes, or values that the gene does not have.
    """
    known = {gene.name: gene for gene in genes}
    problems = [Problem("the space has no such gene", name) for name in params if name not in known]
    for name, gene in known.items():
        value = params.get(name)
        if value is None:
            problems.append(Problem("this gene has no value", name))
        elif not gene.holds(value):
            problems.append(Problem(f"{value!r} is not {gene.expected}", name))
    if problems:
        raise ConfigError.of(problems, "the point")


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))


def _equal(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


@dataclass(frozen=True)
class Slot:
    """What a gene sets: a parameter, and the one expert, layer group and component that it is for (None: all).

    `point` counts the control points of a curve, or is 0 and 1 for a line's alpha and beta.
    """

    param: str
    expert: int | None = None
    group: int | None = None
    component: int | None = None
    point: int | None = None


@dataclass(frozen=True)
class Searched:
    """How one parameter is searched: what it is split over, and whether its values form a curve over depth."""

    param: str
    experts: bool
    groups: bool
    components: bool
    form: Literal["value", "curve", "line"] = "value"
    points: int = 1


# ------------------------------------------------------------------------------------- over depth


def over_depth(form: str, values: Sequence[Any]) -> Any:
    """Return the recipe's setting of a curve's or a line's genes: a gradient, or one number where it is flat."""
    if form == "line":
        alpha, beta = values
        # 12 decimals: 0.1 + 0.2 reads 0.3 in a recipe.
        values = (alpha, alpha if beta == 0 else round(alpha + beta, 12))
    return values[0] if all(value == values[0] for value in values) else list(values)


def from_depth(form: str, layers: Sequence[Any], points: int) -> list[float]:
    """Return the genes' values that make a curve or line through a value per layer, as near as can be.

    The inverse of `over_depth`: layer l of L has t = l / (L - 1), control point k of N lies at k / (N - 1). With
    N <= L, control points are unique.
    """
    values = np.array([math.nan if value is None else float(value) for value in layers])
    if not np.isfinite(values).all():
        return [math.nan] * points
    place = np.arange(len(values)) / (len(values) - 1) * (points - 1)
    hats = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(points)))
    found = [float(value) for value in np.linalg.lstsq(hats, values)[0]]
    return [found[0], found[1] - found[0]] if form == "line" else found


def bends(setting: Any) -> bool:
    """True if a setting, as plain data, changes over depth: it holds a list over the layers."""
    if not isinstance(setting, (list, tuple)):
        return False
    return any(isinstance(item.get("value"), (list, tuple)) if isinstance(item, Mapping) else True for item in setting)


def in_slice(setting: Any, first: int, past: int, n_layers: int) -> Any:
    """Return what a whole-model setting, as plain data, is in one of the slices of `cut`: the same bits per layer.

    The last slice also governs the tensors after the layers, for which t = 0. It has one layer, for which t = 1: a
    gradient of two values gives each its own.
    """
    if not bends(setting):
        return setting
    if any(isinstance(item, Mapping) for item in setting):
        return [{**item, "value": in_slice(item["value"], first, past, n_layers)} for item in setting]
    gradient = tuple(float(value) for value in setting)
    values = [evaluate(gradient, "", layer / (n_layers - 1) if n_layers > 1 else 1.0) for layer in range(first, past)]
    if past == n_layers:
        values.insert(0, evaluate(gradient, "", 0.0))
    return values[0] if all(value == values[0] for value in values) else values


def cut(first: int, past: int, n_layers: int) -> list[tuple[int, int]]:
    """Return the fewest slices of these layers in which a list of one value per layer gives just these values.

    In a slice of n layers, layer i reads the list at i / (n - 1) * (n - 1), which float64 does not always round to i.
    """
    found = []
    end = past - 1 if past == n_layers else past
    while first < end:
        size = next(n for n in range(end - first, 0, -1) if all(i / max(1, n - 1) * (n - 1) == i for i in range(n)))
        found.append((first, first + size))
        first += size
    return [*found, (end, past)] if end < past else found
