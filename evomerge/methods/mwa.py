"""Metrics-weighted averaging: the checkpoints of one run, weighted by a loss or a step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods.linear import linear


@method("mwa", source="Metrics-Weighted Averaging 2025, arXiv 2504.18580", needs_base=False)
def mwa(
    x: Inputs,
    *,
    metric: Annotated[PerExpert, Range(0.1, 10.0, log=True)],
    by: Literal["loss", "step"] = "loss",
    p: Annotated[float, Range(0.0, 5.0)] = 1.0,
) -> Tensor:
    """The average of checkpoints with weights from a metric m_i: sum_i w_i x_i, w_i proportional to m_i^-p or m_i^p.

    `by: loss` takes m_i^-p, so that a lower loss counts more; `by: step` takes m_i^p, so that a later step (or a
    higher score) counts more. p sharpens: 0 is the plain average, a large p approaches the best checkpoint, a
    negative p turns the preference round. Only ratios of the metrics count. The paper's own formula could not be
    established: this is a power law with its idea and its penalty factor p.

    Raises:
        CandidateFailure: for a metric below 0 or not finite, or one of 0 whose weight would be infinite or 0 / 0.
    """
    return linear(x, weight=_weights(x, x.each(metric), -p if by == "loss" else p))


def _weights(x: Inputs, metrics: tuple[float, ...], power: float) -> tuple[float, ...]:
    """Returns m_i^power over its largest value, through logarithms: step 10^6 to the power of 60 is no overflow."""
    undefined = power < 0.0 or (power > 0.0 and not any(metrics))
    for i, value in enumerate(metrics):
        if not 0.0 <= value < math.inf or (value == 0.0 and undefined):
            raise CandidateFailure(
                f"mwa: the metric {value:g} of model {i} in tensor {x.name!r} has no weight (power {power:g})",
                hint="losses are above 0; steps are 0 or more, not all 0",
                reason="bad_metric",
            )
    if power == 0.0:
        return (1.0,) * len(metrics)
    logs = [power * math.log(value) if value > 0.0 else -math.inf for value in metrics]
    return tuple(math.exp(log - max(logs)) for log in logs)
