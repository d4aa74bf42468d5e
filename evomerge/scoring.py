"""Log-likelihoods at the speed of the forward pass: token sequences packed once, forward passes per candidate.

Requests are (context, continuation) pairs of tokens. Those with one context share a row: its continuations follow one
after the other, and an attention mask and positions let each see the context and itself only, so that the context is
computed once. Rows go into batches by length. Per batch the output layer is applied to the positions whose next
token is asked for, and to no other.

Which rows share a batch is a pure function of the requests and of the size of a batch in tokens, so that scores repeat
to the bit. This module knows no tokenizer, no task and no metric.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from evomerge.model import LiveModel

Pair = tuple[Sequence[int], Sequence[int]]
Result = TypeVar("Result")

CPU_BATCH = 2048
SMALLEST_BATCH, LARGEST_BATCH = 64, 1 << 17

SHARED_GAIN = 0.75  # a masked row pays if it has at most this share of the tokens of separate rows
LONGEST_SHARED = 1024  # masks are quadratic in the length
MASK_CELLS = 1 << 24  # of one batch's mask


@dataclass(frozen=True)
class Row:
    """One sequence to compute.

    Attributes:
        tokens: (n,) input tokens: a context, then continuations without their last tokens.
        starts: where continuations after the first begin; empty for a plain row, which needs no mask.
        context: length of the context.
        targets: (position whose output is asked for, token asked for, request) triples.
    """

    tokens: tuple[int, ...]
    context: int
    starts: tuple[int, ...]
    targets: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, ready on the device.

    Attributes:
        ids: (B, L) tokens, padded on the right with 0, which no asked-for position sees.
        positions: (B, L), None for plain rows.
        branch: (B, L) 0 in the context and k in the k-th continuation, None for plain rows.
        outputs: (T,) flat places b * L + l whose output is asked for, ascending.
        asked: (n,) index into `outputs`, and (n,) tokens, of each target.
        key: names what the layers read: batches with one key have equal ids, positions and branches.
    """

    ids: Tensor
    positions: Tensor | None
    branch: Tensor | None
    outputs: Tensor
    asked: Tensor
    tokens: Tensor
    key: bytes

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, L, L) added to the attention scores; made for each pass, since it is quadratic in the length."""
        if self.branch is None:
            return None
        of, width = self.branch, self.branch.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool, device=of.device).tril()
        seen = seen & ((of[:, None, :] == 0) | (of[:, None, :] == of[:, :, None]))
        return torch.zeros(seen.shape, dtype=dtype, device=of.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]


@dataclass(frozen=True)
class Likelihoods:
    """What one scoring of a plan gives, per request.

    Attributes:
        total: (R,) sum of log-probabilities of the continuation's tokens, in nats.
        greedy: (R,) whether each of its tokens is the most likely one.
    """

    total: NDArray[np.float64]
    greedy: NDArray[np.bool_]


class Plan:
    """Requests made ready for one model: build once, `run` for every candidate.

    Args:
        pairs: contexts and continuations, neither empty.
        owners: request of each pair, ascending from 0; None is one pair per request.
        n: number of requests, which may lack pairs; None is one per pair.
        max_length: longest input. What is longer loses tokens on the left, as in lm-eval.
        batch_tokens: size of a batch, padding included; a longer row is a batch of its own.
        share: longest row with several continuations, 0 for none (see `LiveModel.shareable`).
        max_rows: largest number of rows in a batch.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        max_length: int,
        batch_tokens: int,
        share: int,
        owners: Sequence[int] | None = None,
        n: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        self.n = len(pairs) if n is None else n
        rows = pack(pairs, range(len(pairs)) if owners is None else owners, max_length, share=share)
        self.batches = batches(rows, batch_tokens, max_rows)
        self._owners = np.array([t[2] for batch in self.batches for row in batch for t in row.targets], dtype=np.int64)
        self._ready: list[Batch] = []
        self._device: torch.device | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that one scoring computes, padding not counted."""
        return sum(len(row.tokens) for batch in self.batches for row in batch)

    @torch.no_grad()
    def run(self, live: LiveModel) -> Likelihoods:
        """Compute every batch; the only wait for the device is at the end."""
        if self._device != live.device:
            self._ready = [make_batch(rows, live.device) for rows in self.batches]
            self._device = live.device
        logs, hits = [], []
        for batch in self._ready:
            logits, _ = live.logits_at(batch.outputs, batch.ids, batch.mask(live.dtype), batch.positions, key=batch.key)
            # log_softmax and not a logit minus a logsumexp, which loses the digits of probabilities near 1
            logs.append(torch.log_softmax(logits.float(), dim=-1)[batch.asked, batch.tokens])
            hits.append(logits.argmax(dim=-1)[batch.asked] == batch.tokens)
        if not logs:
            return Likelihoods(np.zeros(self.n), np.ones(self.n, dtype=bool))
        log = torch.cat(logs).cpu().double().numpy()
        missed = (~torch.cat(hits)).cpu().numpy()
        total = np.bincount(self._owners, weights=log, minlength=self.n)
        misses = np.bincount(self._owners, weights=missed, minlength=self.n)
        return Likelihoods(total.astype(np.float64), misses == 0)


def backing_off(live: LiveModel, run: Callable[[], Result]) -> Result:
    """Run a scoring; when memory runs out, again with batches of half the size, for all that follows too.

    Hidden states that other candidates left (see `prefix`) are given up before batches become smaller.

    Raises:
        RuntimeError: memory does not suffice for the smallest batch.
    """
    settled = live.batch_tokens
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; so is the CPU's
            if not _is_memory(error):
                live.batch_tokens = settled
                raise
            freed = live.prefixes.release()
            if not freed and live.batch_tokens <= SMALLEST_BATCH:
                live.batch_tokens = settled  # smaller ones did not help: not the next candidate either
                raise
        if not freed:
            live.batch_tokens //= 2
        if live.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "alloc" in str(error).lower() and "memory" in str(error).lower()


def default_batch_tokens(device: torch.device, config: Any) -> int:
    """A batch's size in tokens that should fit: a power of two, the same on every device with that memory.

    On a CPU larger batches leave the cache and gain nothing. On a GPU a quarter of its memory holds the activations
    of one layer and two float32 rows of logits per token.
    """
    if device.type != "cuda":
        return CPU_BATCH
    text = getattr(config, "text_config", config)
    hidden, vocabulary = int(getattr(text, "hidden_size", 4096)), int(getattr(text, "vocab_size", 128_000))
    wide = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    per_token = 2 * (16 * hidden + 4 * wide) + 8 * vocabulary
    total = torch.cuda.get_device_properties(device).total_memory
    return int(min(LARGEST_BATCH, max(SMALLEST_BATCH, 2 ** int(math.log2(total / 4 / per_token)))))


def pack(pairs: Sequence[Pair], owners: Iterable[int], max_length: int, *, share: int) -> list[Row]:
    """Rows in the order of their first pairs; `owners` gives each pair's request."""
    groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for (context, continuation), owner in zip(pairs, owners, strict=True):
        before, after = tuple(context), tuple(continuation)
        # Only the part that is fed in must fit; a continuation never loses a token (checked by the caller).
        before = before[max(0, len(before) + len(after) - 1 - max_length) :]
        groups.setdefault(before, []).append((after, owner))
    rows: list[Row] = []
    for context, members in groups.items():
        rows += _rows_of(context, members, max_length, share=share)
    return rows


