"""Quadratic-surrogate search (MAP), refitted as results come in: the default for a few coefficients.

After a space-filling design, each objective gets a quadratic surrogate (`evomerge.surrogate`; Li et al.,
arXiv 2406.07529), and each proposal is the point whose optimistic prediction adds most hypervolume to the front of
the posterior means of everything evaluated or pending (`_map_front`). So proposals spread over the front, and
parallel workers do not repeat each other. With one objective the proposal is the surrogate's optimum with a bonus for
uncertainty. Unlike MAP's released code, nothing is searched outside the box that the data cover.

Rules, so that nobody has to guess:
- design: until `design` results are in (default: d + 6, at most 20 or the full quadratic's coefficients + 2;
  `paper`: 30, 50, 60, 85, 100, 140, 250 for 2 to 8 coefficients), even numbers take the corner, axis and diagonal
  points that are not known yet, odd ones a Sobol sequence scrambled by the seed;
- box: the bounding box of the evaluated points; a share `explore` of the proposals are Sobol points of that box;
- constraints: the latest floors told; gains count by the probability that the floors are kept, and while nothing is
  predicted to keep them the predicted violation is minimised;
- memory: at most `WINDOW` results; beyond, the older half goes, but for the front and the ends of the hull;
- points that gave no result are not repeated, and lower the gains around them;
- refits: with every result up to 120, then with every fortieth part of the results more; above 120 coefficients
  (14 dimensions) with every second to sixth result.

Variants: `bayesian` takes the second half of the design where the surrogates fit badly; `nested` first merges the
experts pair by pair (`_map_nested`, with `preferences`). Both go on as `quadratic` on all data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.front import non_dominated
from evomerge.optimizers._core import (
    Array,
    Exhausted,
    Facts,
    Goal,
    Recommendation,
    Result,
    check_number,
    rng_for,
    usable,
)
from evomerge.optimizers._map_design import BINS, PAPER, residual_point, sobol, stars, untried
from evomerge.optimizers._map_front import Box, near, propose
from evomerge.optimizers._map_nested import Nested
from evomerge.optimum import optimum
from evomerge.surrogate import Quadratic, fit, n_terms, nearness, terms_for

VARIANTS = ("quadratic", "bayesian", "nested")
WINDOW = 3000  # results; beyond, the older half is dropped but for the front and the ends of the hull
REFIT = 40
COSTLY = 60  # coefficients: a fit of 325 takes as long as some proposals
ENUMERABLE = 100_000  # points of a discrete cube up to which its end is noticed
RECOMMENDED = 4


class MapSearch:
    """Proposals from one quadratic surrogate per objective; any number of objectives."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        variant: str = "quadratic",
        design: int | str | None = None,
        explore: float = 0.12,
        optimism: float = 1.0,
        preferences: Mapping[str, float] | None = None,
        facts: Facts | None = None,
    ) -> None:
        """See `make`; `design` points come first, `optimism` scales the bonus for uncertainty."""
        facts = facts or Facts.plain(dim)
        check_number("explore", explore, 0, 1)
        check_number("optimism", optimism, 0)
        _check_variant(variant, dim, preferences)
        self._dim, self._goals, self._seed, self._variant = dim, tuple(goals), seed, variant
        self._explore, self._optimism = explore, optimism
        self._design = _design_size(design, dim)
        self._cells = np.asarray(facts.cells, dtype=np.intp)
        self._terms = n_terms(dim, terms_for(dim))
        self._whole = Box(np.zeros(dim), np.ones(dim), self._cells)
        self._zero = np.zeros(dim) if facts.zero is None else facts.zero.copy()
        self._stars = self._whole.snap(stars(start))
        self._nested = Nested(goals, seed, facts, _preferences(goals, preferences)) if variant == "nested" else None
        self._ties: Array | None = None  # see `_tied`
        self._rows: dict[int, int] = {}  # candidate number -> row of the lists
        self._x: list[Array] = []
        self._values: list[Array] = []
        self._stderr: list[Array] = []
        self._failed: list[Array] = []
        self._floors: Array | None = None
        self._events = 0
        self._data: tuple[Array, Array, Array] | None = None  # what the surrogates are fitted to
        self._models: tuple[Quadratic, ...] | None = None  # a cache of the fit to that

    def tell(self, result: Result) -> None:
        """Keep the result; the surrogates are refitted when they are next needed."""
        if result.floors is not None:
            floors = np.array(result.floors, dtype=np.float64)
            self._floors = floors if np.isfinite(floors).any() else None
        told = usable(result, self._dim, len(self._goals))
        if told is not None:
            self._keep(result.number, *told)
        failed = None
        if told is None and result.x is not None and np.isfinite(result.x).all():
            failed = np.clip(np.array(result.x, dtype=np.float64), 0.0, 1.0)
            if result.number not in self._rows:
                self._failed.append(failed)
        if self._nested is not None:
            x, values, stderr = told or (failed, None, np.empty(0))
            self._nested.tell(x, values, stderr, self._floors)

    def _keep(self, number: int, x: Array, values: Array, stderr: Array) -> None:
        row = self._rows.setdefault(number, len(self._x))
        for store, item in zip((self._x, self._values, self._stderr), (x, values, stderr), strict=True):
            store[row : row + 1] = [item]
        if len(self._x) > WINDOW:
            self._forget()
        self._events += 1
        if self._events % max(1, self._events // REFIT - 1, self._terms // COSTLY) == 0 or self._data is None:
            self._data = np.array(self._x), np.array(self._values), np.array(self._stderr)
            self._models = None

    def _forget(self) -> None:
        """Drop the older half of the results, those excepted that are on the front or at an end of the hull."""
        x, values = np.array(self._x), np.array(self._values)
        keep = non_dominated(values) | ((x == x.min(axis=0)) | (x == x.max(axis=0))).any(axis=1)
        # Many results may lie at the ends: of those the newest stay.
        keep[np.flatnonzero(keep)[: -WINDOW // 4]] = False
        keep[len(x) // 2 :] = True
        numbers = [number for number, kept in zip(self._rows, keep, strict=True) if kept]
        self._rows = {number: row for row, number in enumerate(numbers)}
        for store in (self._x, self._values, self._stderr):
            store[:] = [item for item, kept in zip(store, keep, strict=True) if kept]
        del self._failed[:-WINDOW]

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a design point, an exploring point or the best proposal of the surrogates.

        Raises:
            Exhausted: the cube consists of cells, and each has been tried.
        """
        rng = rng_for(self._seed, number)
        known = np.array([*self._x, *pending]).reshape(-1, self._dim)
        failed = np.array(self._failed).reshape(-1, self._dim)
        taken = np.vstack([known, failed])
        if self._nested is not None:
            planned = self._nested.ask(number, pending)
            if planned is not None:
                return planned
        elif len(self._x) < self._design:
            return self._new(self._design_point(number, taken, rng), taken, number)
        if self._data is None:
            return self._new(self._whole.snap(sobol(self._dim, self._seed, number)[None])[0], taken, number)
        return self._within(self._box(), number, known, failed, rng)

    def _within(self, box: Box, number: int, known: Array, failed: Array, rng: np.random.Generator) -> Array:
        """Return the best proposal in a box, or a Sobol point of it."""
        if rng.random() >= self._explore:
            proposal = propose(self._fit(), known, failed, box, self._floors, self._optimism, rng)
            if proposal is not None:
                return proposal
        point = box.scale(sobol(self._dim, self._seed, number)[None])[0]
        return self._new(point, np.vstack([known, failed]), number)

    def recommend(self) -> Sequence[Recommendation]:
        """Return the surrogates' optima that are predicted to keep the floors: for the mean, the weakest, and each."""
        if self._data is None or len(self._data[0]) < self._dim + 2:
            return []
        models, box, m = self._fit(), self._box(), len(self._goals)
        wishes: list[tuple[str, Array | None]] = [("surrogate optimum", np.ones(1))]
        if m > 1:
            wishes = [("surrogate optimum (mean)", np.ones(m)), ("surrogate optimum (weakest objective)", None)]
            wishes += [
                (f"surrogate optimum ({goal.name})", row) for goal, row in zip(self._goals, np.eye(m), strict=True)
            ]
        found: list[Recommendation] = []
        for why, preferences in wishes:
            if len(found) == RECOMMENDED:
                break
            x, values, _ = optimum(models, preferences, box.low, box.high, self._seed, self._floors)
            x = box.snap(x[None])[0]
            slack = 1e-3 * np.array([abs(model.scale) for model in models])
            feasible = self._floors is None or bool((values >= self._floors - slack).all())
            if feasible and not near(x[None], np.array([r.x for r in found])).any():
                found.append(Recommendation(x, why))
        return found

    def _box(self) -> Box:
        assert self._data is not None
        return Box(self._data[0].min(axis=0), self._data[0].max(axis=0), self._cells)

    def _fit(self) -> tuple[Quadratic, ...]:
        """Return one surrogate per goal."""
        assert self._data is not None
        if self._models is None:
            x, y, e = self._data
            focus = nearness(y)
            self._models = tuple(
                fit(x, y[:, j], e[:, j], lower=goal.lower, upper=goal.upper, ties=self._ties, focus=focus)
                for j, goal in enumerate(self._goals)
            )
        return self._models

    def _design_point(self, number: int, taken: Array, rng: np.random.Generator) -> Array:
        if self._variant == "bayesian" and len(self._x) >= max(2, self._design // 2):
            j = number % len(self._goals)
            assert self._data is not None
            x, values, _ = self._data
            point = residual_point(self._fit()[j], x, values[:, j], self._zero, rng)
            return np.array(self._whole.snap(point[None])[0])
        if number % 2 == 0:
            fresh = np.flatnonzero(~near(self._stars, taken))
            if len(fresh):
                return np.array(self._stars[fresh[0]])
        return np.array(self._whole.snap(sobol(self._dim, self._seed, number)[None])[0])

    def _new(self, point: Array, taken: Array, number: int) -> Array:
        """Return the point, or an untried one in its stead if the cube consists of cells and it is known."""
        if (
            not self._cells.all()
            or np.prod(self._cells, dtype=np.float64) > ENUMERABLE
            or not near(point[None], taken)[0]
        ):
            return point
        found = untried(self._cells, taken, number)
        if found is None:
            total = int(np.prod(self._cells))
            raise Exhausted(f"all {total} points of the search space have been tried")
        return found


def _design_size(design: int | str | None, dim: int) -> int:
    if design is None:
        return min(n_terms(dim, "full") + 2, dim + 6, 20)
    if design != "paper":
        check_number("design", design, 2, whole=True)
        return int(design)
    if dim not in PAPER:
        message = f"design: paper is given for 2 to 8 coefficients, and the space has {dim}"
        raise ConfigError.of([Problem(message, "optimizer.design", "set a number")], "the optimizer's options")
    return PAPER[dim]


def _check_variant(variant: str, dim: int, preferences: Mapping[str, float] | None) -> None:
    problem = None
    if variant not in VARIANTS:
        problem = Problem(f"variant is {variant!r}", "optimizer.variant", f"one of {', '.join(VARIANTS)}")
    elif variant == "bayesian" and dim > max(BINS):
        message = f"variant: bayesian bins directions of at most {max(BINS)} coefficients, and the space has {dim}"
        problem = Problem(message, "optimizer.variant", "use variant: quadratic")
    elif preferences is not None and variant != "nested":
        message = f"preferences are fixed beforehand by variant: nested only, not by {variant}"
        problem = Problem(message, "optimizer.preferences", "leave them out, and choose from the front afterwards")
    if problem is not None:
        raise ConfigError.of([problem], "the optimizer's options")


def _preferences(goals: Sequence[Goal], preferences: Mapping[str, float] | None) -> Array:
    if preferences is None:
        return np.ones(len(goals))
    names = [goal.name for goal in goals]
    hint = f"a number from 0 on for some of the objectives {', '.join(names)}; the others count as 0"
    numbers = isinstance(preferences, Mapping) and all(
        key in names and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < np.inf
        for key, value in preferences.items()
    )
    if not numbers or not sum(preferences.values()) > 0:
        problem = Problem(f"preferences is {preferences!r}", "optimizer.preferences", hint)
        raise ConfigError.of([problem], "the optimizer's options")
    return np.array([float(preferences.get(name, 0.0)) for name in names])


registry.register("optimizers", "map", MapSearch)
