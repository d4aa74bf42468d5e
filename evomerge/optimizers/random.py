"""Random search: independent uniform points. The baseline that every other optimizer has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge import registry
from evomerge.optimizers._core import Array, Goal, Result, rng_for


class RandomSearch:
    """Uniform points in the unit cube; learns nothing."""

    def __init__(self, dim: int, goals: Sequence[Goal], seed: int, start: Array) -> None:
        self._dim = dim
        self._seed = seed

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a uniform point; `pending` does not matter."""
        return rng_for(self._seed, number).random(self._dim)

    def tell(self, result: Result) -> None:
        """Do nothing: random search has no state."""


registry.register("optimizers", "random", RandomSearch)