def _rows_of(
    context: tuple[int, ...], members: list[tuple[tuple[int, ...], int]], max_length: int, *, share: int
) -> list[Row]:
    """One row where the continuations may share it; else each its own, beside what needs no further input."""
    # A continuation whose inputs begin another's needs none of its own: single tokens, most of all.
    chains: list[tuple[tuple[int, ...], list[tuple[tuple[int, ...], int]]]] = []
    for member in sorted(members, key=lambda m: m[0][:-1], reverse=True):  # a beginning comes after what it begins
        inputs = member[0][:-1]
        if chains and chains[-1][0][: len(inputs)] == inputs:
            chains[-1][1].append(member)
        else:
            chains.append((inputs, [member]))
    together = len(context) + sum(len(inputs) for inputs, _ in chains)
    apart = sum(len(context) + len(inputs) for inputs, _ in chains)
    if len(chains) > 1 and together <= min(SHARED_GAIN * apart, max_length, share):
        return [_row(context, chains)]
    return [_row(context, [chain]) for chain in chains]


def _row(context: tuple[int, ...], chains: Sequence[tuple[tuple[int, ...], list[tuple[tuple[int, ...], int]]]]) -> Row:
    tokens, starts, targets = list(context), [], []
    for inputs, members in chains:
        start = len(tokens)
        starts.append(start)
        tokens += inputs
        for continuation, owner in members:
            places = [len(context) - 1, *range(start, start + len(continuation) - 1)]
            targets += [(place, token, owner) for place, token in zip(places, continuation, strict=True)]
    return Row(tuple(tokens), len(context), tuple(starts[1:]), tuple(targets))


def batches(rows: Sequence[Row], batch_tokens: int, max_rows: int | None = None) -> list[list[Row]]:
    """Rows by length, longest first, plain ones and masked ones apart, cut where a batch is full."""
    order = sorted(range(len(rows)), key=lambda i: (not rows[i].starts, -len(rows[i].tokens), i))
    result: list[list[Row]] = []
    for i in order:
        row, current = rows[i], result[-1] if result else []
        fits = (
            current
            and bool(current[0].starts) == bool(row.starts)
            and (len(current) + 1) * len(current[0].tokens) <= batch_tokens
            and not (row.starts and (len(current) + 1) * len(current[0].tokens) ** 2 > MASK_CELLS)
            and (max_rows is None or len(current) < max_rows)
        )
        if fits:
            current.append(row)
        else:
            result.append([row])
    return result


def make_batch(rows: Sequence[Row], device: torch.device) -> Batch:
    """The tensors of a batch."""
    width = max(len(row.tokens) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row.tokens)] = row.tokens
    places = np.array([b * width + place for b, row in enumerate(rows) for place, _, _ in row.targets])
    outputs, asked = np.unique(places, return_inverse=True)
    tokens = np.array([token for row in rows for _, token, _ in row.targets])
    positions, branch = _branches(rows, width) if rows[0].starts else (None, None)

    def there(values: Any) -> Tensor:
        return torch.as_tensor(values).to(device)

    return Batch(
        ids=there(ids),
        positions=None if positions is None else there(positions),
        branch=None if branch is None else there(branch),
        outputs=there(outputs),
        asked=there(asked),
        tokens=there(tokens),
        key=_key(ids, positions, branch),
    )


def _key(*arrays: NDArray[np.int64] | None) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(repr(None if array is None else array.shape).encode())
        found.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return found.digest()


def _branches(rows: Sequence[Row], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions and branches of rows whose continuations see the context and themselves only."""
    branch = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.tile(np.arange(width), (len(rows), 1))
    for b, row in enumerate(rows):
        edges = [row.context, *row.starts, width]
        for k, (start, stop) in enumerate(pairwise(edges), start=1):
            branch[b, start:stop] = k
            positions[b, start:stop] = row.context + np.arange(stop - start)
        positions[b, len(row.tokens) :] = 0
    return positions, branch
