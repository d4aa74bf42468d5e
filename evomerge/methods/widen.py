"""WIDEN: weights per column from how much its length and its direction changed, by rank."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from evomerge.methods import Inputs, Range, method
from evomerge.methods._statistics import column_dots

_EMBEDDINGS = ("embed", "wte", "wpe")


@method("widen", source="Yu et al. 2024, arXiv 2408.03092")
def widen(
    x: Inputs,
    *,
    ratio: Annotated[float, Range(0.5, 2.0)] = 1.0,
    calibration: Annotated[float, Range(0.3, 1.5)] = 1.0,
    lambda_: Annotated[float, Range(0.5, 1.5)] = 1.0,
) -> Tensor:
    """The base plus lambda sum_i w_i d_i, with a weight per model and column of the matrix.

    A column (one input feature; one token in an embedding) has a length m and a direction D. Model i changed them
    by |m_i - m_0| and 1 - cos(D_i, D_0), and ranks each change among the n columns of the tensor: R = place / n,
    ascending, equal changes in the order of the columns. Per column the scores of length and direction are the
    softmax over the models of their ranks; where R > ratio * mean(R) the score is `calibration` instead; w_i is the
    mean of the two. 1-D tensors rank the elements of |d_i|; more dimensions than two count as rows.

    Ranks do not know how large a task vector is, so a model trained on much more data does not drown the others.
    Above a ratio of 2 nothing is calibrated and the weights of a column sum to 1; at calibration 1 they sum to
    more, which amplifies. A column of zeros has no direction, and its change of direction counts as 0.
    """
    if lambda_ == 0.0 or x.reference.numel() == 0:
        return x.reference
    if len(x.experts) == 1 and calibration == 1.0 and lambda_ == 1.0:
        return x.experts[0]
    weights = _weights(x, ratio, calibration)
    total = x.delta(0).mul_(weights[0])
    for i in range(1, len(weights)):
        total.add_(x.delta(i).mul_(weights[i]))
    return total.mul_(lambda_).add_(x.wide_base)


def _by_rows(x: Inputs) -> bool:
    """True for an embedding: its rows, one per token, are what WIDEN calls columns."""
    return x.reference.ndim == 2 and any(part in x.name for part in _EMBEDDINGS)


def _weights(x: Inputs, ratio: float, calibration: float) -> list[Tensor]:
    """Returns one weight per model and column, in a shape that multiplies the tensor."""
    experts = range(len(x.experts))
    places = [x.table("widen_places", lambda i=i: _places(x, i), experts=[i]) for i in experts]  # type: ignore[misc]
    n = places[0].shape[-1]
    scores = [(place.double() / n).exp_() for place in places]
    total = scores[0].clone()
    for score in scores[1:]:
        total.add_(score)
    weights = []
    for place, score in zip(places, scores, strict=True):
        # R > ratio * mean(R), where the mean of 0 ... n-1 over n is (n - 1) / 2n: no rounding decides
        calibrated = score.div_(total).masked_fill_(place > ratio * (n - 1) / 2, calibration)
        weight = calibrated.mean(dim=0).to(x.dtype)  # of one row or of two
        weights.append(weight.unsqueeze(1) if _by_rows(x) else weight.reshape(x.reference.shape[-1:]))
    return weights


def _places(x: Inputs, i: int) -> Tensor:
    """Returns the place of each column in ascending order of change: two rows (length, direction), one for 1-D."""
    if x.reference.ndim < 2:
        changes = [x.delta(i).abs_().reshape(-1)]
    else:
        before, after = (_columns(x, tensor) for tensor in (x.wide_base, x.wide_experts[i]))
        norm2, other2, dots = column_dots(before, before), column_dots(after, after), column_dots(before, after)
        # cos |cos| sorts like cos, and without a root: equal columns give exactly 1, equal fractions are equal
        cosine = dots.mul_(dots.abs()).div_(norm2 * other2).nan_to_num_(1.0)
        changes = [(other2.sqrt() - norm2.sqrt()).abs_(), 1.0 - cosine.clamp_(max=1.0)]
    result = torch.empty(len(changes), changes[0].numel(), dtype=torch.int32, device=x.reference.device)
    for row, change in zip(result, changes, strict=True):
        row[change.argsort(stable=True)] = torch.arange(change.numel(), dtype=torch.int32, device=row.device)
    return result


def _columns(x: Inputs, tensor: Tensor) -> Tensor:
    return tensor.T if _by_rows(x) else tensor.reshape(-1, tensor.shape[-1])
