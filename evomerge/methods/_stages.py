"""Task vectors in stages: sparsify, select, weight, combine, scale. What the task-arithmetic family is made of.

Each method of the family fills in a `Stages`; `combine` runs it: in one compiled pass on a CPU (`_fused`), with torch
operations elsewhere, to the same bits, or as mergekit rounds it (`_mergekit`). Every sum and product is a float32
operation of its own: a fused multiply-add is used or not depending on an element's place, and would let bits depend
on the chunking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import _fused
from evomerge.methods._fused import Cut
from evomerge.methods._inputs import Inputs
from evomerge.methods._masks import hash_bits, stream_keys, tensor_key
from evomerge.methods._select import global_cut, magnitude_cuts, torch_variance, variance_cut
from evomerge.methods._sparsify import Sparsify, probability_line, torch_ranks
from evomerge.methods._sums import fixed_dot, fixed_norm1

TINY = 1e-8  # a divisor below this in size is replaced by 1

Election = Literal["none", "weighted", "unweighted"]


@dataclass(frozen=True)
class Stages:
    """A merge of K task vectors: base + lambda * tau.

    Attributes:
        weights: K factors.
        sparsify: how each task vector is made sparse, K entries.
        rescale: what makes up for dropped entries: "inv_prob" divides by the probability of being kept, "l1" and
            "l2" restore that norm of the task vector, "none" does nothing.
        election: whose sum elects a sign per element ("none": no election, tau is the weighted sum); a sum of
            exactly zero elects +. Only entries of the elected sign count; zeros never do.
        normalize: divides by the weights that took part (1 if they sum to less than 1e-8 in size).
        lambda_: scales the merged task vector.
        select: keeps the elements with the largest variance over the experts, this share of the non-zero ones,
            for all experts alike; None keeps all.
        weights_only: uses that selection for `energy_weights` alone.
        agree: keeps of tau only the elements that at least this many experts find important: |d_i| > importance *
            |tau - d_i| (Consensus with TALL masks, before lambda); 0 keeps all.
        importance: that threshold.
        energy_weights: multiplies each weight by its share of the selected squares, mean((M d_i)^2): SCE's weights.
    """

    weights: tuple[float, ...]
    sparsify: tuple[Sparsify, ...]
    rescale: str = "none"
    election: Election = "none"
    normalize: bool = False
    lambda_: float = 1.0
    select: float | None = None
    weights_only: bool = False
    agree: int = 0
    importance: float = 0.4
    energy_weights: bool = False


def combine(x: Inputs, stages: Stages) -> Tensor:
    """Returns the merged tensor.

    Raises:
        CandidateFailure: for parameters that this tensor cannot have.
    """
    for i, how in enumerate(stages.sparsify):
        how.check(x, i)
    if not x.paper:
        from evomerge.methods._mergekit import combine_like_mergekit

        return combine_like_mergekit(x, stages)
    stages = replace(stages, sparsify=tuple(how.for_tensor(x) for how in stages.sparsify))
    copy = _identity(x, stages)
    if copy is not None:
        return copy
    cut = _selection(x, stages)
    stages = _with_energies(x, stages, cut)
    cut = None if stages.weights_only else cut
    weights, election = stages.weights, stages.election != "none"
    active = [i for i, w in enumerate(weights) if w != 0.0 and stages.sparsify[i].density > 0.0]
    if not active:
        return x.reference
    restored = [_restored(x, stages, i) for i in active]
    chosen = [weights[i] for i in active]
    if election:
        scale, lambda_ = 1.0, stages.lambda_
    else:  # one scalar, folded into the weights
        divisor = sum(weights) if stages.normalize else 1.0
        scale, lambda_ = 1.0 / (divisor if abs(divisor) >= TINY else 1.0), stages.lambda_
        if not stages.agree:  # a filter looks at tau before it is scaled
            scale, lambda_ = scale * lambda_, 1.0
    by_weight = stages.election != "unweighted"
    votes = [(w * scale if by_weight else 1.0) * r for w, r in zip(chosen, restored, strict=True)]
    factors = [1.0 if by_weight else w for w in chosen]
    run = _fused_sweep if _fused.usable(x) and _has_loop(x, stages, active) else _torch_sweep
    return run(x, stages, active, votes, factors, chosen, election, lambda_, cut)


def _identity(x: Inputs, stages: Stages) -> Tensor | None:
    """Returns the base or the one expert that the merge is a copy of, or None."""
    active = [i for i, w in enumerate(stages.weights) if w != 0.0 and stages.sparsify[i].density > 0.0]
    if not active or stages.lambda_ == 0.0:
        return x.reference
    if (
        len(active) > 1
        or stages.agree
        or not stages.sparsify[active[0]].dense
        or (stages.select is not None and len(x.experts) > 1)
    ):
        return None
    weight = 1.0 if stages.energy_weights else stages.weights[active[0]]
    total = sum(stages.weights) if stages.election == "none" else weight
    if stages.normalize and abs(total) >= TINY:
        weight /= total
    return x.experts[active[0]] if weight * stages.lambda_ == 1.0 else None


def _selection(x: Inputs, stages: Stages) -> Cut | None:
    """Returns the cut of the variance; None keeps all: a share of 1, or experts that agree everywhere."""
    if stages.select is None or stages.select >= 1.0:
        return None
    cut = variance_cut(x, stages.select)
    return None if cut.size == 0.0 else cut


def _with_energies(x: Inputs, stages: Stages, cut: Cut | None) -> Stages:
    if not stages.energy_weights:
        return stages

    def make() -> list[float]:
        limit = cut or _fused.KEEP_ALL
        if _fused.usable(x):
            return _fused.energies(x, cut is not None, limit.size, limit.place)
        keep = limit.mask(torch_variance(x).float()) if cut is not None else None
        kept = [x.deltas[i] if keep is None else x.delta(i).mul_(keep) for i in range(len(x.experts))]
        return [fixed_dot(d, d) for d in kept]

    squares = x.table(("energies", stages.select, cut), make)
    total = sum(squares)
    k = len(squares)
    shares = [value / total if total > 0.0 else 1.0 / k for value in squares]
    return replace(stages, weights=tuple(w * share for w, share in zip(stages.weights, shares, strict=True)))


def _restored(x: Inputs, stages: Stages, i: int) -> float:
    """Returns the scalar that makes up for what is dropped of expert i (1 where it differs by element)."""
    how = stages.sparsify[i]
    if how.dense or stages.rescale == "none":
        return 1.0
    if stages.rescale == "inv_prob":
        return 1.0 if how.kind == "ranked" else 1.0 / how.density
    delta = x.delta(i)
    norm = fixed_norm1 if stages.rescale == "l1" else (lambda t: math.sqrt(fixed_dot(t, t)))
    before = x.table(("norm", stages.rescale), lambda: norm(delta), experts=[i])
    after = norm(delta.mul_(_kept(x, stages, i)))
    return before / after if after > 0.0 else 1.0


def _kept(x: Inputs, stages: Stages, i: int) -> Tensor:
    """Returns what multiplies task vector i, elementwise: 0, 1, or 1/q where the probability q differs by element."""
    how = stages.sparsify[i]
    injected = x.keep(i) if x.keep is not None else None
    if injected is not None:
        return injected
    if how.kind in ("magnitude", "outliers"):
        low, high = _cuts(x, stages, i)
        if how.by_row:
            return how.row_mask(torch_ranks(x, i), x.reference.shape)
        size = x.delta(i).abs_().float()
        return low.mask(size) & ~high.mask(size)
    bits = hash_bits(0, x.reference.numel(), x.seed, x.name, x.streams[i], x.reference.device)
    bits = bits.reshape(x.reference.shape)
    if how.kind == "random":
        return bits < math.floor(how.density * 2**32)
    lowest, step = probability_line(how, x.reference.shape)
    q = torch_ranks(x, i).float().mul_(step).add_(lowest)
    kept = (bits >> 8).float() < q * 2.0**24
    return kept / q if stages.rescale == "inv_prob" else kept


def _cuts(x: Inputs, stages: Stages, i: int) -> tuple[Cut, Cut]:
    """Returns what task vector i keeps, and what of that are outliers to drop."""
    counts = [how.counts(x.reference.numel()) for how in stages.sparsify]
    how = stages.sparsify[i]
    if how.dense:
        return _fused.KEEP_ALL, _fused.KEEP_NONE
    if how.scope == "global":
        return global_cut(x, i, how.density, with_1d=how.sparsify_1d), _fused.KEEP_NONE
    low = magnitude_cuts(x, [None if s.dense else kept for s, (kept, _) in zip(stages.sparsify, counts, strict=True)])
    high = magnitude_cuts(x, [0 if s.dense else top for s, (_, top) in zip(stages.sparsify, counts, strict=True)])
    return low[i], high[i]


def _has_loop(x: Inputs, stages: Stages, active: Sequence[int]) -> bool:
    """Whether the compiled sweep knows these stages: no filter, not by row, and ranks that fit 16 bits."""
    ranked = any(stages.sparsify[i].kind == "ranked" for i in active)
    row = x.reference.shape[-1] if x.reference.ndim else 1
    return not (stages.agree or any(stages.sparsify[i].by_row for i in active) or (ranked and row > 1 << 16))


def _take(x: Inputs, stages: Stages, i: int) -> _fused.Take:
    how = stages.sparsify[i]
    if how.dense:
        return _fused.Take(i)
    if how.kind in ("magnitude", "outliers"):
        low, high = _cuts(x, stages, i)
        return _fused.Take(i, _fused.WINDOW, low, high)
    keys = stream_keys(x.seed, x.name, x.streams[i])
    if how.kind == "random":
        limit = math.floor(how.density * 2**32)
        if limit == 0:  # a density below 2^-32
            return _fused.Take(i, _fused.WINDOW, _fused.KEEP_NONE)
        return _fused.Take(i, _fused.HASHED, keys=keys, upto=limit - 1)
    ranks = x.table("row ranks", lambda: _fused.row_ranks(x, i), experts=[i])
    lowest, step = probability_line(how, x.reference.shape)
    return _fused.Take(i, _fused.RANKED, keys=keys, ranks=ranks, lowest=lowest, step=step)


def _fused_sweep(
    x: Inputs, stages: Stages, active: list[int], votes: list[float], factors: list[float], weights: list[float],
    election: bool, lambda_: float, cut: Cut | None,
) -> Tensor:  # fmt: skip
    takes = {i: _take(x, stages, i) for i in active}
    if cut is not None:  # the variance is over all experts, so all take part in the pass
        spread = {i: (v, f, w) for i, v, f, w in zip(active, votes, factors, weights, strict=True)}
        active = list(range(len(x.experts)))
        votes, factors, weights = (
            [spread.get(i, (0.0, 1.0, 0.0))[column] for i in active] for column in range(3)
        )  # fmt: skip
    return _fused.sweep(
        x,
        [takes.get(i) or _fused.Take(i) for i in active],
        votes=votes,
        factors=factors,
        weights=weights,
        elect=election,
        normalize=stages.normalize,
        lambda_=lambda_,
        key=tensor_key(x.seed, x.name),
        whole=stages.rescale != "inv_prob",
        selected=cut is not None,
        cut=cut.size if cut else 0.0,
        place=cut.place if cut else 0,
    )


def _torch_sweep(
    x: Inputs, stages: Stages, active: list[int], votes: list[float], factors: list[float], weights: list[float],
    election: bool, lambda_: float, cut: Cut | None,
) -> Tensor:  # fmt: skip
    """The same additions and products, in the same order, as `_kernels.sweep`."""
    selected = cut.mask(torch_variance(x).float()) if cut is not None else None
    total = torch.zeros_like(x.wide_base)
    cast: list[Tensor] = []
    for i, vote in zip(active, votes, strict=True):
        d = x.delta(i)
        if selected is not None:
            d.mul_(selected)
        if not stages.sparsify[i].dense:
            d.mul_(_kept(x, stages, i))
        total.add_(d.mul_(vote))
        cast.append(d)
    if not election:
        return _filtered(x, stages, total).mul_(lambda_).add_(x.wide_base)
    elected = torch.where(total >= 0.0, 1.0, -1.0).to(total.dtype)
    unseen = total.mul_(0.0)  # holds the NaN of any dropped entry
    size, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for d, factor, weight in zip(cast, factors, weights, strict=True):
        agrees = d.mul_(elected) > 0.0
        size.add_(torch.where(agrees, d, 0.0).mul_(factor))
        divisor.add_(agrees.to(total.dtype).mul_(weight))
    if stages.normalize:
        size.div_(divisor.masked_fill_(divisor.abs() < TINY, 1.0))
    return _filtered(x, stages, size.mul_(elected).add_(unseen)).mul_(lambda_).add_(x.wide_base)


def _filtered(x: Inputs, stages: Stages, tau: Tensor) -> Tensor:
    """Zeroes, in place, what too few experts find important (Wang et al. 2024, arXiv 2405.07813)."""
    if not stages.agree:
        return tau
    count = torch.zeros_like(tau)
    for i in range(len(x.experts)):
        count.add_(x.deltas[i].abs() > (tau - x.deltas[i]).abs_().mul_(stages.importance))
    return tau.mul_(count >= stages.agree)


def weights_of(x: Inputs, weight: float | Sequence[float]) -> tuple[float, ...]:
    """Returns one finite weight per expert.

    Raises:
        CandidateFailure: for a weight that is not a number.
    """
    weights = x.each(weight)
    if not all(math.isfinite(w) for w in weights):
        raise CandidateFailure(f"weights {list(weights)} of tensor {x.name!r}: not finite", reason="bad_weight")
    return weights


def weighted_sum(x: Inputs, weights: Sequence[float], *, lambda_: float = 1.0, normalize: bool = False) -> Tensor:
    """Returns base + lambda * sum_i w_i d_i, divided by sum_i w_i when `normalize`: the plainest merge."""
    dense = (Sparsify(),) * len(x.experts)
    return combine(x, Stages(tuple(weights), dense, normalize=normalize, lambda_=lambda_))
