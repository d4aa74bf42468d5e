"""Iso-C: the sum of the task vectors with a flat spectrum."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._spectral import is_matrix, is_sound, isotropic, mean, moved, once, summed, thin_svd


def isotropic_sum(x: Inputs) -> Tensor | None:
    """Returns the flattened sum of the task vectors, once per worker; None if an expert is not finite."""
    return once(x, "iso_c", lambda: isotropic(thin_svd(summed(x), x)) if is_sound(x) else None)


@method("iso_c", source="Marczak et al. 2025 (isotropic merging), arXiv 2502.04959", identity=False)
def iso_c(
    x: Inputs,
    *,
    lambda_: Annotated[float, Range(0.3, 2.5)] = 1.0,
    heads: bool = False,
) -> Tensor:
    """The sum of the task vectors with all singular values replaced by their mean.

    Per matrix: sum_i d_i = U S Vt, tau = mean(S) U Vt, result base + lambda tau. It keeps the nuclear norm of the sum.
    One SVD per matrix and worker; a candidate costs one elementwise pass. Weights per expert would change that SVD with
    every candidate, so there are none. Good scales for eight tasks lie near 1.5 in published runs.

    Where the sum is rank-deficient, U Vt is not unique [proposal]: the mean is over the non-zero singular values (above
    1e-10 of the largest), which keeps the nuclear norm, and directions that no task uses stay untouched. Experts of low
    rank whose weights were rounded when saved (a LoRA merged in bfloat16) are not rank-deficient: their rounding noise
    fills the other directions, and this method makes it as strong as the rest. Use `tsv_m` for those.
    Tensors that are not matrices, and embeddings and heads unless `heads`, get the mean lambda / K sum_i d_i.
    """
    if lambda_ == 0.0:
        return x.reference
    tau = isotropic_sum(x) if is_matrix(x, heads) else None
    if tau is None:
        return mean(x, (1.0,) * len(x.experts), lambda_)
    return moved(x, tau, lambda_)
