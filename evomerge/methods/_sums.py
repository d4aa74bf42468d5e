"""Sums with a fixed order, so that their bits depend on nothing but the numbers.

torch's own reductions split the work by thread count and device, which changes the last bits. Here the order is
fixed, in float64: each chunk of 2^20 elements is added row by row onto 2^14 lanes, the lanes are halved until one is
left, and the chunk sums are added from left to right. On a CPU compiled loops do the same additions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evomerge.methods import _fused

CHUNK, LANES = _fused.CHUNK, _fused.LANES


def fixed_dot(a: Tensor, b: Tensor) -> float:
    """Returns the inner product of two tensors of one shape, accumulated in float64."""
    if _fused.readable(a) and _fused.readable(b):
        return _fused.dot(a, b)
    left, right = a.reshape(-1), b.reshape(-1)
    return fixed_sum(left.numel(), lambda at: left[at].to(torch.float64, copy=True).mul_(right[at].double()))


def fixed_norm1(a: Tensor) -> float:
    """Returns the sum of the absolute values, accumulated in float64."""
    if _fused.readable(a):
        return _fused.norm1(a)
    flat = a.reshape(-1)
    return fixed_sum(flat.numel(), lambda at: flat[at].to(torch.float64, copy=True).abs_())


def fixed_sum(n: int, terms: Callable[[slice], Tensor]) -> float:
    """Returns the sum of n float64 terms; `terms(slice)` gives those of one slice as a temporary."""
    total = 0.0
    for start in range(0, n, CHUNK):
        length = min(CHUNK, n - start)
        lanes = torch.zeros(0, dtype=torch.float64)
        for row in range(0, length, LANES):
            part = terms(slice(start + row, start + min(row + LANES, length)))
            if row:
                lanes[: part.numel()] += part
            else:
                lanes = part
        total += _halve(lanes)
    return total


def _halve(values: Tensor) -> float:
    """Sums a float64 temporary pairwise, in place."""
    while values.numel() > 1:
        half = (values.numel() + 1) // 2
        values[: values.numel() - half] += values[half:]
        values = values[:half]
    return float(values[0]) if values.numel() else 0.0
