"""What is kept of one task vector: the largest, all but outliers, or a random part (TIES, Breadcrumbs, DARE, DELLA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods._inputs import Inputs

Kind = Literal["none", "magnitude", "outliers", "random", "ranked"]


@dataclass(frozen=True)
class Sparsify:
    """How one task vector is made sparse.

    Attributes:
        kind: "magnitude" keeps the floor(density * n) largest, at least one. "outliers" drops the floor(gamma * n)
            largest and keeps the next floor(density * n). "random" keeps each entry with probability density.
            "ranked" keeps an entry with a probability that rises with its rank in its row, from density - epsilon
            to density + epsilon.
        density: the share that is kept. 1 and more keeps all (no outliers are dropped either), 0 keeps none.
        scope: "tensor", "row" (the last axis) or, for "magnitude", "global": the whole model.
        sparsify_1d: whether tensors with fewer than two axes (norm gains, biases) are made sparse too.
    """

    kind: Kind = "none"
    density: float = 1.0
    gamma: float = 0.0
    epsilon: float = 0.0
    scope: Literal["tensor", "row", "global"] = "tensor"
    sparsify_1d: bool = False

    @property
    def dense(self) -> bool:
        """True when every entry is kept."""
        return self.kind == "none" or self.density >= 1.0

    @property
    def by_row(self) -> bool:
        """True when each row is made sparse on its own."""
        return self.scope == "row" and not self.dense

    def check(self, x: Inputs, i: int) -> None:
        """Raises CandidateFailure for what no tensor can have."""
        where = f"of expert {i} in tensor {x.name!r}"
        if not self.density >= 0.0:
            raise CandidateFailure(f"density {self.density} {where} is below 0", reason="bad_density")
        if self.kind == "ranked" and 0.0 < self.density < 1.0:
            low, high = self.density - self.epsilon, self.density + self.epsilon
            if not (self.epsilon >= 0.0 and low > 0.0 and high < 1.0):
                raise CandidateFailure(
                    f"keep probabilities {low:g} to {high:g} (density -+ epsilon) {where} leave (0, 1)",
                    hint="epsilon must be below the density and below 1 - density; `window: relative` ensures it",
                    reason="bad_density",
                )

    def for_tensor(self, x: Inputs) -> Sparsify:
        """Returns what holds for this tensor: all or nothing of one with fewer than two axes, unless asked for."""
        if self.sparsify_1d or x.reference.ndim >= 2 or self.kind == "none":
            return self
        return replace(self, density=1.0 if self.density > 0.0 else 0.0)

    def counts(self, n: int) -> tuple[int, int]:
        """Returns how many of n entries rank above the lower cut, and how many of these are outliers."""
        kept = math.floor(self.density * n)
        if self.kind != "outliers":
            return min(n, max(1, kept)), 0
        top = min(math.floor(self.gamma * n), n - kept)  # outliers give way to the density
        return kept + top, top

    def row_mask(self, ranks: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns the bool mask of what each row keeps, from the ranks of its magnitudes (0 the smallest)."""
        n = shape[-1] if shape else 1
        kept, top = self.counts(n)
        return (ranks >= n - kept) & (ranks < n - top)


def probability_line(how: Sparsify, shape: Sequence[int]) -> tuple[float, float]:
    """Returns (lowest, step): the keep probability of rank r in a row is q = lowest + step * r, in float32.

    From density - epsilon for the smallest magnitude of a row to density + epsilon for the largest; a row of one
    entry has q = density. An entry is kept when the 24 high bits of its hash are below q * 2^24.
    """
    n = shape[-1] if shape else 1
    if n == 1:
        return how.density, 0.0
    return how.density - how.epsilon, 2.0 * how.epsilon / (n - 1)


def torch_ranks(x: Inputs, i: int, axis: int = -1) -> Tensor:
    """Returns the rank (int64, 0 the smallest) of each entry of task vector i in its row, equal ones by place."""
    size: Any = x.delta(i).abs_()
    if size.ndim == 0:
        return torch.zeros((), dtype=torch.int64, device=size.device)
    order = size.argsort(dim=axis, stable=True)
    places = torch.arange(size.shape[axis], device=size.device)
    view = [1] * size.ndim
    view[axis] = -1
    return torch.empty_like(order).scatter_(axis, order, places.reshape(view).expand_as(order).contiguous())
