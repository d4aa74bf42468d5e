"""The demo zoo as a table: which items a merge gets right, for merges on a grid of weights, kept once computed.

A search in a benchmark needs thousands of scores, of which a table gives the nearest. Each entry is a real merge,
scored once with the zoo's own plain scorer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

N_EXPERTS = 3
STEP = 0.15  # of a weight; nine levels from 0 to 1.2 make 729 merges
LEVELS = 9
SAVE_EVERY = 25

Point = tuple[int, ...]


class Landscape:
    """Items that grid points get right.

    Args:
        folder: where the table is kept; read if it is there.
        limit: items per task, None for all.
    """

    def __init__(self, folder: Path, split: str, limit: int | None = None) -> None:
        self.split, self.limit = split, limit
        self._file = folder / f"zoo.{split}.{limit or 'all'}.npz"
        self._bench: Any = None
        self._table: dict[Point, np.ndarray] = {}
        if self._file.exists():
            with np.load(self._file) as stored:
                self._table = {tuple(p): s for p, s in zip(stored["points"].tolist(), stored["items"], strict=True)}

    def __len__(self) -> int:
        return len(self._table)

    def items(self, point: Point) -> np.ndarray:
        """Right answers `(tasks, items)` of the merge at a grid point, as 0 and 1."""
        if point not in self._table:
            from zoo.data import TASKS
            from zoo.table import EXPERTS, Bench

            if self._bench is None:
                self._bench = Bench(self.split, self.limit)
            weights = {name: level * STEP for name, level in zip(EXPERTS, point, strict=True)}
            scores = self._bench.scores(self._bench.arithmetic(weights))
            self._table[point] = np.stack([scores[task].numpy() for task in TASKS]).astype(np.uint8)
            if len(self._table) % SAVE_EVERY == 0:
                self.save()
        return self._table[point]

    def nearest(self, weights: np.ndarray) -> Point:
        """The scored merge that is nearest to weights `(experts,)`."""
        points = np.array(sorted(self._table))
        found: Point = tuple(points[int(((points * STEP - weights) ** 2).sum(axis=1).argmin())].tolist())
        return found

    def save(self) -> None:
        """Keep the table, all of it or none."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        points = sorted(self._table)
        scratch = self._file.with_suffix(".tmp.npz")
        np.savez_compressed(scratch, points=np.array(points), items=np.stack([self._table[p] for p in points]))
        scratch.replace(self._file)

    def fill(self, count: int, say: Callable[[str], None]) -> np.ndarray:
        """The points `(count, 3)` of a seeded sample of the grid, all of them scored."""
        every = np.array(list(np.ndindex(*[LEVELS] * N_EXPERTS)))
        chosen = every[np.random.default_rng(0).permutation(len(every))[:count]]
        for k, point in enumerate(chosen.tolist()):
            if tuple(point) not in self._table and k % 50 == 0:
                say(f"scoring merges on the {self.split} split: {k} of {count}")
            self.items(tuple(point))
        self.save()
        return chosen


def grid_point(weights: np.ndarray) -> Point:
    """The nearest grid point of weights."""
    return tuple(np.clip(np.rint(weights / STEP), 0, LEVELS - 1).astype(int).tolist())


if __name__ == "__main__":  # fill a table ahead of time: python benchmarks/_zoo_landscape.py FOLDER [COUNT]
    Landscape(Path(sys.argv[1]), "search").fill(int(sys.argv[2]), print)
