"""LiNeS: a line over depth that scales any merged task vector (Wang et al. 2024, arXiv 2410.17146).

Every method with a base takes the three parameters of this file beside its own. Block l of L scales its merged
task vector by alpha + beta * l / (L - 1); tensors outside the blocks (embeddings, final norm, head) by alpha.
Parameters may differ per tensor, so a filter gives the head, or a component, a scale of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor

from evomerge.methods._inputs import Inputs
from evomerge.methods._ranges import EXTENSION, Range
from evomerge.methods._sums import fixed_norm1


def lines(
    *,
    lines_alpha: Annotated[float, Range(0.0, 1.0), EXTENSION] = 1.0,
    lines_beta: Annotated[float, Range(0.0, 1.5), EXTENSION] = 0.0,
    lines_match: Annotated[bool, EXTENSION] = False,
) -> None:
    """Declares the parameters: the line's start, its rise, and whether the start is matched by L1 norm."""


LINES_PARAMETERS = tuple(inspect.signature(lines).parameters)


def depth_scale(x: Inputs, alpha: float, beta: float) -> float:
    """Returns alpha + beta * l / (L - 1) for the tensor's block l of L, and alpha outside the blocks.

    With a single block the line ends where it starts: alpha + beta.
    """
    if x.layer is None:
        return alpha
    return alpha + beta * (x.layer / (x.n_layers - 1) if x.n_layers > 1 else 1.0)


def matched(x: Inputs, alpha: float, merge: Callable[[Inputs], Tensor]) -> float:
    """Returns alpha times ||sum_i d_i||_1 / (K ||tau||_1), the paper's alpha for K experts and tau = merge - base.

    Both norms are over the whole model. For a sum tau it is alpha / K, for a mean alpha; tau = 0 leaves alpha.
    """

    def ratio() -> float:
        before = after = 0.0
        for y in x.every():
            total = y.delta(0)
            for i in range(1, len(y.experts)):
                total.add_(y.delta(i))
            before += fixed_norm1(total)
            after += fixed_norm1(merge(y).to(y.dtype) - y.wide_base)
        return before / (len(x.experts) * after) if after > 0.0 else 1.0

    return alpha * x.family_table("lines_match", ratio, parameters=True)


def scaled(x: Inputs, result: Tensor, scale: float) -> Tensor:
    """Returns base + scale * (result - base); the base or the result itself where that is a copy."""
    if scale == 1.0 or result is x.base:
        return result
    if scale == 0.0:
        return x.reference
    return (result.to(x.dtype) - x.wide_base).mul_(scale).add_(x.wide_base)


def take_lines(keywords: dict[str, Any]) -> tuple[float, float, bool]:
    """Removes the three parameters from `keywords` and returns them, defaults filled in."""
    alpha = keywords.pop("lines_alpha", 1.0)
    return float(alpha), float(keywords.pop("lines_beta", 0.0)), bool(keywords.pop("lines_match", False))
