"""SLERP: interpolation along the great circle between the base and one model."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods._core import Inputs, Range, method
from evomerge.methods._sums import fixed_dot

_PARALLEL = 0.9995  # above this cosine the great circle is a line to float32 precision
_ZERO_NORM = 1e-8


@method(
    "slerp",
    source="Shoemake 1985; weights merged so by mergekit and MergeLLM",
    n_experts=(1, 1),
    mergekit=True,
)
def slerp(x: Inputs, *, t: Annotated[float, Range(0.0, 1.0, limits=(0.0, 1.0))]) -> Tensor:
    """Great-circle interpolation: t = 0 is the base, t = 1 the model.

    The angle is that of the flattened tensors a and b; with c its cosine and W = acos c the
    result is (sin((1-t)W) a + sin(tW) b) / sin W, or (1-t) a + t b when |c| > 0.9995. The
    coefficients act on the tensors as they are, not on unit vectors. They are computed in
    float64 and the tensors combined in float32, under `compat: mergekit` too.
    """
    if x.paper and t in (0.0, 1.0):
        return x.experts[0] if t else x.reference
    a, b = _widened(x.reference), _widened(x.experts[0])
    keep, move = _coefficients(a, b, t)
    return (a * keep).add_(b * move).to(x.reference.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _coefficients(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    norms = [math.sqrt(fixed_dot(v, v)) for v in (a, b)]
    divisor = math.prod(norm if norm > _ZERO_NORM else 1.0 for norm in norms)
    cosine = fixed_dot(a, b) / divisor
    if not abs(cosine) <= _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine
