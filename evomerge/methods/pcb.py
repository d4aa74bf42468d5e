"""PCB-Merging: every element of a task vector competes for its place, within its model and between the models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods._statistics import CHUNK, alike, quantiles

_TINY = 1e-12  # the least divisor

T = TypeVar("T")


@method("pcb", source="Du et al. 2024, arXiv 2410.02396", identity=False)
def pcb(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.5, 2.5)] = 1.0,
    density: Annotated[float, Range(0.05, 1.0, limits=(0.0, 1.0))] = 0.1,
    lambda_: Annotated[float, Range(0.5, 2.5)] = 1.0,
    version: Literal["A", "B"] = "A",
    scope: Literal["tensor", "global"] = "tensor",
    clamp: Annotated[float, Range(0.0, 0.01, limits=(0.0, 0.499))] = 1e-4,
    sparsify_1d: bool = False,
) -> Tensor:
    """The base plus lambda sum_i w_i d_i s_i / sum_i s_i, with a score s_i in [0, 1] for each element.

    |d_i| is first clamped to its quantiles `clamp` and 1 - `clamp`; N scales a vector to [0, 1] (a constant one to
    0), K is the number of models. Within its model an element scores exp(K N(|d_i|)^2); between the models

        version A (the authors' main script):    tanh(d_i * sum_j d_j), d not clamped
        version B (their script for searches):   sum_j tanh(n_i n_j), n = sign(d) N(|d|); they clamp at 0.01

    Of the product b_i the share `density` above the quantile t = 1 - density is kept: s_i = N(max(b_i, t)). An element
    against the sum of the models scores below 0 and falls first, so sign conflicts are settled on the way. The
    smallest score always maps to 0: even at density 1 each model loses an element, and a vector whose scores are
    all equal (a scalar's) stays at the base. `weight` scales a model's values; it does not change who wins.

    Quantiles and scales are the tensor's, or with `scope: global`, as in the paper, the whole model's (which costs
    a few passes over all models, once per density and worker). Per tensor, 1-D tensors keep density 1 unless
    `sparsify_1d`. Scores are computed in float64 and their result is rounded once.

    Raises:
        CandidateFailure: for a density or clamp outside its limits.
    """
    if not (density >= 0.0 and 0.0 <= clamp < 0.5):
        raise CandidateFailure(
            f"pcb: density {density}, clamp {clamp} (tensor {x.name!r})",
            hint="a density is 0 or more, clamp from 0 to below 0.5",
            reason="bad_density",
        )
    factors = [w * lambda_ for w in x.each(weight)]
    if not any(factors) or density == 0.0:
        return x.reference
    if scope == "tensor" and x.reference.ndim < 2 and not sparsify_1d:
        density = 1.0
    marks = _marks(x, version, scope, min(density, 1.0), clamp)
    tau = torch.empty_like(x.deltas[0]).reshape(-1)
    start = 0
    for chunk in _chunks([x]):
        merged = _merged(chunk, marks, version, factors)
        tau[start : start + merged.numel()] = merged
        start += merged.numel()
    return tau.reshape(x.reference.shape).add_(x.wide_base)


@dataclass(frozen=True)
class _Marks:
    """What one model's scores are measured against: the range of |d|, the threshold and the top of b."""

    low: float
    high: float
    threshold: float
    top: float


def _marks(x: Inputs, version: str, scope: str, density: float, clamp: float) -> tuple[_Marks, ...]:
    """Measures the tensor or the whole model; another density needs no new look at the sizes."""

    def kept(kind: tuple[Hashable, ...], make: Callable[[], tuple[T, ...]]) -> tuple[T, ...]:
        return x.table(kind, make) if scope == "tensor" else x.family_table((*kind, len(x.experts)), make)

    def chunks() -> Iterator[list[Tensor]]:
        return _chunks([x] if scope == "tensor" else alike(x))

    def sizes() -> tuple[tuple[float, ...], ...]:
        return quantiles(lambda: ([d.abs() for d in chunk] for chunk in chunks()), (clamp, 1.0 - clamp))

    def marks() -> tuple[_Marks, ...]:
        ranges = kept(("pcb_sizes", clamp), sizes)
        cuts = quantiles(lambda: (_scores(chunk, ranges, version) for chunk in chunks()), (1.0 - density, 1.0))
        return tuple(_Marks(*size, *cut) for size, cut in zip(ranges, cuts, strict=True))

    return kept(("pcb", version, density, clamp), marks)


def _chunks(tensors: Iterable[Inputs]) -> Iterator[list[Tensor]]:
    """Yields the task vectors piece by piece: K float64 vectors, the same elements of each."""
    for y in tensors:
        flats = [delta.reshape(-1) for delta in y.deltas]
        for start in range(0, flats[0].numel(), CHUNK):
            yield [flat[start : start + CHUNK].double() for flat in flats]


def _scores(chunk: Sequence[Tensor], sizes: Sequence[tuple[float, ...]], version: str) -> list[Tensor]:
    """Returns b_i, one vector per model."""
    levels = [_scaled(d.abs().clamp_(*size), *size) for d, size in zip(chunk, sizes, strict=True)]
    if version == "A":
        total = _add_up(chunk)
        between = [torch.tanh(d * total) for d in chunk]
    else:
        signed = [d.sign() * level for d, level in zip(chunk, levels, strict=True)]
        between = [_add_up([torch.tanh(a * b) for b in signed]) for a in signed]
    return [level.square_().mul_(len(chunk)).exp_().mul_(rival) for level, rival in zip(levels, between, strict=True)]


def _merged(chunk: Sequence[Tensor], marks: Sequence[_Marks], version: str, factors: Sequence[float]) -> Tensor:
    """Returns sum_i factor_i d_i s_i / sum_i s_i for one piece, d_i clamped."""
    scores = _scores(chunk, [(mark.low, mark.high) for mark in marks], version)
    total, divisor = torch.zeros_like(chunk[0]), torch.zeros_like(chunk[0])
    for d, score, mark, factor in zip(chunk, scores, marks, factors, strict=True):
        share = _scaled(score.clamp_(min=mark.threshold), mark.threshold, mark.top)
        divisor.add_(share)
        total.add_(share.mul_(d.abs().clamp_(mark.low, mark.high).mul_(d.sign())).mul_(factor))
    return total.div_(divisor.clamp_(min=_TINY))


def _scaled(values: Tensor, low: float, high: float) -> Tensor:
    """Scales a temporary from [low, high] to [0, 1], in place; a constant one to 0, where NaN stays NaN."""
    return values.sub_(low).div_(high - low) if high > low else values.mul_(0.0)


def _add_up(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total.add_(vector)
    return total
