"""The fused loops of merging on a CPU, compiled by numba: one read of each input, one write of the result.

A tensor is a flat array at an address with a dtype code, float32 or bfloat16, so that one compiled function serves
any number of experts and any mixture of the two. Work goes block by block through scratch that stays in the first
cache. Every operation is a separate IEEE operation in float32 (numba does not contract a*b+c without fastmath), in
the order in which the torch forms in `_stages` do them: the bits are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from evomerge.methods._fused import HASHED, RANKED, WINDOW

BLOCK = 256  # elements of a block: its scratch, a few rows, stays in a first-level cache of 32 KB
STRIDE = BLOCK + 80  # floats between rows of scratch: rows a multiple of 4 KB apart would alias in the cache
F32, BF16 = 0, 1

_FILES = ("_kernels.py", "_kernel_tables.py", "_fused.py")  # what compiled code is made of
_STAMP = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _FILES)).hexdigest()


def jit(function: Callable[..., Any]) -> Any:
    """Compiles on the first call and keeps the code on disk for the next process.

    numba takes kept code for fresh while the file of the function has not changed. These functions call each other
    across files, with block lengths built in: a stale mixture would write past its scratch. So the stamp that numba
    compares is that of all files together.
    """
    try:
        compiled = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder that can be written to: every process compiles for itself
        return njit(nogil=True, error_model="numpy")(function)
    compiled._cache._cache_file._source_stamp = _STAMP
    return compiled


_inline = njit(nogil=True, error_model="numpy", inline="always")

_ZERO, _ONE, _TWO_24 = np.float32(0.0), np.float32(1.0), np.float32(2.0**24)
_ROUNDING = np.float32(1e-12)
TINY = np.float32(1e-8)  # a divisor below this in size is replaced by 1


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer that numba's carray takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), generate


@jit
def load(address: int, dtype: int, start: int, m: int, out: Any) -> None:
    """Widens elements start ... start+m-1 into out[:m]."""
    if dtype == BF16:
        halves = carray(pointer(address), (start + m,), np.uint16)[start:]
        for j in range(m):
            out[j] = np.uint32(np.uint32(halves[j]) << np.uint32(16)).view(np.float32)
    else:
        words = carray(pointer(address), (start + m,), np.float32)[start:]
        for j in range(m):
            out[j] = words[j]


@jit
def _store(address: int, dtype: int, start: int, m: int, values: Any) -> Any:
    """Rounds values[:m] to nearest even and writes them; returns whether one of them is not finite."""
    largest = np.uint32(0)  # of the written bits without sign: infinity and NaN are the largest
    if dtype == BF16:
        halves = carray(pointer(address), (start + m,), np.uint16)[start:]
        for j in range(m):
            bits = np.float32(values[j]).view(np.uint32)
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            rounded = np.uint32(0x7FC0) if is_nan else rounded
            largest = max(largest, rounded & np.uint32(0x7FFF))
            halves[j] = np.uint16(rounded)
        return largest >= np.uint32(0x7F80)
    words = carray(pointer(address), (start + m,), np.float32)[start:]
    for j in range(m):
        largest = max(largest, np.float32(values[j]).view(np.uint32) & np.uint32(0x7FFFFFFF))
        words[j] = values[j]
    return largest >= np.uint32(0x7F800000)


@jit
def scratch_rows(rows: int) -> Any:
    """Rows of STRIDE floats, aligned to cache lines."""
    flat = np.empty(rows * STRIDE + 16, np.float32)
    skip = (-(flat.ctypes.data // 4)) % 16
    return flat[skip : skip + rows * STRIDE].reshape((rows, STRIDE))


@_inline
def _finalise(h: Any) -> Any:
    """Murmur3's fmix32. Every product is cut back to 32 bits: numba widens them to 64."""
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x85EBCA6B))
    h = np.uint32(h ^ (h >> np.uint32(13)))
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@_inline
def widen(half: Any) -> Any:
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@jit
def _first_round(start: int, m: int, key: Any, out: Any) -> None:
    """The first round of `_masks.keep_mask`'s hash, which all experts share; a block never crosses 2^32."""
    low = np.uint32(start & 0xFFFFFFFF)
    high = np.uint32(np.uint32(start >> 32) * np.uint32(0x9E3779B9))
    for j in range(m):
        out[j] = np.uint32(_finalise(np.uint32(np.uint32(low + np.uint32(j)) ^ key)) + high)


