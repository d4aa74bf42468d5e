"""Passthrough: one model's tensor as it is, for stacking layers."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import EXTENSION, Inputs, PerExpert, Range, _fused, method


@method(
    "passthrough",
    source="layer stacking as in mergekit's frankenmerges; no paper",
    needs_base=False,
    n_experts=(1, 1),
    mergekit=True,
)
def passthrough(
    x: Inputs,
    *,
    scale: Annotated[PerExpert, Range(0.5, 2.0, log=True)] = 1.0,
    shift: Annotated[PerExpert, EXTENSION] = 0.0,
) -> Tensor:
    """The one given tensor, times `scale`, plus `shift`.

    `shift` is for gains that a model stores less one, as Gemma's: (1 + w) / c is 1 + w' with w' = w / c + (1 / c - 1).
    `scale` is positive in our arithmetic; mergekit's takes any number.

    Raises:
        CandidateFailure: if `scale` is not a positive number, or `shift` not a finite one.
    """
    (factor,), (more,) = x.each(scale), x.each(shift)
    if x.paper and not (math.isfinite(factor) and factor > 0.0 and math.isfinite(more)):
        _refuse(x.name, factor, more)
    if factor == 1.0 and more == 0.0:
        return x.experts[0]
    if _fused.usable(x):
        return _fused.blend(x, x.experts, [factor], more)
    scaled = x.wide_experts[0] * factor
    return scaled if more == 0.0 else scaled.add_(more)


def _refuse(name: str, factor: float, shift: float) -> None:
    if math.isfinite(factor) and factor > 0.0:
        raise CandidateFailure(
            f"passthrough: the shift of {name} is {shift:g}", hint="a finite number", reason="bad_shift"
        )
    raise CandidateFailure(
        f"passthrough: the scale of {name} is {factor:g}",
        hint="a positive number; 0, which leaves a block without effect, is for `compat: mergekit`: to drop "
        "a layer, leave it out of the path",
        reason="bad_scale",
    )
