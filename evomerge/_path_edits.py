"""Paths as a few edits of the backbone's identity path.

    edit<k>.kind     none, repeat, skip, splice, swap or share
    edit<k>.first    the first place that is edited
    edit<k>.length   how many
    edit<k>.source   where a splice takes its layers from
    edit<k>.scale    the scale at the first seam that the edit makes

A path has a place for each layer of the identity path, and edits name places. They are applied kind by kind, and
within a kind by place, so the order of the slots does not matter:

    splice   the block takes the layers of these numbers from another source
    share    the `length` places behind the first take over its layer (FoldGPT, arXiv 2407.00928)
    swap     the first place and its right neighbour exchange their layers
    skip     the block is left out
    repeat   the block, as the other kinds have left it, once more behind itself

A block that would reach into the frozen end is cut there; a swap or a share that would, starts earlier. Of
overlapping edits of one kind the later wins, and equal swaps count once. Repeats that would make the path longer than
allowed are left out. A scale acts where the path enters what was spliced, shared, swapped or repeated, or jumps over
what was skipped; where it comes back to the backbone by itself the matched scale acts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from evomerge._path_steps import Ground, Layer, Params, Step, named, scale_of, starts_of
from evomerge._space_genes import Gene, Natural

NONE, REPEAT, SKIP, SPLICE, SWAP, SHARE = "none", "repeat", "skip", "splice", "swap", "share"
KINDS = (REPEAT, SKIP, SPLICE, SWAP, SHARE)
_ORDER = (SPLICE, SHARE, SWAP, SKIP, REPEAT)


@dataclass(frozen=True)
class Edit:
    """An edit of the places [first, past); `source` is a splice's, -1 or its number among the sources."""

    kind: str
    first: int
    past: int
    source: int = -1
    scale: float = 1.0

    @property
    def key(self) -> tuple[int, int, int, int, float]:
        """What edits are sorted by."""
        return _ORDER.index(self.kind), self.first, self.past, self.source, self.scale


@dataclass(frozen=True)
class Edits:
    """At most `slots` edits of `kinds`, of blocks of at most `block` layers. See the module."""

    ground: Ground
    slots: int
    kinds: tuple[str, ...]
    block: int

    name = "edits"

    @property
    def others(self) -> tuple[str, ...]:
        """What a splice's source may be.

        Where the backbone is searched, a splice from the backbone itself would change nothing: of two sources it is
        then the other one, without a gene, and of more the one behind the backbone.
        """
        ground = self.ground
        if ground.searched and len(ground.sources) > 2:
            return ground.sources
        return tuple(source for source in ground.sources if source != ground.backbones[0])

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The genes of each slot; those with a single value are left out."""
        return tuple(gene for k in range(self.slots) for gene in self._slot(k))

    def _slot(self, k: int) -> list[Gene]:
        free, name = self.ground.free, f"edit{k}"
        found = [named(f"{name}.kind", (NONE, *self.kinds), NONE)]
        if len(free) > 1:
            middle = (free.start + free.stop - 1) // 2
            found.append(Gene(f"{name}.first", free.start, free.stop - 1, middle, whole=True))
        if self.block > 1 and self.kinds != (SWAP,):
            found.append(Gene(f"{name}.length", 1, self.block, 1, whole=True))
        if SPLICE in self.kinds and len(self.others) > 1:
            found.append(named(f"{name}.source", self.others, self.others[0]))
        return [*found, *self.ground.scale_genes(f"{name}.scale")]

    @property
    def shortest(self) -> int:
        """The number of layers of the shortest path: as many are left out as fit into all skips."""
        left_out = min(len(self.ground.free), self.slots * self.block) if SKIP in self.kinds else 0
        return self.ground.n_layers - left_out

    @cached_property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The genes of each slot."""
        return tuple(tuple(gene.name for gene in self._slot(k)) for k in range(self.slots))

    def start(self, backbone: str) -> Params:
        """Return the start: no edits."""
        return starts_of(self.genes)

    def steps(self, params: Mapping[str, Natural], backbone: str) -> list[Step]:
        """Return the path that the edits make of the backbone's."""
        return _Draft(self.ground, backbone).edited(self._edits(params, backbone))

    def _edits(self, params: Mapping[str, Natural], backbone: str) -> list[Edit]:
        """Return the edits in the order in which they are applied, without what does not matter to their kind."""
        free, sources = self.ground.free, self.ground.sources
        found = []
        for k in range(self.slots):
            kind = str(params[f"edit{k}.kind"])
            if kind == NONE:
                continue
            first, length = int(params.get(f"edit{k}.first", free.start)), int(params.get(f"edit{k}.length", 1))
            source = -1
            if kind == SPLICE:
                named_ = str(params.get(f"edit{k}.source", self.others[0]))
                source = sources.index(named_)
                if named_ == backbone:
                    source = (source + 1) % len(sources)
            if kind in (SWAP, SHARE):  # these take one place more, the neighbour
                first, length = min(first, free.stop - 2), length + 1 if kind == SHARE else 2
            past = min(first + length, free.stop)
            found.append(Edit(kind, first, past, source, scale_of(params, f"edit{k}.scale")))
        return sorted(found, key=lambda edit: edit.key)

    # ---------------------------------------------------------------- from a path

    def read(self, path: Sequence[Layer], backbone: str) -> Params | None:
        """Return the edits of a path that splices, skips and repeats; swapped and shared layers are not looked for."""
        middle = self.ground.middle(path, backbone)
        found = None if middle is None else self._found(middle, backbone)
        if found is None or len(found) > self.slots or any(edit.kind not in self.kinds for edit in found):
            return None
        params = starts_of(self.genes)
        for k, edit in enumerate(found):
            own: Params = {"kind": edit.kind, "first": edit.first, "length": edit.past - edit.first}
            if edit.kind == SPLICE:
                own["source"] = self.ground.sources[edit.source]
            if edit.past - edit.first > self.block:
                return None
            params |= {f"edit{k}.{key}": value for key, value in own.items() if f"edit{k}.{key}" in params}
        return params

    def _found(self, middle: Sequence[Layer], backbone: str) -> list[Edit] | None:
        """Return edits that make a path, or None: a layer further back than the last begins a copy of a block."""
        free, sources = self.ground.free, self.ground.sources
        places: dict[int, str] = {}
        repeats, place, i = [], free.start, 0
        while i < len(middle):
            source, layer = middle[i]
            if layer not in free:
                return None
            if layer >= place:
                places[layer], place, i = source, layer + 1, i + 1
                continue
            block = [(places[d], d) for d in range(layer, place) if d in places]
            if list(middle[i : i + len(block)]) != block:
                return None
            repeats.append(Edit(REPEAT, layer, place))
            i += len(block)
        contents = [places.get(d) for d in free]
        runs = self._runs([None if source == backbone else source or SKIP for source in contents])
        edits = [
            Edit(SKIP, first, past) if what == SKIP else Edit(SPLICE, first, past, sources.index(what))
            for what, first, past in runs
        ]
        return [*edits, *repeats]

    def _runs(self, contents: Sequence[str | None]) -> Iterable[tuple[str, int, int]]:
        """Yield runs of equal contents, None left out, cut into blocks that an edit can have."""
        first = 0
        for i in range(len(contents) + 1):
            ends = i == len(contents) or contents[i] != contents[first] or i - first == self.block
            if ends and i > first:
                what, start = contents[first], self.ground.free.start
                if what is not None:
                    yield what, start + first, start + i
                first = i


