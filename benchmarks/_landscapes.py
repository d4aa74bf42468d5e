"""What every landscape of the search benchmark is: coefficients in, outcomes of single items out, and the truth.

A point is an array of weights `(experts, layers, components)`, natural units, in [0, HIGHEST]. Searches see it as a
cube `(experts * layers * components,)` of weights / HIGHEST, in which coarser spaces are tied (`Level`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HIGHEST = 1.2  # weight in the search space
BLOCKS = 4  # of neighbouring layers, at the level of groups
BELOW_BASE = 0.05  # points of score, of the reference of hypervolumes
UNIFORM_SCALES = tuple(round(0.1 * k, 1) for k in range(1, 13))  # of task arithmetic with one scale


@dataclass(frozen=True)
class Shape:
    """How many experts, layers and components the weights of a landscape have."""

    experts: int
    layers: int
    components: int = 1

    @property
    def dim(self) -> int:
        """Dimensions of the whole cube."""
        return self.experts * self.layers * self.components

    def weights(self, x: Array) -> Array:
        """The weights `(experts, layers, components)` of a point `(dim,)` of the cube."""
        return np.asarray(x, dtype=np.float64).reshape(self.experts, self.layers, self.components) * HIGHEST

    def point(self, weights: Array) -> Array:
        """The point `(dim,)` of weights that broadcast to `(experts, layers, components)`, clipped to the cube."""
        full = np.broadcast_to(weights, (self.experts, self.layers, self.components))
        return np.clip(full / HIGHEST, 0.0, 1.0).ravel()

    def ties(self, level: str) -> Array:
        """The 0/1 matrix `(dim, k)` that spreads a level's coordinates over the cube."""
        expert, layer, component = np.indices((self.experts, self.layers, self.components)).reshape(3, -1)
        block = layer * BLOCKS // self.layers
        owner = {
            "model": expert,
            "groups": (expert * BLOCKS + block) * self.components + component,
            "layers": np.arange(self.dim),
        }[level]
        used, column = np.unique(owner, return_inverse=True)
        return np.eye(len(used))[column]

    def levels(self) -> tuple[Any, ...]:
        """The nested spaces, coarse to fine; those with as many coordinates as the one before are left out."""
        from evomerge.optimizers import Level

        found: list[Any] = []
        for name in ("model", "groups", "layers"):
            matrix = self.ties(name)
            if not found or matrix.shape[1] > found[-1].dim:
                found.append(Level(name, matrix, np.zeros(self.dim)))
        return tuple(found)

    def facts(self, evaluations: int | None, level: str | None = None) -> Any:
        """What an optimizer is told of the cube, or of one level that is all it searches."""
        from evomerge.optimizers import Facts, Level

        ties = self.ties(level or "layers")
        dim = ties.shape[1]
        owners = np.repeat(np.arange(self.experts), self.layers * self.components)
        return Facts(
            cells=np.zeros(dim, dtype=np.intp),
            categorical=np.zeros(dim, dtype=np.bool_),
            zero=np.zeros(dim),
            experts=owners[ties.argmax(axis=0)],
            levels=self.levels() if level is None else (Level(level, np.eye(dim), np.zeros(dim)),),
            evaluations=evaluations,
        )


class Landscape(Protocol):
    """Outcomes of items and the truth, for any weights.

    Attributes:
        name: family and kind, such as "toy heterogeneous".
        n_items: of each task on the search split; the validation split has as many.
        plateau: whether nothing but noise lies between the best uniform recipe and the optimum.
    """

    name: str
    shape: Shape
    n_tasks: int
    n_items: int
    plateau: bool

    def outcomes(self, weights: Array, split: str, positions: NDArray[np.intp] | None = None) -> NDArray[np.uint8]:
        """Right answers `(n,)` as 0 and 1; position k * n_items + i is item i of task k; None is all of them."""

    def truth(self, weights: Array) -> Array:
        """True scores `(n_tasks,)`."""

    def optimum(self) -> Array:
        """Weights that an oracle found, who sees the truth and its gradient."""


def known_recipes(shape: Shape) -> list[tuple[str, Array]]:
    """The recipes that every study of evomerge starts with and that are task arithmetic, as points `(dim,)`."""
    one = np.eye(shape.experts)[:, :, None, None]
    made = [("base", shape.point(np.zeros((1, 1, 1))))]
    made += [(f"expert {k}", shape.point(one[k])) for k in range(shape.experts)]
    made.append(("uniform soup", shape.point(np.full((1, 1, 1), 1.0 / shape.experts))))
    made += [(f"task arithmetic {s:g}", shape.point(np.full((1, 1, 1), s))) for s in (0.5, 0.75, 1.0)]
    return made


@dataclass
class Truth:
    """The truth of a landscape, each point asked for once, with what it is measured against."""

    landscape: Landscape
    _known: dict[bytes, Array] = field(default_factory=dict)

    def __call__(self, weights: Array) -> Array:
        """True scores `(n_tasks,)` of weights `(experts, layers, components)`."""
        key = np.round(weights, 6).tobytes()
        if key not in self._known:
            self._known[key] = self.landscape.truth(weights)
        return self._known[key]

    def uniform_of(self, scale: float) -> float:
        """Mean true score of task arithmetic with one scale."""
        shape = self.landscape.shape
        return float(self(np.full((shape.experts, shape.layers, shape.components), scale)).mean())

    @cached_property
    def uniform(self) -> float:
        """Mean true score of the best task arithmetic with one scale, the base included."""
        return max(self.uniform_of(scale) for scale in (0.0, *UNIFORM_SCALES))

    @cached_property
    def oracle(self) -> float:
        """Mean true score of the oracle's weights."""
        return float(self(self.landscape.optimum()).mean())

    @cached_property
    def reference(self) -> Array:
        """The reference `(n_tasks,)` of hypervolumes: a little below the base's true scores."""
        return self(self.landscape.shape.weights(np.zeros(self.landscape.shape.dim))) - BELOW_BASE


class Meter:
    """Scores weights on the splits and counts the items; one evaluation is the whole search split.

    Args:
        objectives: the tasks of each objective, whose score is the mean over their items.
    """

    def __init__(self, landscape: Landscape, objectives: Sequence[Sequence[int]]) -> None:
        self.landscape, self.objectives = landscape, [list(own) for own in objectives]
        n = landscape.n_items
        self.positions = [np.concatenate([np.arange(t * n, (t + 1) * n) for t in own]) for own in self.objectives]
        self._unit = landscape.n_tasks * n
        self._used = 0

    @property
    def spent(self) -> float:
        """Evaluations so far."""
        return self._used / self._unit

    def items(self, weights: Array, split: str, positions: NDArray[np.intp]) -> Array:
        """Outcomes `(n,)` at positions of all tasks' items."""
        self._used += len(positions)
        return self.landscape.outcomes(weights, split, positions).astype(np.float64)

    def values(self, weights: Array, share: float = 1.0) -> Array:
        """Scores `(m,)` on the first items of each task of the search split."""
        n = self.landscape.n_items
        chosen = np.arange(self._unit).reshape(-1, n)[:, : max(1, round(share * n))]
        outcomes = self.items(weights, "search", chosen.ravel()).reshape(chosen.shape)
        return np.array([outcomes[own].mean() for own in self.objectives])


def sigmoid(x: Any) -> Any:
    """The logistic function."""
    from scipy.special import expit

    return expit(x)


def logit(p: float) -> float:
    """The inverse of the logistic function."""
    return math.log(p / (1.0 - p))
