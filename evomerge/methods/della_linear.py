"""DELLA without election: drop task vector elements at random, the small ones more often, and add up."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._family import Rescale, Sparsify1d, Weight, rescale_name, sparsifiers
from evomerge.methods._stages import Stages, combine
from evomerge.methods.della import Epsilon, RankedDensity, Window


@method("della_linear", source="Deep et al. 2024, arXiv 2406.11617", mergekit=True, random=True)
def della_linear(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: RankedDensity = 1.0,
    epsilon: Epsilon = 0.15,
    window: Window = "absolute",
    lambda_: Annotated[float, Range(0.3, 1.5)] = 1.0,
    normalize: bool = False,
    rescale: Rescale = True,
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Drops elements as `della` does, then adds up: b + lambda sum_i w_i d_i.

    Raises:
        CandidateFailure: if density - epsilon or density + epsilon leave (0, 1).
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(
                x, "ranked", density, epsilon=epsilon, relative=window == "relative", sparsify_1d=sparsify_1d
            ),
            rescale=rescale_name(x, rescale),
            normalize=normalize,
            lambda_=lambda_,
        ),
    )  # fmt: skip
