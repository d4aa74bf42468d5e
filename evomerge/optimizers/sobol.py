"""Sobol search: one low-discrepancy sequence over the whole cube, scrambled by the seed.

Sobol 1967, scrambled as in Matousek 1998 (scipy). Candidate `number` is the point of that number, so known recipes
leave out the first points. More even than `random`, and as blind: it learns nothing and knows no floors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import qmc

from evomerge import registry
from evomerge.optimizers._core import Array, Goal, Result


class SobolSearch:
    """A scrambled Sobol sequence in the unit cube."""

    def __init__(self, dim: int, goals: Sequence[Goal], seed: int, start: Array) -> None:
        self._engine = qmc.Sobol(dim, scramble=True, rng=np.random.default_rng([seed]))

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the point of that number; `pending` does not matter."""
        self._engine.reset()
        if number > 0:
            self._engine.fast_forward(number)
        point: Array = self._engine.random(1)[0]
        return point

    def tell(self, result: Result) -> None:
        """Do nothing: the sequence is fixed."""


registry.register("optimizers", "sobol", SobolSearch)
