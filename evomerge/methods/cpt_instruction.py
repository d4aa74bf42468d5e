"""Domain vector plus instruction vector: task arithmetic with two named roles."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._stages import weighted_sum


@method(
    "cpt_instruction",
    source="The Construction of Instruction-tuned LLMs for Finance 2024, arXiv 2409.19854",
    n_experts=(2, 2),
    symmetric=False,
    identity=False,
)
def cpt_instruction(
    x: Inputs,
    *,
    cpt_weight: Annotated[float, Range(0.0, 1.2)] = 1.0,
    instruction_weight: Annotated[float, Range(0.0, 1.2)] = 1.0,
) -> Tensor:
    """The base plus its continued pre-training on a domain plus its instruction tuning: b + c d_cpt + a d_inst.

    The FIRST expert is the model pre-trained further on the domain, the SECOND the instruction-tuned one. Adding
    them takes task vectors that are close to orthogonal; a domain vector much longer than the instruction vector
    drowns it: lower `cpt_weight` then, or merge with `widen`. A weight of 0 leaves that model out, bit for bit.
    """
    return weighted_sum(x, (cpt_weight, instruction_weight))
