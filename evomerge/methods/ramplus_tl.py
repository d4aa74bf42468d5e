"""RAM+ per tensor: RAM with unique changes scaled up the more, the more of an expert's changes are shared."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._geometry import Block, at_least_zero, blockwise, pieces


@method("ramplus_tl", source="Yuan et al. 2026, arXiv 2601.13572", mergekit=True, identity=False)
def ramplus_tl(
    x: Inputs,
    *,
    r: Annotated[float, Range(0.0, 1.0)] = 0.1,
    alpha: Annotated[float, Range(0.0, 1.0)] = 0.2,
    epsilon: Annotated[float, Range(1e-6, 1e-2, log=True)] = 1e-5,
) -> Tensor:
    """RAM, with the changes that one expert alone made scaled by 1 + r min(rho_i, alpha).

    Expert i changed an element if |d_i| > `epsilon` (in units of the weights). rho_i is the number of its changes
    that it shares with others over the number of those that are its own alone, both counted in this tensor. Shared
    changes are averaged as in `ram`; smaller differences are dropped. r = 0 is `ram`.

    Raises:
        CandidateFailure: for alpha or epsilon below 0.
    """
    at_least_zero(x, "ramplus_tl", alpha=alpha, epsilon=epsilon)
    overlaps = x.table(("ram_overlaps", epsilon, x.dtype), lambda: _overlaps(x, epsilon))
    scales = [1.0 + r * min(shared / max(unique, 1), alpha) for shared, unique in overlaps]

    def average(at: Block, y: Inputs) -> Tensor:
        changed, count = _changes(y, epsilon)
        alone = count == 1.0
        share = count.clamp_(min=1.0).reciprocal_()
        total = torch.zeros_like(y.wide_base)
        for i, scale in enumerate(scales):
            part = y.delta(i).mul_(changed[i])  # a product, not a selection: NaN must stay visible
            total.add_(part.mul_(torch.where(alone, scale, share)))
        return total.add_(y.wide_base)

    return blockwise(x, average)


def _changes(y: Inputs, epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Returns the mask of each expert's changes, and how many experts changed each element."""
    changed = [y.delta(i).abs_() > epsilon for i in range(len(y.experts))]
    count = torch.zeros_like(y.wide_base)
    for mask in changed:
        count.add_(mask)
    return changed, count


def _overlaps(x: Inputs, epsilon: float) -> tuple[tuple[int, int], ...]:
    """Returns for each expert how many of its changes others made too, and how many are its own alone."""
    shared, unique = [0] * len(x.experts), [0] * len(x.experts)
    for _, y in pieces(x):
        changed, count = _changes(y, epsilon)
        for i, mask in enumerate(changed):
            own = int((mask & (count == 1.0)).sum())
            unique[i] += own
            shared[i] += int(mask.sum()) - own
    return tuple(zip(shared, unique, strict=True))
