"""Where `map` evaluates before it has surrogates to ask: the design, and Bayesian MAP's residual-driven points.

Points are `(n, d)` in the unit cube. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from evomerge.optimizers._core import Array
from evomerge.surrogate import Quadratic

# Evaluations of Li et al. (MAP, arXiv 2406.07529) for 2 to 8 coefficients.
PAPER = {2: 30, 3: 50, 4: 60, 5: 85, 6: 100, 7: 140, 8: 250}
BLOCK = 256

# Bayesian MAP (same paper): bins per angle, and how a bin is drawn.
BINS = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2}
RESAMPLES = 30
KEPT = 0.8
TEMPERATURE = 0.07
RADII = (0.2, 0.8)


def stars(start: Array) -> Array:
    """Return the lower corner, the end of every axis through `start`, `start`, and points of the diagonal.

    Together the first d + 1 reach every face of the cube, so that the box of the data is the whole cube; the products
    and squares of a quadratic show best along the axes and the diagonal (search.md, section 2.2).
    """
    dim = len(start)
    ends = np.repeat(start[None], dim, axis=0)
    ends[np.arange(dim), np.arange(dim)] = 1.0
    diagonal = np.repeat(np.array([0.5, 0.25, 0.75, 1.0])[:, None], dim, axis=1)
    return np.vstack([np.zeros((1, dim)), ends, start[None], diagonal])


def sobol(dim: int, seed: int, number: int) -> Array:
    """Return point `number` `(d,)` of the Sobol sequence that `seed` scrambles."""
    return np.array(_block(dim, seed, number // BLOCK)[number % BLOCK])


@lru_cache(maxsize=8)
def _block(dim: int, seed: int, block: int) -> Array:
    engine = qmc.Sobol(dim, scramble=True, rng=np.random.default_rng([seed]))
    if block:
        engine.fast_forward(block * BLOCK)
    return np.asarray(engine.random(BLOCK))


def untried(cells: NDArray[np.intp], known: Array, number: int) -> Array | None:
    """Return an untried point of a cube that consists of cells only, or None if all cells are known.

    Cells are counted through from a place that `number` sets, so that parallel asks do not meet.
    """
    total = math.prod(int(c) for c in cells)
    count = np.asarray(cells, dtype=np.int64)
    index = np.minimum(np.floor(known * count), count - 1).astype(np.int64)
    tried = {tuple(row) for row in index.tolist()}
    if len(tried) >= total:
        return None
    for step in range(len(tried) + 1):
        cell = np.unravel_index((number * 7919 + step) % total, cells)
        if tuple(int(c) for c in cell) not in tried:
            return np.asarray((np.array(cell) + 0.5) / count)
    raise AssertionError("more cells tried than counted")


def residual_point(model: Quadratic, x: Array, values: Array, zero: Array, rng: np.random.Generator) -> Array:
    """Return a point in a direction in which one objective's surrogate fits badly (Bayesian MAP).

    Directions from `zero` (the unmerged base) are binned by their hyperspherical angles. A bin's score is the mean
    squared residual of its points plus half the standard deviation of that mean when a fifth of them is left out;
    scores are scaled to their largest, since a softmax of the small squared residuals of accuracies is nearly uniform.
    Empty bins count as the worst: nothing says that the surrogate is right there. The bin is drawn by a softmax, the
    radius between 0.2 and 0.8 of the way to the cube's side.
    """
    dim = x.shape[1]
    bins = BINS.get(dim, 1)
    squared = (values - model.mean(x)) ** 2
    home = _bins(x - zero, bins)
    n_bins = bins ** max(dim - 1, 0)
    scores = np.full(n_bins, np.nan)
    for b in np.unique(home):
        mine = squared[home == b]
        kept = max(1, math.ceil(KEPT * len(mine)))
        means = [mine[rng.permutation(len(mine))[:kept]].mean() for _ in range(RESAMPLES)]
        scores[b] = mine.mean() + 0.5 * float(np.std(means))
    top = np.nanmax(scores)
    scaled = np.where(np.isnan(scores), 1.0, scores / top if top > 0 else 1.0)
    odds = np.exp((scaled - scaled.max()) / TEMPERATURE)
    chosen = int(rng.choice(n_bins, p=odds / odds.sum()))
    way = _direction(chosen, bins, dim, rng)
    room = float(np.min((1.0 - zero) / np.maximum(way, 1e-9)))
    return np.asarray(np.clip(zero + way * room * rng.uniform(*RADII), 0.0, 1.0))


def _bins(offset: Array, bins: int) -> NDArray[np.intp]:
    """Return the bin `(n,)` of each offset `(n, d)` from zero; negative offsets count as 0."""
    offset = np.maximum(offset, 0.0)
    home = np.zeros(len(offset), dtype=np.intp)
    for i in range(offset.shape[1] - 1):
        angle = np.arctan2(np.linalg.norm(offset[:, i + 1 :], axis=1), offset[:, i])
        home = home * bins + np.minimum((angle / (np.pi / 2) * bins).astype(np.intp), bins - 1)
    return home


def _direction(chosen: int, bins: int, dim: int, rng: np.random.Generator) -> Array:
    """Return a unit vector `(d,)` of the positive orthant in the chosen bin."""
    digits = [(chosen // bins**k) % bins for k in reversed(range(dim - 1))]
    way, left = np.ones(dim), 1.0
    for i, digit in enumerate(digits):
        angle = (digit + rng.random()) / bins * np.pi / 2
        way[i], left = left * math.cos(angle), left * math.sin(angle)
    way[dim - 1] = left
    return way
