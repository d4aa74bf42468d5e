"""DARE, linear: drop task vector elements at random, rescale the rest, add up."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._family import Density, Rescale, Sparsify1d, Weight, rescale_name, sparsifiers
from evomerge.methods._stages import Stages, combine


@method("dare_linear", source="Yu et al. 2024, arXiv 2311.03099", mergekit=True, random=True)
def dare_linear(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: Density = 1.0,
    lambda_: Annotated[float, Range(0.3, 1.5)] = 1.0,
    normalize: bool = False,
    rescale: Rescale = True,
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Keeps each task vector element with probability `density`, rescales, and adds up.

    `rescale: true` is the paper's division by the density (`inv_prob`; the expectation is the full task vector), and
    under `compat: mergekit` mergekit's matching of the L1 norm (`l1`). Masks come from `keep_mask`: from the recipe's
    seed, the tensor's name and the expert alone. Density 1 or more drops nothing, density 0 drops the expert. 1-D
    tensors are left whole unless `sparsify_1d` or `compat: mergekit`.
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(x, "random", density, sparsify_1d=sparsify_1d),
            rescale=rescale_name(x, rescale),
            normalize=normalize,
            lambda_=lambda_,
        ),
    )
