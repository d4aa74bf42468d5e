"""Angles and norms of whole tensors, rows or columns, and sums of them with given factors.

The geometric methods all end in the span of their points (task vectors, or whole models where there is no base), so
a candidate is one small problem on the points' Gram matrix, in float64, and one weighted sum of tensors. The matrix
depends on the models alone and is computed once per worker. Tensors are worked through in blocks that stay in the
processor's cache: the only temporary of full size is the result.

Arithmetic is float32 at least, under `compat: mergekit` too: that keeps mergekit's definitions and thresholds, but
not its roundings between steps in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import _fused
from evomerge.methods._inputs import Inputs
from evomerge.methods._stages import weighted_sum
from evomerge.methods._sums import fixed_dot

_CHUNK = 1 << 18  # elements worked on at a time

Block = tuple[slice, slice, slice]
_BALANCED = 1e-6  # weights that cancel to less than this share of their size have no average


def wide(x: Inputs) -> Inputs:
    """Returns `x` with arithmetic in float32 at least; ask `x` itself for tables and `paper`."""
    return x if x.paper else replace(x, compat="paper")


def rows(tensor: Tensor, axis: int | None) -> Tensor:
    """Returns a view (outer, n, inner) whose middle axis runs along the vectors.

    `axis` is None for one vector of all elements, -1 for the last axis, 0 for the first; scalars and 1-D tensors
    are one vector always.
    """
    if axis is None or tensor.ndim < 2 or tensor.numel() == 0:
        return tensor.reshape(1, -1, 1)
    n = tensor.shape[axis]
    return tensor.reshape(-1, n, 1) if axis == -1 else tensor.reshape(1, n, -1)


def blocks(shape: Sequence[int], *, split_vectors: bool = True) -> Iterator[Block]:
    """Yields the slices of a view of `rows` in blocks of about 2^18 elements.

    A single vector is cut into parts where `split_vectors` allows it; vectors of which there are many stay whole.
    """
    outer, n, inner = shape
    every = slice(None)
    if outer == inner == 1:
        step = _CHUNK if split_vectors else max(n, 1)
        yield from ((every, slice(start, start + step), every) for start in range(0, n, step))
        return
    step = max(1, _CHUNK // max(n, 1))
    if inner == 1:
        yield from ((slice(start, start + step), every, every) for start in range(0, outer, step))
    else:
        yield from ((every, every, slice(start, start + step)) for start in range(0, inner, step))


def pieces(x: Inputs, axis: int | None = None, *, split_vectors: bool = True) -> Iterator[tuple[Block, Inputs]]:
    """Yields the blocks of `x` cut as by `rows`, and the inputs of each, with arithmetic in float32 at least."""
    y = wide(x)
    base = None if y.base is None else rows(y.base, axis)
    experts = [rows(expert, axis) for expert in y.experts]
    for at in blocks(experts[0].shape, split_vectors=split_vectors):
        yield at, replace(y, base=None if base is None else base[at], experts=tuple(e[at] for e in experts))


def blockwise(x: Inputs, merge: Callable[[Block, Inputs], Tensor], axis: int | None = None) -> Tensor:
    """Returns the tensor, in x.dtype, whose blocks are `merge(block, inputs of the block)`."""
    first = x.experts[0]
    result = torch.empty(rows(first, axis).shape, dtype=x.dtype, device=first.device)
    for at, piece in pieces(x, axis):
        result[at] = merge(at, piece)
    return result.reshape(first.shape)


def halved(values: Tensor) -> Tensor:
    """Sums a temporary (outer, n, inner) over n, pairwise and in place; returns (outer, inner).

    The order is fixed, so that the bits do not depend on threads, and each vector's on that vector alone.
    """
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        values[:, : values.shape[1] - half] += values[:, half:]
        values = values[:, :half]
    return values.sum(dim=1)


def gram(x: Inputs, axis: int | None = None) -> Tensor:
    """Returns the inner products of the points, (K, K, outer, inner) in float64 on the CPU: never write to it.

    The points are the task vectors, or the experts where there is no base, cut into vectors as in `rows`.
    """
    return x.table(("gram", axis, x.dtype), lambda: _gram(x, axis))


def _gram(x: Inputs, axis: int | None) -> Tensor:
    k, (outer, _, inner) = len(x.experts), rows(x.experts[0], axis).shape
    result = torch.zeros((k, k, outer, inner), dtype=torch.float64, device=x.experts[0].device)
    if outer == inner == 1:  # one vector: the compiled sums
        points = x.experts if x.base is None else wide(x).deltas
        for i, j in combinations_with_replacement(range(k), 2):
            result[i, j] = result[j, i] = fixed_dot(points[i], points[j])
        return result.cpu()
    for at, piece in pieces(x, axis):
        parts = [point.double() for point in (piece.wide_experts if piece.base is None else piece.deltas)]
        for i in range(k):
            for j in range(i, k):
                result[i, j, at[0], at[2]] += halved(parts[i] * parts[j])
    for i in range(k):
        result[i + 1 :, i] = result[i, i + 1 :]
    return result.cpu()


def combine(x: Inputs, chosen: Sequence[int], factors: Tensor, axis: int | None = None) -> Tensor:
    """Returns the base (if there is one) plus the sum of the chosen points times their factors, in x.dtype.

    `factors` is (len(chosen), outer, inner) in float64.
    """
    if x.paper and factors.shape[1:] == (1, 1):  # whole tensors: one compiled pass
        weights = dict(zip(chosen, factors.flatten().tolist(), strict=True))
        if x.base is not None:
            return weighted_sum(x, [weights.get(i, 0.0) for i in range(len(x.experts))])
        if _fused.usable(x):
            return _fused.blend(x, [x.experts[i] for i in weights], list(weights.values()))
    dtype, device = wide(x).dtype, x.experts[0].device
    scales = factors.to(device=device, dtype=dtype).unsqueeze(2)

    def add_up(at: Block, y: Inputs) -> Tensor:
        total: Tensor | None = None
        for i, scale in zip(chosen, scales, strict=True):
            part = scale[at[0], :, at[2]] * (y.experts[i].to(dtype) if y.base is None else y.delta(i))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total if y.base is None else total.add_(y.wide_base)

    return blockwise(x, add_up, axis)


def shares(x: Inputs, weights: Sequence[float], method: str) -> list[float]:
    """Returns the weights divided by their sum.

    Raises:
        CandidateFailure: if they sum to about zero.
    """
    total = math.fsum(weights)
    if not abs(total) > _BALANCED * math.fsum(map(abs, weights)):
        raise CandidateFailure(
            f"{method}: the weights {list(weights)} of tensor {x.name!r} sum to {total:g}",
            hint="a mean needs weights with a clearly non-zero sum",
            reason="weights_cancel",
        )
    return [weight / total for weight in weights]


def at_least_zero(x: Inputs, method: str, **values: float) -> None:
    """Raises CandidateFailure for a value below 0 or not a number."""
    for name, value in values.items():
        if not value >= 0.0:
            raise CandidateFailure(
                f"{method}: {name} is {value} in tensor {x.name!r}",
                hint=f"{name} is 0 or above",
                reason=f"bad_{name}",
            )
