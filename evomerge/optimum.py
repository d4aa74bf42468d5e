"""The point that fitted surrogates call the best: for given preferences, or for the weakest objective.

With one surrogate per objective any trade-off has its recipe at once, without new evaluations (the amortisation of
MAP: Li et al., arXiv 2406.07529). The surrogates are smooth, so sequential quadratic programming finds the point:
with the box and the floors as constraints, from several starts, because a sum of indefinite quadratics has several
optima. Points are in the unit cube, values are larger-is-better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from evomerge.surrogate import Quadratic

Array = NDArray[np.float64]

POOL = 512  # random points, from the best of which the climbs start
CLIMBS = 5
STEPS = 60  # of one climb
CLOSE = 1e-6  # scaled values that miss a floor by less keep it
TINY = 1e-9


def optimum(
    models: Sequence[Quadratic],
    preferences: ArrayLike | None,
    low: ArrayLike,
    high: ArrayLike,
    seed: int,
    floors: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Return the best point `(d,)` of the box [low, high], its predicted values `(m,)` and their deviations `(m,)`.

    The best is the largest sum of objectives weighted with `preferences` `(m,)`, or, where they are None, the largest
    smallest objective. For both, objectives are scaled to [0, 1] over the front: from the worst to the best value
    that they have at the optima of the single objectives (the payoff table). Values stay at or above `floors` `(m,)`
    (-inf: none) as far as they are predicted to; where nothing is, the point misses them least.

    Raises:
        ValueError: no model, a box that is none, or preferences that do not fit, are negative or all zero.
    """
    box = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    m = len(models)
    if m == 0 or box[0].ndim != 1 or box[0].shape != box[1].shape or not (box[0] <= box[1]).all():
        raise ValueError(f"optimum: {m} models and the box {box[0]} to {box[1]}")
    limits = np.full(m, -np.inf) if floors is None else np.asarray(floors, dtype=np.float64)
    weights = None if preferences is None else np.asarray(preferences, dtype=np.float64)
    if limits.shape != (m,) or (weights is not None and weights.shape != (m,)):
        raise ValueError(f"optimum: {m} models but floors {limits.shape} and preferences {weights}")
    if weights is not None and not ((weights >= 0).all() and 0 < weights.sum() < np.inf):
        raise ValueError(f"optimum: preferences must be numbers >= 0, not all zero; got {weights}")
    pool = box[0] + (box[1] - box[0]) * np.random.default_rng([seed]).random((POOL, len(box[0])))
    task = _Task(models, limits, *box, pool)
    if m > 1:
        corners = np.array([task.best(row, CLIMBS - 2) for row in np.eye(m)])
        table = task.values(corners)
        task.worst = table.min(axis=0)
        spread = table.max(axis=0) - task.worst
        task.spread = np.where(spread > TINY * np.abs(table).max(), spread, 1.0)
        task.pool = np.vstack([corners, pool])
    else:
        weights = np.ones(1)
    x = task.best(weights, CLIMBS)
    predicted = [model.predict(x) for model in models]
    return x, np.array([mean[0] for mean, _ in predicted]), np.array([sd[0] for _, sd in predicted])


