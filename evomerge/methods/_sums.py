"""Sums with a fixed order, so that their bits depend on nothing but the numbers.

torch's own reductions split the work by thread count and device, which changes the last bits.
Here the order is fixed: chunks of 2^20 elements, each halved by elementwise additions in float64,
the chunk sums added from left to right.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_CHUNK = 1 << 20


def fixed_dot(a: Tensor, b: Tensor) -> float:
    """Returns the inner product of two tensors of one shape, accumulated in float64."""
    left, right = a.reshape(-1), b.reshape(-1)
    return _chunked(left.numel(), lambda at: left[at].double().mul_(right[at].double()))


def fixed_norm1(a: Tensor) -> float:
    """Returns the sum of the absolute values, accumulated in float64."""
    flat = a.reshape(-1)
    return _chunked(flat.numel(), lambda at: flat[at].double().abs_())


def _chunked(n: int, terms: Callable[[slice], Tensor]) -> float:
    total = 0.0
    for start in range(0, n, _CHUNK):
        total += _halve(terms(slice(start, min(start + _CHUNK, n))))
    return total


def _halve(values: Tensor) -> float:
    """Sums a float64 temporary pairwise, in place."""
    while values.numel() > 1:
        half = (values.numel() + 1) // 2
        values[: values.numel() - half] += values[half:]
        values = values[:half]
    return float(values[0])
