"""NuSLERP: interpolation along the great circle between two models, or between their task vectors."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods._geometry import combine, gram

_NO_WEIGHT = 1e-6  # weights that sum to less count as equal
_ZERO_NORM = 1e-7  # mergekit's floor for the length of a vector
_PARALLEL = 1e-8  # below this sine the great circle is a line to float64 precision
_OPPOSITE = 1e-3  # opposite vectors have no one great circle: float32 noise, amplified, would choose it


@method(
    "nuslerp",
    source="Shoemake 1985; weights merged so by mergekit",
    needs_base=False,
    optional_base=True,
    n_experts=(2, 2),
    mergekit=True,
)
def nuslerp(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.0)] = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Great-circle interpolation of two models, or of their task vectors if the recipe names a base.

    With t = w_2 / (w_1 + w_2), or 1/2 where the weights sum to less than 1e-6 in size, v_1 and v_2 the models minus
    the base (if any), c their cosine and W = acos c: result = base + (sin((1-t)W) v_1 + sin(tW) v_2) / sin W, and
    base + (1-t) v_1 + t v_2 for parallel and opposite vectors. A vector of zeros counts as orthogonal to all.

    `nuslerp_flatten` takes one angle for the whole tensor. Without it there is one per vector along the last axis,
    or with `nuslerp_row_wise` along the first: mergekit's name for what are columns. 1-D tensors are one vector.
    """
    first, second = x.each(weight)
    total = first + second
    t = second / total if abs(total) >= _NO_WEIGHT else 0.5
    if x.paper and t in (0.0, 1.0):
        return x.experts[1] if t else x.experts[0]
    axis = None if nuslerp_flatten else 0 if nuslerp_row_wise else -1
    return combine(x, (0, 1), _coefficients(gram(x, axis), t, 0.0 if x.paper else _ZERO_NORM), axis)


def _coefficients(products: Tensor, t: float, floor: float) -> Tensor:
    """Returns the factors (2, outer, inner) of the two vectors."""
    norms = torch.stack([products[i, i] for i in (0, 1)]).sqrt().clamp(min=floor)
    size = norms[0] * norms[1]
    cosine = torch.where(size == 0.0, 0.0, products[0, 1] / size.masked_fill(size == 0.0, 1.0)).clamp(-1.0, 1.0)
    angle = cosine.acos()
    sine = angle.sin()
    straight = (sine < _PARALLEL) | ((cosine < 0.0) & (sine < _OPPOSITE))
    sine = sine.masked_fill(straight, math.inf)
    return torch.stack(
        [torch.where(straight, share, (share * angle).sin() / sine) for share in (1.0 - t, t)],
    )
