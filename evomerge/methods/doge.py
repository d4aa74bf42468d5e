"""DOGE TA: task arithmetic with a correction learnt outside the tasks' shared subspace, per-task scales and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods._spectral import (
    fits,
    is_matrix,
    is_sound,
    mean,
    one_thread,
    parent_svd,
    square_norm,
    stored,
    thin_svd,
)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's
_TIE = 1e-6  # by how much the last of an expert's directions counts less than its first in the shared subspace


@dataclass(frozen=True, eq=False)
class _Correction:
    """What DOGE learns for one tensor: Delta, and the scale of every expert (0 for a zero task vector)."""

    delta: Tensor
    scales: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Cut:
    """A mask over the whole model: float32 magnitudes with bits above `bits`, and `ties` of those equal to them."""

    bits: int
    ties: dict[str, int]


@method("doge", source="Wei et al. 2025 (adaptive projective gradient descent), arXiv 2501.01230", identity=False)
def doge(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.2)] = 1.0,
    lambda_: Annotated[float, Range(0.3, 2.5)] = 1.0,
    keep: Annotated[float, Range(0.1, 1.0, limits=(0.0, 1.0))] = 0.3,
    eta: Annotated[float, Range(0.1, 1.0, limits=(0.0, 100.0))] = 0.3,
    lr: Annotated[float, Range(0.003, 0.1, log=True, limits=(0.0, 100.0))] = 0.01,
    subspace: Annotated[float, Range(2.0, 12.0, limits=(1.0, 1e9))] = 6.0,
    steps: int = 400,
    absolute: bool = False,
    heads: bool = False,
) -> Tensor:
    """Scales task vectors to one norm, adds a learnt correction to each, masks them and sums.

    Per matrix (m, n), r = min(m, n), K experts: l_i = E / ||d_i||, s = sum_i l_i d_i, L = sum_i l_i. B holds the
    floor(r / subspace) leading left singular vectors of the K stacked sets of floor(r / K) left singular vectors.
    Delta minimises sum_j sum_rows (sum_cols d_j (d_j - s - L Delta))^2 from 0 by `steps` of Adam, whose gradient g is
    replaced by g - B Bt g. The result is base + lambda sum_i w_i l_i (d_i + Delta) mask_i, where mask_i keeps the share
    `keep` of largest |d_i| of all matrices of the model together: exactly so many, ties in the model's order, zeros
    never.

    The paper's E = 0.07 and step 1e-4 are absolute and fit CLIP's weights; `absolute` takes `eta` and `lr` so.
    Otherwise [proposal] E = eta mean_i ||d_i|| and the step is lr rms(d), so scaling all task vectors scales the merge.
    The mask is a float32 comparison. Ties in the stack's SVD (one expert, duplicates) go to the leading directions
    [proposal]. Delta does not depend on weights, lambda or `keep`: it is a table per worker, and
    a candidate with other weights costs elementwise passes. `weight` is ours: the paper has the l_i alone.

    Everything else stays the base's, as in the paper: tensors that are not matrices, and embeddings and heads unless
    `heads`. Zero task vectors take no part. A matrix with a NaN gets the mean, which shows it.
    """
    weights = x.each(weight)
    if lambda_ == 0.0 or keep == 0.0 or not any(weights) or not is_matrix(x, heads):
        return x.reference
    if not is_sound(x):
        return mean(x, weights, lambda_)
    kind = ("doge", eta, lr, subspace, steps, absolute)
    learnt = x.table(kind, lambda: _learn(x, eta, lr, subspace, steps, absolute), keep=fits(x))
    cuts = _cuts(x, keep, heads)
    total = torch.zeros(x.reference.shape, dtype=torch.float64, device=x.reference.device)
    for i, factor in enumerate(w * scale for w, scale in zip(weights, learnt.scales, strict=True)):
        if factor != 0.0:
            mask = _mask(x, i, cuts[i])
            total.add_((x.delta(i).double() + learnt.delta).mul_(factor).mul_(mask))
    return total.mul_(lambda_).add_(x.wide_base).to(x.dtype)


def _learn(x: Inputs, eta: float, lr: float, subspace: float, steps: int, absolute: bool) -> _Correction:
    """Returns Delta and the l_i; everything in float64."""
    deltas = [x.delta(i).double() for i in range(len(x.experts))]
    norms = [math.sqrt(square_norm(delta)) for delta in deltas]
    active = [i for i, norm in enumerate(norms) if norm > 0.0]
    if not active:
        return _Correction(torch.zeros_like(x.wide_base), (0.0,) * len(norms))
    # relative mode works in units of the entries' rms, so that Adam's epsilon and step mean the same for every model
    unit = 1.0
    if not absolute:
        unit = math.sqrt(math.fsum(norms[i] ** 2 for i in active) / (len(active) * deltas[0].numel()))
        eta *= math.fsum(norms) / len(active)
    scales = [eta / norm if norm > 0.0 else 0.0 for norm in norms]
    basis = _shared_basis(x, active, subspace)
    with one_thread():
        correction = _descend([deltas[i] / unit for i in active], [scales[i] for i in active], basis, lr, steps)
    return _Correction(stored(x, correction.mul_(unit)), tuple(scales))


def _shared_basis(x: Inputs, active: list[int], subspace: float) -> Tensor:
    """Returns B (m, b), the leading left directions that the experts' leading ones have in common."""
    full = min(x.reference.shape)
    limit = max(1, full // len(x.experts))
    bases = [parent_svd(x, i, limit).u for i in active]
    # where experts share everything or nothing all of these are equally common: then the leading ones count first
    order = [1.0 - _TIE * torch.arange(u.shape[1], dtype=u.dtype, device=u.device) / limit for u in bases]
    stacked = torch.cat([u * fall for u, fall in zip(bases, order, strict=True)], dim=1)
    return thin_svd(stacked, x).leading(math.floor(full / subspace)).u


def _descend(deltas: list[Tensor], scales: list[float], basis: Tensor, lr: float, steps: int) -> Tensor:
    """Returns Delta after `steps` of Adam on the projected analytic gradient -2 L sum_j r_j d_j (r_j per row)."""
    total = math.fsum(scales)
    blend = sum((delta * scale for delta, scale in zip(deltas, scales, strict=True)), torch.zeros_like(deltas[0]))
    targets = [(delta * (delta - blend)).sum(dim=1, keepdim=True) for delta in deltas]
    result, first, second = (torch.zeros_like(blend) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = torch.zeros_like(blend)
        for delta, target in zip(deltas, targets, strict=True):
            residual = target - (delta * result).sum(dim=1, keepdim=True).mul_(total)
            gradient.add_(delta * residual.mul_(-2.0 * total))
        gradient.sub_(basis @ (basis.T @ gradient))
        first.mul_(_BETAS[0]).add_(gradient, alpha=1.0 - _BETAS[0])
        second.mul_(_BETAS[1]).add_(gradient.square_(), alpha=1.0 - _BETAS[1])
        divisor = (second / (1.0 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        result.sub_((first / divisor).mul_(lr / (1.0 - _BETAS[0] ** step)))
    return result


def _bits(delta: Tensor) -> Tensor:
    """Returns the magnitudes' float32 bits, flat: integers in the order of the magnitudes."""
    return delta.float().abs().reshape(-1).view(torch.int32)


def _mask(x: Inputs, i: int, cut: _Cut) -> Tensor:
    bits = _bits(x.delta(i))
    mask = bits > cut.bits
    wanted = cut.ties.get(x.name, 0)
    if wanted:
        mask[torch.nonzero(bits == cut.bits).reshape(-1)[:wanted]] = True
    return mask.reshape(x.reference.shape)


def _cuts(x: Inputs, keep: float, heads: bool) -> tuple[_Cut, ...]:
    """Returns one mask per expert over all matrices of the model, once per worker and `keep`."""
    return x.family_table(
        ("doge_cuts", keep, heads), lambda: tuple(_cut(x, i, keep, heads) for i in range(len(x.experts)))
    )


def _cut(x: Inputs, i: int, keep: float, heads: bool) -> _Cut:
    """Finds the k-th largest magnitude by counting the upper 16 bits of all, then the lower 15 of those that tie."""
    upper = np.zeros(1 << 16, dtype=np.int64)
    for y, j in x.every_with(i):
        if is_matrix(y, heads):
            upper += _counts(_bits(y.delta(j)) >> 15, 1 << 16)
    wanted = max(1, math.floor(keep * int(upper.sum())))
    top, wanted = _descent(upper, wanted)
    lower: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    for y, j in x.every_with(i):
        if is_matrix(y, heads):
            bits = _bits(y.delta(j))
            lower[y.name] = _counts(bits[(bits >> 15) == top] & 0x7FFF, 1 << 15)
    last, wanted = _descent(np.sum(list(lower.values()), axis=0), wanted)
    ties = {}
    for name, counts in lower.items():
        taken = min(wanted, int(counts[last]))
        wanted -= taken
        if taken:
            ties[name] = taken
    bits_at = (top << 15) | last
    return _Cut(bits_at, ties if bits_at else {})


def _counts(values: Tensor, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return torch.bincount(values.long(), minlength=size).cpu().numpy()


def _descent(counts: np.ndarray[tuple[int], np.dtype[np.int64]], wanted: int) -> tuple[int, int]:
    """Returns the bin of the `wanted`-th largest value, and which one it is within that bin."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    inside = wanted - (int(above[place - 1]) if place else 0)
    return len(counts) - 1 - place, inside
