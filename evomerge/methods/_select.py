"""Exactly the k largest: cuts for magnitudes of task vectors, for their variance, per tensor or over a whole model.

A table per tensor, made once per worker, counts the scores by bucket (their float32 bits without the last 15). A
new k then only looks at the one bucket that holds the k-th largest, so a candidate with new densities never sorts.
Ties go to the lowest place, over a whole model to the first tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.methods import _fused
from evomerge.methods._fused import KEEP_ALL, KEEP_NONE, Cut
from evomerge.methods._inputs import Inputs

_N_BUCKETS = 1 << 16
_SHIFT = 15
_HEAVY = 1 << 8  # a bucket with more than this part of a tensor's scores is looked into
_PARTS = 1 << 10  # that a heavy bucket is looked into by
_SPLIT = 1 << 4  # ranges that it becomes at least, beside its frequent values


@dataclass(frozen=True)
class Buckets:
    """How many scores lie in each range of bits that is not empty.

    Range r holds the bits lows[r] ... lows[r]+spans[r]-1, ascending; at_least[r] scores lie in it or above it.
    """

    lows: NDArray[np.int64]
    spans: NDArray[np.int64]
    at_least: NDArray[np.int64]

    @property
    def n(self) -> int:
        """The number of scores."""
        return int(self.at_least[0]) if len(self.at_least) else 0

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of scores in each range."""
        return -np.diff(self.at_least, append=0)

    def find(self, k: int) -> tuple[int, int]:
        """Returns the row of the k-th largest (1 <= k <= n), and its rank among the scores of that range, from 1."""
        row = int(np.searchsorted(-self.at_least, -k, side="right")) - 1
        above = int(self.at_least[row + 1]) if row + 1 < len(self.lows) else 0
        return row, k - above


def magnitude_cuts(x: Inputs, counts: Sequence[int | None]) -> tuple[Cut, ...]:
    """Returns for each expert the cut that keeps exactly its count of largest magnitudes (None: all)."""
    return x.table(("magnitude cuts", tuple(counts)), lambda: _cuts(x, tuple(counts), variance=False))


def variance_cut(x: Inputs, share: float) -> Cut:
    """Returns the cut that keeps floor(share * n), at least 1, of the n elements whose variance is not zero.

    Experts that agree everywhere have none: then everything is kept.
    """

    def make() -> Cut:
        (buckets,) = _buckets(x, variance=True)
        varying = int(buckets.counts[buckets.lows > 0].sum())  # bucket 0: zeros, and denormals near 1e-41
        return _cuts(x, (max(1, math.floor(share * varying)),), variance=True)[0] if varying else KEEP_ALL

    return x.table(("variance cut", share), make)


def global_cut(x: Inputs, i: int, density: float, *, with_1d: bool) -> Cut:
    """Returns expert i's cut for this tensor when the largest `density` of the whole model is kept.

    The k = max(1, floor(density * n)) largest magnitudes of all n entries of the tensors that take part: all, or
    those with two axes and more.
    """

    def members() -> list[tuple[Inputs, int]]:
        return [(y, j) for y, j in x.every_with(i) if with_1d or y.experts[j].ndim >= 2]

    def make() -> tuple[Cut, str]:
        total = np.zeros(_N_BUCKETS, np.int64)
        for y, j in members():
            table = _buckets(y, variance=False)[j]
            np.add.at(total, table.lows >> _SHIFT, table.counts)
        every = _compact(total)
        row, rank = every.find(max(1, math.floor(density * every.n)))
        wanted = (int(every.lows[row]), int(every.spans[row]))
        found = []
        for y, j in members():
            ranges = [wanted if place == j else (0, 0) for place in range(len(y.experts))]
            found.append((y.name, *_collect(y, ranges, variance=False)[j]))
        bits = np.concatenate([part for _, part, _ in found])
        size = np.partition(bits, len(bits) - rank)[len(bits) - rank]
        left = rank - int((bits > size).sum())
        for name, part, places in found:
            ties = places[part == size]
            if left <= len(ties):
                return _cut(size, int(ties[left - 1]) + 1), name
            left -= len(ties)
        raise AssertionError("the k-th largest is in no tensor")

    cut, last = x.family_table(("global cut", i, density, with_1d), make)
    order = x.family_table("order of tensors", lambda: {y.name: j for j, y in enumerate(x.every())})
    if cut.size == 0.0 or order[x.name] == order[last]:
        return cut
    return Cut(cut.size, x.experts[i].numel() if order[x.name] < order[last] else 0)


