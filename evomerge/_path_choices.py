"""Paths as a choice for every depth: skip it, or take the layer of this depth from one of the sources.

    layer.<d>        skip, or a source; where the backbone is searched also `own`: the backbone's layer
    scale.<d>        the scale where the path enters what is chosen at depth d, or jumps over it
    again.<d>        with two passes: the same choices once more for the free depths, behind the first pass
    again_scale.<d>  the scale where the path enters it

Every depth of the backbone is chosen at the start, and nothing in the second pass. Where a searched backbone changes,
depths at `own` change with it: so the identity path of every source is one gene away, and an improvement of one
backbone carries over to the next. Naming the backbone's source gives the same path as `own`.

A scale belongs to the choice that makes the seam, so it does nothing where the backbone's own layer is chosen. Where
a path comes back to its backbone by itself the matched scale acts alone; behind skipped depths it is the last one's
scale. Layers of the second pass that would make the path longer than allowed are left out from the last.

Known as the depth-aligned search space for data flows; passes: Akiba et al. 2024, arXiv 2403.13187, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from evomerge._path_steps import Ground, Layer, Params, Step, named, scale_of, starts_of
from evomerge._space_genes import Gene, Natural

OWN, SKIP = "own", "skip"


@dataclass(frozen=True)
class Choices:
    """One choice per free depth and pass. See the module."""

    ground: Ground
    passes: int = 1

    name = "choices"

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The choice and the scale of each depth, first pass first."""
        ground = self.ground
        choices = (*((OWN,) if ground.searched else ()), SKIP, *ground.sources)
        start = OWN if ground.searched else ground.backbones[0]
        found: list[Gene] = []
        for d in ground.free:
            found += [named(f"layer.{d}", choices, start), *ground.scale_genes(f"scale.{d}")]
        for d in ground.free if self.passes > 1 else ():
            found += [named(f"again.{d}", choices, SKIP), *ground.scale_genes(f"again_scale.{d}")]
        return tuple(found)

    @property
    def shortest(self) -> int:
        """The number of layers of the shortest path: the frozen ones."""
        return self.ground.head + self.ground.tail

    @cached_property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The choice of each depth and pass with its scale."""
        names = [gene.name for gene in self.genes]
        size = 1 if self.ground.scales is None else 2
        return tuple(tuple(names[i : i + size]) for i in range(0, len(names), size))

    def start(self, backbone: str) -> Params:
        """Return the start: every depth is the backbone's own, whichever that is."""
        return starts_of(self.genes)

    def steps(self, params: Mapping[str, Natural], backbone: str) -> list[Step]:
        """Return the first frozen layers, both passes, and the last frozen layers."""
        found = self.ground.first_steps(backbone)
        jump = 1.0
        for d in self.ground.free:
            chosen, scale = params[f"layer.{d}"], scale_of(params, f"scale.{d}")
            if chosen == SKIP:
                jump = scale
                continue
            own = chosen in (OWN, backbone)
            found.append(Step(backbone, d, jump) if own else Step(str(chosen), d, scale))
            jump = 1.0
        again = self._again(params, backbone)[: self.ground.longest - self.ground.tail - len(found)]
        return [*found, *again, *self.ground.last_steps(backbone, 1.0 if again else jump)]

    def _again(self, params: Mapping[str, Natural], backbone: str) -> list[Step]:
        chosen = {d: params.get(f"again.{d}", SKIP) for d in self.ground.free}
        return [
            Step(backbone if source == OWN else str(source), d, scale_of(params, f"again_scale.{d}"))
            for d, source in chosen.items()
            if source != SKIP
        ]

    def read(self, path: Sequence[Layer], backbone: str) -> Params | None:
        """Return the choices of a path whose depths rise, in two passes twice."""
        middle = self.ground.middle(path, backbone)
        if middle is None:
            return None
        found: Params = starts_of(self.genes) | {f"layer.{d}": SKIP for d in self.ground.free}
        kind, last = "layer", -1
        for source, d in middle:
            if d <= last and kind == "layer" and self.passes > 1:
                kind, last = "again", -1
            if d <= last or d not in self.ground.free:
                return None
            own = source == backbone and self.ground.searched
            found[f"{kind}.{d}"], last = OWN if own else source, d
        return found
