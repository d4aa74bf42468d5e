"""Statistics of task vectors and whole models, with bits that depend on nothing but the numbers.

Sums have a fixed order; quantiles are exact order statistics, found by counting, so that a model of any size is
streamed in a few passes and neither the order of the tensors nor the number of threads plays a part.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evomerge.methods._inputs import Inputs
from evomerge.methods._sums import fixed_dot

CHUNK = 1 << 20  # elements in float64 at a time
_SORTED = 1 << 22  # up to so many elements are sorted at once
_DIGIT = 16  # bits of a float64 that one pass settles
_FLIP = (1 << 63) - 1

Series = Callable[[], Iterator[Sequence[Tensor]]]
"""Starts a pass over the data: yields chunks of float64 values, one 1-D tensor per series, all of one length."""


def alike(x: Inputs) -> Iterator[Inputs]:
    """Yields the tensors of the merge that have this one's models, in this one's order: expert i is one long vector."""
    models = [x.model(i) for i in range(len(x.experts))]
    for y in x.every():
        theirs = [y.model(j) for j in range(len(y.experts))]
        if theirs == models:
            yield y
        elif len(theirs) == len(models) and set(theirs) == set(models):
            order = [theirs.index(model) for model in models]
            sources = (y.sources[0], *(y.sources[1 + j] for j in order))
            yield replace(
                y,
                experts=tuple(y.experts[j] for j in order),
                streams=tuple(y.streams[j] for j in order),
                sources=sources,
            )


def square_norms(x: Inputs) -> tuple[float, ...]:
    """Returns ||d_i||^2 of this tensor's task vectors, computed once per worker."""
    deltas = (x.delta(i) for i in range(len(x.experts)))  # one at a time
    return x.table("square_norms", lambda: tuple(fixed_dot(delta, delta) for delta in deltas))


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """Returns the inner products of the columns of two (rows, columns) matrices, in float64 and a fixed order."""
    rows, columns = a.shape
    total = torch.zeros(columns, dtype=torch.float64, device=a.device)
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        values = a[start : start + step].double() * b[start : start + step].double()
        while values.shape[0] > 1:
            half = (values.shape[0] + 1) // 2
            values[: values.shape[0] - half] += values[half:]
            values = values[:half]
        total += values[0]
    return total


def quantiles(series: Series, shares: Sequence[float], at_once: int = _SORTED) -> tuple[tuple[float, ...], ...]:
    """Returns, for each series, its quantiles at `shares` in [0, 1]: linear between the two nearest order statistics.

    Up to `at_once` elements are sorted in one pass. Larger series take passes that each count 16 more bits of the
    values around every wanted rank (four at most), until the rest can be sorted. The bits do not depend on the way.
    NaN sorts last.
    """
    n, held = 0, []
    for chunk in series():
        n += chunk[0].numel()
        if n <= at_once:
            held.append(chunk)
    if n == 0:
        return ()
    places = [share * (n - 1) for share in shares]
    ranks = sorted({rank for place in places for rank in (math.floor(place), math.ceil(place))})
    if n <= at_once:
        ordered = [torch.cat(values).sort().values for values in zip(*held, strict=True)]
        found = [{rank: float(values[rank]) for rank in ranks} for values in ordered]
    else:
        found = _counted(series, ranks, at_once)
    return tuple(tuple(_between(values, place) for place in places) for values in found)


def _between(values: dict[int, float], place: float) -> float:
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + 0.0 if low == high else low + (place - math.floor(place)) * (high - low)  # never -0.0


def _counted(series: Series, ranks: Sequence[int], at_once: int) -> list[dict[int, float]]:
    """Returns the values at `ranks` of each series, their bits found from the highest digit down."""
    count = len(next(series()))
    found = [dict.fromkeys(ranks, 0) for _ in range(count)]  # the digits found so far, as one signed number
    left = [{rank: rank for rank in ranks} for _ in range(count)]  # the rank among the values that start with them
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        lowest = -(1 << (_DIGIT - 1)) if shift == 64 - _DIGIT else 0  # the highest digit carries the sign
        counts: list[dict[int, Tensor]] = [{} for _ in range(count)]
        for chunk in series():
            for values, known, table in zip(chunk, found, counts, strict=True):
                _count(values, shift, lowest, set(known.values()), table)
        candidates = 0
        for known, remaining, table in zip(found, left, counts, strict=True):
            totals = {start: column.cumsum(0).tolist() for start, column in table.items()}
            for rank in ranks:
                total = totals[known[rank]]
                digit = bisect.bisect_right(total, remaining[rank])
                below = total[digit - 1] if digit else 0
                remaining[rank] -= below
                known[rank] = (known[rank] << _DIGIT) + digit + lowest
                candidates += total[digit] - below
        if candidates <= at_once:
            return _picked(series, shift, found, left)
    return [{rank: _value(key) for rank, key in known.items()} for known in found]


def _picked(
    series: Series, shift: int, found: list[dict[int, int]], left: list[dict[int, int]]
) -> list[dict[int, float]]:
    """Returns the values at the ranks from one last pass, over the few that start with the digits found."""
    held: list[dict[int, list[Tensor]]] = [{start: [] for start in known.values()} for known in found]
    for chunk in series():
        for values, parts in zip(chunk, held, strict=True):
            keys = _keys(values)
            for start, part in parts.items():
                part.append(keys[keys >> shift == start])
    ordered = [{start: torch.cat(part).sort().values for start, part in parts.items()} for parts in held]
    return [
        {rank: _value(int(keys[start][remaining[rank]])) for rank, start in known.items()}
        for known, remaining, keys in zip(found, left, ordered, strict=True)
    ]


def _count(values: Tensor, shift: int, lowest: int, starts: set[int], table: dict[int, Tensor]) -> None:
    """Adds to `table` how often each digit follows each of the digits `starts`."""
    digits = _keys(values) >> shift
    for start in starts:
        chosen = digits if lowest else digits[digits >> _DIGIT == start].bitwise_and_((1 << _DIGIT) - 1)
        counts = torch.bincount(chosen - lowest, minlength=1 << _DIGIT)
        table[start] = table[start] + counts if start in table else counts


def _keys(values: Tensor) -> Tensor:
    """Returns signed integers in the order of the float64 values; NaN is the largest."""
    bits = values.contiguous().view(torch.int64)
    return (bits ^ ((bits >> 63) & _FLIP)).masked_fill_(values.isnan(), _FLIP)


def _value(key: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", key if key >= 0 else key ^ _FLIP))[0])
