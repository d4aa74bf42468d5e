"""Passthrough: one model's tensor as it is, for stacking layers."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, PerExpert, Range, _fused, method


@method(
    "passthrough",
    source="layer stacking as in mergekit's frankenmerges; no paper",
    needs_base=False,
    n_experts=(1, 1),
    mergekit=True,
)
def passthrough(x: Inputs, *, scale: Annotated[PerExpert, Range(0.0, 2.0)] = 1.0) -> Tensor:
    """The one given tensor, times `scale`."""
    (factor,) = x.each(scale)
    if factor == 1.0:
        return x.experts[0]
    return _fused.blend(x, x.experts, [factor]) if _fused.usable(x) else x.wide_experts[0] * factor
