"""The paired guard of a portfolio: has a finer level really beaten a coarser one?

The best of many finer candidates looks good by luck alone. So the items are split in two halves by the seed: one half
picks the finer candidate, the other, which did not choose it, compares it with the coarse level's best, item by item.
Differences of paired items have a twelfth of the variance of unpaired ones (measured on merges of one family).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers._core import Array, Result, violation

KEPT = 8  # candidates of either kind whose items are held
PASSED = 1.0  # standard errors by which the finer candidate has to win


@dataclass(frozen=True, eq=False)
class _Kept:
    number: int
    rank: Array  # (m,) values that choose it: of all items for a coarse candidate, of the picking half for a finer one
    items: tuple[NDArray[np.float32], ...]


class Guard:
    """Holds the items of the best coarse and the best finer candidates, and compares them.

    Results without the items of every objective, and infeasible ones, are passed over.
    """

    def __init__(self, n_goals: int, seed: int) -> None:
        self._seed = seed
        self._low, self._high = np.full(n_goals, np.inf), np.full(n_goals, -np.inf)
        self._coarse: list[_Kept] = []
        self._fine: list[_Kept] = []

    def tell(self, result: Result, *, coarse: bool) -> None:
        """Take a result of the coarse level or of a finer one."""
        if result.values is None or not np.isfinite(result.values).all():
            return
        values = np.array(result.values, dtype=np.float64)
        self._low, self._high = np.minimum(self._low, values), np.maximum(self._high, values)
        if result.x is None or result.items is None or violation(values, result.floors) > 0:
            return
        items = tuple(np.asarray(part, dtype=np.float32) for part in result.items)
        if len(items) != len(values) or any(part.ndim != 1 or len(part) < 2 for part in items):
            return
        store = self._coarse if coarse else self._fine
        store[:] = [kept for kept in store if kept.number != result.number]
        # Held by all of its items, the best of 100 lucky finer candidates passed twice as often (0.29, against 0.15).
        rank = (
            values if coarse else np.array([p[rows].mean() for p, rows in zip(items, self._half(items), strict=True)])
        )
        store.append(_Kept(result.number, rank, items))
        store.sort(key=lambda kept: (-self._merit(kept.rank), kept.number))
        del store[KEPT:]

    def passes(self) -> bool:
        """Whether the finer candidate that one half of the items picks wins on the other half."""
        if not self._coarse or not self._fine:
            return False
        coarse = self._coarse[0]
        rivals = [kept for kept in self._fine if _shapes(kept) == _shapes(coarse)]
        if not rivals:
            return False
        picking = self._half(coarse.items)
        judging = [np.setdiff1d(np.arange(len(p)), rows) for p, rows in zip(coarse.items, picking, strict=True)]
        best = max(rivals, key=lambda kept: self._lead(kept, coarse, picking)[0])
        gain, error = self._lead(best, coarse, judging)
        return gain > PASSED * error

    def _half(self, items: Sequence[NDArray[np.float32]]) -> list[NDArray[np.int64]]:
        """Of each objective's items, those that pick."""
        orders = [np.random.default_rng([self._seed, j]).permutation(len(part)) for j, part in enumerate(items)]
        return [order[: len(order) // 2] for order in orders]

    def _merit(self, values: Array) -> float:
        return float((values / self._spread()).mean())

    def _spread(self) -> Array:
        spread = self._high - self._low
        return np.where(spread > 0, spread, 1.0)

    def _lead(self, one: _Kept, other: _Kept, chosen: list[NDArray[np.int64]]) -> tuple[float, float]:
        """Mean paired lead over objectives, each in units of its spread, on the chosen items; its standard error."""
        lead = variance = 0.0
        for j, (rows, scale) in enumerate(zip(chosen, self._spread(), strict=True)):
            gap = (one.items[j][rows].astype(np.float64) - other.items[j][rows]) / scale / len(chosen)
            lead += float(gap.mean())
            variance += float(gap.var()) / max(1, len(gap) - 1)
        return lead, float(np.sqrt(variance))


def _shapes(kept: _Kept) -> list[int]:
    return [len(part) for part in kept.items]
