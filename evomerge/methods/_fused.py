"""Calling the compiled loops of `_kernels` on tensors: addresses, threads, and what may go there at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.methods._inputs import Inputs

T = TypeVar("T")

CHUNK = 1 << 20  # elements; threads share a tensor in whole chunks, and sums are folded once per chunk
LANES = 1 << 14  # float64 partial sums of one chunk
STRIP = 1 << 13  # elements that a count of scores tells apart
ALL, WINDOW, HASHED, RANKED = 0, 1, 2, 3  # how a task vector is made sparse
_CODES = {torch.float32: 0, torch.bfloat16: 1}


@cache
def kernels() -> Any:
    """The compiled loops of merging; importing them loads numba, so it waits until a merge needs them."""
    from evomerge.methods import _kernels

    return _kernels


@cache
def tables() -> Any:
    """The compiled loops of what depends on the models alone."""
    from evomerge.methods import _kernel_tables

    return _kernel_tables


def usable(x: Inputs) -> bool:
    """Whether the compiled loops can merge these inputs: on a CPU, in float32, with nothing injected."""
    every = x.experts if x.base is None else (x.base, *x.experts)
    plain = x.paper and x.keep is None and x.dtype == torch.float32
    return plain and all(tensor.device.type == "cpu" for tensor in every) and every[0].numel() > 0


def readable(tensor: Tensor) -> bool:
    """Whether the compiled sums can read the tensor as it is."""
    return tensor.device.type == "cpu" and tensor.dtype in _CODES and tensor.is_contiguous()


@dataclass(frozen=True)
class Cut:
    """Keeps scores above `size`, and those equal to it at places before `place` of the flat tensor; never zeros."""

    size: float
    place: int = 0

    def mask(self, scores: Tensor) -> Tensor:
        """Returns the bool mask of what is kept of non-negative `scores`."""
        kept = scores > self.size
        if 0.0 < self.size < math.inf and self.place > 0:
            early = torch.arange(scores.numel(), device=scores.device) < self.place
            kept |= (scores == self.size) & early.reshape(scores.shape)
        return kept


KEEP_ALL, KEEP_NONE = Cut(0.0), Cut(math.inf)
_NO_RANKS = np.empty(0, np.uint16)


@dataclass(frozen=True, eq=False)
class Take:
    """How the sweep makes one task vector sparse.

    Attributes:
        expert: its place among the inputs.
        mode: ALL, WINDOW, HASHED or RANKED of `_kernels`.
        low, high: WINDOW keeps what `low` keeps and `high` does not.
        keys, upto: HASHED keeps an element whose hash with these two keys is at most `upto`.
        ranks, lowest, step: RANKED keeps one with probability q = lowest + step * rank (in float32), and divides
            it by q unless the sweep's `whole` says not to.
    """

    expert: int
    mode: int = ALL
    low: Cut = KEEP_ALL
    high: Cut = KEEP_NONE
    keys: tuple[int, int] = (0, 0)
    upto: int = 0
    ranks: NDArray[np.uint16] = field(default_factory=lambda: _NO_RANKS)
    lowest: float = 1.0
    step: float = 0.0


class Handles:
    """Addresses and dtype codes `(n, 2)` of tensors, which are kept alive, widened or made contiguous if need be."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [t if t.dtype in _CODES else t.float() for t in tensors]
        self.tensors = [t.detach().contiguous() for t in self.tensors]
        rows = [(t.data_ptr(), _CODES[t.dtype]) for t in self.tensors] or [(0, 0)]
        self.table = np.array(rows, dtype=np.uint64)


