"""WUDI: the task vector that interferes least with every expert's own input directions, in closed form."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, Range, method
from evomerge.methods._spectral import is_matrix, is_sound, mean, moved, once, one_thread, square_norm, summed


@method("wudi", source="Cheng et al. 2025 (Whoever Started the Interference Should End It), arXiv 2503.08099")
def wudi(
    x: Inputs,
    *,
    lambda_: Annotated[float, Range(0.3, 2.0)] = 1.0,
    ridge: Annotated[float, Range(1e-6, 1.0, log=True, limits=(1e-12, 1e6))] = 1e-6,
    heads: bool = False,
) -> Tensor:
    """Minimises sum_i ||(tau - d_i) d_it||^2 / ||d_i||^2: RegMean with each expert's own rows as its data.

    Per matrix (m, n), with G_i = d_it d_i / ||d_i||^2 (n, n), H = sum_i G_i, s = sum_i d_i and mu = ridge tr(H) / n:
    (tau - s) (H + mu I) = sum_i (d_i - s) G_i, and the result is base + lambda tau. The paper starts Adam at s and
    takes 300 steps of 1e-5; the closed form is where it would end [derived]. The ridge is our choice [proposal]: it
    pulls towards s as early stopping does, and keeps the solution unique where H is singular; a large one gives s.
    The paper's step is absolute; here scaling all task vectors scales tau, whatever their size.

    One n x n Cholesky solve per matrix, worker and ridge, no SVD; a candidate costs one elementwise pass. Weights per
    expert would change the solve, so there are none. Zero task vectors take no part. Tensors that are not matrices, and
    embeddings and heads unless `heads`, get the mean lambda / K sum_i d_i. One expert is returned as it is.
    """
    if lambda_ == 0.0:
        return x.reference
    tau = None
    if len(x.experts) > 1 and is_matrix(x, heads):
        tau = once(x, ("wudi", ridge), lambda: _solved(x, ridge))
    if tau is None:
        return mean(x, (1.0,) * len(x.experts), lambda_)
    return moved(x, tau, lambda_)


def _solved(x: Inputs, ridge: float) -> Tensor | None:
    """Returns tau in float64; None if no expert changes the tensor or one is not finite."""
    if not is_sound(x):
        return None
    start = summed(x)
    n = start.shape[1]
    left = torch.zeros((n, n), dtype=torch.float64, device=start.device)
    right = torch.zeros_like(start)
    used = 0
    with one_thread():
        for i in range(len(x.experts)):
            delta = x.delta(i).double()
            squared = square_norm(delta)
            if squared == 0.0:
                continue
            used += 1
            gram = (delta.T @ delta).div_(squared)
            left.add_(gram)
            right.add_((delta - start) @ gram)
        if not used:
            return None
        left.diagonal().add_(ridge * used / n)  # every G_i has trace 1
        factor, failed = torch.linalg.cholesky_ex(left)
        if int(failed):
            raise CandidateFailure(
                f"wudi: the system of tensor {x.name!r} is singular to float64 with ridge {ridge:g}",
                hint="use a larger ridge; 1e-6 is the default",
                reason="singular",
            )
        return start + torch.cholesky_solve(right.T, factor).T
