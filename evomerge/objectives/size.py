"""Objective kind `size`: the number of parameters or layers of the merged model, smaller is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.errors import Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores
from evomerge.objectives._options import SizeOptions, read_options
from evomerge.recipe import layer_index

if TYPE_CHECKING:
    from evomerge.model import LiveModel


class SizeObjective:
    """Number of parameters or layers, counted from the live model.

    Options: `count` (parameters or layers; default parameters). A layer that is used twice counts twice, as in the
    exported checkpoint; tied input and output embeddings count once. The same on every split, without error: `exact`
    says that it is known before any forward pass.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    maximize = False
    partial = False
    exact = True
    splits = SPLITS
    bounds: tuple[float | None, float | None] = (0.0, None)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.name = spec.name
        self.options = read_options(SizeOptions, spec.options, f"objective {spec.name}")

    def check(self) -> list[Problem]:
        """Nothing can be wrong."""
        return []

    def fingerprint(self) -> str:
        """What is counted."""
        return f"size {self.options.count}"

    def size(self, split: str) -> int:
        """One item: the count."""
        return 1

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (1,) the count."""
        layers = [layer_index(name) for name, _ in live.model.named_parameters(remove_duplicate=False)]
        if self.options.count == "layers":
            return self.aggregate(np.array([1.0 + max((i for i in layers if i is not None), default=-1)]))
        # Of two names for one tensor, those in different layers are both written when the model is exported.
        tensors = live.model.named_parameters(remove_duplicate=False)
        sizes = {(id(p), i): p.numel() for (_, p), i in zip(tensors, layers, strict=True)}
        return self.aggregate(np.array([float(sum(sizes.values()))]))

    def aggregate(self, items: np.ndarray) -> Scores:
        """The count itself."""
        return Scores(float(items[0]), 0.0, items)


registry.register("objectives", "size", SizeObjective)
