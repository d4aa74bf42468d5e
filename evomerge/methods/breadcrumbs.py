"""Model Breadcrumbs: drop the outliers and the small entries of each task vector, add up the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._family import Density, Sparsify1d, Weight, rescale_name, sparsifiers
from evomerge.methods._stages import Stages, combine

Gamma = Annotated[PerExpert, Range(0.0, 0.05, limits=(0.0, 1.0))]


@method("breadcrumbs", source="Davari & Belilovsky 2023, arXiv 2312.06795", mergekit=True)
def breadcrumbs(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    lambda_: Annotated[float, Range(0.01, 1.0)] = 1.0,
    normalize: bool = False,
    rescale: bool | Literal["l1", "l2", "none"] = False,
    scope: Annotated[Literal["tensor", "row"], EXTENSION] = "tensor",
    sparsify_1d: Sparsify1d = False,
) -> Tensor:
    """Drops the floor(gamma n) largest magnitudes, keeps the next floor(density n), adds up: b + lambda sum_i w_i d_i.

    n counts each tensor (`scope: tensor`: the paper's layer-wise masks, MergeLLM, mergekit) or each row (`scope:
    row`: the released code). Equal magnitudes rank by lowest index. floor(gamma n) = 0 drops no outliers. Where gamma
    + density exceed 1 fewer outliers are dropped; density 1 or more drops nothing at all, density 0 drops the expert.
    1-D tensors are left whole unless `sparsify_1d` or `compat: mergekit`.
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(x, "outliers", density, gamma=gamma, scope=scope, sparsify_1d=sparsify_1d),
            rescale=rescale_name(x, rescale, of_true="l1"),
            normalize=normalize,
            lambda_=lambda_,
        ),
    )
