"""One run of CMA-ES on pycma, without pycma's asking: a distribution that is told points and moves.

Hansen, arXiv 1604.00772, does the adaptation. Added here: the start from known results (WS-CMA), the margin for
coordinates of few cells (CMA-ES with Margin) and the limits of a box of width 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from evomerge.optimizers._core import Array

TRIES = 64
CONVERGED = 1e-3  # standard deviation, in unit coordinates, below which a coordinate has nothing left to find
MAX_CONDITION = 1e12
FULL = 100  # dimensions; above, only variances are adapted: a full matrix learns in about d^2 evaluations


class Distribution(Protocol):
    """What an asynchronous search draws points from."""

    @property
    def mean(self) -> Array:
        """The middle of it `(d,)`."""

    def draw(self, z: Array) -> Array:
        """Return the point `(d,)` in the cube that standard normal rows `z` `(TRIES, d)` give."""

    def raw(self, z: Array) -> Array:
        """Return the sample `(d,)` behind that point: what an update is told."""


class Runs(Protocol):
    """The adaptation of a distribution from one start until it has converged."""

    @property
    def normal(self) -> Distribution:
        """The current distribution."""

    @property
    def ended(self) -> bool:
        """Whether nothing more can be learned."""

    def update(self, points: Array, costs: Array) -> None:
        """Move by one generation of points `(n, d)` with costs `(n,)`, smaller is better."""


@dataclass(frozen=True, eq=False)
class Normal:
    """A normal distribution over the cube.

    Attributes:
        mean: (d,).
        root: (d, d) with root @ root.T the covariance, or (d,) standard deviations of independent coordinates.
    """

    mean: Array
    root: Array

    def draw(self, z: Array) -> Array:
        """Return the first point inside the cube that standard normal rows `z` `(TRIES, d)` give; else one clipped.

        Never folded: that would mirror the landscape.
        """
        points = self.mean + (z * self.root if self.root.ndim == 1 else z @ self.root.T)
        inside = ((points >= 0) & (points <= 1)).all(axis=1)
        point: Array = np.clip(points[int(np.argmax(inside))], 0.0, 1.0)
        return point

    def raw(self, z: Array) -> Array:
        """Return what `draw` does: points are not rounded."""
        return self.draw(z)

    @property
    def deviations(self) -> Array:
        """The standard deviation of each coordinate, `(d,)`."""
        return self.root if self.root.ndim == 1 else np.linalg.norm(self.root, axis=1)


def isotropic(mean: Array, sigma: float) -> Normal:
    """Return the distribution with one standard deviation in all directions."""
    dim = len(mean)
    return Normal(mean.copy(), np.full(dim, sigma) if dim > FULL else sigma * np.eye(dim))


def warm_start(best: Array, alpha: float = 0.1) -> Normal:
    """Return the normal distribution nearest to a mixture of small ones around the best known points `(n, d)`.

    Nomura et al., AAAI 2021 (WS-CMA-ES): the mean and the covariance of the points, plus alpha^2 in every direction.
    """
    mean = best.mean(axis=0)
    away = best - mean
    if len(mean) > FULL:
        return Normal(mean, np.sqrt(alpha**2 + (away**2).mean(axis=0)))
    return Normal(mean, np.linalg.cholesky(alpha**2 * np.eye(len(mean)) + away.T @ away / len(best)))


def margin(mean: Array, cells: NDArray[np.intp], share: float) -> Array:
    """Return the least standard deviations `(d,)` with which another cell is drawn with probability `share`.

    0 where a coordinate is continuous or has one cell. Hamano et al., GECCO 2022 (CMA-ES with Margin): otherwise the
    distribution settles within one cell and the search for other values is over.
    """
    position = mean * cells
    cell = np.clip(np.floor(position), 0, np.maximum(cells - 1, 0))
    below = np.where(cell > 0, position - cell, np.inf)
    above = np.where(cell < cells - 1, cell + 1 - position, np.inf)
    nearest = np.minimum(below, above) / np.maximum(cells, 1)
    floors: Array = np.where(np.isfinite(nearest), nearest, 0.0) / norm.isf(share)
    return floors


class Run:
    """CMA-ES from one start until it has converged.

    Attributes:
        normal: the current distribution.
        ended: it has converged or broken down; nothing more can be learned from it.
    """

    def __init__(self, start: Normal, popsize: int, seed: int, cells: NDArray[np.intp]) -> None:
        self.normal, self.ended = start, False
        self._cells, self._share = cells, 1.0 / (popsize * len(start.mean))
        self._es = _pycma(start, popsize, seed)

    def update(self, points: Array, costs: Array) -> None:
        """Move the distribution by one generation: `points` `(n, d)` with `costs` `(n,)`, smaller is better.

        pycma did not draw the points itself, so it shortens steps of implausible length (Hansen, arXiv 1110.4181). That
        matters for foreign points; for own ones, however late, it made no measurable difference.
        """
        es = self._es
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            es.ask()  # pycma wants one before each tell; its sample goes unused
            es.tell([x.copy() for x in points], list(costs))
            # A step size beyond the box says only that the landscape is flat.
            es.sigma /= max(1.0, float(np.max(es.stds)))
            floors = margin(np.clip(es.mean, 0.0, 1.0), self._cells, self._share)
            es.sigma_vec *= np.maximum(1.0, floors / es.stds)
        self.ended = not self._take_over() or not self._moving(floors)

    def _take_over(self) -> bool:
        """Set the distribution from pycma's; False if that one is degenerate."""
        es = self._es
        mean = np.clip(es.mean, 0.0, 1.0)
        scale = es.sigma * es.sigma_vec.scaling * np.ones(len(mean))
        if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
            return False
        if len(mean) > FULL:
            self.normal = Normal(mean, scale)
            return True
        spectrum = np.linalg.eigvalsh(es.sm.C)
        if not 0 < spectrum[-1] < MAX_CONDITION * spectrum[0]:
            return False
        self.normal = Normal(mean, scale[:, None] * np.linalg.cholesky(es.sm.C))
        return True

    def _moving(self, floors: Array) -> bool:
        """Return whether any coordinate still varies: by more than its margin, where it has one."""
        settled = np.where(self._cells > 1, np.maximum(CONVERGED, 1.01 * floors), CONVERGED)
        return bool((self.normal.deviations >= settled).any())


def _pycma(start: Normal, popsize: int, seed: int) -> Any:
    """Return a silent pycma strategy that touches no global generator and no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains about a missing matplotlib
        import cma
        from cma.sigma_adaptation import CMAAdaptSigmaCSA

        rng = np.random.default_rng([seed, 1])
        options = {
            "popsize": popsize,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,
            "verbose": -9,
            "verb_log": 0,
            "signals_filename": "",
            "AdaptSigma": CMAAdaptSigmaCSA,  # from 300 dimensions on its default wants samples of its own
        }
        sigma = float(np.exp(np.log(start.deviations).mean()))
        if start.root.ndim == 1:
            options |= {"CMA_diagonal": True, "CMA_stds": start.root / sigma}
            return cma.CMAEvolutionStrategy(start.mean.copy(), sigma, options)
        sigma = float(np.exp(np.linalg.slogdet(start.root)[1] / len(start.mean)))
        es = cma.CMAEvolutionStrategy(start.mean.copy(), sigma, options)
        es.sm.C = start.root @ start.root.T / sigma**2
        es.sm.update_now(-1)
        es._updateBDfromSM()
        return es
