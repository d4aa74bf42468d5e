"""Compiled loops for what depends on the models alone: bucket counts, k-th largest, ranks, norms, energies.

They share the block loops of `_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from evomerge.methods._fused import STRIP
from evomerge.methods._kernels import (
    BF16,
    BLOCK,
    difference,
    jit,
    load,
    pointer,
    scratch_rows,
    select,
    variance_of,
    widen,
)


@jit
def _absolute(m: int, d: Any) -> None:
    for j in range(m):
        d[j] = abs(d[j])


@jit
def _scores(at: int, m: int, base: Any, experts: Any, variance: bool, spread: Any, x: Any, d: Any, sums: Any) -> None:
    """Fills d[i, :m] with |expert i - base|, or d[0, :m] with their variance: stored at `spread`, else computed."""
    k = experts.shape[0]
    if variance and spread[0]:
        load(spread[0], spread[1], at, m, d[0])
        return
    load(base[0], base[1], at, m, x)
    for i in range(k):
        difference(experts[i, 0], experts[i, 1], at, m, x, d[i])
    if variance:
        variance_of(k, m, d, sums[0], sums[1])
        for j in range(m):
            d[0, j] = sums[1, j]
    else:
        for i in range(k):
            _absolute(m, d[i])


@jit
def histogram(start: int, stop: int, base: Any, experts: Any, variance: bool, spread: Any, counts: Any) -> None:
    """Adds to counts[i, bits >> 15] for the magnitudes of each task vector, or to counts[0] for their variance."""
    k = experts.shape[0]
    scratch = scratch_rows(k + 3)
    d, sums, x = scratch[:k], scratch[k : k + 2], scratch[k + 2]
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        _scores(at, m, base, experts, variance, spread, x, d, sums)
        for i in range(1 if variance else k):
            for j in range(m):
                counts[i, np.float32(d[i, j]).view(np.uint32) >> np.uint32(15)] += 1


@jit
def refine(
    start: int, stop: int, base: Any, experts: Any, variance: bool, spread: Any, i: int, rows: Any, counts: Any,
    first: Any, mixed: Any,
) -> None:  # fmt: skip
    """Looks into the buckets of row i's scores, by the parts of `counts` (rows, parts), a row per bucket.

    Adds to counts[row, part]; first[row, part] (-1 so far) becomes one of the part's values, as low 15 bits, and
    mixed[row, part] true if it holds another one too. Nothing branches on a score: which bucket it falls into cannot
    be predicted.
    """
    k = experts.shape[0]
    scratch = scratch_rows(k + 3)
    d, sums, x = scratch[:k], scratch[k : k + 2], scratch[k + 2]
    n_parts = counts.shape[1]
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        _scores(at, m, base, experts if variance else experts[i : i + 1], variance, spread, x, d, sums)
        for j in range(m):
            bits = np.float32(d[0, j]).view(np.uint32)
            low = np.int32(bits & np.uint32(32767))
            row, part = rows[bits >> np.uint32(15)], low * n_parts >> 15
            seen = first[row, part]
            seen = low if seen < 0 else seen
            counts[row, part] += 1
            first[row, part] = seen
            mixed[row, part] |= seen != low


@jit
def _hits(m: int, scores: Any, low: Any, span: Any) -> Any:
    """How many of m scores have bits in low ... low+span-1."""
    hits = np.uint32(0)
    for j in range(m):
        hits += np.uint32(np.uint32(np.float32(scores[j]).view(np.uint32) - low) < span)
    return hits


@jit
def _hits_between(address: int, dtype: int, start: int, m: int, base: Any, low: Any, span: Any) -> Any:
    """`_hits` of the magnitudes of m differences from the base, without storing them."""
    hits = np.uint32(0)
    if dtype == BF16:
        halves = carray(pointer(address), (start + m,), np.uint16)[start:]
        for j in range(m):
            bits = np.float32(widen(halves[j]) - base[j]).view(np.uint32) & np.uint32(0x7FFFFFFF)
            hits += np.uint32(np.uint32(bits - low) < span)
    else:
        words = carray(pointer(address), (start + m,), np.float32)[start:]
        for j in range(m):
            bits = np.float32(words[j] - base[j]).view(np.uint32) & np.uint32(0x7FFFFFFF)
            hits += np.uint32(np.uint32(bits - low) < span)
    return hits


@jit
def count(
    start: int, stop: int, base: Any, experts: Any, variance: bool, spread: Any, low: Any, span: Any, counts: Any
) -> None:
    """Adds to counts[i, place // STRIP] for the scores with bits in low[i] ... low[i]+span[i]-1."""
    k = experts.shape[0]
    scratch = scratch_rows(k + 3)
    d, sums, x = scratch[:k], scratch[k : k + 2], scratch[k + 2]
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        if variance:
            _scores(at, m, base, experts, True, spread, x, d, sums)
            counts[0, at // STRIP] += _hits(m, d[0], low[0], span[0])
            continue
        load(base[0], base[1], at, m, x)
        for i in range(k):
            if span[i]:
                counts[i, at // STRIP] += _hits_between(experts[i, 0], experts[i, 1], at, m, x, low[i], span[i])


@jit
def _list(at: int, m: int, scores: Any, low: Any, span: Any, sizes: Any, places: Any, n: int) -> int:
    """Appends the bits and places of the scores in the range; returns how many are listed now."""
    for group in range(0, m, 64):
        part = scores[group : min(group + 64, m)]
        if _hits(part.size, part, low, span):
            for j in range(part.size):
                bits = np.float32(part[j]).view(np.uint32)
                if np.uint32(bits - low) < span:
                    sizes[n] = bits
                    places[n] = at + group + j
                    n += 1
    return n


@jit
def collect(
    start: int, stop: int, base: Any, experts: Any, variance: bool, spread: Any, low: Any, span: Any, sizes: Any,
    places: Any, found: Any,
) -> None:  # fmt: skip
    """Lists the scores with bits in low[i] ... low[i]+span[i]-1.

    Their bits go to sizes[i], their places to places[i], their number to found[i]. Most blocks, and most groups of 64
    in the others, hold none: a vectorised count passes those over.
    """
    k = experts.shape[0]
    scratch = scratch_rows(k + 3)
    d, sums, x = scratch[:k], scratch[k : k + 2], scratch[k + 2]
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        if variance:
            _scores(at, m, base, experts, True, spread, x, d, sums)
            if _hits(m, d[0], low[0], span[0]):
                found[0] = _list(at, m, d[0], low[0], span[0], sizes[0], places[0], found[0])
            continue
        load(base[0], base[1], at, m, x)
        for i in range(k):
            if span[i] and _hits_between(experts[i, 0], experts[i, 1], at, m, x, low[i], span[i]):
                difference(experts[i, 0], experts[i, 1], at, m, x, d[i])
                _absolute(m, d[i])
                found[i] = _list(at, m, d[i], low[i], span[i], sizes[i], places[i], found[i])


@jit
def row_ranks(start: int, stop: int, row: int, base: Any, expert: Any, out: Any) -> None:
    """Ranks each row's magnitudes, 0 the smallest, equal ones by place; rows start ... stop-1 of length `row`.

    A radix sort of the bits, 8 at a time; a digit that all magnitudes of a row share, as the last ones of differences
    between bfloat16 numbers mostly are, costs nothing.
    """
    x, d = np.empty(row, np.float32), np.empty(row, np.float32)
    order, other = np.empty(row, np.int32), np.empty(row, np.int32)
    key = np.empty(row, np.uint32)
    counts = np.empty((4, 257), np.int32)
    for r in range(start, stop):
        load(base[0], base[1], r * row, row, x)
        difference(expert[0], expert[1], r * row, row, x, d)
        counts[:] = 0
        for j in range(row):
            bits = np.float32(abs(d[j])).view(np.uint32)
            key[j] = bits
            order[j] = j
            counts[0, (bits & np.uint32(255)) + 1] += 1
            counts[1, ((bits >> np.uint32(8)) & np.uint32(255)) + 1] += 1
            counts[2, ((bits >> np.uint32(16)) & np.uint32(255)) + 1] += 1
            counts[3, (bits >> np.uint32(24)) + 1] += 1
        for digit in range(4):
            shift = np.uint32(8 * digit)
            count = counts[digit]
            if count[((key[0] >> shift) & np.uint32(255)) + 1] == row:
                continue
            for b in range(256):
                count[b + 1] += count[b]
            for j in range(row):
                place = order[j]
                b = (key[place] >> shift) & np.uint32(255)
                other[count[b]] = place
                count[b] += 1
            order, other = other, order
        for j in range(row):
            out[r * row + order[j]] = j


@jit
def lanes(start: int, stop: int, left: Any, right: Any, absolute: bool, acc: Any) -> None:
    """Adds the products of two tensors (or |left|), in float64, to acc[place modulo its length], in order."""
    scratch = scratch_rows(2)
    x, y = scratch[0], scratch[1]
    width = acc.size
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        load(left[0], left[1], at, m, x)
        offset = (at - start) % width
        row = acc[offset : offset + m]
        if absolute:
            for j in range(m):
                row[j] += np.float64(abs(x[j]))
        else:
            load(right[0], right[1], at, m, y)
            for j in range(m):
                row[j] += np.float64(x[j]) * np.float64(y[j])


@jit
def energies(
    start: int, stop: int, base: Any, experts: Any, selected: bool, spread: Any, cut: Any, tie: int, acc: Any
) -> None:
    """Adds the squares of the selected entries of each task vector, in float64, to acc[i, place modulo its length]."""
    k = experts.shape[0]
    scratch = scratch_rows(k + 3)
    d, sums, x = scratch[:k], scratch[k : k + 2], scratch[k + 2]
    width = acc.shape[1]
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        load(base[0], base[1], at, m, x)
        for i in range(k):
            difference(experts[i, 0], experts[i, 1], at, m, x, d[i])
        if selected:
            if spread[0]:
                load(spread[0], spread[1], at, m, sums[1])
            else:
                variance_of(k, m, d, sums[0], sums[1])
            select(at, m, k, cut, tie, d, sums[1])
        offset = (at - start) % width
        for i in range(k):
            row = acc[i, offset : offset + m]
            for j in range(m):
                row[j] += np.float64(d[i, j]) * np.float64(d[i, j])


@jit
def variances(start: int, stop: int, base: Any, experts: Any, out: Any) -> None:
    """Writes the variance over the task vectors."""
    k = experts.shape[0]
    scratch = scratch_rows(k + 3)
    d, sums, x = scratch[:k], scratch[k : k + 2], scratch[k + 2]
    nowhere = np.zeros(2, np.uint64)
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        _scores(at, m, base, experts, True, nowhere, x, d, sums)
        out[at : at + m] = d[0, :m]
