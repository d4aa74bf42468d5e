"""NSGA-II on Optuna's sampler: a population search for two or more objectives.

Deb et al. 2002 with simulated binary crossover and polynomial mutation. Generations are counted in arrivals: every
`population` results, in the order told, are one generation, known recipes included, so parallel workers never
wait. Of the history it uses the elite of the last complete generation, which is this optimizer's window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.optimizers._core import Array, Goal, Result, check_number, usable
from evomerge.optimizers._optuna import (
    distributions,
    fresh,
    gene,
    new_study,
    point,
    quiet,
    seed_for,
    trial,
)

if TYPE_CHECKING:
    from optuna.samplers import NSGAIISampler


class Nsga2:
    """NSGA-II; with one objective a plain genetic algorithm."""

    def __init__(self, dim: int, goals: Sequence[Goal], seed: int, start: Array, *, population: int = 24) -> None:
        """See `make`; `population` is the size of a generation."""
        check_number("population", population, 4, whole=True)
        self._dim, self._n_goals, self._seed = dim, len(goals), seed
        self._population = population
        self._told = 0
        with quiet():
            self._study = new_study(self._n_goals)
            self._key = self._sampler(0)._get_generation_key()

    def tell(self, result: Result) -> None:
        """Add the result to the current generation; a complete one selects its parents."""
        told = usable(result, self._dim, self._n_goals)
        if told is None:
            return
        x, values, _ = told
        with quiet():
            self._study.add_trial(trial(x, values, **{self._key: self._told // self._population}))
            self._told += 1
            if self._told % self._population == 0:
                # Optuna caches the elite in the study. Doing it now keeps every change of state in tell.
                generation = self._told // self._population
                self._sampler(0).get_parent_population(fresh(self._study), generation)

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a child of two parents, or a random point in the first generation."""
        with quiet():
            sampler = self._sampler(seed_for(self._seed, number))
            study, space = fresh(self._study), distributions(self._dim)
            # A trial that is not in the study: sampling then leaves no trace there.
            child = trial(np.empty(0), None, **{self._key: self._told // self._population})
            params = sampler.sample_relative(study, child, space)
            for i in range(self._dim):
                if gene(i) not in params:
                    params[gene(i)] = sampler.sample_independent(study, child, gene(i), space[gene(i)])
        return point(params, self._dim)

    def _sampler(self, seed: int) -> NSGAIISampler:
        from optuna.samplers import NSGAIISampler
        from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover

        return NSGAIISampler(
            population_size=self._population,
            crossover=SBXCrossover(),
            mutation=PolynomialMutation(),
            seed=seed,
        )


registry.register("optimizers", "nsga2", Nsga2)
