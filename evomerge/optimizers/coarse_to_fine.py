"""The portfolio: reduce the dimension first, then the noise, then choose the optimizer, and open finer levels by gain.

Stages, each with a proposer of its own, on the nested levels of the space (`Facts.levels`):

1. model: one coordinate per expert and parameter, by `map` (the known recipes are its first results);
2. operator: a race over the categories, if the space has any (`_operators`);
3. groups, and what lies between it and `finest`: up to `SURROGATE_DIM` coordinates the coarse surrogate extended by
   deviations (`_tied`), above that CMA-ES around the best point so far;
4. shift: up to three points of the front (of one objective, of the best tenth) become basis vectors of a small space
   that `map` searches. They are points of the same cube, so what is found there is a recipe of the original experts;
5. all of the above in turn.

A stage ends when its last results (four per worker, and as many as it has dimensions) raised the hypervolume of the
posterior means by less than `GAIN`; so a stage that keeps gaining is never cut off. With fewer than `FEW` evaluations
in all, the first stage (and the race, where there are categories) is everything. Once a finer level is open, half of
the proposals still go to the coarse one, which keeps adding to the front of several objectives where finer ones do
not, and a twentieth to crossover of complementary parents.

Guard: what a finer level recommends is passed on only if its best candidate beats the coarse level's best on items
that did not choose it: one half of the items picks among the finer candidates, the other compares, in pairs, and the
mean gain has to exceed its standard error. The choice of the winner is guarded again, on the validation split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.front import hypervolume, non_dominated
from evomerge.optimizers._core import (
    Array,
    Exhausted,
    Facts,
    Goal,
    Level,
    Recommendation,
    Result,
    rng_for,
    usable,
    violation,
)
from evomerge.optimizers._guard import Guard
from evomerge.optimizers._levels import Arm, facts_on, settled, size, ties
from evomerge.optimizers._operators import OperatorRace
from evomerge.optimizers._tied import TiedSearch
from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.crossover import Crossover
from evomerge.optimizers.map import MapSearch
from evomerge.surrogate import nearness, posterior

GAIN = 0.005
FEW = 60
CHECKED = 4  # results between two looks at whether a stage still gains
SURROGATE_DIM = 120
SIGMA = 0.08  # of CMA-ES on levels above that
COARSE_SHARE, CROSSED_SHARE = 0.5, 0.05
VECTORS = 3
OVERHANG = 0.2  # of a basis vector's weight below 0 and above 1
OPERATOR = "operator"


class CoarseToFine:
    """The default portfolio; any number of objectives.

    Args (options):
        finest: the level to which the search may descend; "groups" where the space has it, else its last level up to
            there. `smooth` and `layers` have to be asked for: they seldom pay.
    """

    wants_items = True

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        finest: str | None = None,
        facts: Facts | None = None,
    ) -> None:
        """See `make`."""
        self._dim, self._goals, self._seed, self._start = dim, tuple(goals), seed, start.copy()
        self._facts = facts or Facts.plain(dim)
        self._levels = _levels(self._facts, finest)
        few = self._facts.evaluations is not None and self._facts.evaluations < FEW
        self._waiting = [level for level in self._levels[1:] if not few or level.name == OPERATOR]
        self._finite = bool(self._facts.cells.all())
        self._shifts = not few and len(self._waiting) > 0 and not self._finite
        self._told: list[Result] = []
        self._rows: dict[int, int] = {}
        self._race: OperatorRace | None = None
        first = settled(self._levels[0], self._facts.categorical, start)
        self._coarse = self._map(first)
        self._arms = [self._coarse]  # every search that is still told, coarse to fine
        self._stage = first.name
        self._since = 0  # results since the stage began
        self._tried: set[bytes] = set()  # points of a cube of cells, failed ones included
        self._turns = False  # the last stage: all arms in turn
        finest_level = settled(self._levels[-1], self._facts.categorical, start)
        self._crossing = self._crossover(finest_level)
        self._guard = Guard(len(goals), seed)

    # ---------------------------------------------------------------- history

    def tell(self, result: Result) -> None:
        """Pass the result on to every level that holds it; a stage may end with it."""
        self._guard.tell(result, coarse=result.x is not None and self._coarse.level.project(result.x) is not None)
        self._crossing.tell(result)
        self._pass_on(replace(result, items=None))
        known = usable(result, self._dim, len(self._goals))
        if known is not None and not self._turns:  # who would open another search is gone by then
            floors = None if result.floors is None else np.array(result.floors, dtype=np.float64)
            row = self._rows.setdefault(result.number, len(self._told))
            self._told[row : row + 1] = [Result(result.number, *known, floors)]
            self._since += 1
        if self._finite and not self._turns and result.x is not None:
            self._tried.add(np.round(result.x, 3).tobytes())
        if self._race is not None:
            self._run_race()
        elif not self._turns and (self._is_spent() or (known is not None and self._has_settled())):
            self._advance()

    def _pass_on(self, result: Result) -> None:
        for arm in self._arms:
            arm.tell(result)
        if self._race is not None:
            self._race.tell(result)

    def _is_spent(self) -> bool:
        """Whether the stage's level consists of cells, and each has been tried."""
        level = self._arms[-1].level
        if not self._finite or len(self._tried) < (points := size(facts_on(self._facts, level))):
            return False
        return sum(level.project(np.frombuffer(x)) is not None for x in self._tried) >= points

    def _has_settled(self) -> bool:
        """Whether the stage's last results gained next to nothing."""
        if self._since % CHECKED:
            return False
        level = self._arms[-1].level
        patience = max(8, 4 * self._facts.workers, level.dim + 4)
        if self._since < patience + (level.dim + 6 if len(self._arms) == 1 else 0):
            return False
        values, reference = self._posterior(level)
        if len(values) <= patience:
            return False
        before, now = (hypervolume(v, reference) for v in (values[:-patience], values))
        return now <= 0.0 or now - before < GAIN * now

    def _posterior(self, level: Level) -> tuple[Array, Array]:
        """Posterior means `(n, m)` of the results in a level, in the order told, and a reference point `(m,)`.

        The reference is the unmerged base where it is known, else the medians.
        """
        inside = self._inside(level)
        if not inside:
            return np.empty((0, len(self._goals))), np.zeros(len(self._goals))
        x = np.array([z for _, z in inside])
        y, e = _table([r for r, _ in inside], len(self._goals))
        tied, focus = ties(self._coarse.level, level), nearness(y)
        means = np.column_stack(
            [
                posterior(x, y[:, j], e[:, j], goal.lower, goal.upper, tied, focus)[0]
                for j, goal in enumerate(self._goals)
            ]
        )
        zero = self._facts.zero
        base = [i for i, (r, _) in enumerate(inside) if zero is not None and r.x is not None and np.allclose(r.x, zero)]
        return means, means[base[0]] if base else np.median(means, axis=0)

    def _inside(self, level: Level) -> list[tuple[Result, Array]]:
        """The newest results that lie in a level, with their points there, in the order told."""
        found: list[tuple[Result, Array]] = []
        for result in reversed(self._told):
            z = None if result.x is None else level.project(result.x)
            if z is not None:
                found.append((result, z))
            if len(found) == RECENT:
                break
        return found[::-1]

    # ---------------------------------------------------------------- stages

    def _advance(self) -> None:
        self._since = 0
        if self._waiting:
            level = self._waiting.pop(0)
            self._stage = level.name
            if level.name == OPERATOR:
                self._open_race(level)
            else:
                self._open(settled(level, self._facts.categorical, self._best(1)[0]))
        elif self._shifts:
            self._shifts = False
            self._stage = "shift"
            self._open_shift()
        else:
            self._turns, self._stage = True, "all levels in turn"
            self._told, self._rows, self._tried = [], {}, set()

    def _open(self, level: Level) -> None:
        tied = ties(self._coarse.level, level)
        facts = facts_on(self._facts, level)
        seed = self._seed + len(self._arms)
        best = self._best(1)[0]
        z = level.project(best)
        middle = z if z is not None else np.full(level.dim, 0.5)
        if tied is not None and level.dim <= SURROGATE_DIM:
            arm = Arm(level, TiedSearch(level.dim, self._goals, seed, middle, ties=tied, facts=facts))
            for result in self._told:
                arm.tell(result)
        else:
            # Earlier results would move the start away from the best point: they lie on coarser levels only.
            arm = Arm(level, CmaEs(level.dim, self._goals, seed, middle, sigma0=SIGMA, facts=facts))
        self._arms.append(arm)

    def _open_race(self, level: Level) -> None:
        self._race = OperatorRace(level, self._goals, self._seed, self._start, self._best(2), self._facts)
        for result in self._told:
            self._race.tell(result)

    def _run_race(self) -> None:
        """End a full round; the last survivor becomes the coarse level of the stages that follow."""
        race = self._race
        assert race is not None
        while race.round_is_full and not race.settled:
            tables = [self._posterior(arm.level) for arm in race.arms]
            references = [reference for means, reference in tables if len(means)]
            reference = np.min(references, axis=0) if references else np.zeros(len(self._goals))
            race.finish_round([self._worth(means, reference) for means, _ in tables])
        if race.settled:
            self._race = None
            self._coarse = race.arms[0]
            self._arms = [self._coarse]
            x = self._coarse.level.embed(np.full(self._coarse.level.dim, 0.5))
            self._crossing = self._crossover(settled(self._levels[-1], self._facts.categorical, x))
            for result in self._told:
                self._crossing.tell(result)
            self._advance()

    def _worth(self, means: Array, reference: Array) -> float:
        """The hypervolume of the means `(n, m)` that keep the floors; below 0 if none does, -inf if there are none."""
        short = self._short(means)
        if not len(means):
            return -np.inf
        return -float(short.min()) if short.min() > 0.0 else hypervolume(means[short <= 0.0], reference)

    def _short(self, means: Array) -> Array:
        """By how much each row of means `(n, m)` misses the latest floors, summed `(n,)`."""
        floors = self._told[-1].floors if self._told else None
        return np.array([violation(row, floors) for row in means])

    def _open_shift(self) -> None:
        """Search the span of some points of the front, beginning with all that is known to lie in it."""
        points = self._best(VECTORS)
        if self._facts.zero is None or len(points) < 2:
            self._advance()
            return
        # The base is the base under any operator; that of the best point keeps the span inside one operator.
        zero = np.where(self._facts.categorical, points[0], self._facts.zero)
        vectors = (points - zero).T
        while np.linalg.matrix_rank(vectors, tol=1e-6) < vectors.shape[1]:
            vectors = vectors[:, :-1]
        if vectors.shape[1] < 2:
            self._advance()
            return
        matrix = (1.0 + 2.0 * OVERHANG) * vectors
        origin = zero - OVERHANG * vectors.sum(axis=1)
        level = Level("shift", matrix, origin)
        facts = replace(facts_on(self._facts, level), cells=np.zeros(level.dim, dtype=np.intp))
        mean = np.full(level.dim, (1.0 / level.dim + OVERHANG) / (1.0 + 2.0 * OVERHANG))
        search = MapSearch(level.dim, self._goals, self._seed + level.dim, mean, facts=facts)
        arm = Arm(level, search, inner=mean)
        for result in self._told:
            arm.tell(result)
        self._arms.append(arm)

    def _map(self, level: Level) -> Arm:
        z = level.project(self._start)
        middle = z if z is not None else np.full(level.dim, 0.5)
        facts = facts_on(self._facts, level)
        return Arm(level, MapSearch(level.dim, self._goals, self._seed + level.dim, middle, facts=facts))

    def _crossover(self, level: Level) -> Arm:
        z = level.project(self._start)
        middle = z if z is not None else np.full(level.dim, 0.5)
        return Arm(level, Crossover(level.dim, self._goals, self._seed, middle, facts=facts_on(self._facts, level)))

    def _best(self, count: int) -> Array:
        """Up to `count` points `(n, d)` of the finest level so far: the best mean, then the most different ones."""
        level = self._arms[-1].level
        inside = self._inside(level)
        if not inside:
            return self._start[None]
        means, _ = self._posterior(level)
        short = self._short(means)
        means = np.where((short <= short.min())[:, None], means, np.nan)
        rows = np.flatnonzero(non_dominated(means))
        spread = np.ptp(means[rows], axis=0) if len(rows) > 1 else np.ones(means.shape[1])
        scaled = means[rows] / np.where(spread > 0, spread, 1.0)
        best = rows[int(np.argmax(scaled.mean(axis=1)))]
        if len(self._goals) == 1:  # its front is one point: take the better tenth instead
            ranks = np.argsort(-means[:, 0], kind="stable")  # those with NaN come last
            rows = ranks[: max(count, int(np.isfinite(means[:, 0]).sum()) // 10)]
        x = np.array([inside[i][0].x for i in rows])
        chosen = [int(np.flatnonzero(rows == best)[0])]
        while len(chosen) < min(count, len(rows)):
            away = np.min([np.abs(x - x[i]).sum(axis=1) for i in chosen], axis=0)
            chosen.append(int(np.argmax(away)))
        return x[chosen]

    # ---------------------------------------------------------------- proposals

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a proposal of the stage's search, or sometimes of another part of the portfolio.

        Raises:
            Exhausted: every point of the levels that may be searched has been tried.
        """
        chance = float(rng_for(self._seed, number).random())
        arms: list[Arm | OperatorRace] = [*self._arms]
        if self._race is not None:
            arms = [self._race]
        elif self._turns:
            turn = number % len(arms)
            arms = [*arms[turn + 1 :], *arms[: turn + 1]]
        elif len(arms) > 1 and chance < COARSE_SHARE:
            arms = [*arms[1:], arms[0]]
        if len(self._arms) > 1 and not self._finite and COARSE_SHARE <= chance < COARSE_SHARE + CROSSED_SHARE:
            arms.append(self._crossing)
        for arm in reversed(arms):
            try:
                return arm.ask(number, pending)
            except Exhausted as error:
                ended = error
        if (
            self._race is not None or self._waiting or self._shifts
        ):  # a coarse level of cells is done before it has settled
            return self._crossing.ask(number, pending)
        names = ", ".join(dict.fromkeys(arm.level.name for arm in self._arms))
        raise Exhausted(f"all points of the levels searched ({names}) have been tried") from ended

    def describe(self) -> str:
        """Return which levels have been opened, and which have not."""
        if self._race is not None:
            return f"levels: {self._coarse.level.name}; now comparing the choices, {len(self._race.arms)} of them left"
        opened = ", ".join(f"{arm.level.name} ({arm.level.dim} dimensions)" for arm in self._arms)
        reached = {arm.level.name for arm in self._arms}
        left = ", ".join(level.name for level in self._levels if level.name not in {*reached, OPERATOR})
        why = "a level is opened when the one before gains no more, and with 60 evaluations or more"
        return f"levels searched: {opened}" + (f"; not opened: {left} ({why})" if left else "")

    def recommend(self) -> Sequence[Recommendation]:
        """Return the optimum of a finer level if the guard lets it pass, then those of the coarse one."""
        coarse = self._coarse.recommend()
        finer = [found for arm in reversed(self._arms[1:]) for found in arm.recommend()[:1]]
        return [*finer, *coarse] if self._guard.passes() else [*coarse, *finer[:1]]


RECENT = 1000  # results that a stage looks at when it asks whether it still gains


def _levels(facts: Facts, finest: str | None) -> list[Level]:
    names = [level.name for level in facts.levels]
    if finest is None:
        last = names.index("groups") if "groups" in names else len(names) - 1
    elif finest in names:
        last = names.index(finest)
    else:
        problem = Problem(f"the space has no level {finest!r}", "optimizer.finest", f"it has {', '.join(names)}")
        raise ConfigError.of([problem], "the optimizer's options")
    return list(facts.levels[: last + 1])


def _table(results: Sequence[Result], n_goals: int) -> tuple[Array, Array]:
    """Values and standard errors `(n, m)`."""
    values = np.array([r.values for r in results], dtype=np.float64).reshape(-1, n_goals)
    unknown = np.full(n_goals, np.nan)
    errors = [unknown if r.stderr is None else np.asarray(r.stderr, dtype=np.float64) for r in results]
    return values, np.array(errors).reshape(-1, n_goals)


registry.register("optimizers", "coarse_to_fine", CoarseToFine)
