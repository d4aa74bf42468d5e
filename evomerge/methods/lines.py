"""LiNeS: task arithmetic whose scale rises linearly with depth."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import EXTENSION, Inputs, PerExpert, Range, method
from evomerge.methods._stages import weighted_sum


@method("lines", source="Wang et al. 2024, arXiv 2410.17146", identity=False)
def lines(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.2)] = 1.0,
    lambda_: Annotated[float, Range(0.0, 1.5)] = 1.0,
    lines_alpha: Annotated[float, Range(0.0, 1.0), EXTENSION] = 1.0,
    lines_beta: Annotated[float, Range(0.0, 1.5), EXTENSION] = 0.5,
    lines_match: Annotated[bool, EXTENSION] = True,
) -> Tensor:
    """The base plus a sum of task vectors scaled by depth: b + (alpha + beta l / (L - 1)) sum_i w_i d_i in block l.

    Shallow blocks hold what all tasks share, so they move least. Tensors outside the L blocks take alpha. With
    `lines_match` the start of the line is `lines_alpha` times ||sum_i d_i||_1 / (K ||tau||_1) over the whole model,
    tau = lambda sum_i w_i d_i: 1 / K at weights 1. The paper searches beta from 0.1 to 1.0. To keep one
    fine-tune's skill while harming the base less, take one expert and beta = 1 - alpha.

    Every method with a base takes the three parameters of the line, flat by default; here `lines_beta` is 0.5 and
    `lines_match` true unless told otherwise.
    """
    # The line is not drawn here: `Method` reads the three parameters and calls with lambda scaled.
    return weighted_sum(x, x.each(weight), lambda_=lambda_)