class _Task:
    """The surrogates, the scale of their values, and the constraints of one question."""

    def __init__(self, models: Sequence[Quadratic], floors: Array, low: Array, high: Array, pool: Array) -> None:
        self.models, self.floors, self.low, self.high, self.pool = models, floors, low, high, pool
        values = self.values(pool)
        self.worst: Array = values.min(axis=0)
        spread = np.ptp(values, axis=0)
        self.spread: Array = np.where(spread > TINY * np.abs(values).max(), spread, 1.0)

    def values(self, x: Array) -> Array:
        table: Array = np.column_stack([model.mean(x) for model in self.models])
        return table

    def scaled(self, x: Array) -> Array:
        return np.asarray((self.values(x) - self.worst) / self.spread)

    def slopes(self, x: Array) -> Array:
        """The gradients `(m, d)` of the scaled values at one point."""
        return np.array([model.gradient(x) for model in self.models]) / self.spread[:, None]

    def best(self, weights: Array | None, climbs: int) -> Array:
        """The best point for the weights, or for the weakest objective."""
        if self.missing(self.pool).min() > CLOSE:
            # Sequential quadratic programming wanders where no point keeps the constraints: ask that first.
            nearest = self._least_missing()
            if self.missing(nearest[None])[0] > CLOSE:
                return nearest
            self.pool = np.vstack([nearest, self.pool])
        order = self._order(self.pool, weights)
        ends = [self._climb(self.pool[i], weights) for i in order[:climbs]]
        found = np.vstack([*ends, self.pool[order[:1]]])
        best: Array = found[self._order(found, weights)[0]]
        return best

    def _order(self, x: Array, weights: Array | None) -> NDArray[np.intp]:
        """Rows of `x`, best first: by how much they miss the floors, then by the utility."""
        scaled = self.scaled(x)
        utility = scaled.min(axis=1) if weights is None else scaled @ (weights / weights.sum())
        missing = self.missing(x)
        return np.lexsort((-utility, np.where(missing < CLOSE, 0.0, missing)))

    def missing(self, x: Array) -> Array:
        """By how much the scaled values miss the floors, summed `(n,)`."""
        return np.asarray(self._short(x).sum(axis=1))

    def _short(self, x: Array) -> Array:
        bound = (self.floors - self.worst) / self.spread
        return np.where(np.isfinite(bound), np.maximum(bound - self.scaled(x), 0.0), 0.0)

    def _least_missing(self) -> Array:
        """The point that misses the floors least, in squares."""

        def loss(v: Array) -> tuple[float, Array]:
            short = self._short(v[None])[0]
            return float(short @ short), -2.0 * short @ self.slopes(v)

        solver: Any = minimize
        starts = self.pool[np.argsort(self.missing(self.pool), kind="stable")[:CLIMBS]]
        bounds = list(zip(self.low, self.high, strict=True))
        ends = [solver(loss, start, jac=True, bounds=bounds, method="L-BFGS-B").x for start in starts]
        found = np.clip(np.vstack([*ends, starts]), self.low, self.high)
        nearest: Array = found[np.argmin(self.missing(found))]
        return nearest

    def _climb(self, start: Array, weights: Array | None) -> Array:
        """A local optimum; the weakest objective is one more variable t, with every scaled value >= t."""
        dim, m = len(start), len(self.models)
        bounds: list[tuple[float | None, float | None]] = list(zip(self.low, self.high, strict=True))
        limited = np.flatnonzero(np.isfinite(self.floors))
        bound = ((self.floors - self.worst) / self.spread)[limited]
        constraints: list[Any] = []
        if len(limited):
            constraints.append(
                {
                    "type": "ineq",
                    "fun": lambda v: self.scaled(v[None, :dim])[0][limited] - bound,
                    "jac": lambda v: np.pad(self.slopes(v[:dim])[limited], ((0, 0), (0, len(v) - dim))),
                }
            )
        if weights is not None:
            share = weights / weights.sum()

            def loss(v: Array) -> tuple[float, Array]:
                return -float(self.scaled(v[None])[0] @ share), -share @ self.slopes(v)

        else:
            down = np.append(np.zeros(dim), -1.0)

            def loss(v: Array) -> tuple[float, Array]:
                return -float(v[dim]), down

            constraints.append(
                {
                    "type": "ineq",
                    "fun": lambda v: self.scaled(v[None, :dim])[0] - v[dim],
                    "jac": lambda v: np.column_stack([self.slopes(v[:dim]), -np.ones(m)]),
                }
            )
            bounds.append((None, None))
            start = np.append(start, self.scaled(start[None]).min())
        solver: Any = minimize  # its stubs know no such pair of loss and gradient
        settings = {"method": "SLSQP", "options": {"maxiter": STEPS}}
        end = solver(loss, start, jac=True, bounds=bounds, constraints=constraints, **settings).x[:dim]
        return np.clip(end, self.low, self.high) if np.isfinite(end).all() else start[:dim]
