"""TIES: trim each task vector, elect a sign per element, average what agrees."""

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


@method("ties", source="Yadav et al. 2023, arXiv 2306.01708", mergekit=True)
def ties(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: Density = 1.0,
    lambda_: Lambda = 1.0,
    normalize: bool = True,
    rescale: bool | Literal["l1", "l2", "none"] = False,
    scope: Annotated[Literal["tensor", "global"], EXTENSION] = "tensor",
    sign_election: SignElection = "weighted",
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Trims task vectors, elects a sign per element and averages the entries that agree.

    Trim: the k = max(1, floor(density * n)) largest magnitudes, exactly k, ties by lowest index; density 1 or more
    keeps all, density 0 drops the expert. n counts each tensor (`scope: tensor`, what LLM merging uses) or the whole
    model at once (`scope: global`, the paper's own code). Elect: the sign of sum_i w_i d_i (`unweighted`: of
    sum_i d_i, the paper's) per element, + for an exact tie. Merge: the entries of that sign, added up and divided by
    their weights; `normalize: false` is the paper's dis-sum. `rescale: l1` restores the L1 norm of each trimmed task
    vector.

    1-D tensors (norm gains, biases) are not trimmed, nor counted in the global scope, unless `sparsify_1d`: the tail
    of so short a vector matters. `compat: mergekit` trims them like every other tensor.
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(x, "magnitude", density, scope=scope, sparsify_1d=sparsify_1d),
            rescale=rescale_name(x, rescale, of_true="l1"),
            election=sign_election,
            normalize=normalize,
            lambda_=lambda_,
        ),
    )
