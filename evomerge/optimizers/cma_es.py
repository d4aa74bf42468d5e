"""CMA-ES for asynchronous, noisy, boxed searches, on one scalarised objective or along several directions at once.

The adaptation is pycma's (`_cma.py`); the asynchrony is ours: a point is always drawn from the current distribution,
arrivals are buffered whatever generation they came from, and every lambda arrivals are told in arrival order. With
lambda >= workers / 2 that loses nothing against synchronous generations.

Rules:
- several objectives become one (`scalarise`): the mean of the values divided by their spread so far, or the
  augmented Tchebycheff distance to the best value of each (Steuer and Choo 1983). Where `weights` are given they
  belong to the values as they are. With `directions` there are as many scalarisations with weights spread over the
  simplex, each with a distribution of its own; a candidate's number decides which one draws it;
- a result is a direction's own if its number draws it from a recent distribution of that direction (within 0.02, since
  recipes are rounded, or in the same cell). All others, those of the other directions too, are foreign to it;
- the start: foreign results (known recipes, an earlier stage) make no generation. From 5 d of them on, the best
  tenth set mean and covariance (WS-CMA-ES); fewer set the mean to the best of them; none leave `start`;
- later, the best foreign result since the last update joins the generation if it beats all own ones;
- a result below a floor costs more than every feasible one, the more the further it is;
- box [0, 1]: a sample outside is drawn again, up to 64 times, then clipped;
- coordinates of cells keep a margin: another cell stays possible. For categories the order of the cells means
  nothing, so there the margin alone makes the search;
- failed results are dropped: nobody knows how bad they are;
- once converged, a run restarts with twice the lambda at a random place (IPOP: Auger and Hansen 2005): it never stops.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.optimizers._cma import TRIES, Distribution, Normal, Run, Runs, isotropic, warm_start
from evomerge.optimizers._core import (
    Array,
    Facts,
    Goal,
    Recommendation,
    Result,
    check_number,
    rng_for,
    usable,
    violation,
)

RECOGNISED = 0.02  # natural values are rounded to 4 decimals before they come back
RECENT = 32  # distributions of a direction from which points may still be on their way
EARLY = 50  # results that tell how bad values are: later ones crowd together, for some goals more than for others
BROKEN = 5  # times the better three quarters' range: what lies further below counts as lying there
KNOWN = 1000  # newest results that may set a start
BEST_SHARE = 0.1
AUGMENTED = 0.05  # share of the weighted sum in the Tchebycheff distance, against points that are only weakly best
NOBODY = -1  # drew a foreign result
SCALARISATIONS = ("weighted", "tchebycheff")
MOST_DIRECTIONS = 16


@dataclass(frozen=True, eq=False)
class Told:
    """A result as a direction keeps it: point `(d,)`, values `(m,)` and by how much these miss their floors."""

    x: Array
    values: Array
    missing: float


@dataclass(frozen=True, eq=False)
class Scale:
    """The best value of each goal so far and the size of a difference that matters, both `(m,)`."""

    best: Array
    unit: Array


class CmaEs:
    """Asynchronous CMA-ES on one or several scalarisations of the objectives."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        sigma0: float = 0.2,
        scalarise: str = "weighted",
        weights: Mapping[str, float] | None = None,
        directions: int = 1,
        facts: Facts | None = None,
    ) -> None:
        """See `make`; `weights` maps goals to numbers, `directions` is the number of scalarisations."""
        check_number("sigma0", sigma0, 0, 1, above=True)
        check_number("directions", directions, 1, MOST_DIRECTIONS, whole=True)
        own = _goal_weights(goals, weights)
        _check_combination(scalarise, own is not None, directions, len(goals))
        facts = facts or Facts.plain(dim)
        self._dim, self._n_goals, self._seed = dim, len(goals), seed
        self._raw = own is not None
        popsize = max(4 + math.floor(3 * math.log(dim)), math.ceil(facts.workers / (2 * directions)))
        self._directions = [
            self._new_direction(w, scalarise == "tchebycheff", start, sigma0, popsize, [seed, i], facts)
            for i, w in enumerate(spread_weights(directions, len(goals)) if own is None else own[None])
        ]
        self._early: list[Array] = []
        self._best = np.full(self._n_goals, -np.inf)
        self._known: dict[int, tuple[int, Told]] = {}  # number -> the direction that drew it, and the result
        self._numbers: set[int] = set()

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
        return Direction(weights, tchebycheff, start, sigma0, popsize, seeds, facts.cells)

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a point drawn from the current distribution of the number's direction; `pending` does not matter."""
        return self._directions[self._index(number)].normal.draw(self._noise(number))

    def tell(self, result: Result) -> None:
        """Buffer the result with the direction that drew it, lambda of which move it; it is foreign to all others."""
        told = usable(result, self._dim, self._n_goals)
        if told is None:
            return
        x, values, _ = told
        new = Told(x, values, violation(values, result.floors))
        if result.number in self._numbers:
            self._replace(result.number, new)
            return
        self._numbers.add(result.number)
        self._best = np.maximum(self._best, values)
        if len(self._early) < EARLY:
            self._early.append(values)
        index = self._index(result.number)
        drawn = self._directions[index].drawn(x, self._noise(result.number))
        if drawn is None:
            self._share(result.number, new, NOBODY)
            return
        new = Told(drawn.x, values, new.missing)
        self._share(result.number, new, index)
        if drawn.run == self._directions[index].run_number:
            self._directions[index].add(result.number, new, self._scale())

    def recommend(self) -> Sequence[Recommendation]:
        """Return the mean of each direction that has completed a generation; each averages out its samples' noise."""
        scale = self._scale()
        means = [direction.settled(scale) for direction in self._directions]
        return [Recommendation(mean.copy(), "mean of CMA-ES") for mean in means if mean is not None]

    def _index(self, number: int) -> int:
        """Return the direction that draws a number: in each block of numbers every direction once, in random order.

        Not number % n alone: a portfolio that passes on every second number only would starve half of them.
        """
        n = len(self._directions)
        if n == 1:
            return 0
        block, place = divmod(number, n)
        return int(np.random.default_rng([self._seed, block, 3]).permutation(n)[place])

    def _noise(self, number: int) -> Array:
        return rng_for(self._seed, number).standard_normal((TRIES, self._dim))

    def _scale(self) -> Scale:
        """Return the best values so far and their distance from the worst early ones that were not broken."""
        one = np.ones(self._n_goals)
        if self._raw or not self._early:
            return Scale(self._best if self._early else 0 * one, one)
        early = np.array(self._early)
        bulk = early.max(axis=0) - np.quantile(early, 0.25, axis=0)
        low = early.min(axis=0)
        low = np.where(bulk > 0, np.maximum(low, early.max(axis=0) - BROKEN * bulk), low)
        unit = self._best - low
        return Scale(self._best, np.where(unit > 0, unit, 1.0))

    def _share(self, number: int, new: Told, owner: int) -> None:
        """Show a result to all directions but the one that drew it."""
        if any(direction.waiting for direction in self._directions):
            self._known[number] = (owner, new)
            if len(self._known) > KNOWN:
                del self._known[next(iter(self._known))]
        else:
            self._known.clear()
        scale = self._scale()
        for i, direction in enumerate(self._directions):
            if i != owner:
                direction.begin(self._foreign(i), scale)
                direction.meet(new, scale)

    def _foreign(self, index: int) -> list[Told]:
        return [told for owner, told in self._known.values() if owner != index]

    def _replace(self, number: int, new: Told) -> None:
        """Take the new score of a result that a start or a coming generation still needs; ignore any other."""
        buffer = self._directions[self._index(number)].buffer
        if number in buffer:
            new = buffer[number] = Told(buffer[number].x, new.values, new.missing)
        if number in self._known:
            self._known[number] = (self._known[number][0], new)
            for i, direction in enumerate(self._directions):
                direction.begin(self._foreign(i), self._scale())


