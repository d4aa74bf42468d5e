"""DELLA: drop task vector elements at random, the small ones more often; elect signs; average what agrees."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._family import (
    Lambda,
    Rescale,
    SignElection,
    Sparsify1d,
    Weight,
    rescale_name,
    sparsifiers,
)  # fmt: skip
from evomerge.methods._stages import Stages, combine

# Ranges inside which every density goes with every epsilon.
RankedDensity = Annotated[PerExpert, Range(0.2, 0.8, limits=(0.0, 1.0))]
Epsilon = Annotated[PerExpert, Range(0.0, 0.19, limits=(0.0, 1.0))]
Window = Annotated[Literal["absolute", "relative"], EXTENSION]


@method("della", source="Deep et al. 2024, arXiv 2406.11617", mergekit=True, random=True)
def della(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: RankedDensity = 1.0,
    epsilon: Epsilon = 0.15,
    window: Window = "absolute",
    lambda_: Lambda = 1.0,
    normalize: bool = True,
    rescale: Rescale = True,
    sign_election: SignElection = "weighted",
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Keeps elements with a probability that rises with their rank, rescales, elects signs and averages.

    Drop (MagPrune): an entry of rank r among the n magnitudes of its row (the last axis; 0 the smallest, equal ones
    by place) is kept with probability q = (density - epsilon) + 2 epsilon r / (n - 1), and divided by q (`rescale:
    true`: every entry keeps its expectation; under `compat: mergekit` the L1 norm is matched instead). The mean of q
    over a row is the density; epsilon 0 is DARE. `epsilon` is half the width of the window, as in mergekit; the
    paper's code calls the whole width `window_size`. Elect and merge as in `ties`.

    `window: relative` takes epsilon as a share of min(density, 1 - density), so that no probability leaves (0, 1):
    use it when both are searched. Density 1 or more drops nothing, density 0 drops the expert. 1-D tensors are left
    whole unless `sparsify_1d` or `compat: mergekit`. Masks are those of `keep_mask`.

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
            election=sign_election,
            normalize=normalize,
            lambda_=lambda_,
        ),
    )  # fmt: skip