@jit
def difference(address: int, dtype: int, start: int, m: int, base: Any, out: Any) -> None:
    """out[:m] = expert - base."""
    if dtype == BF16:
        halves = carray(pointer(address), (start + m,), np.uint16)[start:]
        for j in range(m):
            out[j] = widen(halves[j]) - base[j]
    else:
        words = carray(pointer(address), (start + m,), np.float32)[start:]
        for j in range(m):
            out[j] = words[j] - base[j]


@jit
def _take_all(m: int, f: Any, d: Any, acc: Any) -> None:
    """d *= f; acc += d. The other _take functions do the same with a factor of 0 for what they drop.

    Factors, not selections, so that a NaN in a dropped element stays visible.
    """
    for j in range(m):
        value = d[j] * f
        d[j] = value
        acc[j] += value


@jit
def _take_window(start: int, m: int, lo: Any, lo_tie: int, hi: Any, hi_tie: int, f: Any, d: Any, acc: Any) -> None:
    """Keeps what ranks between the two cuts."""
    low = np.int32(min(max(lo_tie - start, 0), m))
    high = np.int32(min(max(hi_tie - start, 0), m))
    for j in range(m):
        size = abs(d[j])
        inside = (size > lo) | ((size == lo) & (np.int32(j) < low))
        outlier = (size > hi) | ((size == hi) & (np.int32(j) < high))
        value = d[j] * (f if inside & (not outlier) else _ZERO)
        d[j] = value
        acc[j] += value


@jit
def _take_hashed(m: int, first: Any, add: Any, xor: Any, upto: Any, f: Any, d: Any, acc: Any) -> None:
    """Keeps an element when its hash is at most `upto`."""
    for j in range(m):
        value = d[j] * (f if _finalise(np.uint32(np.uint32(first[j] + add) ^ xor)) <= upto else _ZERO)
        d[j] = value
        acc[j] += value


@jit
def _take_ranked(
    start: int, m: int, ranks_at: int, first: Any, add: Any, xor: Any, low: Any, step: Any, whole: bool, f: Any,
    d: Any, acc: Any,
) -> None:  # fmt: skip
    """Keeps an element with probability q = low + step * rank, times 1/q unless `whole`."""
    ranks = carray(pointer(ranks_at), (start + m,), np.uint16)[start:]
    for j in range(m):
        q = low + step * np.float32(ranks[j])
        # the 24 high bits of the hash are a float32 exactly
        draw = np.float32(np.int32(_finalise(np.uint32(np.uint32(first[j] + add) ^ xor)) >> np.uint32(8)))
        scale = _ONE if whole else _ONE / q
        value = d[j] * (scale if draw < q * _TWO_24 else _ZERO) * f
        d[j] = value
        acc[j] += value


@jit
def _deviate(m: int, d: Any, mean: Any, out: Any) -> None:
    for j in range(m):
        off = d[j] - mean[j]
        out[j] += off * off


@jit
def variance_of(k: int, m: int, d: Any, mean: Any, out: Any) -> None:
    """out[:m] = population variance over the k rows of d; 0 where it is rounding: up to 1e-12 of the squared mean."""
    share = np.float32(1.0 / k)
    for j in range(m):
        mean[j] = d[0, j]
        out[j] = _ZERO
    for i in range(1, k):
        add(m, mean, d[i])
    for j in range(m):
        mean[j] *= share
    for i in range(k):
        _deviate(m, d[i], mean, out)
    for j in range(m):
        v = out[j] * share
        out[j] = _ZERO if v <= mean[j] * mean[j] * _ROUNDING else abs(v)  # clears the sign of a NaN


@jit
def add(m: int, total: Any, x: Any) -> None:
    """total += x."""
    for j in range(m):
        total[j] += x[j]


