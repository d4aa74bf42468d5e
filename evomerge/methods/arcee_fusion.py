"""Arcee Fusion: take over a model's most important changes, by a robust threshold on their importance."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, Range, method
from evomerge.methods._geometry import Block, blockwise, halved, pieces, rows, wide

_FLOOR = 1e-8  # added to every probability
_QUANTILES = (0.25, 0.5, 0.75)


@method(
    "arcee_fusion",
    source="Arcee AI 2025, Arcee Fusion in mergekit 0.1",
    n_experts=(1, 1),
    mergekit=True,
    identity=False,
)
def arcee_fusion(x: Inputs, *, iqr_factor: Annotated[float, Range(-1.0, 3.0), EXTENSION] = 1.5) -> Tensor:
    """Keeps the changes whose importance stands out from the tensor's others.

    The importance of an element is |d| KL(p || q) with d = model - base, p and q the softmax of its row (along the
    last axis) in the model and in the base, each plus 1e-8. Changes of importance at least
    Q(1/2) + `iqr_factor` (Q(3/4) - Q(1/4)) are taken over, all others dropped; Q(f) is the element of rank
    floor(f (n - 1)) of the tensor's sorted importances. Lower factors keep more; 1.5 is the reference's.

    The quantiles are exact for every size: mergekit draws them from a random million of larger tensors, with other
    results in each run. Scalars and tensors with equal rows have no importance to compare: everything is taken over.
    The result has the model's dtype under `compat: mergekit` too, which saves float32 there.
    """
    if x.reference.numel() == 0:
        return x.reference
    divergence, (low, middle, high) = x.table(("arcee_fusion", x.dtype), lambda: _statistics(x))
    threshold = middle + iqr_factor * (high - low)

    def take(at: Block, y: Inputs) -> Tensor:
        delta = y.delta(0)
        kept = delta.abs().mul_(divergence[at[0]]) >= threshold
        return delta.mul_(kept).add_(y.wide_base)  # a product, not a selection: NaN must stay visible

    return blockwise(x, take, -1)


def _statistics(x: Inputs) -> tuple[Tensor, tuple[float, ...]]:
    """Returns the divergence of each row, (outer, 1, 1), and the quantiles of the importances."""
    dtype, base = wide(x).dtype, rows(x.reference, -1)
    divergence = torch.empty((base.shape[0], 1, 1), dtype=dtype, device=base.device)
    importance = torch.empty(base.shape, dtype=dtype, device=base.device)
    for at, y in pieces(x, -1, split_vectors=False):
        p, q = (_softmax(part.double()).add_(_FLOOR) for part in (y.experts[0], y.reference))
        divergence[at[0]] = halved((p / q).log_().mul_(p)).unsqueeze(2).to(dtype)
        importance[at] = y.delta(0).abs_().mul_(divergence[at[0]])
    values = importance.flatten()
    ranks = [math.floor(f * (values.numel() - 1)) for f in _QUANTILES]
    return divergence, tuple(float(values.kthvalue(rank + 1).values) for rank in ranks)


def _softmax(values: Tensor) -> Tensor:
    values = (values - values.amax(dim=1, keepdim=True)).exp_()
    return values / halved(values.clone()).unsqueeze(1)
