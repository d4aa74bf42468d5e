"""OPCM: experts join one after the other, each without what overlaps the merge so far."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._spectral import (
    Factors,
    is_matrix,
    is_sound,
    mean,
    moved,
    once,
    one_thread,
    parent_svd,
    square_norm,
    summed,
    thin_svd,
)

_ALPHA = 0.5


@method(
    "opcm", source="Tang et al. 2025 (Merging Models on the Fly Without Retraining), arXiv 2501.09522", symmetric=False
)
def opcm(
    x: Inputs,
    *,
    lambda_: Annotated[float, Range(0.3, 2.0)] = 1.0,
    alpha: Annotated[float, Range(0.0, 0.95, limits=(0.0, 0.999))] = _ALPHA,
    heads: bool = False,
) -> Tensor:
    """Adds the experts in their order, each projected off the leading directions of the merge so far.

    tau_1 = d_1. With tau_{t-1} = U S Vt and r the 0-based index of the first place where the running sum of S exceeds
    alpha of the whole, tau_t = tau_{t-1} + d_t - U_r U_rt d_t V_r V_rt - sum_{j >= r} (u_jt d_t v_j) u_j v_jt: in the
    basis of tau_{t-1}, the leading block and the diagonal of d_t are dropped. The result is base + lambda c tau_K with
    one c for the whole model, such that ||c tau_K|| is the mean of the norms ||d_i|| (norms over all tensors).

    The paper rescales after every step and undoes it before the next one by the same factor (its lambda_t), so only the
    last scale remains; this is the thin form of its full SVD [both derived]. alpha must stay below 1: at 1 nothing but
    the diagonal would be dropped. Singular values below 1e-10 of the largest are zero: their arbitrary directions are
    not dropped [proposal]. Tensors that are not matrices, and embeddings and heads unless `heads`, add up whole task
    vectors.

    The last tau is a table per worker and alpha, c one number per worker; a candidate with the same alpha costs one
    elementwise pass. The order of the experts counts. One expert is returned as it is.
    """
    if lambda_ == 0.0:
        return x.reference
    if len(x.experts) == 1:
        return mean(x, (1.0,), lambda_)
    return moved(x, _joined(x, alpha, heads), lambda_ * _scale(x))


def _joined(x: Inputs, alpha: float, heads: bool) -> Tensor:
    """Returns tau_K of one tensor, before the scale of the whole model."""
    tau = once(x, ("opcm", alpha), lambda: _projected(x, alpha)) if is_matrix(x, heads) and is_sound(x) else None
    return summed(x) if tau is None else tau


def _projected(x: Inputs, alpha: float) -> Tensor:
    tau = x.delta(0).double()
    for i in range(1, len(x.experts)):
        factors = parent_svd(x, 0, min(tau.shape)) if i == 1 else thin_svd(tau, x)
        delta = x.delta(i).double()
        with one_thread():
            tau = tau + _without_overlap(delta, factors, alpha)
    return tau


def _without_overlap(delta: Tensor, factors: Factors, alpha: float) -> Tensor:
    """Returns `delta` without the block of the leading directions and without the diagonal beyond it."""
    if factors.rank == 0:
        return delta
    running = torch.cumsum(factors.s, 0)
    r = int((running <= alpha * running[-1]).sum())
    inside = factors.u.T @ delta @ factors.v.T
    dropped = torch.diag(inside.diagonal())
    dropped[:r, :r] = inside[:r, :r]
    return delta - factors.u @ dropped @ factors.v


def _scale(x: Inputs) -> float:
    """Returns c: the mean norm of the task vectors over the norm of tau_K, both over the whole model.

    Recipes may give tensors an alpha of their own, so the table's key is a digest of all tensors' values.
    """

    def digest() -> str:
        return hashlib.blake2b(repr([_settings(y) for y in x.every()]).encode(), digest_size=16).hexdigest()

    def make() -> float:
        squares: dict[int, float] = {}
        merged = 0.0
        for y in x.every():
            for i in range(len(y.experts)):
                squares[i] = squares.get(i, 0.0) + square_norm(y.delta(i))
            merged += square_norm(_joined(y, *_settings(y)))
        average = math.fsum(math.sqrt(square) for square in squares.values()) / len(squares)
        return average / math.sqrt(merged) if merged != 0.0 else 1.0

    settings = x.family_table("opcm_settings", digest, parameters=True)
    return x.family_table(("opcm_scale", settings), make)


def _settings(y: Inputs) -> tuple[float, bool]:
    """Returns alpha and heads of a tensor of the family; its recipe may leave out the defaults."""
    return float(y.parameters.get("alpha", _ALPHA)), bool(y.parameters.get("heads", False))
