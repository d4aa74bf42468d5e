"""Breadcrumbs with TIES: drop outliers and small entries, then elect signs."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, method
from evomerge.methods._family import (
    Density,
    Lambda,
    SignElection,
    Sparsify1d,
    Weight,
    rescale_name,
    sparsifiers,
)  # fmt: skip
from evomerge.methods._stages import Stages, combine
from evomerge.methods.breadcrumbs import Gamma


@method("breadcrumbs_ties", source="Davari & Belilovsky 2023, arXiv 2312.06795; signs as in TIES", mergekit=True)
def breadcrumbs_ties(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    lambda_: Lambda = 1.0,
    normalize: bool = False,
    rescale: bool | Literal["l1", "l2", "none"] = False,
    scope: Annotated[Literal["tensor", "row"], EXTENSION] = "tensor",
    sign_election: SignElection = "weighted",
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Makes task vectors sparse as `breadcrumbs` does, then elects signs as `ties` does.

    `normalize` is off by default, as in mergekit: entries that agree are added, not averaged.
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(x, "outliers", density, gamma=gamma, scope=scope, sparsify_1d=sparsify_1d),
            rescale=rescale_name(x, rescale, of_true="l1"),
            election=sign_election,
            normalize=normalize,
            lambda_=lambda_,
        ),
    )
