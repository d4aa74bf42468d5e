"""TPE on Optuna's sampler: density ratios of good and bad points, one or more objectives.

Bergstra et al. 2011; several objectives as in Ozaki et al. 2022. It models all dimensions together
(multivariate), sees the newest `window` results, and treats pending points as bad ones (constant liar). Results that
miss a floor count as bad while there are good ones (Optuna's constrained TPE). An ask takes about 2 microseconds
per coordinate of the window and of the pending points, so the default window shrinks with the dimension:
500 results up to 24 dimensions, 12,000 / d above. A long search of a large space forgets its oldest results.
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge import registry
from evomerge.optimizers._core import Array, Goal, Result, check_number, rng_for
from evomerge.optimizers._optuna import Rows, asked, cube, finished, point, quiet, running, seed_for, study

WINDOW = 500
COORDINATES = 12_000  # of the default window: what an ask has time for


class Tpe:
    """Tree-structured Parzen estimator over a window of the newest results."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        window: int | None = None,
        startup: int = 10,
    ) -> None:
        """See `make`; the first `startup` results are answered at random."""
        check_number("startup", startup, 1, whole=True)
        if window is None:
            window = max(2 * startup, min(WINDOW, COORDINATES // dim))
        check_number("window", window, max(10, startup), whole=True)
        self._dim, self._n_goals, self._seed = dim, len(goals), seed
        self._startup = startup
        self._rows = Rows(dim, self._n_goals, window)

    def tell(self, result: Result) -> None:
        """Keep the result; the oldest leaves the window."""
        self._rows.tell(result)

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the best of the sampler's proposals given the window and the pending points."""
        if len(self._rows) < self._startup:
            return rng_for(self._seed, number).random(self._dim)
        from optuna.samplers import TPESampler

        with quiet():
            sampler = TPESampler(seed=seed_for(self._seed, number), multivariate=True, n_startup_trials=1)
            trials = finished(self._rows, self._rows.floors) + running(pending)
            params = sampler.sample_relative(study(trials, self._n_goals), asked(self._dim), cube(self._dim))
        return point(params, self._dim)


registry.register("optimizers", "tpe", Tpe)
