"""The quadratic surrogate of one objective, with uncertainty, and what is asked of it.

A merged model is base + sum_i c_i * delta_i, so a second-order Taylor expansion of any score around the base
collapses to a quadratic in the few coefficients c (Li et al., MAP, arXiv 2406.07529, eq. 3-5). Scores with two bounds
(accuracies) go through a logit link, scores with one bound (losses) through a softplus link, which keep predictions
inside the bounds; others are modelled as they are. All three fits are ridge regressions with a Gaussian prior on the
coefficients: the mode of a quasi-likelihood for which the link is canonical (McCullagh and Nelder 1989, ch. 9), so
Newton's method has one optimum to find and scores that lie on a bound need no special care.

`fit` makes a surrogate, `posterior` shrinks noisy scores towards it, `evomerge.optimum` searches
it. Points are `(n, d)` in the unit cube, values are larger-is-better. Nothing here knows optimizers or recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, spence

from evomerge.front import non_dominated

Array = NDArray[np.float64]
Terms = Literal["linear", "diagonal", "full"]
Link = Literal["identity", "logit", "softplus"]

# Prior standard deviations of the coefficients over z = 2 x - 1 in [-1, 1], in link units (logits, or standard
# deviations of the data): weak enough for the data, strong enough to tame the points at the box's corners. The d^2 / 2
# products share what there is to explain, so each gets at most PRODUCTS / d. With that the full quadratic predicts
# better than fewer terms at every number of points (measured in 3 to 24 dimensions with 16 to 400 points).
PRIOR_SD = {"constant": 10.0, "linear": 2.0, "square": 1.0, "product": 0.5, "apart": 1.0, "apart square": 0.5}
PRODUCTS = 3.0
MAX_FULL = 26  # 378 coefficients: 60 ms for a fit to 1,000 points
# What the quadratic itself gets wrong, as a share of the value range: no score is trusted beyond it.
MISFIT = 0.01
# Without two bounds a broken merge can score arbitrarily badly. Scores further below the median than this many times
# the distance from the median to the best are moved up to there: bad is all that the model has to know.
TAIL = 4.0
# Candidates share their items, so their scores differ by less than standard errors say. Residuals that are calmer than
# that are believed, down to a tenth of the variance.
CALM, CALMEST = 0.9, 0.1


def n_terms(dim: int, terms: Terms) -> int:
    """Return the number of coefficients of a model in `dim` dimensions."""
    if terms == "full":
        return (dim + 1) * (dim + 2) // 2
    return 1 + dim * (2 if terms == "diagonal" else 1)


def terms_for(dim: int) -> Terms:
    """Return the full quadratic up to `MAX_FULL` dimensions, squares without products above."""
    return "full" if dim <= MAX_FULL else "diagonal"


@cache
def _products(dim: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(dim, 1)


def features(x: Array, terms: Terms, ties: Array | None = None) -> Array:
    """Return the design matrix `(n, p)`: constant, z, z^2, and for "full" the products z_i z_j, z = 2 x - 1.

    With `ties` `(d, k)`, 0/1 with one 1 per row, x lies in a finer space of which each of k coarse coordinates has
    become several. z is then that of their means `(n, k)`, and each coordinate's deviation from its mean adds a
    linear and a square term: the coarse model stays as it is, and what splitting adds is learned beside it.
    """
    if ties is not None:
        coarse = x @ (ties / ties.sum(axis=0))
        apart = 2.0 * (x - coarse @ ties.T)
        return np.hstack([features(coarse, terms), apart, apart * apart])
    z = 2.0 * x - 1.0
    columns = [np.ones((len(x), 1)), z]
    if terms != "linear":
        columns.append(z * z)
    if terms == "full":
        rows, cols = _products(x.shape[1])
        columns.append(z[:, rows] * z[:, cols])
    return np.hstack(columns)


def _inverse_link(kind: Link, eta: Array) -> Array:
    if kind == "logit":
        return np.asarray(expit(eta))
    return np.logaddexp(0.0, eta) if kind == "softplus" else eta


def _slope(kind: Link, eta: Array) -> Array:
    """Return the derivative of the inverse link; for a canonical link also the variance function."""
    if kind == "logit":
        return np.asarray(expit(eta) * expit(-eta))
    return np.asarray(expit(eta)) if kind == "softplus" else np.ones_like(eta)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A fitted surrogate: value = offset + scale * inverse_link(eta), eta = features @ coefficients.

    Attributes:
        coefficients: (p,), on the link scale.
        factor: (p, p); factor @ factor.T is the covariance of the coefficients.
        scale: negative where the link counts down from an upper bound.
    """

    terms: Terms
    coefficients: Array
    factor: Array
    offset: float
    scale: float
    kind: Link
    ties: Array | None = None

    def features(self, x: Array) -> Array:
        """Return the design matrix `(n, p)` of points `(n, d)`."""
        return features(x, self.terms, self.ties)

    def link(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return mean and standard deviation `(n,)` of eta (logits, or standardised values)."""
        phi = self.features(np.atleast_2d(np.asarray(x, dtype=np.float64)))
        return phi @ self.coefficients, np.linalg.norm(phi @ self.factor, axis=1)

    def value(self, eta: Array) -> Array:
        """Return the values `(n,)` that belong to link-scale predictions."""
        return self.offset + self.scale * _inverse_link(self.kind, eta)

    def mean(self, x: Array) -> Array:
        """Return the predicted values `(n,)` at `x` `(n, d)`, without their uncertainty."""
        return self.value(self.features(x) @ self.coefficients)

    def predict(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return mean and standard deviation `(n,)` of the values at `x` `(n, d)`.

        The mean is the value at the mean of the link; the deviation is the first-order one (delta method). It is the
        uncertainty of the surrogate, without the noise of one more evaluation.
        """
        eta, sd = self.link(x)
        return self.value(eta), abs(self.scale) * _slope(self.kind, eta) * sd

    def hopeful(self, x: Array, bonus: float) -> Array:
        """Return the values `(n,)` that are `bonus` standard deviations of eta better than the mean."""
        eta, sd = self.link(x)
        return self.value(eta + np.sign(self.scale) * bonus * sd)

    def gradient(self, x: Array) -> Array:
        """Return the gradient `(d,)` of the predicted value at one point `x` `(d,)`."""
        b = self.coefficients
        eta = self.features(x[None]) @ b
        scale = self.scale * _slope(self.kind, eta) * 2.0
        if self.ties is None:
            return np.asarray(scale * self._quadratic_slope(x))
        means = self.ties / self.ties.sum(axis=0)
        coarse = x @ means
        split = b[-2 * len(x) :]
        apart = split[: len(x)] + 2.0 * split[len(x) :] * 2.0 * (x - self.ties @ coarse)
        return np.asarray(scale * (means @ self._quadratic_slope(coarse) + apart - means @ (self.ties.T @ apart)))

    def _quadratic_slope(self, x: Array) -> Array:
        """Return the gradient of eta over z at one point `(d,)`."""
        dim, b = len(x), self.coefficients
        z = 2.0 * x - 1.0
        slope = b[1 : 1 + dim].copy()
        if self.terms != "linear":
            slope += 2.0 * b[1 + dim : 1 + 2 * dim] * z
        if self.terms == "full":
            rows, cols = _products(dim)
            cross = np.zeros((dim, dim))
            cross[rows, cols] = b[1 + 2 * dim : 1 + 2 * dim + len(rows)]
            slope += (cross + cross.T) @ z
        return slope


def fit(
    x: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None = None,
    *,
    lower: float | None = None,
    upper: float | None = None,
    terms: Terms | None = None,
    ties: Array | None = None,
    focus: ArrayLike | None = None,
) -> Quadratic:
    """Fit one objective to points `x` `(n, d)` in the unit cube.

    The link is logit with two bounds (`lower < upper`), softplus with one, else the identity. `stderr` `(n,)` weights
    the points; NaN means unknown and counts as the median of the known ones. `terms` defaults to `terms_for(d)`.
    `ties` `(d, k)` as in `features`. `focus` `(n,)` in (0, 1] says how much of a point's precision counts: `nearness`.

    Raises:
        ValueError: no points, shapes that do not fit, or values that are not finite.
    """
    return _fit(x, values, stderr, lower, upper, terms, ties, focus)[0]


def nearness(values: ArrayLike) -> Array:
    """Return for each row of values `(n, m)` how much it matters for the shape of the front: (0, 1].

    A quadratic cannot be right everywhere. What the search needs is its shape near the front, so a point's weight
    falls with the smallest step, the same share of each objective's range, that would make it non-dominated (the
    additive epsilon indicator: Zitzler et al. 2003), in units of that step's median: e^-2 at the median, e^-6 at most.
    """
    y = np.asarray(values, dtype=np.float64)
    front = y[non_dominated(y)]
    spread = np.ptp(y, axis=0)
    scaled, best = y / np.where(spread > 0, spread, 1.0), front / np.where(spread > 0, spread, 1.0)
    step = np.zeros(len(y))
    for row in best:
        np.maximum(step, (row - scaled).min(axis=1), out=step)
    middle = float(np.median(step[step > 0])) if (step > 0).any() else 1.0
    return np.asarray(np.exp(-2.0 * np.minimum(step / middle, 3.0)))


def posterior(
    x: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None,
    lower: float | None = None,
    upper: float | None = None,
    ties: Array | None = None,
    focus: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Return mean and standard deviation `(n,)` of each candidate's true value, given all candidates' scores.

    A noisy score is shrunk towards what the surrogate predicts without it: mean = prediction + w (score - prediction)
    with w = t^2 / (t^2 + stderr^2). t^2 is what the predictions get wrong, estimated as the excess variance of the
    leave-one-out residuals over the noise, and at least the surrogate's own variance at the point. The arg-max of
    the means does not win by luck, as that of the scores does. With fewer points than a linear model needs to be
    judged (2 d + 4), or without any known stderr, the scores are returned as they are.

    Raises:
        ValueError: as `fit`.
    """
    points, y = np.asarray(x, dtype=np.float64), np.asarray(values, dtype=np.float64)
    noise = _noise(stderr, len(y))
    dim = points.shape[-1] if ties is None else ties.shape[1]
    if len(y) < 2 * dim + 4 or not noise.any():
        return y.copy(), noise
    model, target, weights = _fit(points, y, stderr, lower, upper, None, ties, focus)
    phi = model.features(points)
    eta = phi @ model.coefficients
    variance = (phi @ model.factor) ** 2 @ np.ones(phi.shape[1])
    leverage = np.minimum(weights * _slope(model.kind, eta) * variance, 0.99)
    # One Newton step away from the point that is left out.
    without = eta - variance * weights * (target - _inverse_link(model.kind, eta)) / (1.0 - leverage)
    predicted = model.value(without)
    own = model.scale**2 * _slope(model.kind, without) ** 2 * variance / (1.0 - leverage)
    residual = model.offset + model.scale * target - predicted
    excess = max(0.0, float(np.mean(residual**2 - noise**2)))
    misfit = np.maximum(excess, own)
    w = misfit / np.maximum(misfit + noise**2, 1e-300)
    return predicted + w * (y - predicted), np.sqrt(w) * noise


def _fit(
    x: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None,
    lower: float | None,
    upper: float | None,
    terms: Terms | None,
    ties: Array | None,
    focus: ArrayLike | None,
) -> tuple[Quadratic, Array, Array]:
    """Return the surrogate, the targets `(n,)` that it was fitted to, and the weights `(n,)` of the points."""
    points, y = np.asarray(x, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or y.shape != (len(points),) or len(y) == 0:
        raise ValueError(f"fit: points {points.shape} and values {y.shape} do not fit together")
    if not (np.isfinite(points).all() and np.isfinite(y).all()):
        raise ValueError("fit: points and values must be finite")
    kind, offset, scale, target = _standardise(y, lower, upper)
    noise = _noise(stderr, len(y)) / abs(scale)
    dim = points.shape[1] if ties is None else ties.shape[1]
    chosen = terms or terms_for(dim)
    phi = features(points, chosen, ties)
    prior = _prior(dim, n_terms(dim, chosen), kind, target)
    if ties is not None:
        share = 1.0 / (ties @ ties.sum(axis=0))  # of a coarse coordinate's effect that one of its parts may have
        prior = np.concatenate([prior, (PRIOR_SD["apart"] * share) ** -2.0, (PRIOR_SD["apart square"] * share) ** -2.0])
    weights = _variance(kind, target) / (noise**2 + MISFIT**2)
    if focus is not None:
        weights = weights * np.asarray(focus, dtype=np.float64)
    beta, hessian = _newton(kind, phi, target, weights, prior, _start(kind, phi, target, weights, prior))
    counted = float(len(y) if focus is None else np.sum(focus))
    dispersion = _dispersion(kind, phi, target, weights, beta, hessian, counted)
    if dispersion > 1.0 or dispersion < CALM:
        weights = weights / max(dispersion, CALMEST)
        beta, hessian = _newton(kind, phi, target, weights, prior, beta)
    # hessian = L L^T, so the covariance's factor is L^-T.
    factor = np.linalg.inv(np.linalg.cholesky(hessian)).T
    return Quadratic(chosen, beta, factor, offset, scale, kind, ties), target, weights


def _standardise(y: Array, lower: float | None, upper: float | None) -> tuple[Link, float, float, Array]:
    """Return the link, offset and scale, and the targets: (y - offset) / scale inside the link's range."""
    low = lower if lower is not None and np.isfinite(lower) else None
    high = upper if upper is not None and np.isfinite(upper) else None
    if low is not None and high is not None and low < high:
        return "logit", low, high - low, np.clip((y - low) / (high - low), 0.0, 1.0)
    middle, best = float(np.median(y)), float(y.max())
    if best > middle:
        y = np.maximum(y, middle - TAIL * (best - middle))
    spread = float(y.std())
    spread = spread if spread > 1e-12 * max(1.0, float(np.abs(y).max())) else 1.0
    if low is not None and high is None:
        return "softplus", low, spread, np.maximum((y - low) / spread, 0.0)
    if high is not None and low is None:
        return "softplus", high, -spread, np.maximum((high - y) / spread, 0.0)
    return "identity", float(y.mean()), spread, (y - y.mean()) / spread


def _noise(stderr: ArrayLike | None, n: int) -> Array:
    if stderr is None:
        return np.zeros(n)
    noise = np.array(stderr, dtype=np.float64)
    if noise.shape != (n,):
        raise ValueError(f"fit: {n} values but stderr has the shape {noise.shape}")
    known = np.isfinite(noise)
    noise[~known] = np.median(noise[known]) if known.any() else 0.0
    return noise


def _prior(dim: int, p: int, kind: Link, target: Array) -> Array:
    """Return the prior's precision `(p,)`."""
    sd = np.full(p, min(PRIOR_SD["product"], PRODUCTS / dim))
    # A loss far from its bound lies many of its own standard deviations away from it.
    sd[0] = max(PRIOR_SD["constant"], float(target.max())) if kind == "softplus" else PRIOR_SD["constant"]
    sd[1 : 1 + dim] = PRIOR_SD["linear"]
    sd[1 + dim : 1 + 2 * dim] = PRIOR_SD["square"]
    return 1.0 / sd**2


def _variance(kind: Link, target: Array) -> Array:
    """Return the variance function at the scores: it turns standard errors into weights (numbers of trials)."""
    if kind == "logit":
        middle = np.clip(target, 0.05, 0.95)
        return middle * (1 - middle)
    return -np.expm1(-np.maximum(target, 0.05)) if kind == "softplus" else np.ones_like(target)


def _start(kind: Link, phi: Array, y: Array, weights: Array, precision: Array) -> Array:
    """Return the ridge regression of the transformed scores, where Newton's method begins."""
    if kind == "identity":
        return np.zeros(phi.shape[1])  # its first step is the solution
    if kind == "logit":
        middle = np.clip(y, 0.02, 0.98)
        eta, weights = np.log(middle / (1 - middle)), weights * middle * (1 - middle)
    else:
        middle = np.maximum(y, 0.02)
        eta, weights = middle + np.log(-np.expm1(-middle)), weights * -np.expm1(-middle)
    hessian = (phi.T * weights) @ phi
    hessian[np.diag_indices_from(hessian)] += precision
    return np.asarray(cho_solve(cho_factor(hessian), phi.T @ (weights * eta)))


def _potential(kind: Link, eta: Array) -> Array:
    """Return the integral of the inverse link (the cumulant function of the quasi-likelihood)."""
    if kind == "logit":
        return np.logaddexp(0.0, eta)
    if kind == "identity":
        return 0.5 * eta**2
    # Of softplus it is -Li2(-e^eta), here by the dilogarithm's inversion formula where e^eta would overflow.
    tail = -np.asarray(spence(1.0 + np.exp(-np.abs(eta))))
    return np.where(eta > 0, np.pi**2 / 6 + 0.5 * eta**2 - tail, tail)


def _newton(kind: Link, phi: Array, y: Array, weights: Array, precision: Array, beta: Array) -> tuple[Array, Array]:
    """Return the mode of the quasi-posterior and the Hessian there (damped Newton; the loss is convex)."""

    def loss(b: Array) -> float:
        eta = phi @ b
        return float(weights @ (_potential(kind, eta) - y * eta) + 0.5 * precision @ b**2)

    current = loss(beta)
    for _ in range(20):
        eta = phi @ beta
        hessian = (phi.T * (weights * np.maximum(_slope(kind, eta), 1e-9))) @ phi
        hessian[np.diag_indices_from(hessian)] += precision
        gradient = phi.T @ (weights * (y - _inverse_link(kind, eta))) - precision * beta
        step = cho_solve(cho_factor(hessian), gradient)
        gain = float(gradient @ step)  # twice the decrease that Newton expects
        if gain < 1e-6:
            break
        for shrink in (1.0, 0.5, 0.25, 0.1, 0.01):
            trial = loss(beta + shrink * step)
            if trial < current:
                beta, current = beta + shrink * step, trial
                break
        else:
            break
    return beta, hessian


def _dispersion(kind: Link, phi: Array, y: Array, weights: Array, beta: Array, hessian: Array, counted: float) -> float:
    """Return how much larger the residuals are than the weights say (Pearson's chi^2 per degree of freedom).

    `counted` is the number of points, those out of focus as the share of them that counts.
    """
    eta = phi @ beta
    variance = np.maximum(_slope(kind, eta), 1e-4)
    residual = (y - _inverse_link(kind, eta)) ** 2 / variance
    # trace of the hat matrix: the degrees of freedom that the fit really used
    used = float(np.sum(cho_solve(cho_factor(hessian), (phi.T * (weights * variance))) * phi.T))
    free = counted - used
    return float(weights @ residual / free) if free > 1.0 else 1.0
