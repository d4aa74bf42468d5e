"""DARE with TIES: drop at random instead of trimming, then elect signs."""

from __future__ import annotations

from torch import Tensor

from evomerge.methods import Inputs, method
from evomerge.methods._family import (
    Density,
    Lambda,
    Rescale,
    SignElection,
    Sparsify1d,
    Weight,
    rescale_name,
    sparsifiers,
)  # fmt: skip
from evomerge.methods._stages import Stages, combine


@method("dare_ties", source="Yu et al. 2024, arXiv 2311.03099", mergekit=True, random=True)
def dare_ties(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: Density = 1.0,
    lambda_: Lambda = 1.0,
    normalize: bool = False,
    rescale: Rescale = True,
    sign_election: SignElection = "weighted",
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Keeps task vector elements at random as `dare_linear` does, then elects signs as `ties` does.

    `normalize` is off by default, as in mergekit: entries that agree are added, not averaged.
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(x, "random", density, sparsify_1d=sparsify_1d),
            rescale=rescale_name(x, rescale),
            election=sign_election,
            normalize=normalize,
            lambda_=lambda_,
        ),
    )
