"""A search on one level of nested spaces, as part of a portfolio on the whole cube."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers._core import Array, Facts, Level, Optimizer, Recommendation, Recommends, Result


@dataclass(frozen=True, eq=False)
class Arm:
    """An optimizer that sees a level's own cube; points of the whole cube are projected, and back.

    Attributes:
        inner: (k,) a point of the level that lies in the whole cube unclipped; None: the middle does.
    """

    level: Level
    search: Optimizer
    inner: Array | None = None

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a point `(d,)` of the whole cube."""
        inside = [z for x in pending if (z := self.level.project(x)) is not None]
        return self._embed(self.search.ask(number, inside))

    def tell(self, result: Result) -> None:
        """Pass on a result that lies in the level."""
        if result.x is None:
            self.search.tell(result)
            return
        z = self.level.project(result.x)
        if z is not None:
            self.search.tell(replace(result, x=z))

    def recommend(self) -> list[Recommendation]:
        """Return the search's recommendations as points of the whole cube."""
        if not isinstance(self.search, Recommends):
            return []
        return [Recommendation(self._embed(r.x), f"{r.why}, {self.level.name}") for r in self.search.recommend()]

    def _embed(self, z: Array) -> Array:
        """Return the point `(d,)` of the cube for z, or where the way to it from the inner point leaves the cube.

        Clipped to the cube instead, a point would mostly lie outside the level, and its result never reach the search.
        """
        inner = np.full(self.level.dim, 0.5) if self.inner is None else self.inner
        begin, end = (self.level.origin + self.level.matrix @ point for point in (inner, z))
        out = np.maximum(end - 1.0, -end)
        if (out > 1e-9).any():
            room = np.where(end > 1.0, 1.0 - begin, begin)
            share = float(np.min((room / np.maximum(room + out, 1e-12))[out > 0.0]))
            z = inner + max(0.0, share) * (z - inner)
        return self.level.embed(z)


def owners(level: Level) -> NDArray[np.intp]:
    """Return for each coordinate of a level the cube's coordinate that shows its kind `(k,)`."""
    return np.asarray(np.argmax(np.abs(level.matrix), axis=0))


def facts_on(facts: Facts, level: Level) -> Facts:
    """Return what is known of a level's own cube; its one level is itself."""
    at = owners(level)
    return Facts(
        cells=facts.cells[at],
        categorical=facts.categorical[at],
        zero=None if facts.zero is None else level.project(facts.zero),
        experts=facts.experts[at],
        levels=(Level(level.name, np.eye(level.dim), np.zeros(level.dim)),),
        workers=facts.workers,
        evaluations=facts.evaluations,
    )


def size(facts: Facts) -> float:
    """Return of how many points the cube consists; infinite if a coordinate is continuous."""
    return float(np.prod(facts.cells, dtype=np.float64)) if facts.cells.all() else np.inf


def settled(level: Level, categorical: NDArray[np.bool_], x: Array) -> Level:
    """Return the level without its categorical coordinates, which keep their values at the point `x` `(d,)`.

    A level of categories only stays as it is: there is nothing else to search.
    """
    keep = ~categorical[owners(level)]
    if keep.all() or not keep.any():
        return level
    z = level.project(x)
    chosen = x if z is None else level.embed(np.where(keep, 0.0, z))
    origin = np.where(categorical, chosen, level.origin)
    return Level(level.name, level.matrix[:, keep], origin)


def ties(coarse: Level, fine: Level) -> Array | None:
    """Return the 0/1 matrix `(k_fine, k_coarse)` that splits coarse coordinates; None if that is not all it does."""
    at = owners(fine)
    found = coarse.matrix[at]
    whole = (found > 0).sum(axis=1) == 1
    same = np.allclose(fine.matrix @ found, coarse.matrix) and np.isin(found, (0.0, 1.0)).all()
    return found if bool(whole.all()) and same and bool((found.sum(axis=0) > 0).all()) else None
