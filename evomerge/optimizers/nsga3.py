"""NSGA-III on Optuna's sampler: a population search for three or more objectives.

Deb and Jain 2014: NSGA-II (`nsga2`, whose generations by arrivals and floors are the same here), but parents on the
last front that fits are chosen by their distance to reference directions. The directions are the points of Das and
Dennis, all m-tuples of multiples of 1/p with sum 1, C(m + p - 1, p) of them: p is the largest that gives no more than
`population`, so that each direction can have a candidate. The population is 24 by default, or as many as p = 2
needs: 28 for 7 objectives, 36 for 8. With one objective there is one direction and nothing to spread: that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.optimizers._core import Array, Goal, check_number
from evomerge.optimizers._optuna import Generations

if TYPE_CHECKING:
    from optuna.samplers import NSGAIIISampler

SMALLEST = 24


class Nsga3(Generations):
    """NSGA-III for two or more objectives."""

    def __init__(
        self, dim: int, goals: Sequence[Goal], seed: int, start: Array, *, population: int | None = None
    ) -> None:
        """See `make`; `population` is the size of a generation, at least 4 and at least the number of objectives.

        Raises:
            ConfigError: one objective, or a population that is too small.
        """
        m = len(goals)
        if m < 2:
            problem = Problem(
                f"nsga3 spreads candidates over several objectives, and there is one: {goals[0].name}",
                where="optimizer",
                hint="use cma_es, map or nsga2, or add an objective",
            )
            raise ConfigError.of([problem], "the optimizer")
        if population is None:
            population = max(SMALLEST, directions(m, 2))
        check_number("population", population, max(4, m), whole=True)
        super().__init__(dim, goals, seed, population)
        self._divisions = divisions(m, population)

    def sampler(self, seed: int) -> NSGAIIISampler:
        """Return Optuna's sampler with simulated binary crossover and polynomial mutation."""
        from optuna.samplers import NSGAIIISampler
        from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover

        return NSGAIIISampler(
            population_size=self._population,
            crossover=SBXCrossover(),
            mutation=PolynomialMutation(),
            dividing_parameter=self._divisions,
            seed=seed,
        )


def directions(n_goals: int, parts: int) -> int:
    """Return the number of reference directions for `n_goals` objectives with `parts` divisions of each axis."""
    return math.comb(n_goals + parts - 1, parts)


def divisions(n_goals: int, population: int) -> int:
    """Return the most divisions that give no more directions than `population`; at least 1."""
    parts = 1
    while directions(n_goals, parts + 1) <= population:
        parts += 1
    return parts


registry.register("optimizers", "nsga3", Nsga3)
