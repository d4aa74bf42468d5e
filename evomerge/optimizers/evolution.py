"""Evolution of edits: a small archive of points whose parts are added, removed, moved and united; any objectives.

For spaces in which most points are useless and few changes of a neutral point are not: layer orders, where one random
edit of the identity path is within 3 points of it 80 % of the time, and a random string of layers never. The units are
`Facts.parts` (an edit of a layer path; a position of it); see `_parts.py` for what filled, slots and positions are. In
a space without parts each coordinate is one, and `start` is neutral: that works, though other optimizers do better.

Rules:
- the archive holds the `population` best results: by how much they miss floors, then by non-dominated rank, then by
  crowding (NSGA-II: Deb et al. 2002). One child at a time, (mu + 1): it enters if it is not the worst;
- the first candidates are the neutral point and `start`, then single edits of those: one part filled at random, in
  members of the archive with at most one filled part, until `population` results are known;
- then parents win binary tournaments. A share `crossover` of the children unites two parents: what both hold
  stays, what one of them holds is kept, all of it or each by the toss of a coin. All others are mutants of one;
- a mutant has 1 + Poisson(`more`) changes: an empty part is filled, a filled one emptied, or one coordinate of a
  filled part moves (a category is redrawn, a whole number goes by one or two cells, a number by a normal step);
- nothing known or in flight is proposed again, up to 64 tries; what empty parts hold does not make a point new, nor
  what the space says that a point does not mean. When all points of a finite space are known, the search is over.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge import registry
from evomerge.front import non_dominated
from evomerge.optimizers._core import (
    Array,
    Exhausted,
    Facts,
    Goal,
    Result,
    check_number,
    rng_for,
    usable,
    violation,
)
from evomerge.optimizers._parts import Parts

TRIES = 64
FEW, MANY = 8, 24  # members of the archive with one objective, and with several
FILL, CLEAR = 0.4, 0.15  # shares of a mutant's changes; the rest moves a coordinate
LISTED = 4096  # points of a finite space up to which the last unknown ones are looked for one by one


@dataclass(frozen=True, eq=False)
class _Member:
    """A result in the archive: point `(d,)`, what it means, values `(m,)` and by how much these miss their floors."""

    number: int
    x: Array
    key: bytes
    values: Array
    missing: float


class Evolution:
    """(mu + 1) evolution of the parts of a point; any number of objectives."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        population: int | None = None,
        crossover: float = 0.3,
        more: float = 1.0,
        facts: Facts | None = None,
    ) -> None:
        """See `make`; `population` is the size of the archive, `more` the mean number of changes beyond the first.

        None stands for a population of 8 with one objective and of 24 with several, which have a front to hold.
        """
        population = (FEW if len(goals) == 1 else MANY) if population is None else population
        check_number("population", population, 2, whole=True)
        check_number("crossover", crossover, 0, 1)
        check_number("more", more, 0, 20)
        self._dim, self._n_goals, self._seed = dim, len(goals), seed
        self._population, self._crossover, self._more = population, crossover, more
        self._parts = Parts.of(facts or Facts.plain(dim), start)
        self._first = (self._parts.neutral, start.copy())
        self._archive: list[_Member] = []  # best first
        self._results = 0
        self._known: set[Hashable] = set()

    def tell(self, result: Result) -> None:
        """Take the result into the archive; the worst leaves."""
        if result.x is not None and np.shape(result.x) == (self._dim,) and np.isfinite(result.x).all():
            self._known |= self._parts.names(np.clip(result.x, 0.0, 1.0))  # failed ones too: they would fail again
        told = usable(result, self._dim, self._n_goals)
        if told is None:
            return
        x, values, _ = told
        new = _Member(result.number, x, self._parts.key(x), values, violation(values, result.floors))
        self._results += 1
        rest = [m for m in self._archive if m.number != new.number and m.key != new.key]
        self._archive = _ranked([*rest, new])[: self._population]

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a first point or a child that is neither known nor pending.

        Raises:
            Exhausted: the space is finite and all of its points are known.
        """
        known = self._known.union(*(self._parts.names(x) for x in pending))
        count = self._parts.count
        if self._parts.meaning is None and count is not None and len(known) >= count:
            raise Exhausted(f"all {count} points of the space have been tried")
        for x in self._first:
            if known.isdisjoint(self._parts.names(x)):
                return x.copy()
        rng = rng_for(self._seed, number)
        for _ in range(TRIES):
            child = self._child(rng)
            if known.isdisjoint(self._parts.names(child)):
                return child
        if count is not None and count <= LISTED:
            unknown = [x for x in self._parts.points() if known.isdisjoint(self._parts.names(x))]
            if not unknown:
                raise Exhausted("all that the points of the space mean has been tried")
            return unknown[rng.integers(len(unknown))]
        return child

    def _child(self, rng: np.random.Generator) -> Array:
        simple = [i for i, m in enumerate(self._archive) if self._parts.filled(m.x).sum() <= 1]
        if self._results < self._population or not self._archive:
            child = self._archive[_winner(simple, rng)].x.copy() if simple else self._parts.neutral.copy()
            if not self._parts.fill(child, rng):
                self._change(child, rng)
            return child
        everyone = range(len(self._archive))
        first = self._archive[_winner(everyone, rng)]
        if len(self._archive) > 1 and rng.random() < self._crossover:
            second = self._archive[_winner([i for i in everyone if self._archive[i] is not first], rng)]
            child = self._parts.unite(first.x, second.x, rng)
            if self._parts.key(child) not in (first.key, second.key):
                return child
        child = first.x.copy()
        for _ in range(1 + int(rng.poisson(self._more))):
            self._change(child, rng)
        return child

    def _change(self, x: Array, rng: np.random.Generator) -> None:
        """Change one part, in place, in a random way that the point allows."""
        draw = rng.random()
        ways = [self._parts.move, self._parts.fill, self._parts.clear]
        if draw < FILL:
            ways = [self._parts.fill, self._parts.move, self._parts.clear]
        elif draw < FILL + CLEAR:
            ways = [self._parts.clear, self._parts.fill, self._parts.move]
        any(way(x, rng) for way in ways)


def _winner(among: Sequence[int], rng: np.random.Generator) -> int:
    """Return the better of two places in the ranked archive; the lower, the better."""
    return int(min(among[i] for i in rng.integers(len(among), size=2)))


def _ranked(members: Sequence[_Member]) -> list[_Member]:
    """Return the members, best first: by violation, by non-dominated rank, by crowding, the latest result first."""
    values, missing = np.array([m.values for m in members]), np.array([m.missing for m in members])
    rank, crowding = np.zeros(len(members), dtype=np.intp), np.zeros(len(members))
    left, level = np.flatnonzero(missing == 0), 0
    while len(left):
        front = left[non_dominated(values[left])]
        rank[front], crowding[front] = level, _crowding(values[front])
        left, level = np.setdiff1d(left, front), level + 1
    order = sorted(range(len(members)), key=lambda i: (missing[i], rank[i], -crowding[i], -members[i].number))
    return [members[i] for i in order]


def _crowding(values: Array) -> Array:
    """Return how far each of a front's values `(n, m)` is from its neighbours; infinite at the ends."""
    n, m = values.shape
    distance = np.zeros(n)
    if m == 1:
        return distance  # equal values: nobody is at an end
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        gaps = np.full(n, np.inf)
        if n > 2 and span > 0:
            gaps[1:-1] = (column[order[2:]] - column[order[:-2]]) / span
        distance[order] += gaps
    return distance


registry.register("optimizers", "evolution", Evolution)
