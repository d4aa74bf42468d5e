"""The demo zoo as a table: which items a merge gets right, for merges on a grid of weights, kept once computed.

A search in a benchmark needs thousands of scores, of which a table gives the nearest. Each entry is a real merge,
scored once with the zoo's own plain scorer. `ZooLandscape` is the zoo as the benchmark of searches sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _landscapes import HIGHEST, Array, Shape
from numpy.typing import NDArray

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
        self._layered: dict[bytes, np.ndarray] = {}
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

    def points(self) -> list[Point]:
        """The grid points that have been scored."""
        return sorted(self._table)

    def layered(self, weights: np.ndarray) -> np.ndarray:
        """Right answers `(tasks, items)` of the merge with weights `(experts, layers)`, kept in memory only."""
        from zoo.data import TASKS
        from zoo.table import EXPERTS, Bench

        key = np.round(weights, 4).tobytes()
        if key not in self._layered:
            if self._bench is None:
                self._bench = Bench(self.split, self.limit)
            groups = [dict(zip(EXPERTS, column.tolist(), strict=True)) for column in weights.T]
            scores = self._bench.scores(self._bench.grouped(groups))
            self._layered[key] = np.stack([scores[task].numpy() for task in TASKS]).astype(np.uint8)
        return self._layered[key]

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


class ZooLandscape:
    """Real merges of the demo zoo as a landscape of `search_efficiency.py`; a seed draws half of the search items.

    The other half is for validation, and the truth is the score on test items. The best of the table stands in for the
    oracle: nobody knows the optimum, so no share of a gap is exact.

    Args:
        kind: "model": one weight per expert; scores are those of the nearest merge in the table of bench-fidelity,
            which is filled first (minutes). "layers": a weight per expert and decoder layer (the embeddings move with
            the first layer, the last norm with the last); each merge is made and scored when it is asked for.
        folder: of the table.
    """

    n_tasks = 4
    plateau = False

    def __init__(self, kind: str, seed: int, folder: Path) -> None:
        self.name, self._folder = f"zoo {kind}", folder
        self._layers = 4 if kind == "layers" else 1
        self.shape = Shape(N_EXPERTS, self._layers)
        drawn = np.random.default_rng([6, seed]).permutation(300)
        self.n_items = 150
        self._chosen = {"search": np.sort(drawn[:150]), "validation": np.sort(drawn[150:])}
        self._tables = {"search": shared_table(folder, "search"), "truth": shared_table(folder, "test", TEST_ITEMS)}
        self._tables["search"].fill(MERGES, lambda text: print(text, file=sys.stderr, flush=True))

    def outcomes(self, weights: Array, split: str, positions: NDArray[np.intp] | None = None) -> NDArray[np.uint8]:
        """See Landscape."""
        found = self._right(weights, "search")[:, self._chosen[split]].ravel()
        return found if positions is None else found[positions]

    def truth(self, weights: Array) -> Array:
        """See Landscape."""
        return np.asarray(self._right(weights, "truth").mean(axis=1))

    def optimum(self) -> Array:
        """See Landscape: the best grid point of the search table by all its items."""
        table = self._tables["search"]
        best = max(table.points(), key=lambda point: float(table.items(point).mean()))
        weights = np.minimum(np.array(best) * STEP, HIGHEST)
        return np.repeat(weights[:, None, None], self._layers, axis=1)

    def _right(self, weights: Array, name: str) -> np.ndarray:
        table = self._tables[name]
        if self._layers == 1:
            return table.items(self._tables["search"].nearest(weights[:, 0, 0]))
        return table.layered(weights[:, :, 0])


MERGES = 225  # in the table, besides what else is there
TEST_ITEMS = 500  # per task
_SHARED: dict[tuple[Path, str], Landscape] = {}


def shared_table(folder: Path, split: str, limit: int | None = None) -> Landscape:
    """The table of a folder, read once per process."""
    return _SHARED.setdefault((folder, split), Landscape(folder, split, limit))


if __name__ == "__main__":  # fill a table ahead of time: python benchmarks/_zoo_landscape.py FOLDER [COUNT]
    Landscape(Path(sys.argv[1]), "search").fill(int(sys.argv[2]), print)
