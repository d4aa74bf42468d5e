"""Where on the predicted front the next evaluation helps most: the acquisition of `map`.

A pool of points evolves on the surrogates, then the point is taken whose optimistic prediction adds most to the front
of the posterior means of everything evaluated or pending. "Most" is hypervolume by Monte Carlo up to four objectives.
Above, it is measured along reference directions (Das and Dennis 1998): how far a point's orthant reaches along each
ray from the worst corner, the mean of which to the power m is the hypervolume in polar coordinates. Constraints
multiply the gain by the probability that the surrogates' uncertainty gives to all floors being kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.special import ndtr

from evomerge.front import non_dominated
from evomerge.optimizers._core import Array
from evomerge.surrogate import Quadratic

POOL = 512
ELITES = 48  # anchors of the search on the surrogates
CHILDREN = 8
ROUNDS = 3
HOPELESS = 0.4  # share of successes around a point below which it is not tried: failures are mostly deterministic
SAME = 0.005  # two points closer than this in every coordinate are the same experiment
RAYS = 200  # at most this many reference directions in the outer layer
VOLUME = 4  # objectives up to which the hypervolume is sampled

Barred = Callable[[Array, Array], Array]


@dataclass(frozen=True, eq=False)
class Box:
    """The part of the cube that is searched; `cells` `(d,)` as in Facts: a value in a cell means its middle."""

    low: Array
    high: Array
    cells: NDArray[np.intp]

    def snap(self, x: Array) -> Array:
        """Return points `(n, d)` inside the box, with the discrete coordinates in the middle of their cells."""
        x = np.asarray(np.clip(x, self.low, self.high))
        if not self.cells.any():
            return x
        count = np.maximum(self.cells, 1)
        middle = (np.minimum(np.floor(x * count), count - 1) + 0.5) / count
        return np.asarray(np.where(self.cells > 0, middle, x))

    def scale(self, unit: Array) -> Array:
        """Return the points of the box that belong to points `(n, d)` of the unit cube."""
        return self.snap(self.low + (self.high - self.low) * unit)


def near(points: Array, known: Array) -> NDArray[np.bool_]:
    """Return the mask `(n,)` of the points that repeat a known one."""
    if len(known) == 0 or len(points) == 0:
        return np.zeros(len(points), dtype=np.bool_)
    distance, _ = KDTree(known).query(points, p=np.inf, distance_upper_bound=SAME)
    return np.asarray(distance < SAME)


def propose(
    models: Sequence[Quadratic],
    known: Array,
    failed: Array,
    box: Box,
    floors: Array | None,
    optimism: float,
    rng: np.random.Generator,
) -> Array | None:
    """Return the point `(d,)` with the largest optimistic gain over `known` `(k, d)`, or None if nothing promises any.

    `failed` `(f, d)` are points that gave no result: they are not repeated, and gains near them count less.
    """
    reached = _means(models, known)
    allowed = _missing(models, reached, floors) <= 0
    start = known[allowed][non_dominated(reached[allowed])] if allowed.any() else known[-ELITES:]

    def barred(x: Array, values: Array) -> Array:
        return np.asarray(_missing(models, values, floors) + (_survival(x, known, failed, box) == 0))

    pool = _evolve(models, start, box, barred, rng)
    pool = pool[~near(pool, np.vstack([known, failed]))]
    if len(pool) == 0:
        return None
    bonus = optimism * rng.random()
    hopeful = np.column_stack([model.hopeful(pool, bonus) for model in models])
    chance = _chance(models, pool, floors) * _survival(pool, known, failed, box)
    if not allowed.any():
        order = np.lexsort((-chance, _missing(models, hopeful, floors)))
        return np.asarray(pool[order[0]])
    gains = gain(hopeful, reached[allowed], rng) * chance
    best = int(np.argmax(gains))
    if gains[best] > 0:
        return np.asarray(pool[best])
    # One objective: the surrogate's optimum is known already; the best point beside it still improves the fit.
    sound = np.flatnonzero(chance > HOPELESS)
    return np.asarray(pool[sound[np.argmax(hopeful[sound, 0])]]) if len(models) == 1 and len(sound) else None


def _means(models: Sequence[Quadratic], x: Array) -> Array:
    return np.asarray(np.column_stack([model.mean(x) for model in models]), dtype=np.float64)


def _missing(models: Sequence[Quadratic], values: Array, floors: Array | None) -> Array:
    """By how much each row misses the floors, summed in the scales of the objectives; 0 if feasible."""
    if floors is None:
        return np.zeros(len(values))
    scale = np.array([abs(model.scale) for model in models])
    short = np.where(np.isfinite(floors), (floors - values) / scale, 0.0)
    return np.asarray(np.maximum(short, 0.0).sum(axis=1))


def _chance(models: Sequence[Quadratic], x: Array, floors: Array | None) -> Array:
    """The probability `(n,)` that the true values keep all floors, with independent objectives."""
    chance = np.ones(len(x))
    for j, model in enumerate(models):
        if floors is not None and np.isfinite(floors[j]):
            mean, sd = model.predict(x)
            chance *= ndtr((mean - floors[j]) / np.maximum(sd, 1e-9 * abs(model.scale)))
    return chance


def _survival(x: Array, known: Array, failed: Array, box: Box) -> Array:
    """The share of successes around each point (Gaussian kernel, one success in advance); 0 below `HOPELESS`."""
    if len(failed) == 0:
        return np.ones(len(x))
    width = 0.1 * np.maximum(box.high - box.low, SAME) * math.sqrt(x.shape[1])

    def weight(others: Array) -> Array:
        scaled, theirs = x / width, others / width
        squared = (scaled**2).sum(axis=1)[:, None] + (theirs**2).sum(axis=1) - 2.0 * scaled @ theirs.T
        return np.asarray(np.exp(-0.5 * squared).sum(axis=1))

    good = 1.0 + weight(known)
    share = good / (good + weight(failed))
    return np.where(share < HOPELESS, 0.0, share)


def _evolve(models: Sequence[Quadratic], start: Array, box: Box, barred: Barred, rng: np.random.Generator) -> Array:
    """Return points around the predicted front: rounds of selection and variation from `start` and random points.

    `barred(x, values)` `(n,)` is 0 for the points that may be on it.
    """
    pool = np.vstack([box.scale(rng.random((POOL, len(box.low)))), box.snap(start)])
    for _ in range(ROUNDS):
        values = _means(models, pool)
        anchors = pool[_elite(values, barred(pool, values), rng)]
        pool = np.vstack([anchors, box.snap(_vary(anchors, box, rng))])
    return np.asarray(pool)


def _elite(values: Array, missing: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return `ELITES` rows: the best of the feasible ones, then the least infeasible.

    The best are the first non-dominated layers, the last one thinned at random; above `VOLUME` objectives, where all
    rows are non-dominated, the furthest along each of some reference directions.
    """
    good, bad = np.flatnonzero(missing <= 0), np.flatnonzero(missing > 0)
    spare = bad[np.argsort(missing[bad], kind="stable")]
    if values.shape[1] == 1:
        good = good[np.argsort(-values[good, 0], kind="stable")]
    elif len(good) and values.shape[1] > VOLUME:
        low, span = _frame(values[good])
        rays = reference_directions(values.shape[1])
        rays = rays[rng.permutation(len(rays))[:ELITES]]
        good = good[np.unique(np.argmax(reach(values[good], low, span, rays), axis=0))]
    elif len(good):
        chosen: list[NDArray[np.intp]] = []
        rest = good
        while sum(map(len, chosen)) < ELITES and len(rest):
            layer = non_dominated(values[rest])
            chosen.append(rng.permutation(rest[layer]))
            rest = rest[~layer]
        good = np.concatenate(chosen)
    return np.concatenate([good, spare])[:ELITES]