@jit
def select(start: int, m: int, k: int, cut: Any, tie: int, d: Any, scores: Any) -> None:
    """Zeroes every task vector where the score does not reach the cut."""
    limit = np.int32(min(max(tie - start, 0), m))
    for i in range(k):
        row = d[i]
        for j in range(m):
            row[j] *= _ONE if (scores[j] > cut) | ((scores[j] == cut) & (np.int32(j) < limit)) else _ZERO


@jit
def _agree(m: int, d: Any, f: Any, w: Any, plain: bool, elected: Any, total: Any, divisor: Any) -> None:
    """Adds four experts' entries whose sign is the elected one, as sizes, and the experts' weights where there are any.

    `plain` says that all four factors are 1.
    """
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    f0, f1, f2, f3 = f[0], f[1], f[2], f[3]
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for j in range(m):
        sign = elected[j]
        v0, v1, v2, v3 = d0[j] * sign, d1[j] * sign, d2[j] * sign, d3[j] * sign
        p0, p1 = v0 if v0 > _ZERO else _ZERO, v1 if v1 > _ZERO else _ZERO
        p2, p3 = v2 if v2 > _ZERO else _ZERO, v3 if v3 > _ZERO else _ZERO
        if plain:
            total[j] = total[j] + p0 + p1 + p2 + p3
        else:
            total[j] = total[j] + p0 * f0 + p1 * f1 + p2 * f2 + p3 * f3
        u0, u1 = w0 if v0 > _ZERO else _ZERO, w1 if v1 > _ZERO else _ZERO
        u2, u3 = w2 if v2 > _ZERO else _ZERO, w3 if v3 > _ZERO else _ZERO
        divisor[j] = divisor[j] + u0 + u1 + u2 + u3


@jit
def _elect_four(m: int, d: Any, f: Any, w: Any, plain: bool, normalize: bool, lam: Any, x: Any, total: Any) -> None:
    """`_elect` of up to four experts, with nothing stored on the way."""
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    f0, f1, f2, f3 = f[0], f[1], f[2], f[3]
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for j in range(m):
        sign = _ONE if total[j] >= _ZERO else -_ONE
        v0, v1, v2, v3 = d0[j] * sign, d1[j] * sign, d2[j] * sign, d3[j] * sign
        p0, p1 = v0 if v0 > _ZERO else _ZERO, v1 if v1 > _ZERO else _ZERO
        p2, p3 = v2 if v2 > _ZERO else _ZERO, v3 if v3 > _ZERO else _ZERO
        size = p0 + p1 + p2 + p3 if plain else p0 * f0 + p1 * f1 + p2 * f2 + p3 * f3
        if normalize:
            u0, u1 = w0 if v0 > _ZERO else _ZERO, w1 if v1 > _ZERO else _ZERO
            u2, u3 = w2 if v2 > _ZERO else _ZERO, w3 if v3 > _ZERO else _ZERO
            divisor = u0 + u1 + u2 + u3
            size /= _ONE if abs(divisor) < TINY else divisor
        total[j] = (size * sign + total[j] * _ZERO) * lam + x[j]


@jit
def _elect(
    m: int, d: Any, factor: Any, weight: Any, plain: bool, normalize: bool, lam: Any, x: Any, sums: Any
) -> None:  # fmt: skip
    """sums[0] = base + lam * what the entries that agree with the sign of sums[0] add up to.

    sums[0] sums every entry, so it holds the NaN of any: its product with 0 keeps that visible.
    """
    total, elected, divisor, size = sums[0], sums[1], sums[2], sums[3]
    if d.shape[0] == 4:
        _elect_four(m, d, factor, weight, plain, normalize, lam, x, total)
        return
    for j in range(m):
        elected[j] = _ONE if total[j] >= _ZERO else -_ONE
        total[j] *= _ZERO
        size[j] = _ZERO
        divisor[j] = _ZERO
    for i in range(0, d.shape[0], 4):
        _agree(m, d[i : i + 4], factor[i : i + 4], weight[i : i + 4], plain, elected, size, divisor)
    if normalize:
        for j in range(m):
            size[j] /= _ONE if abs(divisor[j]) < TINY else divisor[j]
    for j in range(m):
        total[j] = (size[j] * elected[j] + total[j]) * lam + x[j]