@dataclass
class _Draft:
    """A path in the making.

    `places` holds what stands in each free place, None if it was skipped; `enter` the scales where the path enters a
    place, `over` where it jumps over one; `behind` what was repeated behind a place.
    """

    ground: Ground
    backbone: str
    places: dict[int, Layer | None] = field(default_factory=dict)
    enter: dict[int, float] = field(default_factory=dict)
    over: dict[int, float] = field(default_factory=dict)
    behind: dict[int, list[Step]] = field(default_factory=dict)

    def edited(self, edits: Sequence[Edit]) -> list[Step]:
        """Return the path with sorted edits."""
        self.places = {d: (self.backbone, d) for d in self.ground.free}
        swapped: set[int] = set()
        for edit in edits:
            if edit.kind == SPLICE:
                self._splice(edit)
            elif edit.kind == SHARE:
                self._share(edit)
            elif edit.kind == SKIP:
                self._skip(edit)
            elif edit.kind == REPEAT:
                self._repeat(edit)
            elif edit.first not in swapped:
                self._swap(edit)
                swapped.add(edit.first)
        return self._whole()

    def _splice(self, edit: Edit) -> None:
        source = self.ground.sources[edit.source]
        self.places |= {d: (source, d) for d in range(edit.first, edit.past)}
        self.enter[edit.first] = edit.scale

    def _share(self, edit: Edit) -> None:
        self.places |= {d: self.places[edit.first] for d in range(edit.first + 1, edit.past)}
        self.enter[edit.first + 1] = edit.scale

    def _swap(self, edit: Edit) -> None:
        one, other = edit.first, edit.first + 1
        self.places[one], self.places[other] = self.places[other], self.places[one]
        self.enter[one] = edit.scale

    def _skip(self, edit: Edit) -> None:
        self.places |= dict.fromkeys(range(edit.first, edit.past))
        self.over |= dict.fromkeys(range(edit.first, edit.past), edit.scale)

    def _repeat(self, edit: Edit) -> None:
        copy, _ = self._walk(range(edit.first, edit.past), copies=False)
        if copy and len(copy) + len(self._whole()) <= self.ground.longest:
            copy[0] = replace(copy[0], scale=edit.scale)
            self.behind.setdefault(edit.past - 1, []).extend(copy)

    def _whole(self) -> list[Step]:
        middle, jump = self._walk(self.ground.free, copies=True)
        return [*self.ground.first_steps(self.backbone), *middle, *self.ground.last_steps(self.backbone, jump)]

    def _walk(self, places: range, copies: bool) -> tuple[list[Step], float]:
        """Return the steps of some places, and the scale of the jump that is open behind them."""
        found: list[Step] = []
        jump = 1.0
        for d in places:
            layer = self.places[d]
            if layer is None:
                jump = self.over[d]
            else:
                found.append(Step(*layer, self.enter.get(d, jump)))
                jump = 1.0
            if copies:
                found += self.behind.get(d, ())
        return found, jump