def _vary(anchors: Array, box: Box, rng: np.random.Generator) -> Array:
    """Return varied copies of each anchor: blends with another anchor plus steps of mixed size."""
    parents = np.repeat(anchors, CHILDREN, axis=0)
    partners = anchors[rng.integers(len(anchors), size=len(parents))]
    blend = np.where(rng.random(len(parents)) < 0.5, rng.random(len(parents)), 0.0)[:, None]
    size = 10.0 ** rng.uniform(-2.3, -0.7, (len(parents), 1))
    moved = rng.random(parents.shape) < rng.uniform(0.1, 1.0, (len(parents), 1))
    step = size * rng.standard_normal(parents.shape) * moved * (box.high - box.low)
    return np.asarray(parents + blend * (partners - parents) + step)


def gain(hopeful: Array, reached: Array, rng: np.random.Generator) -> Array:
    """Return what each row of `hopeful` `(n, m)` adds to the front of `reached` `(k, m)`; `(n,)`, only ranks matter."""
    if reached.shape[1] == 1:
        return np.asarray(np.maximum(hopeful[:, 0] - reached.max(), 0.0))
    many = reached.shape[1] > VOLUME
    front = reached if many else reached[non_dominated(reached)]
    # The front as it is predicted: the one reached may still be a single point, beside which nothing would count.
    low, span = _frame(np.vstack([hopeful, front]))
    if many:
        rays = reference_directions(reached.shape[1])
        best = np.maximum(reach(front, low, span, rays).max(axis=0), 0.0)
        power = reached.shape[1]
        return np.asarray(np.maximum(reach(hopeful, low, span, rays) ** power - best**power, 0.0).mean(axis=1))
    gains = np.zeros(len(hopeful))
    # A dominated prediction never gains more than the one that dominates it.
    choice = np.flatnonzero(non_dominated(hopeful))
    gains[choice] = _volumes(hopeful[choice], front, low, rng)
    return gains


