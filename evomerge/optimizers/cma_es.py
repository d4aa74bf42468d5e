"""CMA-ES for asynchronous, noisy, boxed searches, on pycma.

pycma (Hansen, arXiv 1604.00772) does the adaptation; the asynchrony is ours: a point is always drawn from the
current distribution, arrivals are buffered whatever generation they came from, and every lambda arrivals are told in
arrival order. With lambda >= workers / 2 that loses nothing against synchronous generations.

Rules:
- several objectives become one: the mean of the values divided by their spread so far, or the weighted sum of the
  values as they are where `weights` are given;
- the start: results that this search did not propose (known recipes, an earlier stage) make no generation. The best of
  them becomes the centre of the first one, if there is any; else `start`. A result is recognised as proposed
  if its own number draws it (within 0.02, since recipes are rounded) from one of those centres;
- box [0, 1]: a sample outside is drawn again, up to 64 times, then clipped; never folded, which would mirror the
  landscape;
- failed results are dropped: nobody knows how bad they are;
- once converged, it restarts with twice the lambda at a random place (IPOP: Auger and Hansen 2005): it never stops.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.optimizers._core import Array, Goal, Result, check_number, rng_for, usable

TRIES = 64
RECOGNISED = 0.02  # natural values are rounded to 4 decimals before they come back
CONVERGED = 1e-3  # largest standard deviation, in unit coordinates, at which a run has nothing left to find
MAX_CONDITION = 1e12


class CmaEs:
    """Asynchronous CMA-ES on one scalarised objective."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        sigma0: float = 0.2,
        workers: int = 1,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """See `make`; `workers` is the number of parallel evaluations, `weights` maps goals to numbers."""
        check_number("sigma0", sigma0, 0, 1, above=True)
        check_number("workers", workers, 1, whole=True)
        self._dim, self._n_goals, self._seed, self._sigma0 = dim, len(goals), seed, float(sigma0)
        self._weights = _goal_weights(goals, weights)
        self._lambda = max(4 + math.floor(3 * math.log(dim)), math.ceil(workers / 2))
        self._restarts = 0
        self._es: Any = None  # None until the first generation is complete
        self._mean, self._root = start.copy(), self._sigma0 * np.eye(dim)
        self._centres = [start.copy()]
        self._best: tuple[Array, Array] | None = None  # point and values of the best foreign result
        self._low, self._high = np.full(self._n_goals, np.inf), np.full(self._n_goals, -np.inf)
        self._buffer: list[tuple[Array, Array]] = []

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a point drawn from the current distribution; `pending` does not matter."""
        return self._draw(number, self._mean)

    def tell(self, result: Result) -> None:
        """Buffer the result; every lambda results update the distribution."""
        told = usable(result, self._dim, self._n_goals)
        if told is None:
            return
        x, values, _ = told
        self._low, self._high = np.minimum(self._low, values), np.maximum(self._high, values)
        if self._es is None and self._restarts == 0 and self._is_foreign(result.number, x):
            if self._best is None or self._score(values) > self._score(self._best[1]):
                self._best = (x, values)
                self._mean = x
                self._centres.append(x)
            return
        self._buffer.append((x, values))
        if len(self._buffer) >= self._lambda:
            self._update()

    def _draw(self, number: int, mean: Array) -> Array:
        z = rng_for(self._seed, number).standard_normal((TRIES, self._dim))
        points = mean + z @ self._root.T
        inside = ((points >= 0) & (points <= 1)).all(axis=1)
        point: Array = np.clip(points[int(np.argmax(inside))], 0.0, 1.0)
        return point

    def _is_foreign(self, number: int, x: Array) -> bool:
        return not any(np.abs(x - self._draw(number, centre)).max() < RECOGNISED for centre in self._centres)

    def _score(self, values: Array) -> float:
        if self._weights is not None:
            return float(self._weights @ values)
        spread = self._high - self._low
        return float((values / np.where(spread > 0, spread, 1.0)).mean())

    def _update(self) -> None:
        """Tell lambda results to pycma and take over its distribution."""
        if self._es is None:
            self._es = _strategy(self._mean, self._sigma0, self._lambda, self._seed)
        # pycma wants an ask before each tell; its own sample goes unused. It clips the steps of points that it did not
        # sample to a plausible length, which matters for foreign ones only.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._es.ask()
            self._es.tell([x.copy() for x, _ in self._buffer], [-self._score(v) for _, v in self._buffer])
        self._buffer = []
        es = self._es
        root = es.sigma * (es.B * es.D) * np.reshape(es.sigma_vec.scaling, (-1, 1))
        deviations = np.linalg.norm(root, axis=1)
        healthy = np.isfinite(root).all() and es.D.max() ** 2 < MAX_CONDITION * es.D.min() ** 2
        if not healthy or deviations.max() < CONVERGED:
            self._restart()
            return
        # A step size beyond the box says only that the landscape is flat.
        root = root / max(1.0, float(deviations.max()))
        self._mean, self._root = np.clip(es.mean, 0.0, 1.0), root

    def _restart(self) -> None:
        self._restarts += 1
        self._lambda *= 2
        self._es = None
        self._mean = np.random.default_rng([self._seed, self._restarts, 1]).random(self._dim)
        self._root = self._sigma0 * np.eye(self._dim)


def _goal_weights(goals: Sequence[Goal], weights: Mapping[str, float] | None) -> Array | None:
    if weights is None:
        return None
    known = [goal.name for goal in goals]
    if not isinstance(weights, Mapping):
        problem = Problem(f"weights is {weights!r}", "optimizer.weights", "a mapping: objective to number")
        raise ConfigError.of([problem])
    for name, weight in weights.items():
        check_number(f"weights.{name}", weight, 0)
    problems = [
        Problem(f"there is no objective {name!r}", "optimizer.weights", f"known: {', '.join(known)}")
        for name in weights
        if name not in known
    ]
    array = np.array([float(weights.get(name, 0.0)) for name in known])
    if not problems and not 0 < array.sum() < np.inf:
        problems = [Problem("the weights are all zero or infinite", "optimizer.weights")]
    if problems:
        raise ConfigError.of(problems, "optimizer.weights")
    return array


def _strategy(mean: Array, sigma: float, popsize: int, seed: int) -> Any:
    """Return a silent pycma strategy that touches no global generator and no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains about a missing matplotlib
        import cma

        rng = np.random.default_rng([seed, 1])
        return cma.CMAEvolutionStrategy(
            mean.copy(),
            sigma,
            {
                "popsize": popsize,
                "randn": lambda *shape: rng.standard_normal(shape),
                "seed": np.nan,
                "verbose": -9,
                "verb_log": 0,
                "signals_filename": "",
            },
        )


registry.register("optimizers", "cma_es", CmaEs)
