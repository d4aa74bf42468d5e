"""The task-arithmetic family as mergekit 0.1.5 computes it, for `compat: mergekit`.

Everything is rounded to the tensors' own dtype after every step, weights included; what is dropped is made up for by
matching the L1 norm; 1-D tensors are made sparse like all others; and there are no shortcuts for copies.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.methods._inputs import Inputs
from evomerge.methods._masks import keep_mask
from evomerge.methods._sparsify import Sparsify, torch_ranks
from evomerge.methods._sums import fixed_norm1

if TYPE_CHECKING:
    from evomerge.methods._stages import Stages

_TINY = 1e-7  # a task vector whose L1 norm is below this is not rescaled


def combine_like_mergekit(x: Inputs, stages: Stages) -> Tensor:
    """Returns base + lambda * tau, every step in the tensors' dtype."""
    base = x.reference
    deltas = torch.stack([_sparse(x, stages, i) for i in range(len(x.experts))])
    if stages.select is not None and stages.select < 1.0:
        deltas = deltas * _selected(x, deltas, stages.select)
    weights = _energy_weights(deltas) if stages.energy_weights else torch.tensor(stages.weights, dtype=base.dtype)
    factors = weights.to(base).reshape(-1, *[1] * base.ndim)
    weighted = deltas * factors
    if stages.election != "none":
        votes = weighted if stages.election == "weighted" else deltas
        majority = (votes.sum(dim=0) >= 0).to(base.dtype) * 2 - 1
        agrees = votes.sign() == majority
        total, divisor = (weighted * agrees).sum(dim=0), (factors * agrees).sum(dim=0)
        divisor = divisor.clamp(min=1e-6) if stages.energy_weights else divisor.masked_fill(divisor == 0, 1)
    else:
        total, divisor = weighted.sum(dim=0), factors.sum(dim=0)
        divisor = torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
    if stages.normalize:
        total = total / divisor
    if stages.lambda_ != 1.0:
        total = total * stages.lambda_
    return base + total


def _sparse(x: Inputs, stages: Stages, i: int) -> Tensor:
    how, delta = stages.sparsify[i], x.delta(i)
    if how.dense:
        return delta
    injected = x.keep(i) if x.keep is not None else None
    mask = _mask(x, how, i) if injected is None else injected
    before = fixed_norm1(delta)
    delta.mul_(mask)
    if stages.rescale != "l1":
        return delta.div_(how.density) if stages.rescale == "inv_prob" and how.density > 0.0 else delta
    after = fixed_norm1(delta)
    if before < _TINY or after < _TINY:
        return delta
    norms = torch.tensor([before, after], dtype=delta.dtype, device=delta.device)
    return delta.mul_(norms[0] / norms[1])


def _mask(x: Inputs, how: Sparsify, i: int) -> Tensor:
    shape, n = x.reference.shape, x.reference.numel()
    if how.density <= 0.0:
        return torch.zeros(shape, dtype=torch.bool, device=x.reference.device)
    if how.kind in ("magnitude", "outliers"):
        kept, top = how.counts(n)
        # Descending, equal magnitudes by lowest place; mergekit ranks in float32 too.
        order = x.delta(i).abs_().float().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(n, dtype=torch.bool, device=order.device)
        mask[order[top:kept]] = True
        return mask.reshape(shape)
    draw = {"seed": x.seed, "tensor_name": x.name, "stream": x.streams[i], "device": x.reference.device}
    if how.kind == "random":
        return keep_mask(shape, how.density, **draw)  # type: ignore[arg-type]
    axis = 1 if len(shape) > 1 else 0
    columns = shape[axis] if shape else 1
    share = torch_ranks(x, i, axis if shape else -1).double() / (columns - 1) if columns > 1 else torch.tensor(0.5)
    threshold = ((how.density - how.epsilon) + 2 * how.epsilon * share).mul(2**32).floor()
    from evomerge.methods._masks import hash_bits

    bits = hash_bits(0, n, x.seed, x.name, x.streams[i], x.reference.device).reshape(shape)
    return bits < threshold


def _selected(x: Inputs, deltas: Tensor, share: float) -> Tensor:
    """The elements with the largest variance over the models (population), ties by lowest place."""
    injected = x.keep(0) if x.keep is not None else None
    if injected is not None:
        return injected.bool()
    variance = deltas.float().var(dim=0, unbiased=False).flatten()
    k = math.floor(int((variance != 0).sum()) * share)
    mask = torch.zeros_like(variance, dtype=torch.bool)
    mask[variance.argsort(descending=True, stable=True)[:k]] = True
    return mask.reshape(deltas.shape[1:])


def _energy_weights(deltas: Tensor) -> Tensor:
    """Mean squares, normalised; uniform if they sum to less than 1e-6 (mergekit's absolute threshold)."""
    squares = deltas.square().flatten(1).mean(dim=1) if deltas[0].numel() else torch.zeros(len(deltas))
    total = squares.sum()
    return torch.full_like(squares, 1.0 / len(deltas)) if float(total) < 1e-6 else squares / total
