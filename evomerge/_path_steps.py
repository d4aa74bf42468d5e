"""Steps of a path through layers, and what the three encodings of a layer-order space have in common.

A path is a list of steps: a layer of a source each. A *seam* is a step that does not follow the one before it in the
same source: the source changes, or layers are skipped or repeated. Scales act at seams alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from evomerge._space_genes import Gene, Natural

Layer = tuple[str, int]  # a source's short name, and the number of one of its layers
Params = dict[str, Natural]
BACKBONE = "backbone"  # the gene that chooses among several


@dataclass(frozen=True)
class Step:
    """A layer of a path; the hidden state is multiplied by `scale` before it.

    An encoding gives the value of the gene that governs a seam here; at a seam it is then multiplied by the matched
    scale.
    """

    source: str
    layer: int
    scale: float = 1.0

    @property
    def of(self) -> Layer:
        """The step without its scale."""
        return self.source, self.layer


@dataclass(frozen=True)
class Ground:
    """What a layer-order space is about, whatever its encoding.

    `backbones` are the sources that may be the backbone; of several, the gene "backbone" chooses one. The backbone
    gives the first `head` and the last `tail` layers of every path. `longest` counts layers. `scales` is the range of
    scale genes, None if there are none.
    """

    sources: tuple[str, ...]
    backbones: tuple[str, ...]
    n_layers: int
    head: int
    tail: int
    longest: int
    scales: tuple[float, float] | None

    @property
    def free(self) -> range:
        """The numbers of the layers that are not frozen."""
        return range(self.head, self.n_layers - self.tail)

    @property
    def searched(self) -> bool:
        """True if a gene chooses the backbone."""
        return len(self.backbones) > 1

    def first_steps(self, backbone: str) -> list[Step]:
        """Return the frozen layers with which every path begins."""
        return [Step(backbone, d) for d in range(self.head)]

    def last_steps(self, backbone: str, scale: float = 1.0) -> list[Step]:
        """Return the frozen layers with which every path ends; `scale` is for where the path comes to them."""
        steps = [Step(backbone, d) for d in range(self.free.stop, self.n_layers)]
        return [replace(steps[0], scale=scale), *steps[1:]] if steps else []

    def middle(self, path: Sequence[Layer], backbone: str) -> list[Layer] | None:
        """Return a path without its frozen ends, or None if it has others."""
        first = [step.of for step in self.first_steps(backbone)]
        last = [step.of for step in self.last_steps(backbone)]
        past = len(path) - self.tail
        if past < self.head or list(path[: self.head]) != first or list(path[past:]) != last:
            return None
        return list(path[self.head : past])

    def scale_genes(self, *names: str) -> tuple[Gene, ...]:
        """Return a gene for each scale, none if scales are not searched."""
        if self.scales is None:
            return ()
        low, high = self.scales
        return tuple(Gene(name, low, high, min(high, max(low, 1.0)), "log") for name in names)


class Encoding(Protocol):
    """Genes, and the way from their values to the steps of a path and back."""

    @property
    def name(self) -> str:
        """The value of `path` in the YAML form."""

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes, without the backbone's; at their starts they make the identity path of the first backbone."""

    @property
    def shortest(self) -> int:
        """The number of layers of the shortest path."""

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Genes that mean something together only. With the first at its start, the others change nothing."""

    def start(self, backbone: str) -> Params:
        """Return the values that make the identity path of a backbone."""

    def steps(self, params: Mapping[str, Natural], backbone: str) -> list[Step]:
        """Return the path of natural values, never empty and never longer than allowed."""

    def read(self, path: Sequence[Layer], backbone: str) -> Params | None:
        """Return values that make a path, as far as this encoding knows how to find them; scales are at their start."""


def is_seam(before: Step | None, step: Step) -> bool:
    """True if a step does not follow the one before it (None: the embeddings) in the same source."""
    return step.layer != 0 if before is None else step.of != (before.source, before.layer + 1)


def scale_of(params: Mapping[str, Natural], name: str) -> float:
    """Return the value of a scale gene, 1 if scales are not searched."""
    return float(params.get(name, 1.0))


def starts_of(genes: Sequence[Gene]) -> Params:
    """Return each gene's start."""
    return {gene.name: gene.start for gene in genes}


def named(name: str, choices: Sequence[str], start: str) -> Gene:
    """Return a gene that chooses among names."""
    return Gene(name, 0.0, len(choices) - 1.0, start, choices=tuple(choices))
