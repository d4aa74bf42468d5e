"""A uniform grid for one scale: the points of a line through the cube, and then no more.

What people do by hand before they search: the same coefficient for every expert, at evenly spaced sizes. The line runs
from the unmerged base (`facts.zero`; the cube's lower corner if the cube does not hold it) to the upper corner. Where
the space says which coordinates weigh an expert, only these move and the others stay at the start. A space with one
coordinate gets the plain grid over it. The order halves the gaps: both ends and the middle come early, so a budget
that ends before the grid does has seen all of the range. Points that were evaluated already, by whomever, or are
pending are left out; failures are not repeated. It learns nothing and knows no floors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge import registry
from evomerge.optimizers._core import Array, Exhausted, Facts, Goal, Result, check_number

SAME = 1e-3  # natural values are rounded to 4 decimals before they come back
MOST = 500  # so that neighbours stay further apart than that


class GridSearch:
    """A finite search: `points` points on one line."""

    def __init__(
        self, dim: int, goals: Sequence[Goal], seed: int, start: Array, *, facts: Facts, points: int = 13
    ) -> None:
        """See `make`; `points` is how many there are, both ends included."""
        check_number("points", points, 2, MOST, whole=True)
        self._points = _line(start, facts, points)
        self._done: set[int] = set()

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the first point of the grid that is neither told nor pending.

        Raises:
            Exhausted: there is none.
        """
        taken = self._done.union(*(self._matches(np.asarray(x, dtype=np.float64)) for x in pending))
        for index, point in enumerate(self._points):
            if index not in taken:
                return np.array(point)
        raise Exhausted(
            f"all {len(self._points)} points of the grid have been proposed; for a finer one set `points`, "
            "for a search of the whole space choose another optimizer"
        )

    def tell(self, result: Result) -> None:
        """Note which point of the grid this was, if any; what it scored does not matter."""
        if result.x is not None:
            self._done |= self._matches(np.asarray(result.x, dtype=np.float64))

    def _matches(self, x: Array) -> set[int]:
        if x.shape != self._points.shape[1:]:
            raise ValueError(f"a point {x.shape} does not fit a grid in {self._points.shape[1]} dimensions")
        return set(np.flatnonzero(np.abs(self._points - x).max(axis=1) < SAME).tolist())


def _line(start: Array, facts: Facts, count: int) -> Array:
    """Return the points `(n, d)` in the order of proposal; fewer than `count` where cells make some of them equal."""
    dim = len(start)
    moving = facts.experts >= 0 if (facts.experts >= 0).any() else np.ones(dim, dtype=np.bool_)
    low = np.zeros(dim) if facts.zero is None or dim == 1 else facts.zero
    points = np.where(moving, low + np.linspace(0.0, 1.0, count)[:, None] * (1.0 - low), start)
    cells = np.maximum(facts.cells, 1)
    middles = (np.minimum(np.floor(points * cells), cells - 1) + 0.5) / cells
    points = np.where(facts.cells > 0, middles, points)
    # Bits of the index read backwards (van der Corput) put the ends of ever smaller intervals one after another.
    bits = (count - 1).bit_length()
    order = sorted(range(count), key=lambda i: (i != count - 1, int(f"{i:0{bits}b}"[::-1], 2)))
    _, first = np.unique(points[order], axis=0, return_index=True)
    chosen: Array = points[order][np.sort(first)]
    return chosen


registry.register("optimizers", "grid", GridSearch)
