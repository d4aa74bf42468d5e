"""What a search needs of its space: coefficients (`SearchSpace`) or layer orders (`PathSpace`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge._space_genes import Gene, Natural
from evomerge.optimizers import Facts
from evomerge.recipe import Recipe

Array = NDArray[np.float64]


class Space(Protocol):
    """Genes, and the way from their values to a Recipe and back. See `SearchSpace` for what the methods do."""

    @property
    def methods(self) -> tuple[str, ...]: ...

    @property
    def genes(self) -> tuple[Gene, ...]: ...

    @property
    def dim(self) -> int: ...

    def start(self) -> dict[str, Natural]: ...

    def starts(self) -> list[dict[str, Natural]]: ...

    def facts(self, workers: int = 1, evaluations: int | None = None) -> Facts: ...

    def decode(self, x: ArrayLike) -> dict[str, Natural]: ...

    def encode(self, params: Mapping[str, Natural]) -> Array: ...

    def recipe(self, params: Mapping[str, Natural]) -> Recipe: ...

    def point_of(self, recipe: Recipe) -> dict[str, Natural] | None: ...
