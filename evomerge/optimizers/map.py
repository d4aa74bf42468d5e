"""Quadratic-surrogate search (MAP), refitted after every result: the default for a few coefficients.

After a space-filling design, each objective gets a quadratic surrogate (`evomerge.surrogate`; Li et al.,
arXiv 2406.07529), and each proposal is the point whose optimistic prediction adds most hypervolume to the front of
the posterior means of everything evaluated or pending. So proposals spread over the front, and parallel
workers do not repeat each other. Unlike MAP's released code, nothing is searched outside the box that the data cover.

Rules, so that nobody has to guess:
- design: until `design` results are in (default: coefficients of the full quadratic + 2, but at most
  max(24, 2 d + 3)), even numbers take axis and diagonal points, odd ones a Sobol sequence scrambled by the seed;
- model: full quadratic from (d + 1)(d + 2) / 2 + 2 points on, squares only from 2 d + 3, else linear;
- box: the bounding box of the evaluated points, 10 % wider, inside [0, 1];
- a share `explore` of the proposals are Sobol points of that box.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from evomerge import registry
from evomerge.front import non_dominated
from evomerge.optimizers._core import Array, Goal, Result, check_number, rng_for, usable
from evomerge.surrogate import Quadratic, fit, n_terms

ELITES = 48  # anchors of the search on the surrogate
ROUNDS = 3
SAME = 0.005  # two points closer than this in every coordinate are the same experiment


class MapSearch:
    """Proposals from one quadratic surrogate per objective; any number of objectives."""

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        design: int | None = None,
        explore: float = 0.12,
        optimism: float = 1.0,
    ) -> None:
        """See `make`; `design` points come first, `optimism` scales the bonus for uncertainty."""
        if design is not None:
            check_number("design", design, 2, whole=True)
        check_number("explore", explore, 0, 1)
        check_number("optimism", optimism, 0)
        self._dim, self._goals, self._seed = dim, tuple(goals), seed
        self._explore, self._optimism = explore, optimism
        few = min(n_terms(dim, "full") + 2, max(24, 2 * dim + 3))
        self._design = few if design is None else design
        self._stars = _stars(start)
        self._x: list[Array] = []
        self._values: list[Array] = []
        self._stderr: list[Array] = []
        self._models: tuple[Quadratic, ...] = ()
        self._fitted = 0

    def tell(self, result: Result) -> None:
        """Keep the result; the surrogates are refitted when they are next needed."""
        told = usable(result, self._dim, len(self._goals))
        if told is not None:
            for store, item in zip((self._x, self._values, self._stderr), told, strict=True):
                store.append(item)

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a design point, an exploring point or the best proposal of the surrogates."""
        rng = rng_for(self._seed, number)
        known = np.array([*self._x, *pending]).reshape(-1, self._dim)
        if len(self._x) < self._design:
            return self._design_point(number, known)
        data = np.array(self._x)
        low, high = data.min(axis=0), data.max(axis=0)
        margin = 0.1 * (high - low)
        low, high = np.maximum(low - margin, 0.0), np.minimum(high + margin, 1.0)
        if rng.random() >= self._explore:
            proposal = self._propose(rng, known, low, high)
            if proposal is not None:
                return proposal
        point: Array = low + (high - low) * self._sobol(number)
        return point

    def _design_point(self, number: int, known: Array) -> Array:
        star = self._stars[number // 2 % len(self._stars)]
        if number % 2 == 0 and not _near(star[None], known)[0]:
            return np.array(star)
        return self._sobol(number)

    def _sobol(self, number: int) -> Array:
        engine = qmc.Sobol(self._dim, scramble=True, rng=np.random.default_rng([self._seed]))
        point: Array = engine.fast_forward(number).random(1)[0]
        return point

    def _fit(self) -> tuple[Quadratic, ...]:
        """Return one surrogate per goal for the results told so far (a cache, not state)."""
        if self._fitted != len(self._x):
            x, y, e = np.array(self._x), np.array(self._values), np.array(self._stderr)
            self._models = tuple(
                fit(x, y[:, j], e[:, j], lower=goal.lower, upper=goal.upper) for j, goal in enumerate(self._goals)
            )
            self._fitted = len(self._x)
        return self._models

    def _propose(self, rng: np.random.Generator, known: Array, low: Array, high: Array) -> Array | None:
        """Return the point with the largest optimistic gain, or None if nothing promises any."""
        models = self._fit()
        reached = _means(models, known)
        front = known[non_dominated(reached)]
        pool = np.vstack([low + (high - low) * rng.random((512, self._dim)), front])
        for _ in range(ROUNDS):
            anchors = pool[_elite(_means(models, pool), ELITES, rng)]
            pool = np.vstack([anchors, _vary(anchors, 8, rng, low, high)])
        pool = pool[~_near(pool, known)]
        if len(pool) == 0:
            return None
        bonus = self._optimism * rng.random()
        hopeful = np.empty((len(pool), len(models)))
        for j, model in enumerate(models):
            eta, sd = model.link(pool)
            hopeful[:, j] = model.value(eta + bonus * sd)
        # A dominated prediction never gains more than the one that dominates it.
        choice = np.flatnonzero(non_dominated(hopeful))
        gains = _gains(hopeful[choice], reached, rng)
        best = int(np.argmax(gains))
        return pool[choice[best]] if gains[best] > 0 else None


def _stars(start: Array) -> Array:
    """Return the axis and diagonal points: where the quadratic terms are best seen (section 2.2)."""
    dim = len(start)
    levels = np.array([0.25, 0.5, 0.75, 1.0])
    diagonal = np.repeat(levels[:, None], dim, axis=1)
    star = np.repeat(start[None], dim, axis=0)
    star[np.arange(dim), np.arange(dim)] = np.where(start > 0.5, 0.0, 1.0)
    rows = [start[None], diagonal, star]
    return np.vstack(rows)


def _near(points: Array, known: Array) -> NDArray[np.bool_]:
    """Return the mask of the points that repeat a known one."""
    if len(known) == 0:
        return np.zeros(len(points), dtype=np.bool_)
    near = np.abs(points[:, None, :] - known[None, :, :]).max(axis=2) < SAME
    return np.asarray(near.any(axis=1))


def _means(models: Sequence[Quadratic], x: Array) -> Array:
    return np.column_stack([model.value(model.link(x)[0]) for model in models])


def _elite(values: Array, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the rows of the best non-dominated layers, `count` in all, the last layer thinned at random."""
    if values.shape[1] == 1:
        return np.argsort(-values[:, 0], kind="stable")[:count]
    chosen: list[int] = []
    rest = np.arange(len(values))
    while len(chosen) < count and len(rest):
        layer = non_dominated(values[rest])
        chosen += rng.permutation(rest[layer]).tolist()
        rest = rest[~layer]
    return np.array(chosen[:count])


def _vary(anchors: Array, children: int, rng: np.random.Generator, low: Array, high: Array) -> Array:
    """Return `children` varied copies of each anchor: blends with another anchor plus steps of mixed size."""
    parents = np.repeat(anchors, children, axis=0)
    partners = anchors[rng.integers(len(anchors), size=len(parents))]
    blend = np.where(rng.random(len(parents)) < 0.5, rng.random(len(parents)), 0.0)[:, None]
    size = 10.0 ** rng.uniform(-2.3, -0.7, (len(parents), 1))
    moved = rng.random(parents.shape) < rng.uniform(0.1, 1.0, (len(parents), 1))
    step = size * rng.standard_normal(parents.shape) * moved * (high - low)
    return np.clip(parents + blend * (partners - parents) + step, low, high)


def _gains(hopeful: Array, reached: Array, rng: np.random.Generator) -> Array:
    """Return the hypervolume that each hopeful row adds to the front of `reached`, by Monte Carlo.

    The reference lies a tenth of the front's range below its worst values, so the front's ends can still grow.
    """
    if reached.shape[1] == 1:
        return np.asarray(hopeful[:, 0] - reached.max())
    front = reached[non_dominated(reached)]
    span = front.max(axis=0) - front.min(axis=0)
    span = np.where(span > 0, span, reached.max(axis=0) - reached.min(axis=0) + 1e-12)
    low = front.min(axis=0) - 0.1 * span
    high = np.maximum(front.max(axis=0), hopeful.max(axis=0))
    samples = np.empty((0, len(low)))
    for _ in range(4):
        fresh = low + (high - low) * rng.random((2048, len(low)))
        covered = (front[:, None, :] >= fresh[None, :, :]).all(axis=2).any(axis=0)
        samples = np.vstack([samples, fresh[~covered]])
        if len(samples) >= 512:
            break
    if len(samples) == 0:
        return np.zeros(len(hopeful))
    gains: Array = (hopeful[:, None, :] >= samples[None, :, :]).all(axis=2).mean(axis=1)
    return gains


registry.register("optimizers", "map", MapSearch)
