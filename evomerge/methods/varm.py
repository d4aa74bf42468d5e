"""VaRM: weights from how far each model moved from the base."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, Range, method
from evomerge.methods._stages import weighted_sum
from evomerge.methods._statistics import alike, square_norms


@method("varm", source="FuseChat (preliminary report) 2024, arXiv 2402.16107")
def varm(
    x: Inputs,
    *,
    granularity: Literal["tensor", "element", "layer", "model"] = "tensor",
    temperature: Annotated[float, Range(0.25, 4.0, log=True, limits=(0.001, 1000.0))] = 1.0,
    lambda_: Annotated[float, Range(0.5, 1.5)] = 1.0,
) -> Tensor:
    """The base plus lambda sum_i w_i d_i, where w_i is model i's share of the squared change: v_i / sum_j v_j.

    v_i is the mean of d_i^2 over what `granularity` names: this tensor (the paper's choice), its whole block, the
    whole model, or the element alone. Outside the blocks `layer` means the tensor. Nothing changed anywhere: equal
    weights. The weights sum to 1, so a model trained at a large learning rate dominates.

    `temperature` T is an extension: w_i proportional to v_i^(1/T), the softmax of log v_i / T. 1 is the paper, a
    large T approaches equal weights, a small one the model that moved most. (A softmax of v_i itself, which the
    authors' scripts offer, is uniform at the size of real task vectors.) Powers other than 1 are taken in float64
    and rounded once.

    Raises:
        CandidateFailure: for a temperature of 0 or less.
    """
    if not temperature > 0.0:
        raise CandidateFailure(
            f"varm: temperature {temperature} (tensor {x.name!r})", hint="above 0", reason="bad_temperature"
        )
    if granularity != "element":
        weights = _shares(_squares(x, granularity), temperature)
        return weighted_sum(x, weights, lambda_=lambda_)
    if lambda_ == 0.0:
        return x.reference
    if len(x.experts) == 1 and lambda_ == 1.0:
        return x.experts[0]
    return _by_element(x, temperature).mul_(lambda_).add_(x.wide_base)


def _squares(x: Inputs, granularity: str) -> tuple[float, ...]:
    """Returns sum d_i^2 over the tensor, the block or the model; the number of elements is the same for all i."""
    if granularity == "tensor" or (granularity == "layer" and x.layer is None):
        return square_norms(x)
    block = x.layer if granularity == "layer" else None

    def add_up() -> tuple[float, ...]:
        parts = [square_norms(y) for y in alike(x) if block is None or y.layer == block]
        return tuple(math.fsum(values) for values in zip(*parts, strict=True))

    return x.family_table(("varm", block, len(x.experts)), add_up)


def _shares(squares: tuple[float, ...], temperature: float) -> tuple[float, ...]:
    most = max(squares)
    if not most > 0.0:
        return (1.0 / len(squares),) * len(squares)
    powers = [(value / most) ** (1.0 / temperature) for value in squares]
    return tuple(power / math.fsum(powers) for power in powers)


def _by_element(x: Inputs, temperature: float) -> Tensor:
    """Returns sum_i d_i r_i / sum_i r_i with r_i = (|d_i| / max_j |d_j|)^(2 / T): no square can underflow."""
    most = x.delta(0).abs_()
    for i in range(1, len(x.experts)):
        most = torch.maximum(most, x.deltas[i].abs())
    most.masked_fill_(most == 0, 1.0)
    total, divisor = torch.zeros_like(most), torch.zeros_like(most)
    for delta in x.deltas:
        share = delta.abs().div_(most)
        share = share.mul_(share) if temperature == 1.0 else share.double().pow_(2.0 / temperature).to(share.dtype)
        divisor.add_(share)
        total.add_(share.mul_(delta))
    return total.div_(divisor.masked_fill_(divisor == 0, 1.0))
