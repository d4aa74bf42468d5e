"""Quadratic-surrogate search where coarse coordinates have been split: `map` on a finer level, near what is known.

A level with dozens of coordinates has too many products for its own quadratic. Its surrogate is the coarse level's,
in the means of the coordinates that were one, plus a linear and a square term for each one's deviation
(`surrogate.features` with ties): what the coarse stage learned stays, and each evaluation that moves all deviations at
once says a little about every one of them. Deviations that no data speak for are worth nothing and cost uncertainty,
so proposals keep to a region around a point of the front, and recommendations count the uncertainty against a point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge.front import non_dominated
from evomerge.optimizers._core import Array, Facts, Goal, Recommendation, rng_for
from evomerge.optimizers._map_design import sobol
from evomerge.optimizers._map_front import Box
from evomerge.optimizers.map import COSTLY, MapSearch

RADIUS = 0.25  # of the region around a point of the front; half of it measured worse by 0.02 to 0.05 of the gap
PESSIMISM = 1.0  # standard deviations that count against a recommended point
CLIMBS = 6  # rounds of variation around the best point for a recommendation


class TiedSearch(MapSearch):
    """`map` on a level whose coordinates are tied into coarser ones by `ties` `(d, k)`."""

    def __init__(
        self, dim: int, goals: Sequence[Goal], seed: int, start: Array, *, ties: Array, facts: Facts | None = None
    ) -> None:
        """See `make`; `ties` as in `surrogate.features`. There is no design: the coarse stage was one."""
        super().__init__(dim, goals, seed, start, design=2, facts=facts)
        self._ties = ties
        self._terms = 2 * dim + COSTLY

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the best proposal near a point of the front, or a Sobol point there."""
        rng = rng_for(self._seed, number)
        known = np.array([*self._x, *pending]).reshape(-1, self._dim)
        failed = np.array(self._failed).reshape(-1, self._dim)
        if self._data is None:
            point = self._whole.snap(sobol(self._dim, self._seed, number)[None])[0]
            return self._new(point, np.vstack([known, failed]), number)
        front = self._front()
        return self._within(self._around(front[rng.integers(len(front))]), number, known, failed, rng)

    def recommend(self) -> Sequence[Recommendation]:
        """Return the point with the best mean of objectives, each scaled to the front, less its uncertainty."""
        if self._data is None:
            return []
        models, front = self._fit(), self._front()
        values = np.column_stack([model.mean(front) for model in models])
        spread = np.ptp(values, axis=0) if len(front) > 1 else np.ones(len(models))
        scale = np.where(spread > 0, spread, np.ptp(self._data[1], axis=0) + 1e-12)

        def merit(x: Array) -> Array:
            kept = np.column_stack([model.hopeful(x, -PESSIMISM) for model in models])
            short = 0.0 if self._floors is None else np.maximum(self._floors - kept, 0.0) / scale
            return np.asarray((kept / scale - 10.0 * short).mean(axis=1))

        best = front[int(np.argmax(merit(front)))]
        box, rng = self._around(best), np.random.default_rng([self._seed, len(self._x), 1])
        for round_ in range(CLIMBS):
            step = 0.5 ** (round_ + 1) * RADIUS * rng.standard_normal((256, self._dim))
            moved = rng.random(step.shape) < rng.uniform(0.1, 1.0, (256, 1))
            pool = np.vstack([best, box.snap(best + step * moved)])
            best = pool[int(np.argmax(merit(pool)))]
        return [Recommendation(best, "surrogate optimum")]

    def _front(self) -> Array:
        """The known points that are on the front with some certainty `(n, d)`; feasible ones if there are any."""
        assert self._data is not None
        x = self._data[0]
        kept = np.column_stack([model.hopeful(x, -0.5 * PESSIMISM) for model in self._fit()])
        if self._floors is not None:
            short = np.maximum(self._floors - kept, 0.0).sum(axis=1)
            x, kept = x[short <= short.min()], kept[short <= short.min()]
        return np.asarray(x[non_dominated(kept)])

    def _around(self, centre: Array) -> Box:
        return Box(np.maximum(centre - RADIUS, 0.0), np.minimum(centre + RADIUS, 1.0), self._cells)
