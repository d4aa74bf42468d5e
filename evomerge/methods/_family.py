"""Parameters that the task-arithmetic family shares, with their search ranges, and how they become stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from evomerge.methods._inputs import Inputs
from evomerge.methods._ranges import EXTENSION, PerExpert, Range
from evomerge.methods._sparsify import Kind, Sparsify

Weight = Annotated[PerExpert, Range(0.0, 1.2)]
Density = Annotated[PerExpert, Range(0.05, 1.0, limits=(0.0, 1.0))]
Lambda = Annotated[float, Range(0.3, 2.5)]
Rescale = bool | Literal["inv_prob", "l1", "l2", "none"]
SignElection = Annotated[Literal["weighted", "unweighted"], EXTENSION]
Sparsify1d = Annotated[bool, EXTENSION]


def rescale_name(x: Inputs, rescale: bool | str, of_true: str = "inv_prob") -> str:
    """Returns what `rescale` means: true is `of_true`, and mergekit's matching of the L1 norm under its compat."""
    if isinstance(rescale, str):
        return rescale
    if not rescale:
        return "none"
    return of_true if x.paper else "l1"


def sparsifiers(
    x: Inputs,
    kind: Kind,
    density: float | Sequence[float],
    *,
    gamma: float | Sequence[float] = 0.0,
    epsilon: float | Sequence[float] = 0.0,
    relative: bool = False,
    scope: Literal["tensor", "row", "global"] = "tensor",
    sparsify_1d: bool = False,
) -> tuple[Sparsify, ...]:
    """Returns one `Sparsify` per expert; `relative` takes epsilon as a share of min(density, 1 - density)."""
    made = []
    for rho, outliers, width in zip(x.each(density), x.each(gamma), x.each(epsilon), strict=True):
        window = width * min(rho, 1.0 - rho) if relative else width
        made.append(Sparsify(kind, rho, outliers, window, scope, sparsify_1d))
    return tuple(made)
