"""A pipeline of stages: sparsify, select, weight, combine, filter, scale, each chosen on its own."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods._family import Density, Lambda, Weight, sparsifiers
from evomerge.methods._stages import Stages, combine

# Beside "tensor", which all have.
_SCOPES: dict[str, tuple[str, ...]] = {"magnitude": ("global",), "outliers": ("row",)}


@method(
    "pipeline", source="the stages' own papers: see ties, dare_linear, della, breadcrumbs, sce, consensus", random=True
)
def pipeline(
    x: Inputs,
    *,
    sparsify: Literal["random", "ranked", "magnitude", "outliers", "none"] = "random",
    density: Density = 1.0,
    gamma: Annotated[PerExpert, Range(0.0, 0.05, limits=(0.0, 1.0))] = 0.01,
    epsilon: Annotated[PerExpert, Range(0.0, 0.95, limits=(0.0, 1.0))] = 0.3,
    scope: Literal["tensor", "row", "global"] = "tensor",
    rescale: Literal["auto", "none", "inv_prob", "l1", "l2"] = "auto",
    sparsify_1d: bool = False,
    select_topk: Annotated[float, Range(0.02, 1.0, log=True, limits=(0.0, 1.0))] = 1.0,
    weight: Weight = 1.0,
    energy_weights: bool = False,
    combine_by: Literal["sum", "elect"] = "sum",
    sign_election: Literal["weighted", "unweighted"] = "weighted",
    normalize: bool = False,
    agree: Annotated[int, Range(0, 3, limits=(0, 1_000_000))] = 0,
    importance: Annotated[float, Range(0.2, 0.6)] = 0.4,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Runs task vectors through stages that are each chosen on their own; every other method of the family is one.

    1. Sparsify each task vector: `random` (DARE), `ranked` with `epsilon`, here a share of min(density, 1 - density)
       (DELLA), `magnitude` (TIES) or `outliers` with `gamma` (Breadcrumbs); density 1 keeps all. `scope` is what a
       density counts: each tensor, each row (outliers alone), or the whole model (magnitude alone); the others count
       each tensor whatever it says, so that both can be searched. `rescale` makes up for what was dropped; `auto`
       divides by the keep probability where the choice is random.
    2. Select the `select_topk` share of elements where the experts differ most (SCE), for all experts alike.
    3. Weight by `weight`, times each expert's share of the squares with `energy_weights` (SCE, VaRM).
    4. Combine: `sum`, or `elect` signs and keep what agrees; `normalize` divides by the weights that took part.
    5. Filter: keep what at least `agree` experts find important, |d_i| > importance * |tau - d_i| (Consensus); 0 off.
    6. Scale by `lambda`, and along the depth by lines_alpha and lines_beta (LiNeS).
    """
    counted = scope if scope in _SCOPES.get(sparsify, ()) else "tensor"
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(
                x, sparsify, density,
                gamma=gamma, epsilon=epsilon, relative=True, scope=counted, sparsify_1d=sparsify_1d,
            ),
            rescale=("inv_prob" if sparsify in ("random", "ranked") else "none") if rescale == "auto" else rescale,
            election="none" if combine_by == "sum" else sign_election,
            normalize=normalize,
            lambda_=lambda_,
            select=select_topk if select_topk < 1.0 else None,
            agree=agree,
            importance=importance,
            energy_weights=energy_weights,
        ),
    )  # fmt: skip
