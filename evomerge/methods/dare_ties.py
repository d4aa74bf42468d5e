"""DARE with TIES: drop at random instead of trimming, then elect signs."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods._combine import check_densities, elected_sum
from evomerge.methods._core import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._sparsify import dare_rescale, drop


@method("dare_ties", source="Yu et al. 2024, arXiv 2311.03099", mergekit=True, random=True)
def dare_ties(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.5)] = 1.0,
    density: Annotated[PerExpert, Range(0.05, 1.0, limits=(0.0, 1.0))] = 1.0,
    lambda_: Annotated[float, Range(0.3, 2.5)] = 1.0,
    normalize: bool = False,
    rescale: bool | Literal["inv_prob", "l1", "none"] = True,
    sign_election: Annotated[Literal["weighted", "unweighted"], EXTENSION] = "weighted",
    sparsify_1d: Annotated[bool, EXTENSION] = False,
) -> Tensor:
    """Keeps task vector elements at random as `dare_linear` does, then elects signs as `ties` does.

    `normalize` is off by default, as in mergekit: entries that agree are added, not averaged.
    """
    densities = check_densities(x, density, sparsify_1d)
    scaling = dare_rescale(x, rescale)
    return elected_sum(
        x,
        x.each(weight),
        densities,
        lambda i: drop(x, i, densities[i], scaling),
        lambda_=lambda_,
        normalize=normalize,
        weighted_election=sign_election == "weighted",
    )