@dataclass(frozen=True, eq=False)
class Drawn:
    """The exact point `(d,)` that a rounded result came from, and the run that drew it."""

    x: Array
    run: int


class Direction:
    """One scalarisation and the distribution that follows it."""

    _remembered = RECENT

    def __init__(
        self,
        weights: Array,
        tchebycheff: bool,
        start: Array,
        sigma0: float,
        popsize: int,
        seeds: list[int],
        cells: NDArray[np.intp],
    ) -> None:
        self.run_number = 0
        self.buffer: dict[int, Told] = {}  # own results since the last update
        self._weights, self._tchebycheff = weights, tchebycheff
        self._sigma0, self._popsize, self._seeds, self._cells = sigma0, popsize, seeds, cells
        self.normal = self._around(start)
        self._recent = deque([(0, self.normal)], maxlen=self._remembered)
        self._run: Runs | None = None  # none until the first generation of a run is complete
        self._newcomer: Told | None = None  # the best foreign result since the last update
        self._means: list[Told] = []  # the means of the ended runs and of the current one, as far as they are good

    @property
    def waiting(self) -> bool:
        """Whether the first generation is still to come."""
        return self._run is None and self.run_number == 0

    def drawn(self, x: Array, z: Array) -> Drawn | None:
        """Return where a point comes from, or None if no recent distribution gives it for these normal rows `z`."""
        counted = self._cells > 0
        for run, normal in reversed(self._recent):
            point = normal.draw(z)
            near = np.abs(x - point) < RECOGNISED
            same = np.floor(x * self._cells) == np.floor(point * self._cells)
            if bool(np.where(counted, near | same, near).all()):
                return Drawn(normal.raw(z), run)
        return None

    def costs(self, told: Sequence[Told], scale: Scale) -> Array:
        """Return a cost for each result, smaller is better; each infeasible one costs more than each feasible."""
        values, missing = np.array([t.values for t in told]), np.array([t.missing for t in told])
        away = self._weights * (scale.best - values) / scale.unit
        cost = away.sum(axis=1)
        if self._tchebycheff:
            cost = away.max(axis=1) + AUGMENTED * cost
        feasible = missing == 0
        top = cost[feasible].max() if feasible.any() else 0.0
        return np.where(feasible, cost, top + 1.0 + missing)

    def begin(self, foreign: Sequence[Told], scale: Scale) -> None:
        """Set the start from foreign results, as long as no generation is complete."""
        if not self.waiting or not foreign:
            return
        order = np.argsort(self.costs(foreign, scale), kind="stable")
        dim = len(self.normal.mean)
        if len(foreign) >= 5 * dim:
            best = order[: max(1, int(BEST_SHARE * len(foreign)))]
            self._move(self._spread(np.array([foreign[i].x for i in best])))
        elif not np.array_equal(self.normal.mean, foreign[order[0]].x):
            self._move(self._around(foreign[order[0]].x))

    def meet(self, new: Told, scale: Scale) -> None:
        """Keep a foreign result for the next generation if it is the best of them."""
        if self.run_number > 0 or (self._run is None and not self.buffer):
            return  # a later run searches elsewhere; before the first own result the start says it all
        old = self._newcomer
        if old is None or np.diff(self.costs([old, new], scale))[0] < 0:
            self._newcomer = new

    def add(self, number: int, own: Told, scale: Scale) -> None:
        """Buffer an own result; lambda of them move the distribution."""
        self.buffer[number] = own
        if len(self.buffer) >= self._popsize:
            generation = list(self.buffer.values())
            self._update(generation, scale)

    def settled(self, scale: Scale) -> Array | None:
        """Return the best mean `(d,)` of the ended runs and the current one; None before the first generation."""
        if not self._means:
            return None
        return self._means[int(np.argmin(self.costs(self._means, scale)))].x

    def _update(self, generation: list[Told], scale: Scale) -> None:
        costs = self.costs(generation, scale)
        if self._newcomer is not None:
            withit = self.costs([*generation, self._newcomer], scale)
            if withit[-1] < withit[:-1].min():
                generation[int(np.argmax(costs))] = self._newcomer
                costs = self.costs(generation, scale)
        self.buffer, self._newcomer = {}, None
        first = self._run is None
        if self._run is None:
            self._run = self._begin_run()
        self._run.update(np.array([t.x for t in generation]), costs)
        self._note_mean(generation, costs, scale, first)
        if self._run.ended:
            self._restart()
        else:
            self._move(self._run.normal)

    def _note_mean(self, generation: Sequence[Told], costs: Array, scale: Scale, first: bool) -> None:
        """Keep the run's mean with the average of the generation's better half, and the best mean of earlier runs."""
        assert self._run is not None
        half = [generation[i] for i in np.argsort(costs, kind="stable")[: (len(generation) + 1) // 2]]
        values = np.mean([t.values for t in half], axis=0)
        mean = Told(self._run.normal.mean, values, float(np.mean([t.missing for t in half])))
        earlier = self._means if first else self._means[:-1]
        if len(earlier) > 1:
            earlier = [earlier[int(np.argmin(self.costs(earlier, scale)))]]
        self._means = [*earlier, mean]

    def _restart(self) -> None:
        self.run_number += 1
        self._popsize *= 2
        self._run = None
        self._move(self._around(self._place()))

    def _around(self, place: Array) -> Distribution:
        """Return the distribution with which a run begins at a place `(d,)`."""
        return isotropic(place, self._sigma0)

    def _spread(self, best: Array) -> Distribution:
        """Return the distribution with which the first run begins where `best` `(n, d)` are known, best first."""
        return warm_start(best)

    def _begin_run(self) -> Runs:
        assert isinstance(self.normal, Normal)
        return Run(self.normal, self._popsize, self._seeds[0], self._cells)

    def _place(self) -> Array:
        """Return where the next run begins `(d,)`."""
        return np.random.default_rng([*self._seeds, self.run_number, 1]).random(len(self.normal.mean))

    def _move(self, normal: Distribution) -> None:
        self.normal = normal
        self._recent.append((self.run_number, normal))


@functools.cache
def spread_weights(n: int, m: int) -> Array:
    """Return `(n, m)` weights of m goals, spread evenly over the simplex: centroids of n parts of equal shape."""
    if n == 1 or m == 1:
        return np.full((n, m), 1.0 / m)
    rng = np.random.default_rng([n, m])
    sample = rng.dirichlet(np.ones(m), 4096)
    chosen = sample[:1]
    for _ in range(n - 1):  # each next one as far away as it can be
        away = ((sample[:, None] - chosen) ** 2).sum(axis=2).min(axis=1)
        chosen = np.vstack([chosen, sample[np.argmax(away)]])
    for _ in range(30):
        nearest = ((sample[:, None] - chosen) ** 2).sum(axis=2).argmin(axis=1)
        chosen = np.array([sample[nearest == i].mean(axis=0) for i in range(n)])
    return chosen


def _check_combination(scalarise: str, weighted: bool, directions: int, n_goals: int) -> None:
    problems = []
    if scalarise not in SCALARISATIONS:
        hint = f"one of {', '.join(SCALARISATIONS)}"
        problems.append(Problem(f"scalarise is {scalarise!r}", "optimizer.scalarise", hint))
    if directions > 1 and n_goals == 1:
        hint = "several directions need several objectives: leave it at 1"
        problems.append(Problem(f"directions is {directions} with one objective", "optimizer.directions", hint))
    if directions > 1 and weighted:
        hint = "several directions have weights of their own: leave one of the two out"
        problems.append(Problem(f"directions is {directions} beside weights", "optimizer.directions", hint))
    if problems:
        raise ConfigError.of(problems, "the optimizer's options")


def _goal_weights(goals: Sequence[Goal], weights: Mapping[str, float] | None) -> Array | None:
    if weights is None:
        return None
    known = [goal.name for goal in goals]
    if not isinstance(weights, Mapping):
        problem = Problem(f"weights is {weights!r}", "optimizer.weights", "a mapping: objective to number")
        raise ConfigError.of([problem])
    for name, weight in weights.items():
        check_number(f"weights.{name}", weight, 0)
    problems = [
        Problem(f"there is no objective {name!r}", "optimizer.weights", f"known: {', '.join(known)}")
        for name in weights
        if name not in known
    ]
    array = np.array([float(weights.get(name, 0.0)) for name in known])
    if not problems and not 0 < array.sum() < np.inf:
        problems = [Problem("the weights are all zero or infinite", "optimizer.weights")]
    if problems:
        raise ConfigError.of(problems, "optimizer.weights")
    return array


registry.register("optimizers", "cma_es", CmaEs)
