"""Linear: the weighted average of whole models (model soup)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, PerExpert, Range, _fused, method

_BALANCED = 1e-6  # weights that cancel to less than this share of their size have no average


@method("linear", source="Wortsman et al. 2022, arXiv 2203.05482", needs_base=False, mergekit=True)
def linear(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.0)] = 1.0,
    normalize: bool = True,
) -> Tensor:
    """The weighted average of the models: sum_i w_i x_i / sum_i w_i.

    The base, if it is to take part, is one of the models. Without `normalize` the weights are
    used as they are, so a sum other than 1 rescales the base's own weights as well.

    Raises:
        CandidateFailure: if `normalize` and the weights sum to about zero.
    """
    weights = x.each(weight)
    divisor = sum(weights) if normalize else 1.0
    if abs(divisor) <= _BALANCED * sum(abs(w) for w in weights):
        raise CandidateFailure(
            f"linear: the weights {list(weights)} of tensor {x.name!r} sum to {divisor:g}",
            hint="an average needs weights with a clearly non-zero sum, or normalize: false",
            reason="weights_cancel",
        )
    if not x.paper:
        return _mergekit(x, weights, divisor)
    factors = [w / divisor for w in weights]
    active = [i for i, factor in enumerate(factors) if factor != 0.0]
    if not active:
        return torch.zeros_like(x.experts[0])
    if len(active) == 1 and factors[active[0]] == 1.0:
        return x.experts[active[0]]
    if _fused.usable(x):
        return _fused.blend(x, [x.experts[i] for i in active], [factors[i] for i in active])
    total = x.wide_experts[active[0]] * factors[active[0]]
    for i in active[1:]:
        total.add_(x.wide_experts[i] * factors[i])
    return total


def _mergekit(x: Inputs, weights: tuple[float, ...], divisor: float) -> Tensor:
    """mergekit 0.1.5 sums in float32, divides at the end and rounds once to the inputs' dtype."""
    dtype = torch.promote_types(x.experts[0].dtype, torch.float32)
    total = torch.zeros_like(x.experts[0], dtype=dtype)
    for expert, weight in zip(x.experts, weights, strict=True):
        total.add_(expert.to(dtype) * weight)
    return total.div_(divisor).to(x.experts[0].dtype)