def in_chunks(n: int, work: Callable[[int, int], T]) -> list[T]:
    """Calls work(start, stop) for parts of n elements, cut at multiples of CHUNK, on as many threads as torch uses."""
    chunks = -(-n // CHUNK)
    parts = max(1, min(torch.get_num_threads(), chunks))
    bounds = [min(n, chunks * i // parts * CHUNK) for i in range(parts)] + [n]
    if parts == 1:
        return [work(0, n)]
    return list(_threads(parts).map(work, bounds[:-1], bounds[1:]))


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="evomerge-merge")


def output(x: Inputs) -> Tensor:
    """Returns where a fused loop writes: the target if it can be written in place, else a new float32 tensor."""
    shape = x.experts[0].shape
    if x.target is not None and readable(x.target.tensor) and x.target.tensor.shape == shape:
        return x.target.tensor
    return torch.empty(shape, dtype=torch.float32)


def written(x: Inputs, out: Tensor, bad: Sequence[bool]) -> Tensor:
    """Notes what the loop found out about the values it wrote, and returns them."""
    if x.target is not None and out is x.target.tensor:
        x.target.finite = not any(bad)
    return out


def blend(x: Inputs, models: Sequence[Tensor], factors: Sequence[float], shift: float = 0.0) -> Tensor:
    """Returns sum_i factor_i * model_i + shift."""
    out, factor = output(x), np.array(factors, np.float32)
    models_at, out_at = Handles(models), Handles([out])
    loop, more = kernels().blend, np.float32(shift)
    bad = in_chunks(out.numel(), lambda a, b: loop(a, b, models_at.table, out_at.table[0], factor, more))
    return written(x, out, bad)


def stored_variance(x: Inputs, wanted: bool) -> Handles:
    """Returns a handle on the variance over the task vectors; its address is 0 where it is to be computed.

    It takes as much memory as a float32 model, so the tables keep it where they have room. Hold on to the handle while
    a loop reads the address.
    """
    n = x.reference.numel()
    nowhere = Handles([])
    if not wanted:
        return nowhere

    def make() -> Tensor:
        base, experts, out = Handles([x.reference]), Handles(x.experts), torch.empty(n)
        loop = tables().variances
        in_chunks(n, lambda start, stop: loop(start, stop, base.table[0], experts.table, out.numpy()))
        return out

    stored = x.table_if_room("variance", 4 * n, make)
    return nowhere if stored is None else Handles([stored])


def histogram(x: Inputs, variance: bool) -> NDArray[np.int64]:
    """Returns the number of scores per bucket, (K, 65536); (1, 65536) of the variance."""
    base, experts, spread = Handles([x.reference]), Handles(x.experts), stored_variance(x, variance)

    def work(start: int, stop: int) -> NDArray[np.int32]:
        # 32 bits while they suffice: the counts of three experts then stay in the cache
        counts = np.zeros((1 if variance else len(x.experts), 1 << 16), np.int32 if stop - start < 2**31 else np.int64)
        tables().histogram(start, stop, base.table[0], experts.table, variance, spread.table[0], counts)
        return counts

    counts: NDArray[np.int64] = np.sum(in_chunks(x.reference.numel(), work), axis=0, dtype=np.int64)
    return counts


def refine(
    x: Inputs, i: int, variance: bool, heavy: NDArray[np.int64], n_parts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Returns what the even parts of each bucket of `heavy` hold: three arrays (len(heavy), n_parts).

    The number of scores, one of their values as its low 15 bits (-1: none), and whether there are others.
    """
    base, experts, spread = Handles([x.reference]), Handles(x.experts), stored_variance(x, variance)
    rows = np.full(1 << 16, len(heavy), np.int16)  # the last row takes the scores of all other buckets
    rows[heavy] = np.arange(len(heavy))

    def work(start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
        counts = np.zeros((len(heavy) + 1, n_parts), np.int32 if stop - start < 2**31 else np.int64)
        first, mixed = np.full(counts.shape, -1, np.int32), np.zeros(counts.shape, np.bool_)
        tables().refine(
            start, stop, base.table[0], experts.table, variance, spread.table[0], i, rows, counts, first, mixed
        )  # fmt: skip
        return counts[:-1], first[:-1], mixed[:-1]

    found = in_chunks(x.reference.numel(), work)
    total: NDArray[np.int64] = np.sum([counts for counts, _, _ in found], axis=0, dtype=np.int64)
    value: NDArray[np.int64] = np.max([first for _, first, _ in found], axis=0).astype(np.int64)
    differ = [mixed | ((first >= 0) & (first != value)) for _, first, mixed in found]
    return total, value, np.any(differ, axis=0)


Range = tuple[int, int]
"""Bits of scores: the lowest, and how many values from there (0: none)."""


def count(x: Inputs, ranges: Sequence[Range], variance: bool) -> NDArray[np.int64]:
    """Returns the number of scores in each range per strip of STRIP elements, (K, strips)."""
    base, experts, spread = Handles([x.reference]), Handles(x.experts), stored_variance(x, variance)
    low, span = np.array(ranges, np.uint32).reshape(-1, 2).T.copy()
    counts = np.zeros((len(ranges), -(-x.reference.numel() // STRIP)), np.int64)

    def work(start: int, stop: int) -> None:
        tables().count(start, stop, base.table[0], experts.table, variance, spread.table[0], low, span, counts)

    in_chunks(x.reference.numel(), work)
    return counts


def collect(
    x: Inputs, ranges: Sequence[Range], sizes: Sequence[int], variance: bool, part: Range | None = None
) -> list[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """Returns the bits and places of the scores in each range, at most `sizes` of them; `part` is (start, stop)."""
    base, experts, spread = Handles([x.reference]), Handles(x.experts), stored_variance(x, variance)
    low, span = np.array(ranges, np.uint32).reshape(-1, 2).T.copy()

    def work(start: int, stop: int) -> list[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        room = min(max(sizes), stop - start)
        bits, places = np.empty((len(ranges), room), np.uint32), np.empty((len(ranges), room), np.int64)
        found = np.zeros(len(ranges), np.int64)
        tables().collect(
            start, stop, base.table[0], experts.table, variance, spread.table[0], low, span, bits, places, found
        )
        return [(bits[i, :n], places[i, :n]) for i, n in enumerate(found)]

    parts = in_chunks(x.reference.numel(), work) if part is None else [work(*part)]
    return [
        (np.concatenate([part[i][0] for part in parts]), np.concatenate([part[i][1] for part in parts]))
        for i in range(len(ranges))
    ]


def row_ranks(x: Inputs, i: int) -> NDArray[np.uint16]:
    """Returns the rank of each entry of task vector i in its row (the last axis) by magnitude, 0 the smallest."""
    row = x.reference.shape[-1] if x.reference.ndim else 1
    base, expert = Handles([x.reference]), Handles([x.experts[i]])
    out = np.empty(x.reference.numel(), np.uint16)
    rows = out.size // row
    parts = min(torch.get_num_threads(), rows)
    bounds = [rows * part // parts for part in range(parts + 1)]

    def work(start: int, stop: int) -> None:
        tables().row_ranks(start, stop, row, base.table[0], expert.table[0], out)

    if parts == 1:
        work(0, rows)
    else:
        list(_threads(parts).map(work, bounds[:-1], bounds[1:]))
    return out


def dot(a: Tensor, b: Tensor) -> float:
    """Returns the inner product, in the order that `_sums` fixes."""
    return _folded(a.numel(), 1, Handles([a, b]), lambda s, e, h, acc: tables().lanes(s, e, h[0], h[1], False, acc[0]))[
        0
    ]


def norm1(a: Tensor) -> float:
    """Returns the sum of absolute values, in the order that `_sums` fixes."""

    def work(start: int, stop: int, handles: Any, acc: Any) -> None:
        tables().lanes(start, stop, handles[0], handles[0], True, acc[0])

    return _folded(a.numel(), 1, Handles([a]), work)[0]


def energies(x: Inputs, selected: bool, cut: float, place: int) -> list[float]:
    """Returns the sum of squares of each task vector, of the entries that the variance cut keeps."""
    spread = stored_variance(x, selected)

    def work(start: int, stop: int, handles: Any, acc: Any) -> None:
        tables().energies(start, stop, handles[0], handles[1:], selected, spread.table[0], np.float32(cut), place, acc)

    return _folded(x.reference.numel(), len(x.experts), Handles([x.reference, *x.experts]), work)


def _folded(n: int, rows: int, handles: Handles, work: Callable[[int, int, Any, Any], None]) -> list[float]:
    """Returns `rows` sums over n elements: lanes per chunk, halved, the chunks added from left to right."""

    def chunks(start: int, stop: int) -> list[NDArray[np.float64]]:
        result = []
        for at in range(start, stop, CHUNK):
            end = min(at + CHUNK, stop)
            acc = np.zeros((rows, min(LANES, end - at)))
            work(at, end, handles.table, acc)
            while acc.shape[1] > 1:
                half = (acc.shape[1] + 1) // 2
                acc[:, : acc.shape[1] - half] += acc[:, half:]
                acc = acc[:, :half]
            result.append(acc[:, 0])
        return result

    totals = [0.0] * rows
    for part in in_chunks(n, chunks):
        for sums in part:
            totals = [total + float(value) for total, value in zip(totals, sums, strict=True)]
    return totals


def sweep(
    x: Inputs,
    takes: Sequence[Take],
    *,
    votes: Sequence[float],
    factors: Sequence[float],
    weights: Sequence[float],
    elect: bool,
    normalize: bool,
    lambda_: float,
    key: int = 0,
    whole: bool = False,
    selected: bool = False,
    cut: float = 0.0,
    place: int = 0,
) -> Tensor:
    """Returns the merge of the task vectors that `takes` names, in one pass: see `_kernels.sweep`."""
    k = len(takes)
    out = output(x)
    base, out_at, spread = Handles([x.reference]), Handles([out]), stored_variance(x, selected)
    experts = Handles([x.experts[take.expert] for take in takes])
    padded = k + -k % 4
    factor, weight = np.zeros(padded, np.float32), np.zeros(padded, np.float32)
    factor[:k], weight[:k] = factors, weights
    if all(value == 1.0 for value in factors):
        factor[:] = 1.0
    arguments = (
        base.table[0],
        experts.table,
        out_at.table[0],
        np.array([take.mode for take in takes], np.int64),
        np.array([take.low.size for take in takes], np.float32),
        np.array([take.low.place for take in takes], np.int64),
        np.array([take.high.size for take in takes], np.float32),
        np.array([take.high.place for take in takes], np.int64),
        np.uint32(key),
        np.array([take.keys for take in takes], np.uint32),
        np.array([take.upto for take in takes], np.uint32),
        np.array([take.ranks.ctypes.data for take in takes], np.uint64),
        np.array([take.lowest for take in takes], np.float32),
        np.array([take.step for take in takes], np.float32),
        whole,
        selected,
        spread.table[0],
        np.float32(cut),
        place,
        np.array(votes, np.float32),
        elect,
        factor,
        weight,
        normalize,
        np.float32(lambda_),
    )
    loop = kernels().sweep
    return written(x, out, in_chunks(out.numel(), lambda start, stop: loop(start, stop, *arguments)))
