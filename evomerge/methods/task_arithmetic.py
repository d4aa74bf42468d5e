"""Task arithmetic: the base plus a weighted sum of task vectors."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._family import Weight, sparsifiers
from evomerge.methods._stages import Stages, combine


@method("task_arithmetic", source="Ilharco et al. 2023, arXiv 2212.04089", mergekit=True)
def task_arithmetic(
    x: Inputs,
    *,
    weight: Weight = 1.0,
    lambda_: Annotated[float, Range(0.0, 1.5)] = 1.0,
    normalize: bool = False,
) -> Tensor:
    """The base plus lambda times the weighted sum of the task vectors: b + lambda sum_i w_i d_i.

    A sum over K experts, so a good lambda shrinks roughly as 1/K. `normalize` divides by
    sum_i w_i (by 1 if that is below 1e-8 in size). A negative weight removes a skill.
    """
    return combine(
        x, Stages(x.each(weight), sparsifiers(x, "none", 1.0), normalize=normalize, lambda_=lambda_)
    )  # fmt: skip
