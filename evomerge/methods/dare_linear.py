"""DARE, linear: drop task vector elements at random, rescale the rest, add up."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods._combine import check_densities, weighted_sum
from evomerge.methods._core import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._sparsify import dare_rescale, drop


@method("dare_linear", source="Yu et al. 2024, arXiv 2311.03099", mergekit=True, random=True)
def dare_linear(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.5)] = 1.0,
    density: Annotated[PerExpert, Range(0.05, 1.0, limits=(0.0, 1.0))] = 1.0,
    lambda_: Annotated[float, Range(0.3, 1.5)] = 1.0,
    normalize: bool = False,
    rescale: bool | Literal["inv_prob", "l1", "none"] = True,
    sparsify_1d: Annotated[bool, EXTENSION] = False,
) -> Tensor:
    """Keeps each task vector element with probability `density`, rescales, and adds up.

    `rescale: true` is the paper's division by the density (`inv_prob`; the expectation is the
    full task vector), and under `compat: mergekit` mergekit's matching of the L1 norm (`l1`).
    Masks come from `keep_mask`: from the recipe's seed, the tensor's name and the expert alone.
    Density 1 or more drops nothing, density 0 drops the expert. 1-D tensors are left whole unless
    `sparsify_1d` or `compat: mergekit`.
    """
    densities = check_densities(x, density, sparsify_1d)
    scaling = dare_rescale(x, rescale)
    return weighted_sum(
        x,
        x.each(weight),
        densities,
        lambda i: drop(x, i, densities[i], scaling),
        lambda_=lambda_,
        normalize=normalize,
    )
