"""The choice of the operator and of other categories, opened late: a race of quadratic-surrogate searches.

Every combination of categories has a `map` of its own over the numbers that are left, which starts from the points
that are best under the combination searched so far. In each round every survivor gets as many results, then the half
with the smaller hypervolume of posterior means leaves, until one is left (successive halving: Jamieson and Talwalkar
2016). Categories have no order, so no surrogate can run through them; numbers do, within each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from evomerge.optimizers._core import Array, Exhausted, Facts, Goal, Level, Result
from evomerge.optimizers._levels import Arm, facts_on, owners, settled, size
from evomerge.optimizers.map import MapSearch

MOST = 12  # combinations; with more, each category is changed alone
INCUMBENTS = 2  # points of the earlier stage that every combination tries first


class OperatorRace:
    """A race over the categories of a level.

    Attributes:
        arms: the survivors, best first after each round.
    """

    def __init__(
        self, level: Level, goals: Sequence[Goal], seed: int, start: Array, incumbents: Array, facts: Facts
    ) -> None:
        """`start` `(d,)` holds the categories so far, `incumbents` `(n, d)` the best points, of the whole cube."""
        self._quota = level.dim + 4
        self._round = 1
        self._most: list[float] = []  # points that a combination consists of
        self.arms: list[Arm] = []
        self._first: list[Array] = []
        self._seen: list[set[int]] = []
        for index, x in enumerate(_combinations(level, facts, start)):
            own = settled(level, facts.categorical, x)
            # The fraction of incumbents that this combination's level can express: all but the categories.
            tried = [own.embed(_nearest(own, point)) for point in incumbents[:INCUMBENTS]]
            inside = own.project(tried[0] if tried else x)
            middle = inside if inside is not None else np.full(own.dim, 0.5)
            search = MapSearch(own.dim, goals, seed + index, middle, design=own.dim + 2, facts=facts_on(facts, own))
            self.arms.append(Arm(own, search))
            self._first.append(np.array(tried).reshape(-1, len(start)))
            self._seen.append(set())
            self._most.append(size(facts_on(facts, own)))

    @property
    def settled(self) -> bool:
        """Whether one combination is left."""
        return len(self.arms) == 1

    def tell(self, result: Result) -> None:
        """Pass the result to the combination that it belongs to."""
        for arm, seen in zip(self.arms, self._seen, strict=True):
            if result.x is not None and arm.level.project(result.x) is None:
                continue
            arm.tell(result)
            if result.x is not None:
                seen.add(result.number)

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a point of the combination with the fewest results, those that are pending included.

        Raises:
            Exhausted: every point of every combination has been tried or is pending.
        """
        counts = []
        for arm, seen in zip(self.arms, self._seen, strict=True):
            counts.append(len(seen) + sum(arm.level.project(x) is not None for x in pending))
        for index in np.argsort(counts, kind="stable"):
            if counts[index] < len(self._first[index]):
                return np.array(self._first[index][counts[index]])
            try:
                return self.arms[int(index)].ask(number, pending)
            except Exhausted as error:
                ended = error
        raise ended

    def finish_round(self, scores: Sequence[float]) -> None:
        """Drop the worse half of the survivors; `scores` are theirs, larger is better."""
        order = np.argsort(-np.asarray(scores), kind="stable")[: (len(self.arms) + 1) // 2]
        self.arms = [self.arms[i] for i in order]
        self._first = [self._first[i] for i in order]
        self._seen = [self._seen[i] for i in order]
        self._most = [self._most[i] for i in order]
        self._round += 1

    @property
    def round_is_full(self) -> bool:
        """Whether every survivor has the results of this round, or of all its points if it has not so many."""
        wanted = self._quota * self._round
        return all(len(seen) >= min(wanted, most) for seen, most in zip(self._seen, self._most, strict=True))


def _combinations(level: Level, facts: Facts, start: Array) -> list[Array]:
    """Points `(d,)` with each combination of categories, the start's own first."""
    at = [int(i) for i in owners(level) if facts.categorical[i]]
    ranges = [range(int(facts.cells[i])) for i in at]
    mine = tuple(min(int(start[i] * facts.cells[i]), int(facts.cells[i]) - 1) for i in at)
    if np.prod([len(r) for r in ranges], dtype=np.float64) <= MOST:
        wanted = [mine, *(c for c in product(*ranges) if c != mine)]
    else:
        wanted = [mine]
        for k, cells in enumerate(ranges):
            wanted += [(*mine[:k], c, *mine[k + 1 :]) for c in cells if c != mine[k]]
    return [_with(level, facts, start, at, cells) for cells in wanted]


def _with(level: Level, facts: Facts, start: Array, at: Sequence[int], cells: Sequence[int]) -> Array:
    """The start with other categories, in all coordinates that the level ties to them."""
    z = _nearest(level, start)
    column = {int(i): k for k, i in enumerate(owners(level))}
    for i, cell in zip(at, cells, strict=True):
        z[column[i]] = (cell + 0.5) / facts.cells[i]
    return level.embed(z)


def _nearest(level: Level, x: Array) -> Array:
    """The level's point `(k,)` that is nearest to a point of the cube, in it or not."""
    z = level.project(x)
    near = z if z is not None else np.linalg.lstsq(level.matrix, x - level.origin, rcond=None)[0]
    return np.clip(np.array(near, dtype=np.float64), 0.0, 1.0)
