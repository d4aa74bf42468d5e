"""TPE on Optuna's sampler: density ratios of good and bad points, one or more objectives.

Bergstra et al. 2011; several objectives as in Ozaki et al. 2022. It models all dimensions together
(multivariate), sees the newest `window` results, and treats pending points as bad ones (constant liar).
The window bounds the time of an ask: 0.2 s with 500 results in 12 dimensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge import registry
from evomerge.optimizers._core import Array, Goal, Result, check_number, usable
from evomerge.optimizers._optuna import distributions, new_study, point, quiet, seed_for, trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class Tpe:
    """Tree-structured Parzen estimator over a window of the newest results."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        window: int = 500,
        startup: int = 10,
    ) -> None:
        """See `make`; the first `startup` results are answered at random."""
        check_number("window", window, 10, whole=True)
        check_number("startup", startup, 1, whole=True)
        self._dim, self._n_goals, self._seed = dim, len(goals), seed
        self._startup = startup
        self._trials: deque[FrozenTrial] = deque(maxlen=window)

    def tell(self, result: Result) -> None:
        """Keep the result; the oldest leaves the window."""
        told = usable(result, self._dim, self._n_goals)
        if told is not None:
            self._trials.append(trial(told[0], told[1]))

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the best of the sampler's proposals given the window and the pending points."""
        from optuna.samplers import TPESampler

        with quiet():
            study = new_study(self._n_goals)
            study.sampler = TPESampler(
                seed=seed_for(self._seed, number),
                multivariate=True,
                n_startup_trials=self._startup,
            )
            study.add_trials([*self._trials, *(trial(x, None) for x in pending)])
            asked = study.ask(distributions(self._dim))
        return point(asked.params, self._dim)


registry.register("optimizers", "tpe", Tpe)
