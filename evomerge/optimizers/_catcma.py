"""One run of CatCMA with margin on `cmaes`, without its asking: a distribution that is told points and moves.

Hamano et al., arXiv 2504.07884 (CatCMAwM), does the adaptation: a normal distribution over numbers and whole numbers,
and a probability per category. Added here: sampling by hand, so that a point is a function of the distribution and of
given normal rows; the box; and guards, since `cmaes` divides by norms that ties and flat landscapes make zero. Private
attributes of `cmaes` 0.13 are read in this file only; `tests/test_catcma.py` names each that is gone.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from evomerge.optimizers._cma import CONVERGED
from evomerge.optimizers._core import Array

PRIVATE = ("_mean", "_sigma", "_C", "_A", "_q", "_p_sigma", "_pc", "_s", "_Delta", "_gamma", "_calc_continuous_penalty")
MARGIN_SHARE = 0.73  # chance that no discrete coordinate leaves its settled value (CatCMAwM, section 4)
MOST_OTHER = 0.9  # times the share of other categories in an even distribution: the start stays the likeliest
SETTLED = 1.05  # times the margin: nothing but the margin is left


@dataclass(frozen=True, eq=False)
class Layout:
    """Which coordinates of the cube are numbers, whole numbers and categories.

    Two cells are categories, ordered or not. A single cell is neither: it stays at its middle.

    Attributes:
        cells: (d,) as in Facts.
        numbers: continuous coordinates.
        whole: coordinates of three or more ordered cells.
        choices: coordinates of two cells, or of more without an order.
    """

    cells: NDArray[np.intp]
    numbers: NDArray[np.intp]
    whole: NDArray[np.intp]
    choices: NDArray[np.intp]

    @classmethod
    def of(cls, cells: NDArray[np.intp], categorical: NDArray[np.bool_]) -> Layout:
        """Return the layout of coordinates with so many cells."""
        choice = (cells == 2) | ((cells > 2) & categorical)
        whole = (cells > 2) & ~categorical
        return cls(cells, np.flatnonzero(cells == 0), np.flatnonzero(whole), np.flatnonzero(choice))

    @cached_property
    def normal(self) -> NDArray[np.intp]:
        """The coordinates of the normal distribution: numbers, then whole numbers."""
        return np.concatenate([self.numbers, self.whole])

    @property
    def alpha(self) -> float:
        """The chance with which a settled discrete coordinate still takes another value."""
        return 1.0 - float(MARGIN_SHARE ** (1.0 / max(1, len(self.whole) + len(self.choices))))

    def cut(self, raw: Array) -> Array:
        """Return the point `(d,)` of a raw one: whole numbers at the middle of their cell."""
        middles = (self.categories(raw) + 0.5) / np.maximum(self.cells, 1)
        return np.clip(np.where(self.cells > 0, middles, raw), 0.0, 1.0)

    def categories(self, x: Array) -> NDArray[np.intp]:
        """Return the cells `(d,)` of a point; 0 for numbers."""
        return np.clip(np.floor(x * self.cells), 0, np.maximum(self.cells - 1, 0)).astype(np.intp)


@dataclass(frozen=True, eq=False)
class Mixed:
    """A distribution over numbers, whole numbers and categories.

    Attributes:
        centre: (g,) mean of the normal coordinates.
        root: (g, g) with root @ root.T their covariance.
        shares: (c, most categories) probabilities; 0 beyond the categories that a coordinate has.
    """

    layout: Layout
    centre: Array
    root: Array
    shares: Array

    @property
    def mean(self) -> Array:
        """The most likely categories, and the mean of the rest: a point `(d,)` of the cube."""
        cells = self.shares.argmax(axis=1) if len(self.shares) else np.zeros(0, dtype=np.intp)
        return self.layout.cut(self._whole(np.clip(self.centre, 0.0, 1.0), cells))

    def draw(self, z: Array) -> Array:
        """Return the point `(d,)` that standard normal rows `z` `(TRIES, d)` give."""
        return self.layout.cut(self.raw(z))

    def raw(self, z: Array) -> Array:
        """Return the sample `(d,)` before whole numbers are rounded to their cell.

        The first row whose numbers lie inside the cube counts; if none does, the first one, clipped.
        """
        n = len(self.layout.numbers)
        sample = first = self.centre + self.root @ z[0, self.layout.normal]
        for row in z[1:]:
            if ((sample[:n] >= 0) & (sample[:n] <= 1)).all():
                break
            sample = self.centre + self.root @ row[self.layout.normal]
        else:
            sample = np.r_[np.clip(first[:n], 0.0, 1.0), first[n:]]
        return self._whole(sample, self._categories(norm.cdf(z[0, self.layout.choices])))

    def _categories(self, uniform: Array) -> NDArray[np.intp]:
        reached = np.cumsum(self.shares, axis=1) < uniform[:, None]
        last = self.layout.cells[self.layout.choices] - 1
        return np.asarray(np.minimum(reached.sum(axis=1), last), dtype=np.intp)

    def _whole(self, sample: Array, categories: NDArray[np.intp]) -> Array:
        raw = np.full(len(self.layout.cells), 0.5)
        raw[self.layout.normal] = sample
        raw[self.layout.choices] = (categories + 0.5) / self.layout.cells[self.layout.choices]
        return raw


def around(place: Array, sigma: float, changes: float, layout: Layout) -> Mixed:
    """Return a distribution around a point `(d,)`, whose samples change about `changes` of its categories."""
    cells = layout.cells[layout.choices]
    shares = np.zeros((len(cells), int(cells.max(initial=0))))
    own = layout.categories(place)[layout.choices]
    for i, k in enumerate(cells):
        other = min(changes / len(cells), MOST_OTHER * (k - 1) / k)
        shares[i, :k] = other / (k - 1)
        shares[i, own[i]] = 1.0 - other
    g = len(layout.normal)
    return Mixed(layout, place[layout.normal].astype(np.float64), sigma * np.eye(g), shares)


class MixedRun:
    """CatCMA with margin from one start until it has converged.

    Attributes:
        normal: the current distribution.
        ended: it has converged; nothing more can be learned from it.
    """

    def __init__(self, start: Mixed, sigma: float, popsize: int) -> None:
        self.normal, self.ended = start, False
        self._layout = start.layout
        self._es = _strategy(start, sigma, popsize)

    def update(self, points: Array, costs: Array) -> None:
        """Move the distribution by one generation: raw `points` `(n, d)` with `costs` `(n,)`, smaller is better.

        A generation without differences teaches nothing and is passed over, and so is one that breaks the strategy.
        """
        if not np.isfinite(costs).all() or costs.max() <= costs.min():
            return
        layout = self._layout
        cells = np.array([layout.categories(x)[layout.choices] for x in points])
        kinds = np.arange(self.normal.shares.shape[1])
        solutions = [
            (self._es.Solution(c=own[:, None] == kinds, _v_raw=self._shortened(x[layout.normal])), float(cost))
            for x, own, cost in zip(points, cells, costs, strict=True)
        ]
        moved = copy.deepcopy(self._es)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            moved.tell(solutions)
            if not self._bounded(moved):
                return
            self._es = moved
            self.normal = self._snapshot()
        self.ended = not self._moving()

    def _shortened(self, sample: Array) -> Array:
        """Return a sample `(g,)`, nearer if no draw from the distribution would be as far: another's point.

        Hansen, arXiv 1110.4181, section 3: a step has at most the length sqrt(g) + 2 g / (g + 2).
        """
        g = len(sample)
        if g == 0:
            return sample.copy()
        away = sample - self.normal.centre
        length = float(np.linalg.norm(np.linalg.lstsq(self.normal.root, away, rcond=None)[0]))
        most = math.sqrt(g) + 2 * g / (g + 2)
        return self.normal.centre + away * min(1.0, most / max(length, 1e-300))

    def _bounded(self, es: Any) -> bool:
        """Keep the strategy inside the cube; False if it has values that are not finite."""
        if len(self._layout.normal):
            deviations = es._sigma * es._A * np.sqrt(np.diag(es._C))
            if not (np.isfinite(deviations).all() and np.isfinite(es._p_sigma).all() and np.isfinite(es._pc).all()):
                return False
            es._sigma /= max(1.0, float(deviations.max()))  # a step beyond the box says only that the land is flat
            n, cells = len(self._layout.numbers), self._layout.cells[self._layout.whole]
            # Rows of fewer whole numbers are padded in cmaes: beyond their last value the margin would be for nothing.
            low, high = np.r_[np.zeros(n), 0.5 / cells], np.r_[np.ones(n), 1 - 0.5 / cells]
            es._mean = np.clip(es._mean, low, high)
        if len(self._layout.choices):
            numbers = [es._q.sum(), es._s.sum(), es._Delta, es._gamma]
            return bool(np.isfinite(numbers).all() and (es._q >= 0).all())
        return True

    def _snapshot(self) -> Mixed:
        es, g = self._es, len(self._layout.normal)
        root = np.zeros((g, g))
        centre = np.zeros(0)
        if g:
            directions, lengths = es._eigen_decomposition()
            root, centre = (es._sigma * es._A)[:, None] * directions * lengths, es._mean.copy()
        shares = es._q.copy() if len(self._layout.choices) else np.zeros((0, 0))
        return Mixed(self._layout, centre, root, shares)

    def _moving(self) -> bool:
        """Return whether anything still varies: by more than its margin, where it has one."""
        deviations = np.linalg.norm(self.normal.root, axis=1)
        n, limit = len(self._layout.numbers), SETTLED * self._layout.alpha
        if (deviations[:n] >= CONVERGED).any() or (1.0 - self.normal.shares.max(axis=1, initial=0.0) > limit).any():
            return True
        return bool(len(self._layout.whole) and (self._es._pmut > limit).any())


def _strategy(start: Mixed, sigma: float, popsize: int) -> Any:
    """Return CatCMAwM with this distribution, in the geometry of the cube."""
    from cmaes import CatCMAwM

    layout = start.layout
    covariance = start.root @ start.root.T / sigma**2
    es = CatCMAwM(
        x_space=[[0.0, 1.0]] * len(layout.numbers) or None,
        z_space=[list((np.arange(k) + 0.5) / k) for k in layout.cells[layout.whole]] or None,
        c_space=[int(k) for k in layout.cells[layout.choices]] or None,
        population_size=popsize,
        mean=start.centre.copy() if len(layout.normal) else None,
        sigma=sigma,
        cov=covariance if len(layout.normal) else None,
        cat_param=start.shares.copy() if len(layout.choices) else None,
        seed=0,  # never drawn from
    )
    # Samples are inside the box already, and the median of no history is NaN.
    es._calc_continuous_penalty = _no_penalty
    return es


def _no_penalty(samples: Array, costs: Array) -> Array:
    return np.zeros(len(costs))
