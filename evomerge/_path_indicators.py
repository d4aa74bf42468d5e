"""Paths as indicators: which layers of a long list are executed (Akiba et al. 2024, arXiv 2403.13187, section 3.2).

    on.<r>.<source>.<layer>      off or on: whether the path has this layer in round r
    scale.<a>.<i>.<b>.<j>        with a matrix: the scale where layer j of source b comes behind layer i of source a
    scale.<r>.<source>.<layer>   without: the scale where the path enters this slot

All free layers of all sources, in the order of the sources, form a list, which is repeated; a path is the layers that
are on, in this order, between the frozen ends. At the start the first round of the backbone is on. The matrix is the
paper's W, of which layers in their natural order need no entry (W = 1). Slots beyond the longest path are left out
from the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from evomerge._path_steps import Ground, Layer, Params, Step, named, scale_of, starts_of
from evomerge._space_genes import Gene, Natural

OFF, ON = "off", "on"
MOST_GENES = 1024


@dataclass(frozen=True)
class Indicators:
    """The list of layers `repeats` times over, each on or off. See the module."""

    ground: Ground
    repeats: int
    matrix: bool

    name = "indicators"

    @cached_property
    def slots(self) -> tuple[tuple[int, str, int], ...]:
        """Round, source and layer of every indicator, in the order of execution."""
        ground = self.ground
        return tuple((r + 1, s, d) for r in range(self.repeats) for s in ground.sources for d in ground.free)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """All indicators, then all scales."""
        on = self.start(self.ground.backbones[0])
        bits = [named(_on(slot), (OFF, ON), str(on[_on(slot)])) for slot in self.slots]
        names = (_pair(*pair) for pair in self._pairs()) if self.matrix else map(_slot_scale, self.slots)
        return (*bits, *(self.ground.scale_genes(*names) if self.ground.scales else ()))

    @property
    def n_genes(self) -> int:
        """How many genes there are, without making them."""
        scales = 0 if self.ground.scales is None else sum(1 for _ in self._pairs()) if self.matrix else len(self.slots)
        return len(self.slots) + scales

    def _pairs(self) -> Iterator[tuple[Layer, Layer]]:
        """Yield every pair of layers that can follow each other in a path, but for natural successors."""
        ground = self.ground
        layers = [(source, d) for source in ground.sources for d in ground.free]
        last = [(name, ground.head - 1) for name in ground.backbones if ground.head]
        first = [(name, ground.free.stop) for name in ground.backbones if ground.tail]
        for i, a in enumerate([*layers, *last]):
            for j, b in enumerate([*layers, *first]):
                both = i < len(layers) and j < len(layers)
                reached = self.repeats > 1 or i < j if both else i < len(layers) or j < len(layers) or a[0] == b[0]
                if reached and b != (a[0], a[1] + 1):
                    yield a, b

    @property
    def shortest(self) -> int:
        """The number of layers of the shortest path: the frozen ones."""
        return self.ground.head + self.ground.tail

    @cached_property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Each indicator; scales mean something on their own."""
        return tuple((_on(slot),) for slot in self.slots)

    def start(self, backbone: str) -> Params:
        """Return the start: the first round of the backbone is on."""
        bits: Params = {_on(slot): ON if slot[:2] == (1, backbone) else OFF for slot in self.slots}
        if self.ground.scales is None:
            return bits
        names = (_pair(*pair) for pair in self._pairs()) if self.matrix else map(_slot_scale, self.slots)
        return bits | starts_of(self.ground.scale_genes(*names))

    def steps(self, params: Mapping[str, Natural], backbone: str) -> list[Step]:
        """Return the layers that are on, with as many as fit between the frozen ends."""
        ground = self.ground
        room = ground.longest - ground.head - ground.tail
        chosen = [slot for slot in self.slots if params[_on(slot)] == ON][:room]
        middle = [Step(source, d, scale_of(params, _slot_scale((r, source, d)))) for r, source, d in chosen]
        path = [*ground.first_steps(backbone), *middle, *ground.last_steps(backbone)]
        if not self.matrix:
            return path
        return [path[0], *(replace(b, scale=scale_of(params, _pair(a.of, b.of))) for a, b in pairwise(path))]

    def read(self, path: Sequence[Layer], backbone: str) -> Params | None:
        """Return the indicators of a path: each layer is the earliest slot that is left."""
        middle = self.ground.middle(path, backbone)
        if middle is None:
            return None
        found = self.start(backbone) | {_on(slot): OFF for slot in self.slots}
        left = iter(self.slots)
        for layer in middle:
            slot = next((slot for slot in left if slot[1:] == layer), None)
            if slot is None:
                return None
            found[_on(slot)] = ON
        return found


def _on(slot: tuple[int, str, int]) -> str:
    return "on.{}.{}.{}".format(*slot)


def _slot_scale(slot: tuple[int, str, int]) -> str:
    return "scale.{}.{}.{}".format(*slot)


def _pair(a: Layer, b: Layer) -> str:
    return f"scale.{a[0]}.{a[1]}.{b[0]}.{b[1]}"
