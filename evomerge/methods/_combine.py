"""How task vectors become one merged tensor: the weighted sum, and the sum over elected signs.

Each is written twice. The first form is ours: float32, in place on its own temporaries, inputs
returned untouched where the merge is a copy. The second reproduces mergekit 0.1.5, which works
in the tensors' dtype (weights, sums and quotients are rounded to it) and takes no shortcuts.

Products and sums are separate operations on purpose: a fused multiply-add is used or not
depending on an element's place in its chunk, and would let the bits depend on the chunking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods._core import Inputs

_TINY = 1e-8  # a divisor below this in size is replaced by 1, as mergekit does

Sparsify = Callable[[int], Tensor]
"""Gives the sparsified task vector of expert i as a temporary that may be overwritten."""


def check_densities(x: Inputs, density: float | Sequence[float], sparsify_1d: bool) -> tuple[float, ...]:
    """Returns one density per expert; 1 for 1-D tensors unless they are to be sparsified.

    mergekit makes no exception for 1-D tensors, so `compat: mergekit` makes none either.

    Raises:
        CandidateFailure: for a density below 0 or not a number.
    """
    densities = x.each(density)
    for i, value in enumerate(densities):
        if not value >= 0.0:
            raise CandidateFailure(
                f"density {value} of expert {i} in tensor {x.name!r} is below 0",
                reason="bad_density",
            )
    small = len(x.reference.shape) < 2
    if x.paper and small and not sparsify_1d:
        return tuple(1.0 if value > 0.0 else 0.0 for value in densities)
    return densities


def weighted_sum(
    x: Inputs,
    weights: tuple[float, ...],
    densities: tuple[float, ...],
    sparsify: Sparsify,
    *,
    lambda_: float,
    normalize: bool,
) -> Tensor:
    """Returns base + lambda * sum_i w_i d_i, divided by sum_i w_i when `normalize`."""
    if not x.paper:
        return _mergekit_sum(x, weights, sparsify, lambda_, normalize, elect=False)
    divisor = sum(weights) if normalize else 1.0
    scale = lambda_ / (divisor if abs(divisor) >= _TINY else 1.0)
    factors = [weight * scale for weight in weights]
    active = [i for i, factor in enumerate(factors) if factor != 0.0 and densities[i] > 0.0]
    if not active:
        return x.reference
    if len(active) == 1 and factors[active[0]] == 1.0 and densities[active[0]] >= 1.0:
        return x.experts[active[0]]
    total = sparsify(active[0]).mul_(factors[active[0]])
    for i in active[1:]:
        total.add_(sparsify(i).mul_(factors[i]))
    return total.add_(x.reference)


def elected_sum(
    x: Inputs,
    weights: tuple[float, ...],
    densities: tuple[float, ...],
    sparsify: Sparsify,
    *,
    lambda_: float,
    normalize: bool,
    weighted_election: bool = True,
) -> Tensor:
    """Returns base + lambda * tau, where tau adds up only the entries with the elected sign.

    The elected sign of an element is that of sum_i w_i d_i (of sum_i d_i over the experts that
    take part, if not `weighted_election`); a sum of exactly zero elects +. An entry counts if its
    own sign agrees; zeros never do. With `normalize` tau is divided by the weights that took part.
    """
    if not x.paper:
        return _mergekit_sum(x, weights, sparsify, lambda_, normalize, True, weighted_election)
    active = [i for i, w in enumerate(weights) if w != 0.0 and densities[i] > 0.0]
    if not active or lambda_ == 0.0:
        return x.reference
    if len(active) == 1 and densities[active[0]] >= 1.0:
        only = weights[active[0]]
        if lambda_ * (1.0 if normalize and abs(only) >= _TINY else only) == 1.0:
            return x.experts[active[0]]
    votes = {i: sparsify(i) for i in active}
    if weighted_election:
        for i, vote in votes.items():
            vote.mul_(weights[i])
    first, *others = votes.values()
    positive = first.clone()
    for vote in others:
        positive.add_(vote)
    elected = positive >= 0
    total, divisor = torch.zeros_like(first), torch.zeros_like(first)
    for i, vote in votes.items():
        agrees = torch.where(elected, vote > 0, vote < 0)
        if not weighted_election:
            vote.mul_(weights[i])
        total.add_(vote.mul_(agrees))  # a product, not a selection: NaN must stay visible
        divisor.add_(agrees.to(total.dtype).mul_(weights[i]))
    if normalize:
        total.div_(divisor.masked_fill_(divisor.abs() < _TINY, 1.0))
    return total.mul_(lambda_).add_(x.reference)


def _mergekit_sum(
    x: Inputs,
    weights: tuple[float, ...],
    sparsify: Sparsify,
    lambda_: float,
    normalize: bool,
    elect: bool,
    weighted_election: bool = True,
) -> Tensor:
    """The same two sums with every step in the tensors' dtype, as mergekit rounds them."""
    base = x.reference
    deltas = torch.stack([sparsify(i) for i in range(len(x.experts))])
    factors = torch.tensor(weights, dtype=base.dtype, device=base.device)
    factors = factors.reshape(-1, *[1] * base.ndim)
    weighted = deltas * factors
    if elect:
        votes = weighted if weighted_election else deltas
        majority = (votes.sum(dim=0) >= 0).to(base.dtype) * 2 - 1
        agrees = votes.sign() == majority
        total, divisor = (weighted * agrees).sum(dim=0), (factors * agrees).sum(dim=0)
        divisor[divisor == 0] = 1
    else:
        total, divisor = weighted.sum(dim=0), factors.sum(dim=0)
        divisor = torch.where(divisor.abs() < _TINY, torch.ones_like(divisor), divisor)
    if normalize:
        total = total / divisor
    if lambda_ != 1.0:
        total = total * lambda_
    return base + total
