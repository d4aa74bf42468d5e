"""Points as sets of parts: which are filled, what they hold, and small changes of one of them.

A part is a group of coordinates that mean something together only (`Facts.parts`); a coordinate that is in none is a
part of its own. A part is empty where its first coordinate is in the neutral cell: it changes nothing there.

Parts are either *slots* or *positions*. Slots are interchangeable: what one holds means the same in any other, so a
point is a bag of their contents. Parts are taken for slots if they have the same kinds of coordinates and the same
neutral, and hold a place: a whole number beside their first coordinate. All others are positions: each means something
of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers._core import Array, Facts

GRID = 1000  # continuous values that agree to 1 / GRID are one
OFFSET = 0.3127  # no border of that grid is where values like to be, such as 1/2 or 7/16: results come back rounded
FRESH = 0.1  # standard deviation of a continuous coordinate of new content, around the neutral value
FINEST, COARSEST = 0.02, 0.3  # standard deviations of a continuous step
Codes = NDArray[np.int64]
Signature = tuple[tuple[int, bool, int], ...]


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a cube.

    Attributes:
        members: the coordinates of each part.
        cells: (d,) as in Facts.
        categorical: (d,) as in Facts.
        neutral: (d,) the point whose parts are all empty.
        slots: groups of interchangeable parts, by number.
        meaning: as in Facts.
    """

    members: tuple[NDArray[np.intp], ...]
    cells: NDArray[np.intp]
    categorical: NDArray[np.bool_]
    neutral: Array
    slots: tuple[tuple[int, ...], ...]
    meaning: Callable[[Array], Hashable] | None = None

    @classmethod
    def of(cls, facts: Facts, start: Array) -> Parts:
        """Return the parts that the facts name, then one for each other coordinate; neutral is `start` if none is."""
        named = {j for part in facts.parts for j in part}
        loose = [(j,) for j in range(len(start)) if j not in named]
        members = tuple(np.array(part, dtype=np.intp) for part in (*facts.parts, *loose))
        neutral = start if facts.neutral is None else facts.neutral
        parts = cls(members, facts.cells, facts.categorical, neutral.copy(), ())
        groups: dict[Signature, list[int]] = {}
        for k in range(len(facts.parts)):
            groups.setdefault(parts._signature(k), []).append(k)
        slots = [
            tuple(group)
            for signature, group in groups.items()
            if len(group) > 1 and any(cells > 1 and not categorical for cells, categorical, _ in signature[1:])
        ]
        return cls(members, facts.cells, facts.categorical, neutral.copy(), tuple(slots), facts.meaning)

    def codes(self, x: Array) -> Codes:
        """Return the cell of each coordinate `(d,)`, or its place on a fine grid where it is continuous."""
        counted = np.clip(np.floor(x * self.cells), 0, np.maximum(self.cells - 1, 0))
        return np.where(self.cells > 0, counted, np.floor(x * GRID + OFFSET)).astype(np.int64)

    def filled(self, x: Array) -> NDArray[np.bool_]:
        """Return which parts `(n,)` change something."""
        return np.asarray(self.codes(x)[self._first] != self._neutral_codes[self._first])

    def key(self, x: Array) -> bytes:
        """Return what points that mean the same share: what empty parts hold and the order of slots do not count."""
        codes = self.codes(x)
        empty = codes[self._first] == self._neutral_codes[self._first]
        codes = np.where(empty[self._owner], self._neutral_codes, codes)
        for group in self._grids:
            rows = codes[group]
            codes[group] = rows[np.lexsort(rows.T)]
        return codes.tobytes()

    def names(self, x: Array) -> set[Hashable]:
        """Return what a point is known by: its key, and what the space says that it means."""
        return {self.key(x)} if self.meaning is None else {self.key(x), self.meaning(x)}

    @cached_property
    def count(self) -> int | None:
        """How many points there are that mean different things; None if a coordinate is continuous."""
        if (self.cells == 0).any():
            return None
        total = 1
        for group in self.slots:
            total *= math.comb(self._contents(group[0]) + len(group), len(group))
        for k in range(len(self.members)):
            total *= 1 if k in self._slotted else 1 + self._contents(k)
        return total

    def points(self) -> Iterator[Array]:
        """Yield one point for each meaning; only where `count` is a number, and not a large one."""
        groups: list[tuple[int, ...]] = [
            *self.slots,
            *((k,) for k in range(len(self.members)) if k not in self._slotted),
        ]
        choices = [itertools.combinations_with_replacement(list(self._all_contents(g[0])), len(g)) for g in groups]
        for chosen in itertools.product(*choices):
            x = self.neutral.copy()
            for group, contents in zip(groups, chosen, strict=True):
                for k, content in zip(group, contents, strict=True):
                    x[self.members[k]] = content
            yield x

    # --------------------------------------------------------------------------------- changes, in place

    def fill(self, x: Array, rng: np.random.Generator) -> bool:
        """Fill a random empty part with random content, or with what a neighbour holds; False if none is empty."""
        filled = self.filled(x)
        empty = np.flatnonzero(~filled & self._fillable)
        if len(empty) == 0:
            return False
        beside = [(k, j) for k in empty for j in self._neighbours[k] if filled[j]]
        if beside and rng.random() < 0.5:  # a run of positions from one source grows
            to, source = beside[rng.integers(len(beside))]
            x[self.members[to]] = x[self.members[source]]
        else:
            k = int(rng.choice(empty))
            x[self.members[k]] = self._fresh(k, rng)
        return True

    def clear(self, x: Array, rng: np.random.Generator) -> bool:
        """Empty a random filled part; False if there is none."""
        filled = np.flatnonzero(self.filled(x))
        if len(filled) == 0:
            return False
        own = self.members[int(rng.choice(filled))]
        x[own] = self.neutral[own]
        return True

    def move(self, x: Array, rng: np.random.Generator) -> bool:
        """Change one coordinate of a random filled part; False if there is none, or nothing else for it to be."""
        filled = np.flatnonzero(self.filled(x))
        if len(filled) == 0:
            return False
        own = self.members[int(rng.choice(filled))]
        able = [j for i, j in enumerate(own) if self.cells[j] == 0 or self.cells[j] > (1 if i else 2)]
        if not able:
            return False
        j = int(able[rng.integers(len(able))])
        x[j] = self._moved(j, x[j], rng, self.neutral[j] if j == own[0] else None)
        return True

    def unite(self, first: Array, second: Array, rng: np.random.Generator) -> Array:
        """Return a child: what both parents hold, and what one of them does, each by the toss of a coin or all of it.

        Where both hold something at one position, either has it. Contents of slots that find no room are left out.
        """
        child = np.where(self._coins(rng), second, first)
        keep = 1.0 if rng.random() < 0.5 else 0.5
        mine, yours = self.filled(first), self.filled(second)
        for k in np.flatnonzero(mine | yours):
            if k in self._slotted:
                continue
            own = self.members[k]
            if mine[k] and yours[k]:
                continue
            holder = first if mine[k] else second
            child[own] = holder[own] if rng.random() < keep else self.neutral[own]
        for group in self.slots:
            self._unite_slots(child, first, second, group, keep, rng)
        return child

    # --------------------------------------------------------------------------------- internals

    def _unite_slots(
        self, child: Array, first: Array, second: Array, group: tuple[int, ...], keep: float, rng: np.random.Generator
    ) -> None:
        held: list[dict[bytes, Array]] = []
        for parent in (first, second):
            codes, filled = self.codes(parent), self.filled(parent)
            own = [self.members[k] for k in group if filled[k]]
            held.append({codes[part].tobytes(): parent[part] for part in own})
        both = [content for name, content in held[0].items() if name in held[1]]
        single = [c for a, b in (held, held[::-1]) for name, c in a.items() if name not in b]
        contents = [*both, *(c for c in single if rng.random() < keep)]
        order = rng.permutation(len(contents))[: len(group)]
        for i, k in enumerate(group):
            child[self.members[k]] = contents[order[i]] if i < len(order) else self.neutral[self.members[k]]

    def _coins(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return for each coordinate `(d,)` the toss of a coin for its part."""
        return np.asarray((rng.random(len(self.members)) < 0.5)[self._owner])

    def _fresh(self, k: int, rng: np.random.Generator) -> Array:
        own = self.members[k]
        content = self.neutral[own].copy()
        for i, j in enumerate(own):
            if self.cells[j] == 0:
                size = FRESH if i else _size(rng)
                content[i] = np.clip(content[i] + size * rng.standard_normal(), 0.0, 1.0)
            elif i == 0:
                content[i] = self._other_cell(j, [int(self._neutral_codes[j])], rng)
            else:
                content[i] = (rng.integers(self.cells[j]) + 0.5) / self.cells[j]
        return content

    def _moved(self, j: int, value: float, rng: np.random.Generator, neutral: float | None) -> float:
        """Return another value of coordinate j; never the neutral one where that would empty the part."""
        cells = int(self.cells[j])
        if cells == 0:
            return float(np.clip(value + _size(rng) * rng.standard_normal(), 0.0, 1.0))
        now = min(int(value * cells), cells - 1)
        forbidden = {now} if neutral is None else {now, min(int(neutral * cells), cells - 1)}
        if not self.categorical[j]:
            steps = [c for c in (now - 2, now - 1, now + 1, now + 2) if 0 <= c < cells and c not in forbidden]
            if steps:
                return (steps[rng.integers(len(steps))] + 0.5) / cells
        return self._other_cell(j, sorted(forbidden), rng)

    def _other_cell(self, j: int, forbidden: Sequence[int], rng: np.random.Generator) -> float:
        free = [c for c in range(int(self.cells[j])) if c not in forbidden]
        return float((free[rng.integers(len(free))] + 0.5) / self.cells[j])

    def _signature(self, k: int) -> Signature:
        codes = self._neutral_codes
        return tuple((int(self.cells[j]), bool(self.categorical[j]), int(codes[j])) for j in self.members[k])

    def _contents(self, k: int) -> int:
        """How many contents a part has that fill it."""
        cells = [int(self.cells[j]) for j in self.members[k]]
        return max(0, cells[0] - 1) * math.prod(cells[1:])

    def _all_contents(self, k: int) -> Iterator[Array]:
        """Yield the neutral content of a part of cells, then all that fill it."""
        own = self.members[k]
        yield self.neutral[own]
        for cells in itertools.product(*(range(int(self.cells[j])) for j in own)):
            if cells[0] != self._neutral_codes[own[0]]:
                yield (np.array(cells) + 0.5) / self.cells[own]

    @cached_property
    def _neutral_codes(self) -> Codes:
        return self.codes(self.neutral)

    @cached_property
    def _first(self) -> NDArray[np.intp]:
        return np.array([own[0] for own in self.members], dtype=np.intp)

    @cached_property
    def _owner(self) -> NDArray[np.intp]:
        owner = np.zeros(len(self.neutral), dtype=np.intp)
        for k, own in enumerate(self.members):
            owner[own] = k
        return owner

    @cached_property
    def _slotted(self) -> frozenset[int]:
        return frozenset(k for group in self.slots for k in group)

    @cached_property
    def _grids(self) -> list[NDArray[np.intp]]:
        return [np.array([self.members[k] for k in group]) for group in self.slots]

    @cached_property
    def _fillable(self) -> NDArray[np.bool_]:
        return np.array([self.cells[own[0]] != 1 for own in self.members])

    @cached_property
    def _neighbours(self) -> list[list[int]]:
        """The positions before and after each that have the same kinds of coordinates; none for slots and numbers."""
        found: list[list[int]] = []
        for k, own in enumerate(self.members):
            near = [j for j in (k - 1, k + 1) if 0 <= j < len(self.members) and k not in self._slotted]
            categorical = bool(self.categorical[own[0]])
            found.append([j for j in near if categorical and self._signature(j) == self._signature(k)])
        return found


def _size(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(FINEST), np.log(COARSEST))))
