"""Bayesian optimisation on Optuna's GPSampler: the most careful proposals for the fewest evaluations, at seconds each.

One Gaussian process (Matern 5/2, a length scale per coordinate) for each objective and each floor; proposals maximise
the log expected improvement (Ament et al. 2023), with several objectives that of the hypervolume, and expect that the
pending points are evaluated. All of that grows quickly, so the Gaussian processes only answer while

- there are at most 30 dimensions and 300 results,
- objectives and floors are at most 3 together,
- at most 40 results are non-dominated (noise makes fronts long), and
- at least `startup` results are in, which begin with the design of `map`.

Otherwise, and where they would repeat an experiment, the quadratic surrogate of `map` answers, which is told the same
results; from 301 results on it does for ever. It recommends, too. An ask measured on one core: 0.2 to 1 s with one
objective, 0.7 to 3 s with two, 1.5 to 6 s with three; the front's length matters most (64 points: 10 s).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge import registry
from evomerge.front import non_dominated
from evomerge.optimizers._core import Array, Facts, Goal, Recommendation, Recommends, Result, check_number, make
from evomerge.optimizers._optuna import Rows, asked, cube, finished, point, quiet, running, seed_for, study

MOST_DIMENSIONS = 30
MOST_RESULTS = 300
MOST_PROCESSES = 3
MOST_FRONT = 40
SAME = 0.005  # two points closer than this in every coordinate are the same experiment


class GaussianProcess:
    """Expected improvement on Gaussian processes while they are affordable, then the quadratic surrogate."""

    def __init__(
        self, dim: int, goals: Sequence[Goal], seed: int, start: Array, *, facts: Facts, startup: int = 10
    ) -> None:
        """See `make`; before `startup` results, the surrogate's design answers."""
        check_number("startup", startup, 2, whole=True)
        self._dim, self._n_goals, self._seed, self._startup = dim, len(goals), seed, startup
        self._map = make("map", dim, goals, seed, start, facts=facts)
        self._rows = Rows(dim, self._n_goals, MOST_RESULTS + 1)

    def tell(self, result: Result) -> None:
        """Keep the result, here and in the surrogate."""
        self._map.tell(result)
        self._rows.tell(result)

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the point of the largest expected improvement, or the surrogate's proposal."""
        proposal = self._propose(number, pending) if self._affordable() else None
        if proposal is None:
            proposal = self._map.ask(number, pending)
        return proposal

    def _propose(self, number: int, pending: Sequence[Array]) -> Array | None:
        """Return the Gaussian processes' proposal, or None if it repeats an experiment."""
        from optuna.samplers import GPSampler

        with quiet():
            sampler = GPSampler(seed=seed_for(self._seed, number), n_startup_trials=1)
            trials = finished(self._rows, self._rows.floors) + running(pending)
            params = sampler.sample_relative(study(trials, self._n_goals), asked(self._dim), cube(self._dim))
        proposal = np.clip(point(params, self._dim), 0.0, 1.0)
        known = np.array([*(row.x for row in self._rows), *pending])
        return None if bool((np.abs(known - proposal).max(axis=1) < SAME).any()) else proposal

    def recommend(self) -> Sequence[Recommendation]:
        """Return what the surrogate recommends."""
        return self._map.recommend() if isinstance(self._map, Recommends) else ()

    def _affordable(self) -> bool:
        floors = self._rows.floors
        processes = self._n_goals + (0 if floors is None else int(np.isfinite(floors).sum()))
        if self._dim > MOST_DIMENSIONS or processes > MOST_PROCESSES:
            return False
        if not self._startup <= len(self._rows) <= MOST_RESULTS:
            return False
        values = np.array([row.values for row in self._rows])
        return int(non_dominated(values).sum()) <= MOST_FRONT


registry.register("optimizers", "gp", GaussianProcess)
