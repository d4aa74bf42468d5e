"""SLERP: interpolation along the great circle between the base and one model."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, _fused, method
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
    keep, move = _coefficients(*x.table("slerp", lambda: _products(x)), t)
    if _fused.usable(x):
        return _fused.blend(x, [x.reference, x.experts[0]], [keep, move])
    a, b = _widened(x.wide_base), _widened(x.wide_experts[0])
    return (a * keep).add_(b * move).to(x.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _products(x: Inputs) -> tuple[float, float, float]:
    """Returns <a, a>, <b, b> and <a, b>: all that a new t needs to know of the tensors."""
    a, b = _widened(x.reference), _widened(x.experts[0])
    return fixed_dot(a, a), fixed_dot(b, b), fixed_dot(a, b)


def _coefficients(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    norms = [math.sqrt(square) for square in (aa, bb)]
    cosine = ab / math.prod(norm if norm > _ZERO_NORM else 1.0 for norm in norms)
    if not abs(cosine) <= _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine
