"""TIES: trim each task vector, elect a sign per element, average what agrees."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods._combine import check_densities, elected_sum
from evomerge.methods._core import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._sparsify import trim


@method("ties", source="Yadav et al. 2023, arXiv 2306.01708", mergekit=True)
def ties(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.5)] = 1.0,
    density: Annotated[PerExpert, Range(0.05, 1.0, limits=(0.0, 1.0))] = 1.0,
    lambda_: Annotated[float, Range(0.3, 2.5)] = 1.0,
    normalize: bool = True,
    rescale: bool | Literal["l1", "none"] = False,
    sign_election: Annotated[Literal["weighted", "unweighted"], EXTENSION] = "weighted",
    sparsify_1d: Annotated[bool, EXTENSION] = False,
) -> Tensor:
    """Trims task vectors, elects a sign per element and averages the entries that agree.

    Trim: the k = max(1, floor(density * n)) largest magnitudes of each tensor, exactly k, ties by
    lowest index; density 1 or more keeps all, density 0 drops the expert. (The paper's own code
    trims over the whole model at once; per tensor is what LLM merging uses.) Elect and merge as
    in `elected_sum`; `normalize: false` is the paper's dis-sum. `rescale: l1` restores the L1
    norm of each trimmed task vector. An exact tie of the votes elects +.

    1-D tensors (norm gains, biases) are not trimmed unless `sparsify_1d`: the tail of so short a
    vector matters. `compat: mergekit` trims them like every other tensor.
    """
    densities = check_densities(x, density, sparsify_1d)
    norm = "l1" if rescale in (True, "l1") else "none"
    return elected_sum(
        x,
        x.each(weight),
        densities,
        lambda i: trim(x, i, densities[i], norm),
        lambda_=lambda_,
        normalize=normalize,
        weighted_election=sign_election == "weighted",
    )
