"""SCE: select the elements where the experts differ most, weight experts by their energy there, erase minorities."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._family import sparsifiers
from evomerge.methods._stages import Stages, combine


@method("sce", source="Wan et al. 2024, FuseChat, arXiv 2408.07990", mergekit=True)
def sce(
    x: Inputs,
    *,
    select_topk: Annotated[float, Range(0.02, 1.0, log=True, limits=(0.0, 1.0))] = 1.0,
    weight: Annotated[PerExpert, Range(0.0, 1.2), EXTENSION] = 1.0,
    lambda_: Annotated[float, Range(0.5, 1.5), EXTENSION] = 1.0,
    sum_scope: Annotated[Literal["selected", "all"], EXTENSION] = "selected",
) -> Tensor:
    """Selects by variance, calculates weights from squares, erases minority signs: b + lambda tau.

    Select: M keeps the floor(select_topk * n) elements, at least one, with the largest population variance over the
    task vectors, of the n where it is not zero (a variance below 1e-12 of the mean square is rounding, and counts as
    zero); if the experts agree everywhere M keeps all. Calculate: w_i = mean((M d_i)^2), normalised to sum 1, times
    the expert's `weight`. Erase: the sign of sum_i M d_i, + for an exact tie; tau = sum w_i M d_i / sum w_i over the
    entries of that sign.

    `sum_scope: all` uses M for the weights only and then elects and adds up the whole task vectors, as the authors'
    released code does; `selected` is the paper's text. The paper has no lambda and no weights beside w_i. mergekit
    falls back to uniform weights where the squares sum to less than 1e-6, which most fine-tunes do; `compat: mergekit`
    follows it, otherwise only an exact zero is uniform.
    """
    return combine(
        x,
        Stages(
            x.each(weight),
            sparsifiers(x, "none", 1.0),
            election="unweighted",
            normalize=True,
            lambda_=lambda_,
            select=select_topk if select_topk < 1.0 else None,
            energy_weights=True,
            weights_only=sum_scope == "all",
        ),
    )
