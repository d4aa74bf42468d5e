"""The quadratic surrogate of one objective, with uncertainty.

A merged model is base + sum_i c_i * delta_i, so a second-order Taylor expansion of any score around the base
collapses to a quadratic in the few coefficients c (Li et al., MAP, arXiv 2406.07529, eq. 3-5). Scores with two bounds
(accuracies) go through a logit link, which keeps predictions inside the bounds; others are modelled as they are.
Fitting is a ridge regression with a Gaussian prior on the coefficients; with the logit link it is a quasi-binomial
maximum a posteriori fit by Newton's method, which is convex and, unlike transforming the data, takes scores of
exactly 0 and 1. Points are `(n, d)` in the unit cube. Nothing here knows optimizers or recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

Array = NDArray[np.float64]
Terms = Literal["linear", "diagonal", "full"]

# Prior standard deviations of the coefficients over z = 2 x - 1 in [-1, 1], in link units (logits, or standard
# deviations of the data): weak enough for the data, strong enough to tame the points at the box's corners.
PRIOR_SD = {"constant": 10.0, "linear": 2.0, "quadratic": 1.0}
# What the quadratic itself gets wrong, as a share of the value range: no score is trusted beyond it.
MISFIT = 0.01


def n_terms(dim: int, terms: Terms) -> int:
    """Return the number of coefficients of a model in `dim` dimensions."""
    if terms == "full":
        return (dim + 1) * (dim + 2) // 2
    return 1 + dim * (2 if terms == "diagonal" else 1)


def terms_for(n: int, dim: int) -> Terms:
    """Return the richest model with at least two points more than coefficients; linear where even that fails."""
    if n >= n_terms(dim, "full") + 2:
        return "full"
    return "diagonal" if n >= n_terms(dim, "diagonal") + 2 else "linear"


def features(x: Array, terms: Terms) -> Array:
    """Return the design matrix `(n, p)`: constant, z, z^2, and for "full" the products z_i z_j, z = 2 x - 1."""
    z = 2.0 * x - 1.0
    columns = [np.ones((len(x), 1)), z]
    if terms != "linear":
        columns.append(z * z)
    if terms == "full":
        rows, cols = np.triu_indices(x.shape[1], 1)
        columns.append(z[:, rows] * z[:, cols])
    return np.hstack(columns)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A fitted surrogate: coefficients, their covariance `(p, p)`, and the scale of the values."""

    terms: Terms
    coefficients: Array
    factor: Array  # (p, p), factor @ factor.T is the covariance of the coefficients
    offset: float  # value = offset + scale * link^-1(features @ coefficients)
    scale: float
    logit: bool

    def link(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return mean and standard deviation `(n,)` on the link scale (logits, or standardised values)."""
        phi = features(np.atleast_2d(np.asarray(x, dtype=np.float64)), self.terms)
        return phi @ self.coefficients, np.linalg.norm(phi @ self.factor, axis=1)

    def value(self, eta: Array) -> Array:
        """Return the values `(n,)` that belong to link-scale predictions."""
        return self.offset + self.scale * (expit(eta) if self.logit else eta)

    def predict(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return mean and standard deviation `(n,)` of the values at `x` `(n, d)`.

        The mean is the value at the mean of the link; the deviation is the first-order one (delta method). It is the
        uncertainty of the surrogate, without the noise of one more evaluation.
        """
        eta, sd = self.link(x)
        slope = expit(eta) * expit(-eta) if self.logit else 1.0
        return self.value(eta), self.scale * slope * sd


def fit(
    x: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None = None,
    *,
    lower: float | None = None,
    upper: float | None = None,
    terms: Terms | None = None,
) -> Quadratic:
    """Fit one objective to points `x` `(n, d)` in the unit cube.

    With both bounds given (`lower < upper`), the link is logit. `stderr` `(n,)` weights the points; NaN means unknown
    and counts as the median of the known ones. `terms` defaults to `terms_for(n, d)`.

    Raises:
        ValueError: no points, shapes that do not fit, or values that are not finite.
    """
    points, y = np.asarray(x, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or y.shape != (len(points),) or len(y) == 0:
        raise ValueError(f"fit: points {points.shape} and values {y.shape} do not fit together")
    if not (np.isfinite(points).all() and np.isfinite(y).all()):
        raise ValueError("fit: points and values must be finite")
    logit = lower is not None and upper is not None and 0 < upper - lower < np.inf
    if lower is not None and upper is not None and logit:
        offset, scale = float(lower), float(upper - lower)
    else:
        spread = float(y.std())
        offset, scale = float(y.mean()), spread if spread > 0 else 1.0
    target = (y - offset) / scale
    if logit:
        target = np.clip(target, 0.0, 1.0)
    noise = _noise(stderr, len(y)) / scale
    chosen = terms or terms_for(len(y), points.shape[1])
    phi = features(points, chosen)
    precision = _prior_precision(points.shape[1], phi.shape[1])
    weights = 1.0 / (noise**2 + MISFIT**2)
    if logit:
        middle = np.clip(target, 0.05, 0.95)
        weights *= middle * (1 - middle)  # binomial variance: the number of trials that has this error
    solve = _logistic if logit else _linear
    beta, hessian = solve(phi, target, weights, precision)
    dispersion = _dispersion(phi, target, weights, beta, hessian, logit)
    if dispersion > 1.0:
        beta, hessian = solve(phi, target, weights / dispersion, precision)
    # hessian = L L^T, so the covariance's factor is L^-T.
    factor = np.linalg.inv(np.linalg.cholesky(hessian)).T
    return Quadratic(chosen, beta, factor, offset, scale, logit)


def _noise(stderr: ArrayLike | None, n: int) -> Array:
    if stderr is None:
        return np.zeros(n)
    noise = np.array(stderr, dtype=np.float64)
    if noise.shape != (n,):
        raise ValueError(f"fit: {n} values but stderr has the shape {noise.shape}")
    known = np.isfinite(noise)
    noise[~known] = np.median(noise[known]) if known.any() else 0.0
    return noise


def _prior_precision(dim: int, p: int) -> Array:
    sd = np.full(p, PRIOR_SD["quadratic"])
    sd[1 : 1 + dim] = PRIOR_SD["linear"]
    sd[0] = PRIOR_SD["constant"]
    return 1.0 / sd**2


def _linear(phi: Array, y: Array, weights: Array, precision: Array) -> tuple[Array, Array]:
    """Return the ridge solution and its Hessian."""
    hessian = (phi.T * weights) @ phi
    hessian[np.diag_indices_from(hessian)] += precision
    return cho_solve(cho_factor(hessian), phi.T @ (weights * y)), hessian


def _logistic(phi: Array, y: Array, weights: Array, precision: Array) -> tuple[Array, Array]:
    """Return the mode of the quasi-binomial posterior and the Hessian there (damped Newton, convex)."""

    def loss(b: Array) -> float:
        eta = phi @ b
        return float(weights @ (np.logaddexp(0.0, eta) - y * eta) + 0.5 * precision @ b**2)

    middle = np.clip(y, 0.02, 0.98)
    start = weights * middle * (1 - middle)
    beta, hessian = _linear(phi, np.log(middle / (1 - middle)), start, precision)
    current = loss(beta)
    for _ in range(20):
        p = expit(phi @ beta)
        hessian = (phi.T * (weights * np.maximum(p * (1 - p), 1e-9))) @ phi
        hessian[np.diag_indices_from(hessian)] += precision
        gradient = phi.T @ (weights * (y - p)) - precision * beta
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


def _dispersion(phi: Array, y: Array, weights: Array, beta: Array, hessian: Array, logit: bool) -> float:
    """Return how much larger the residuals are than the weights say (Pearson's chi^2 per degree of freedom)."""
    eta = phi @ beta
    if logit:
        variance = expit(eta) * expit(-eta)
        variance = np.maximum(variance, 1e-4)
        residual, w = (y - expit(eta)) ** 2 / variance, weights * variance
    else:
        residual, w = (y - eta) ** 2, weights
    # trace of the hat matrix: the degrees of freedom that the fit really used
    used = float(np.einsum("ij,ji->", cho_solve(cho_factor(hessian), (phi.T * w)), phi))
    free = len(y) - used
    return float(weights @ residual / free) if free > 1.0 else 1.0
