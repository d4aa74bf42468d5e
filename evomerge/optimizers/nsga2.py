"""NSGA-II on Optuna's sampler: a population search for two or more objectives.

Deb et al. 2002 with simulated binary crossover and polynomial mutation. Generations are counted in arrivals: every
`population` results, in the order told, are one generation, known recipes included, so parallel workers never
wait. It keeps the parents and the current generation, which is this optimizer's window. Candidates that miss a
floor are dominated by all that do not, and rank by how much they miss (Deb's constrained domination).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge import registry
from evomerge.optimizers._core import Array, Goal, check_number
from evomerge.optimizers._optuna import Generations

if TYPE_CHECKING:
    from optuna.samplers import NSGAIISampler


class Nsga2(Generations):
    """NSGA-II; with one objective a plain genetic algorithm."""

    def __init__(self, dim: int, goals: Sequence[Goal], seed: int, start: Array, *, population: int = 24) -> None:
        """See `make`; `population` is the size of a generation."""
        check_number("population", population, 4, whole=True)
        super().__init__(dim, goals, seed, population)

    def sampler(self, seed: int) -> NSGAIISampler:
        """Return Optuna's sampler with simulated binary crossover and polynomial mutation."""
        from optuna.samplers import NSGAIISampler
        from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover

        return NSGAIISampler(
            population_size=self._population, crossover=SBXCrossover(), mutation=PolynomialMutation(), seed=seed
        )


registry.register("optimizers", "nsga2", Nsga2)
