"""What every landscape of the search benchmark is: coefficients in, outcomes of single items out, and the truth.

A point is an array of weights `(experts, layers, components)`, natural units, in [0, HIGHEST]. Searches see it as a
cube `(experts * layers * components,)` of weights / HIGHEST, in which coarser spaces are tied (`Level`).
"""

from __future__ import annotations

import math
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
        return np.eye(int(owner.max()) + 1)[owner]

    def levels(self) -> tuple[Any, ...]:
        """The nested spaces, coarse to fine; those with as many coordinates as the one before are left out."""
        from evomerge.optimizers import Level

        found: list[Any] = []
        for name in ("model", "groups", "layers"):
            matrix = self.ties(name)
            if not found or matrix.shape[1] > found[-1].dim:
                found.append(Level(name, matrix, np.zeros(self.dim)))
        return tuple(found)

    def facts(self, evaluations: int | None) -> Any:
        """What an optimizer is told of the cube."""
        from evomerge.optimizers import Facts

        return Facts(
            cells=np.zeros(self.dim, dtype=np.intp),
            categorical=np.zeros(self.dim, dtype=np.bool_),
            zero=np.zeros(self.dim),
            experts=np.repeat(np.arange(self.experts), self.layers * self.components),
            levels=self.levels(),
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

    def __call__(self, x: Array) -> Array:
        """True scores `(n_tasks,)` of a point of the cube."""
        key = np.round(x, 6).tobytes()
        if key not in self._known:
            self._known[key] = self.landscape.truth(self.landscape.shape.weights(x))
        return self._known[key]

    @cached_property
    def uniform(self) -> float:
        """Mean true score of the best task arithmetic with one scale."""
        shape = self.landscape.shape
        return max(float(self(shape.point(np.full((1, 1, 1), s))).mean()) for s in (0.0, *UNIFORM_SCALES))

    @cached_property
    def oracle(self) -> float:
        """Mean true score of the oracle's weights."""
        return float(self(self.landscape.shape.point(self.landscape.optimum())).mean())

    @cached_property
    def reference(self) -> Array:
        """The reference `(n_tasks,)` of hypervolumes: a little below the base's true scores."""
        return self(np.zeros(self.landscape.shape.dim)) - BELOW_BASE


def sigmoid(x: Any) -> Any:
    """The logistic function."""
    from scipy.special import expit

    return expit(x)


def logit(p: float) -> float:
    """The inverse of the logistic function."""
    return math.log(p / (1.0 - p))
