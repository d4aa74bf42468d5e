"""CatCMA with margin: for spaces in which categories, whole numbers and numbers are searched at once.

The asynchrony, several objectives, constraints and known recipes are those of `cma_es`, whose rules hold here too; the
distribution is another one (`_catcma.py`; Hamano et al., arXiv 2504.07884): each category has a probability, whole
numbers keep a margin, and both move with the numbers. Differences:
- the first samples change about `changes` of the start's categories, however many there are, and numbers by `sigma0`:
  where most strings of categories are useless, the even distribution that is usual sees nothing to learn from;
- an own result is told with the exact sample that it came from, which is drawn once more from (seed, number, one of the
  last few distributions); whole numbers of others' results count as the middle of their cell;
- any number of foreign results sets the start to the best of them (no covariance);
- a converged run restarts at the start, not at a random place, with twice the lambda;
- what is known or in flight is drawn again, up to 16 times; what empty parts hold (`_parts.py`) makes no point new;
- a generation in which all cost the same moves nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge import registry
from evomerge.optimizers._catcma import Layout, Mixed, MixedRun, around
from evomerge.optimizers._cma import Distribution, Runs
from evomerge.optimizers._core import Array, Exhausted, Facts, Goal, Recommendation, Result, check_number
from evomerge.optimizers._parts import Parts
from evomerge.optimizers.cma_es import CmaEs, Direction, Drawn

ATTEMPTS = 16  # to draw a point that is not known


class CatCma(CmaEs):
    """Asynchronous CatCMA with margin on one or several scalarisations of the objectives."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        sigma0: float = 0.1,
        changes: float = 3.0,
        scalarise: str = "weighted",
        weights: Mapping[str, float] | None = None,
        directions: int = 1,
        facts: Facts | None = None,
    ) -> None:
        """See `make`; `changes` is how many categories a first sample changes on average, the rest as for `cma_es`."""
        check_number("changes", changes, 0, above=True)
        facts = facts or Facts.plain(dim)
        self._changes = changes
        self._layout = Layout.of(facts.cells, facts.categorical)
        self._parts = Parts.of(facts, start)
        self._seen: set[Hashable] = set()
        super().__init__(
            dim,
            goals,
            seed,
            start,
            sigma0=sigma0,
            scalarise=scalarise,
            weights=weights,
            directions=directions,
            facts=facts,
        )

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a point drawn from the current distribution of the number's direction.

        Raises:
            Exhausted: the space has one point, which is known.
        """
        if not len(self._layout.normal) and not len(self._layout.choices) and (self._numbers or pending):
            raise Exhausted("the space has a single point")
        known = self._seen.union(*(self._parts.names(x) for x in pending))
        z, distribution = self._noise(number), self._directions[self._index(number)].normal
        for attempt in range(ATTEMPTS):
            x = distribution.draw(z[attempt:])
            if known.isdisjoint(self._parts.names(x)):
                break
        return x

    def tell(self, result: Result) -> None:
        """Remember the point as known, and do with the result as `cma_es` does."""
        if result.x is not None and np.shape(result.x) == (self._dim,) and np.isfinite(result.x).all():
            self._seen |= self._parts.names(np.clip(result.x, 0.0, 1.0))
        super().tell(result)

    def recommend(self) -> Sequence[Recommendation]:
        """Return the mean of each direction that has completed a generation, with its most likely categories."""
        return [Recommendation(one.x, "most likely point of CatCMA") for one in super().recommend()]

    def _new_direction(
        self,
        weights: Array,
        tchebycheff: bool,
        start: Array,
        sigma0: float,
        popsize: int,
        seeds: list[int],
        facts: Facts,
    ) -> Direction:
        return _MixedDirection(
            weights, tchebycheff, start, sigma0, popsize, seeds, facts.cells, self._layout, self._changes
        )


class _MixedDirection(Direction):
    """One scalarisation and the mixed distribution that follows it."""

    _remembered = 6  # a covariance of 1,000 numbers takes 8 MB

    def __init__(
        self,
        weights: Array,
        tchebycheff: bool,
        start: Array,
        sigma0: float,
        popsize: int,
        seeds: list[int],
        cells: NDArray[np.intp],
        layout: Layout,
        changes: float,
    ) -> None:
        self._layout, self._changes, self._start = layout, changes, start
        super().__init__(weights, tchebycheff, start, sigma0, popsize, seeds, cells)

    def drawn(self, x: Array, z: Array) -> Drawn | None:
        """Return where a point comes from: whichever attempt it was, of whichever recent distribution."""
        for attempt in range(ATTEMPTS):
            found = super().drawn(x, z[attempt:])
            if found is not None:
                return found
        return None

    def _around(self, place: Array) -> Distribution:
        return around(place, self._sigma0, self._changes, self._layout)

    def _spread(self, best: Array) -> Distribution:
        return self._around(best[0])

    def _begin_run(self) -> Runs:
        assert isinstance(self.normal, Mixed)
        return MixedRun(self.normal, self._sigma0, self._popsize)

    def _place(self) -> Array:
        return self._start


registry.register("optimizers", "catcma", CatCma)