def _cut(bits: np.uint32 | int, place: int) -> Cut:
    size = float(np.uint32(bits).view(np.float32))
    return Cut(size, place) if size > 0.0 else KEEP_ALL


def _cuts(x: Inputs, counts: tuple[int | None, ...], *, variance: bool) -> tuple[Cut, ...]:
    """Returns the cut of each score: where its range has one value, only the place of a tie has to be found."""
    tables = _buckets(x, variance=variance)
    exact: list[_fused.Range] = [(0, 0)] * len(counts)
    wide: list[_fused.Range] = [(0, 0)] * len(counts)
    ranks = [0] * len(counts)
    for i, (k, buckets) in enumerate(zip(counts, tables, strict=True)):
        if k is not None and 0 < k < buckets.n:
            row, ranks[i] = buckets.find(k)
            chosen = (int(buckets.lows[row]), int(buckets.spans[row]))
            if chosen[0] > 0 or chosen[1] > 1:
                (exact if chosen[1] == 1 else wide)[i] = chosen
    places = _nth(x, exact, ranks, variance=variance)
    listed = _collect(x, wide, variance=variance)
    result = []
    for i, k in enumerate(counts):
        bits, where = listed[i]
        if k == 0:
            result.append(KEEP_NONE)
        elif exact[i][1]:
            result.append(_cut(exact[i][0], places[i] + 1))
        elif wide[i][1]:
            size = np.partition(bits, len(bits) - ranks[i])[len(bits) - ranks[i]]
            ties = where[bits == size]
            result.append(_cut(size, int(ties[ranks[i] - int((bits > size).sum()) - 1]) + 1))
        else:
            result.append(KEEP_ALL)
    return tuple(result)


def _nth(x: Inputs, ranges: Sequence[_fused.Range], ranks: Sequence[int], *, variance: bool) -> list[int]:
    """Returns the place of the ranks[i]-th score in each range (0 where there is none): counted strip by strip."""
    if not any(span for _, span in ranges):
        return [0] * len(ranges)
    if not _fused.usable(x):
        found = _collect(x, ranges, variance=variance)
        return [int(where[rank - 1]) if len(where) else 0 for (_, where), rank in zip(found, ranks, strict=True)]
    strips = _fused.count(x, ranges, variance)
    result = []
    for i, ((_, span), rank) in enumerate(zip(ranges, ranks, strict=True)):
        if not span:
            result.append(0)
            continue
        sums = strips[i].cumsum()
        strip = int(np.searchsorted(sums, rank))
        before = int(sums[strip] - strips[i, strip])
        start = strip * _fused.STRIP
        part = (start, min(start + _fused.STRIP, x.reference.numel()))
        only = [r if j == i else (0, 0) for j, r in enumerate(ranges)]
        _, where = _fused.collect(x, only, [_fused.STRIP], variance, part)[i]
        result.append(int(where[rank - before - 1]))
    return result


