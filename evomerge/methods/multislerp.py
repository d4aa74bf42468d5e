"""Multi-SLERP: the weighted mean direction of several models, at their weighted mean length."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods._geometry import combine, gram, shares

_RESOLUTION = 1e-7  # a mean direction shorter than this share of its parts is rounding noise


@method(
    "multislerp",
    source="mergekit; spherical averages: Buss and Fillmore 2001, doi 10.1145/502122.502124",
    needs_base=False,
    optional_base=True,
    mergekit=True,
)
def multislerp(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.0)] = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """The weighted mean direction of the models, or of their task vectors if the recipe names a base.

    With y_i the models minus the base (if any), n_i = |y_i|, u_i = y_i / n_i over the whole tensor and W_i the
    weights, divided by their sum if `normalize_weights`: result = base + (sum_i W_i n_i) m with m the unit vector
    along s = sum_i W_i u_i. mergekit then moves m along the tangent sum_i W_i (u_i - (u_i.m) m) = s - (s.m) m,
    which is zero for every input since m is parallel to s, so the step is left out; `karcher` is the mean with
    the angles taken into account. A y_i of zeros has no direction: it counts in the mean length alone.

    Where the directions cancel (|s| below `eps`, or 1e-7 of the weights' sizes) two models give their weighted
    sum. A single model is returned as it is. `compat: mergekit` divides by n_i + eps.

    Raises:
        CandidateFailure: if the weights sum to about zero, or the directions of three or more models cancel.
    """
    if len(x.experts) == 1:
        return x.experts[0]
    weights = list(x.each(weight))
    if normalize_weights:
        weights = shares(x, weights, "multislerp")
    active = [i for i, w in enumerate(weights) if w != 0.0]
    if not active:
        return torch.zeros_like(x.experts[0]) if x.base is None else x.base
    if x.paper and len(active) == 1 and weights[active[0]] == 1.0:
        return x.experts[active[0]]
    products = gram(x)[:, :, 0, 0].numpy()[np.ix_(active, active)]
    factors = _factors(x, products, np.array([weights[i] for i in active]), eps)
    return combine(x, active, torch.from_numpy(factors)[:, None, None])


def _factors(x: Inputs, products: NDArray[np.float64], weights: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    norms = np.sqrt(np.diag(products))
    lengths = np.where(norms == 0.0, np.inf, norms) if x.paper else norms + eps
    with np.errstate(invalid="ignore"):
        parts = weights / lengths
        size = np.sqrt(np.maximum((parts[:, None] * products * parts).sum(), 0.0))
    if not size <= max(eps, _RESOLUTION * np.abs(weights).sum()):
        return np.asarray(parts * ((weights * norms).sum() / size))
    if len(weights) > 2 and norms.any():
        raise CandidateFailure(
            f"multislerp: the weighted directions of the {len(weights)} models cancel in tensor {x.name!r}",
            hint="use weights that do not balance, or another method",
            reason="directions_cancel",
        )
    return weights
