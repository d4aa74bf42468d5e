"""Iso-CTS: a common subspace and task-specific directions, with a flat spectrum."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._spectral import (
    ZERO_SHARE,
    Factors,
    is_matrix,
    is_sound,
    isotropic,
    mean,
    moved,
    once,
    one_thread,
    stacked,
    summed,
    thin_svd,
)
from evomerge.methods.iso_c import isotropic_sum


@method("iso_cts", source="Marczak et al. 2025 (isotropic merging), arXiv 2502.04959", identity=False)
def iso_cts(
    x: Inputs,
    *,
    lambda_: Annotated[float, Range(0.3, 2.5)] = 1.0,
    common: Annotated[float, Range(0.4, 1.0, limits=(0.0, 1.0))] = 0.8,
    heads: bool = False,
) -> Tensor:
    """Iso-C's common directions beside directions that only one task uses, all equally strong.

    Per matrix (m, n), r = min(m, n), K experts: each task gets t = floor((1 - common) r / K) directions, the sum of the
    task vectors the other s = r - K t. With U the s leading left singular vectors of the sum, task i adds the t leading
    triplets of d_i - U Ut d_i. All left vectors side by side, and all right ones, are replaced by their polar factors;
    tau is the mean of all these singular values times U Vt, and the result is base + lambda tau. K + 1 SVDs per matrix,
    worker and s; a candidate with the same s costs one elementwise pass.

    `common` 1 is Iso-C. How a remainder is shared out is a choice [proposal]: it goes to the common part, so no
    direction is lost. Zero singular values (below 1e-10 of the matrix's own largest) take no part. Where the
    stacked vectors are dependent (condition number above 1e6, as with duplicated experts) the tensor falls back to
    Iso-C [proposal]. Tensors that are not matrices, embeddings and heads unless `heads` get the mean of `iso_c`.
    """
    if lambda_ == 0.0:
        return x.reference
    if not is_matrix(x, heads):
        return mean(x, (1.0,) * len(x.experts), lambda_)
    own = math.floor((1.0 - common) * min(x.reference.shape) / len(x.experts) + 1e-9)
    tau = once(x, ("iso_cts", own), lambda: _flattened(x, own)) if own else None
    if tau is None:
        tau = isotropic_sum(x)
    return mean(x, (1.0,) * len(x.experts), lambda_) if tau is None else moved(x, tau, lambda_)


def _flattened(x: Inputs, own: int) -> Tensor | None:
    """Returns tau in float64 for `own` directions per task; None where Iso-C must do."""
    if not is_sound(x):
        return None
    shared = thin_svd(summed(x), x).leading(min(x.reference.shape) - own * len(x.experts))
    parts = [shared, *(_outside(x, i, shared.u).leading(own) for i in range(len(x.experts)))]
    bases = stacked(x, parts)
    return None if bases is None else isotropic(Factors(bases.u, bases.s, bases.v))


def _outside(x: Inputs, i: int, u: Tensor) -> Factors:
    """Returns the SVD of the part of task vector i outside the columns of `u`."""
    delta = x.delta(i).double()
    with one_thread():
        rest = delta - u @ (u.T @ delta)
        # the zero of d_i, not of the rest: what projecting leaves of a common direction is rounding noise
        zero = float(torch.linalg.matrix_norm(delta)) * ZERO_SHARE
    return thin_svd(rest, x, zero=zero)
