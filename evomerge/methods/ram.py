"""RAM: what one expert alone changed is kept whole, what several changed is averaged."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._geometry import Block, at_least_zero, blockwise


@method("ram", source="Yuan et al. 2026, arXiv 2601.13572", mergekit=True, identity=False)
def ram(x: Inputs, *, epsilon: Annotated[float, Range(1e-6, 1e-2, log=True)] = 1e-5) -> Tensor:
    """Averages each element's change over the experts that changed it, so that unique changes are not diluted.

    Expert i changed an element if |d_i| > `epsilon` (in units of the weights). With c the number of experts that
    changed it: result = base + sum of their d_i / max(c, 1). Smaller differences are dropped. For task vectors of
    reinforcement learning, which are sparse and overlap little.

    Raises:
        CandidateFailure: for epsilon below 0.
    """
    at_least_zero(x, "ram", epsilon=epsilon)

    def average(at: Block, y: Inputs) -> Tensor:
        total, count = torch.zeros_like(y.wide_base), torch.zeros_like(y.wide_base)
        for i in range(len(y.experts)):
            delta = y.delta(i)
            changed = delta.abs() > epsilon
            count.add_(changed)
            total.add_(delta.mul_(changed))  # a product, not a selection: NaN must stay visible
        return total.div_(count.clamp_(min=1.0)).add_(y.wide_base)

    return blockwise(x, average)
