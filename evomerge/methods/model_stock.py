"""Model Stock: between the base and the average, as far as the task vectors agree in direction."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from evomerge.methods import Inputs, method
from evomerge.methods._geometry import combine, gram

_ZERO_NORM = 1e-6  # mergekit's floor for a product of two norms
_POLE = 1e-9  # rounding of the cosines must not turn the pole into a huge ratio


@method("model_stock", source="Jang et al. 2024, arXiv 2403.19522", n_experts=(2, None), mergekit=True)
def model_stock(x: Inputs, *, filter_wise: bool = False) -> Tensor:
    """Interpolates from the base to the experts' average by a ratio that the angles between task vectors give.

    result = t mean_i(x_i) + (1 - t) base with t = N c / (1 + (N - 1) c) for N experts, c being the mean cosine of all
    pairs of task vectors, each clipped to [-1, 1], over the whole tensor (with `filter_wise` one per vector along
    the last axis; a 1-D tensor is one vector). Identical experts give t = 1, orthogonal ones the base.

    A pair with a task vector of zeros has no angle and is left out; with no pair left, and for 1 + (N - 1) c <= 1e-9,
    at the formula's pole and beyond, t is 0. `compat: mergekit` has neither guard: its cosines are divided by at least
    1e-6, so that small task vectors count as orthogonal.
    """
    axis = -1 if filter_wise else None
    t = _ratio(gram(x, axis), x.paper)
    if x.paper and not t.any():
        return x.reference
    k = len(x.experts)
    return combine(x, range(k), (t / k).expand(k, *t.shape), axis)


def _ratio(products: Tensor, paper: bool) -> Tensor:
    """Returns t, (outer, inner), from the inner products of the task vectors. NaN in, NaN out."""
    n = len(products)
    norms = [products[i, i].sqrt() for i in range(n)]
    total, pairs = torch.zeros_like(norms[0]), torch.zeros_like(norms[0])
    for i, j in combinations(range(n), 2):
        size = norms[i] * norms[j]
        skipped = (size == 0.0) if paper else torch.zeros_like(size, dtype=torch.bool)
        floored = size.masked_fill(skipped, 1.0) if paper else size.clamp(min=_ZERO_NORM)
        total += (products[i, j] / floored).clamp(-1.0, 1.0).masked_fill(skipped, 0.0)
        pairs += ~skipped
    cosine = total / pairs.clamp(min=1.0)
    divisor = 1.0 + (n - 1) * cosine
    if not paper:
        return n * cosine / divisor
    pole = divisor <= _POLE
    return (n * cosine / divisor.masked_fill(pole, 1.0)).masked_fill(pole, 0.0)