@jit
def sweep(
    start: int, stop: int, base: Any, experts: Any, out: Any, mode: Any, lo: Any, lo_tie: Any, hi: Any, hi_tie: Any,
    key: Any, keys: Any, upto: Any, ranks: Any, low: Any, step: Any, whole: bool, selected: bool, spread: Any, cut: Any,
    tie: int,
    vote: Any, elect: bool, factor: Any, weight: Any, normalize: bool, lam: Any,
) -> bool:  # fmt: skip
    """Merges elements start ... stop-1: difference, sparsify, select, weight, combine, scale, add, round, write.

    `base`, `experts` (K, 2) and `out` hold addresses and dtype codes. `mode` says how each task vector is made
    sparse: WINDOW by (lo, lo_tie, hi, hi_tie), HASHED by (key, keys, upto), RANKED by (key, keys, ranks, low,
    step, whole). With `selected` only elements whose variance (stored at `spread`, else computed) reaches the cut
    take part. Task vectors are multiplied by `vote` and added up; with `elect` the sum only elects signs, and what
    agrees is added up times `factor`. `factor` and `weight` are zero-padded to a multiple of 4. Returns whether a
    written value is not finite.
    """
    k = experts.shape[0]
    rows = factor.size  # k rounded up to a multiple of 4; the rows to spare stay zero
    scratch = scratch_rows(rows + 6)
    scratch[k:rows] = _ZERO
    d, sums, x, first = scratch[:rows], scratch[rows : rows + 4], scratch[rows + 4], scratch[rows + 5].view(np.uint32)
    total = sums[0]
    plain = np.all(factor == _ONE)
    hashing = False
    for i in range(k):
        hashing |= mode[i] >= HASHED
    bad = False
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        load(base[0], base[1], at, m, x)
        if hashing:
            _first_round(at, m, key, first)
        if selected:
            for i in range(k):
                difference(experts[i, 0], experts[i, 1], at, m, x, d[i])
            if spread[0]:
                load(spread[0], spread[1], at, m, sums[1])
            else:
                variance_of(k, m, d, sums[0], sums[1])
            select(at, m, k, cut, tie, d, sums[1])
        total[:m] = _ZERO
        for i in range(k):
            row = d[i if elect or selected else 0]
            if not selected:
                difference(experts[i, 0], experts[i, 1], at, m, x, row)
            if mode[i] == WINDOW:
                _take_window(at, m, lo[i], lo_tie[i], hi[i], hi_tie[i], vote[i], row, total)
            elif mode[i] == HASHED:
                _take_hashed(m, first, keys[i, 0], keys[i, 1], upto[i], vote[i], row, total)
            elif mode[i] == RANKED:
                _take_ranked(
                    at, m, ranks[i], first, keys[i, 0], keys[i, 1], low[i], step[i], whole, vote[i], row, total
                )  # fmt: skip
            else:
                _take_all(m, vote[i], row, total)
        if elect:
            _elect(m, d, factor, weight, plain, normalize, lam, x, sums)
        else:
            for j in range(m):
                total[j] += x[j]
        bad |= _store(out[0], out[1], at, m, total)
    return bad


@jit
def blend(start: int, stop: int, models: Any, out: Any, factor: Any, shift: Any) -> int:
    """Writes sum_i factor_i * model_i + shift for elements start ... stop-1; nonzero if a value is not finite."""
    scratch = scratch_rows(2)
    x, total = scratch[0], scratch[1]
    bad = False
    for at in range(start, stop, BLOCK):
        m = min(BLOCK, stop - at)
        load(models[0, 0], models[0, 1], at, m, total)
        f = factor[0]
        for j in range(m):
            total[j] *= f
        for i in range(1, models.shape[0]):
            load(models[i, 0], models[i, 1], at, m, x)
            f = factor[i]
            for j in range(m):
                total[j] += x[j] * f
        if shift != 0:  # or -0.0 would lose its sign
            for j in range(m):
                total[j] += shift
        bad |= _store(out[0], out[1], at, m, total)
    return bad