def _frame(values: Array) -> tuple[Array, Array]:
    """Return the reference `(m,)`, a tenth below the front's worst values so that its ends can grow, and its range.

    Above `VOLUME` objectives, where nearly everything is non-dominated, the best row of each objective stands for the
    front (the payoff table).
    """
    few = values.shape[1] <= VOLUME
    front = values[non_dominated(values) if few else np.unique(values.argmax(axis=0))]
    span = np.ptp(front, axis=0)
    span = np.where(span > 0, span, np.ptp(values, axis=0) + 1e-12)
    return np.asarray(front.min(axis=0) - 0.1 * span), np.asarray(span)


def _volumes(hopeful: Array, front: Array, low: Array, rng: np.random.Generator) -> Array:
    """Return the shares of the not yet dominated box that each row dominates, by Monte Carlo."""
    high = np.maximum(front.max(axis=0), hopeful.max(axis=0))
    samples = np.empty((0, len(low)))
    for _ in range(4):
        fresh = low + (high - low) * rng.random((2048, len(low)))
        samples = np.vstack([samples, fresh[~_covers(front, fresh).any(axis=0)]])
        if len(samples) >= 512:
            break
    return np.asarray(_covers(hopeful, samples).mean(axis=1)) if len(samples) else np.zeros(len(hopeful))


def _covers(points: Array, samples: Array) -> NDArray[np.bool_]:
    """Return the mask `(n, s)`: whether a point is at least as good as a sample in every objective."""
    mask = np.ones((len(points), len(samples)), dtype=np.bool_)
    for j in range(points.shape[1]):
        mask &= points[:, j, None] >= samples[None, :, j]
    return mask


def reach(values: Array, low: Array, span: Array, rays: Array) -> Array:
    """Return how far `(n, r)` along each ray from `low` the orthant below each row of `values` reaches; not below 0."""
    lengths = np.full((len(values), len(rays)), np.inf)
    for j in range(values.shape[1]):
        np.minimum(lengths, ((values[:, j] - low[j]) / span[j])[:, None] / rays[:, j], out=lengths)
    return np.asarray(np.maximum(lengths, 0.0))


@cache
def reference_directions(m: int) -> Array:
    """Return unit vectors `(r, m)` spread over the positive orthant: the simplex lattice of Das and Dennis 1998.

    The finest lattice with at most `RAYS` points; with fewer divisions than objectives, where all of them lie on the
    simplex's border, a second layer half-way to the centre (Deb and Jain 2014).
    """
    divisions = max(h for h in range(1, RAYS) if h == 1 or math.comb(h + m - 1, m - 1) <= RAYS)
    bars = np.array(list(combinations(range(divisions + m - 1), m - 1)), dtype=np.int64).reshape(-1, m - 1)
    edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), divisions + m - 1)])
    lattice = (np.diff(edges, axis=1) - 1) / divisions
    if divisions < m:
        lattice = np.vstack([lattice, 0.5 * lattice + 0.5 / m])
    rays = np.maximum(lattice, 0.01)
    unit: Array = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    unit.flags.writeable = False  # shared by all callers
    return unit