def _collect(
    x: Inputs, ranges: Sequence[_fused.Range], *, variance: bool
) -> list[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """Returns the bits and places (ascending) of the scores in each range."""
    nothing = (np.empty(0, np.uint32), np.empty(0, np.int64))
    if not any(span for _, span in ranges):
        return [nothing] * len(ranges)
    if _fused.usable(x):
        tables = _buckets(x, variance=variance)
        sizes = []
        for table, (low, span) in zip(tables, ranges, strict=True):
            inside = (table.lows >= low) & (table.lows < low + span)
            sizes.append(int(table.counts[inside].sum()))
        return _fused.collect(x, ranges, sizes, variance) if max(sizes) else [nothing] * len(ranges)
    found = []
    for bits, (low, span) in zip(_torch_bits(x, variance), ranges, strict=True):
        places = ((bits >= low) & (bits < low + span)).nonzero().squeeze(1)
        found.append((bits[places].cpu().numpy().astype(np.uint32), places.cpu().numpy()))
    return found


def _buckets(x: Inputs, *, variance: bool) -> tuple[Buckets, ...]:
    def make() -> tuple[Buckets, ...]:
        if not _fused.usable(x):
            return tuple(_compact(row) for row in _torch_histogram(x, variance))
        rows = _fused.histogram(x, variance)
        return tuple(_refined(x, i, variance, row) for i, row in enumerate(rows))

    return x.table(("buckets", variance), make)


def _compact(counts: NDArray[np.int64]) -> Buckets:
    ids = np.flatnonzero(counts)
    return _of_rows(ids << _SHIFT, np.full(len(ids), 1 << _SHIFT), counts[ids])


def _of_rows(lows: NDArray[np.int64], spans: NDArray[np.int64], counts: NDArray[np.int64]) -> Buckets:
    order = np.argsort(lows)
    return Buckets(lows[order], spans[order], counts[order][::-1].cumsum()[::-1].copy())


def _refined(x: Inputs, i: int, variance: bool, counts: NDArray[np.int64]) -> Buckets:
    """Returns the buckets with the heavy ones split: frequent values on their own, the rest evenly.

    Differences of bfloat16 numbers take few values, each many times. A range with one value needs no search for the
    k-th largest, only for its place.
    """
    n = x.reference.numel()
    heavy = np.flatnonzero(counts > max(n // _HEAVY, 1 << 10))
    heavy = heavy[heavy > 0]  # the bucket of the zeros needs no look: a cut in it keeps everything
    if not len(heavy):
        return _compact(counts)
    light = counts.copy()
    light[heavy] = 0
    coarse = _compact(light)
    lows, spans, numbers = _split(heavy, *_fused.refine(x, i, variance, heavy, _PARTS), frequent=n // (4 * _HEAVY))
    return _of_rows(
        np.concatenate([coarse.lows, lows]),
        np.concatenate([coarse.spans, spans]),
        np.concatenate([coarse.counts, numbers]),
    )


def _split(
    heavy: NDArray[np.int64],
    counts: NDArray[np.int64],
    values: NDArray[np.int64],
    mixed: NDArray[np.bool_],
    *,
    frequent: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns disjoint ranges (lows, spans, numbers) of the looked-into buckets, empty ones left out.

    A part whose scores all have one frequent value becomes that value; what lies between is split at most evenly.
    """
    width = (1 << _SHIFT) // _PARTS
    place = np.arange(counts.size)  # parts of all buckets in one row, ascending
    single = ((counts > frequent) & ~mixed).ravel()
    begins = single | np.roll(single, 1) | (place % (_PARTS // _SPLIT) == 0)
    starts = np.flatnonzero(begins)
    numbers = np.add.reduceat(counts.ravel(), starts)
    origin = (heavy << _SHIFT).repeat(_PARTS)
    lows = origin[starts] + np.where(single[starts], values.ravel()[starts], starts % _PARTS * width)
    ends = np.append(starts[1:], counts.size) - starts
    spans = np.where(single[starts], 1, ends * width)
    held = numbers > 0
    return lows[held], spans[held], numbers[held]


def _torch_histogram(x: Inputs, variance: bool) -> NDArray[np.int64]:
    rows = [torch.bincount(bits >> _SHIFT, minlength=_N_BUCKETS).cpu().numpy() for bits in _torch_bits(x, variance)]
    return np.stack(rows)


def _torch_bits(x: Inputs, variance: bool) -> list[Tensor]:
    scores = [torch_variance(x)] if variance else [x.delta(i).abs_() for i in range(len(x.experts))]
    return [score.float().flatten().view(torch.int32) for score in scores]


def torch_variance(x: Inputs) -> Tensor:
    """Returns the population variance over the task vectors; 0 where it is rounding: 1e-12 of the squared mean."""
    share = float(np.float32(1.0 / len(x.experts)))
    mean = x.delta(0)
    for i in range(1, len(x.experts)):
        mean.add_(x.deltas[i])
    mean.mul_(share)
    total = torch.zeros_like(mean)
    for i in range(len(x.experts)):
        total.add_(x.delta(i).sub_(mean).square_())
    total.mul_(share)
    # A NaN has its sign cleared, as that of a magnitude: the bits of scores are compared as numbers.
    return total.masked_fill_(total <= mean.square().mul_(float(np.float32(1e-12))), 0.0).abs_()
