"""Consensus merging: keep what several experts' TALL masks agree on."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, PerExpert, Range, keep_largest, method


@method("consensus", source="Wang et al. 2024 (TALL-masks), arXiv 2405.07813", identity=False)
def consensus(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.2)] = 1.0,
    mask_lambda: Annotated[PerExpert, Range(0.2, 0.6, limits=(0.0, 1000.0))] = 0.4,
    k: Annotated[int, Range(1, 3, limits=(0, 1000))] = 2,
    vote: PerExpert = 1.0,
    lambda_: Annotated[float, Range(0.05, 1.0)] = 0.3,
    vector: Literal["sum", "ties"] = "sum",
    density: Annotated[float, Range(0.05, 1.0, limits=(0.0, 1.0))] = 0.2,
    sparsify_1d: bool = False,
) -> Tensor:
    """The base plus lambda tau * [count >= k]: the multi-task vector where at least k experts' masks claim it.

    tau is the sum of the weighted task vectors w_i d_i, or with `vector: ties` their TIES vector (each trimmed to
    `density` per tensor, elected signs, summed; 1-D tensors are trimmed only if `sparsify_1d`). Expert t's TALL mask
    is |w_t d_t| > l_t |tau - w_t d_t| with l_t = `mask_lambda`: a larger one keeps less. The count adds up the masks.
    k = 2 drops what one expert alone claims (selfish) and what none does (catastrophic), k = 1 only the latter, k = 0
    nothing, and k above the number of experts everything. A sum over K experts, so a good lambda is well below 1.

    `vote` is how much each mask counts. One expert at vote 1, the others at 0, k 1 and lambda 1 is that expert as
    TALL-masks reconstructs it from tau and its mask.

    Raises:
        CandidateFailure: for a density below 0.
    """
    if not density >= 0.0:
        raise CandidateFailure(
            f"consensus: density {density} (tensor {x.name!r})", hint="0 or more", reason="bad_density"
        )
    weights, votes = x.each(weight), x.each(vote)
    active = [i for i, w in enumerate(weights) if w != 0.0]
    if not active or lambda_ == 0.0:
        return x.reference
    first = active[0]
    whole = vector == "sum" or density >= 1.0 or (x.reference.ndim < 2 and not sparsify_1d)
    if len(active) == 1 and whole and k <= max(0.0, votes[first]) and weights[first] * lambda_ == 1.0:
        return x.experts[first]
    deltas = [x.delta(i).mul_(weights[i]) for i in active]
    tau = _sum(deltas) if vector == "sum" else _ties(deltas, 1.0 if whole else density)
    count = torch.zeros_like(tau)
    limits = x.each(mask_lambda)
    for i, delta in zip(active, deltas, strict=True):
        claimed = delta.abs() > (tau - delta).abs_().mul_(limits[i])
        count.add_(claimed.to(count.dtype).mul_(votes[i]))
    return tau.mul_(count >= k).mul_(lambda_).add_(x.wide_base)  # a product: NaN must stay visible


def _sum(vectors: list[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total.add_(vector)
    return total


def _ties(vectors: list[Tensor], density: float) -> Tensor:
    """Returns the sum, per element, of the trimmed values with the elected sign; a sum of 0 elects +."""
    trimmed = [v * keep_largest(v, density) for v in vectors]
    elected = _sum(trimmed) >= 0
    total = torch.zeros_like(trimmed[0])
    for values in trimmed:
        total.add_(values.mul_(torch.where(elected, values > 0, values < 0)))
    return total
