"""Karcher mean: the point of the sphere with the least squared angles to all models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._geometry import at_least_zero, combine, gram, shares

_OPPOSITE = 1e-6  # a point this close to the antipode, in radians, has no one way to it

Array = NDArray[np.float64]


@method(
    "karcher",
    source="Karcher 1977, doi 10.1002/cpa.3160300502; Buss and Fillmore 2001, doi 10.1145/502122.502124",
    needs_base=False,
    optional_base=True,
    mergekit=True,
)
def karcher(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.0), EXTENSION] = 1.0,
    base_weight: Annotated[float, Range(0.0, 1.0), EXTENSION] = 1.0,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Tensor:
    """The weighted Karcher (Frechet) mean of the models' directions, at their weighted mean length.

    A base that the recipe names is one more model, of weight `base_weight`. With n_i = |x_i|, u_i = x_i / n_i over
    the whole tensor and a_i the weights divided by their sum, u starts along sum_i a_i u_i and takes at most
    `max_iter` steps along T = sum_i a_i (W_i / sin W_i) (u_i - c_i u), c_i = u_i . u, W_i = acos c_i: the gradient
    of the squared angles. It stops when |T| < `tol` (radians). The result is (sum_i a_i n_i) u.

    Tensors of zeros have no direction: they count in the mean length alone (`compat: mergekit` treats norms up to
    `tol` so). Where the start cancels (|sum_i a_i u_i| < tol) it is u_1. All zeros give zeros.

    Raises:
        CandidateFailure: for a negative weight, or none above zero.
    """
    z, weights = _points(x, weight, base_weight)
    at_least_zero(x, "karcher", weight=min(weights))
    weights = tuple(shares(x, weights, "karcher"))
    active = [i for i, w in enumerate(weights) if w != 0.0]
    if x.paper and len(active) == 1:
        return z.experts[active[0]]
    products = gram(z)[:, :, 0, 0].numpy()
    norms = np.sqrt(np.diag(products))
    floor = 0.0 if x.paper else tol
    kept = [i for i in active if not norms[i] <= floor]
    if not kept:
        return torch.zeros_like(z.experts[0])
    length = math.fsum(weights[i] * float(norms[i]) for i in active)
    cosines = products[np.ix_(kept, kept)] / np.outer(norms[kept], norms[kept])
    mean = sphere_mean(cosines, np.array(shares(x, [weights[i] for i in kept], "karcher")), max_iter, tol)
    return combine(z, kept, torch.from_numpy(length * mean / norms[kept])[:, None, None])


def _points(x: Inputs, weight: PerExpert, base_weight: float) -> tuple[Inputs, tuple[float, ...]]:
    """Returns inputs without a base, the base being the last expert, and a weight for each."""
    weights = x.each(weight)
    if x.base is None:
        return x, weights
    sources = (None, *x.sources[1:], x.sources[0]) if x.sources else ()
    z = replace(x, base=None, experts=(*x.experts, x.base), streams=(), sources=sources)
    return z, (*weights, base_weight)


def sphere_mean(cosines: Array, weights: Array, max_iter: int, tol: float) -> Array:
    """Returns the Karcher mean of unit vectors as factors of them, given their cosines (K, K)."""

    def size(factors: Array) -> float:
        return math.sqrt(max(float((factors[:, None] * cosines * factors).sum()), 0.0))

    norm = size(weights)
    mean = np.eye(len(weights))[0] if norm < tol else weights / norm
    for _ in range(max_iter):
        to_mean = np.clip((cosines * mean).sum(axis=1), -1.0, 1.0)
        angles = np.arccos(to_mean)
        still = (angles <= tol) | (angles > math.pi - _OPPOSITE)
        pull = np.where(still, 0.0, weights * angles / np.where(still, 1.0, np.sin(angles)))
        step = pull - (pull * to_mean).sum() * mean
        length = size(step)
        if length <= tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean = mean / size(mean)
    return mean
