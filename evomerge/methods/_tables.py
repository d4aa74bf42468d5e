"""Per-worker tables: what depends on base and experts alone, computed once and used by every candidate."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor

T = TypeVar("T")

BUDGET_BYTES = 1 << 30
_ENTRY_BYTES = 600  # of a key and its places in two mappings, beside the value


class Tables:
    """Values by key, kept within `budget_bytes`.

    What the last candidates used is never pushed out by more of the same: every candidate looks at all tensors in
    turn, and giving up the least recently used would then lose each value just before it is needed. So a new value
    takes the place of those that neither this candidate nor the one before used, or is not stored at all.

    A key must name everything that the value was computed from: which tensors of which models, and how. Values
    are tensors, arrays, numbers, or tuples, mappings and dataclasses of them; never write to one. Giving a value
    up costs time, never bits: it is computed again.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.n_bytes = 0
        self.made = self.reused = self.dropped = 0
        self.seconds = 0.0  # spent computing
        self._depth = 0
        self._candidate = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()  # the longest unused first
        self._used: dict[Hashable, int] = {}  # the last candidate that looked at a value

    def next_candidate(self) -> None:
        """Says that another model is merged from here on."""
        self._candidate += 1

    def get(self, key: Hashable, make: Callable[[], T], *, keep: bool = True) -> T:
        """Returns the value stored under `key`, or makes it, and stores it if it fits the budget at all.

        Without `keep` a new value is given up at once: for scans over more than the budget, where storing it would only
        push out what the next scan needs first.
        """
        if key in self._values:
            self._values.move_to_end(key)
            self._used[key] = self._candidate
            self.reused += 1
            return cast(T, self._values[key][0])
        started = time.perf_counter()
        self._depth += 1
        try:
            value = make()
        finally:
            self._depth -= 1
        if not self._depth:  # a table made of other tables counts its time once
            self.seconds += time.perf_counter() - started
        self.made += 1
        size = _ENTRY_BYTES + n_bytes(value)
        if keep and self._make_room(size):
            self._values[key] = (value, size)
            self._used[key] = self._candidate
            self.n_bytes += size
        else:
            self.dropped += 1
        return value

    def get_if_room(self, key: Hashable, size: int, make: Callable[[], T]) -> T | None:
        """Returns the value under `key`, made if about `size` bytes more fit now, else None: for what saves time."""
        if key in self._values or self._make_room(2 * _ENTRY_BYTES + size):
            return self.get(key, make)
        return None

    def _make_room(self, size: int) -> bool:
        """Gives up values that are out of use until `size` more bytes fit; whether they do."""
        while self.n_bytes + size > self.budget_bytes:
            oldest = next(iter(self._values), None)
            if size > self.budget_bytes or oldest is None or self._used[oldest] >= self._candidate - 1:
                return False
            _, freed = self._values.pop(oldest)
            del self._used[oldest]
            self.n_bytes -= freed
            self.dropped += 1
        return True

    def report(self) -> dict[str, float]:
        """Returns what the tables hold and cost so far: bytes, budget, seconds, counts."""
        return {
            "bytes": self.n_bytes,
            "budget_bytes": self.budget_bytes,
            "seconds": self.seconds,
            "made": self.made,
            "reused": self.reused,
            "dropped": self.dropped,
        }


def n_bytes(value: Any) -> int:
    """Returns the memory of a table's value; small objects count 64 bytes."""
    if isinstance(value, Tensor):
        return 64 + value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return 64 + int(value.nbytes)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return 64 + sum(n_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return 64 + sum(n_bytes(item) for item in value.values())
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return 64 + sum(n_bytes(item) for item in value)
    return 64
