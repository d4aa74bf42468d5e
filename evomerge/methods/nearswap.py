"""NearSwap: take a model's elements where they are near the base's, and move the others a little."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._geometry import Block, at_least_zero, blockwise

_NEAR = 1e-6  # mergekit's floor for a difference


@method(
    "nearswap",
    source="alchemonaut 2024, QuartetAnemoi-70B-t0.0001 model card; mergekit",
    n_experts=(1, 1),
    mergekit=True,
    identity=False,
)
def nearswap(x: Inputs, *, t: Annotated[float, Range(1e-5, 0.1, log=True)]) -> Tensor:
    """Moves each element of the base towards the model, by `t` (in units of the weights) at most.

    result = base + s d with d = model - base and s = min(1, t / |d|): elements that differ by at most t become the
    model's own, exactly, all others move by t. t = 0 gives the base. `compat: mergekit` divides by at least
    1e-6 instead, so that with t < 1e-6 nearer elements move by a share of their way.

    Raises:
        CandidateFailure: for t below 0.
    """
    at_least_zero(x, "nearswap", t=t)
    if t == 0.0:
        return x.reference

    def move(at: Block, y: Inputs) -> Tensor:
        delta, expert = y.delta(0), y.wide_experts[0]
        if x.paper:
            near = delta.abs() <= t
            return torch.where(near, expert, delta.clamp_(-t, t).add_(y.wide_base))
        share = (t / delta.abs_().clamp_(min=_NEAR)).clamp_(0.0, 1.0)
        return (expert * share).add_((1.0 - share).mul_(y.wide_base))

    return blockwise(x, move)
