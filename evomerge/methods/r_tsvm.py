"""R-TSVM (an interpretation): TSV-M with tasks weighed by their outliers and ranks by their density."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, PerExpert, Range, fixed_norm1, method
from evomerge.methods._spectral import equal_rank, mean, rebuilt, square_norm, stack

_SMALL = 0.1  # entries of at most this share of the mean magnitude do not count as changed


@dataclass(frozen=True)
class _Statistics:
    """Of one task vector: the L1 norm of its outliers, and the share of its entries that are not small."""

    outliers: float
    dense: float


@method("r_tsvm", source="interpretation of Yang et al. 2025 (Mix Data or Merge Models?), arXiv 2502.06876")
def r_tsvm(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.2)] = 1.0,
    lambda_: Annotated[float, Range(0.3, 2.0)] = 1.0,
    rank: Annotated[float, Range(0.2, 1.0, limits=(0.0, 1.0))] = 1.0,
    outlier: Annotated[float, Range(0.0, 1.0, limits=(0.0, 1.0))] = 1.0,
    kappa: Annotated[float, Range(0.0, 2.0, limits=(0.0, 10.0))] = 1.0,
    heads: bool = False,
) -> Tensor:
    """TSV-M with each task scaled by its outliers and given a rank by its density [proposal].

    The authors' code was not available: the abstract names outlier-aware task weights and sparsity-adaptive ranks, and
    these formulas are our reading of it, not the paper's. Per matrix (m, n), K experts, r = min(m, n):

    - O_i = {|d_i| > mu_i + 3 sigma_i}, with mu and sigma of |d_i| over the matrix; a_i = K sum_{O_i} |d_i| /
      sum_j sum_{O_j} |d_j|, of mean 1 (all 1 without outliers); singular values are scaled by 1 + outlier (a_i - 1);
    - q_i = the share of entries above 0.1 mu_i; k_i = max(1, floor(rank r / K (q_i / mean q)^kappa)), scaled
      down together where they sum to more than r;
    - then as TSV-M, with w_i on the singular values, and with its exceptions: see `tsv_m`.

    `outlier` 0 with `kappa` 0 is TSV-M. SVDs, statistics and polar factors depend on the models and on the ranks alone.
    """
    weights = x.each(weight)
    if lambda_ == 0.0 or not any(weights):
        return x.reference
    if equal_rank(x, 1.0, heads) == 0:
        return mean(x, weights, lambda_)
    found = [_statistics(x, i) for i in range(len(weights))]
    ranks = _ranks(found, rank, kappa, min(x.reference.shape))
    whole = len(weights) == 1 and ranks[0] == min(x.reference.shape)
    bases = None if whole else stack(x, ranks, _limit(ranks, min(x.reference.shape)))
    if bases is None:
        return mean(x, weights, lambda_)
    total = math.fsum(one.outliers for one in found)
    shares = [len(found) * one.outliers / total if total > 0.0 else 1.0 for one in found]
    return rebuilt(x, bases, [w * lambda_ * (1.0 + outlier * (a - 1.0)) for w, a in zip(weights, shares, strict=True)])


def _statistics(x: Inputs, i: int) -> _Statistics:
    def make() -> _Statistics:
        size = x.delta(i).abs_().double()
        count = size.numel()
        mu = fixed_norm1(size.clone()) / count
        deviation = size - mu
        sigma = math.sqrt(square_norm(deviation) / count)
        outliers = fixed_norm1(size * (size > mu + 3.0 * sigma))
        return _Statistics(outliers, int((size > _SMALL * mu).sum()) / count)

    return x.table("r_tsvm", make, experts=(i,))


def _limit(ranks: tuple[int, ...], full: int) -> int:
    """Returns how many triplets to keep of each SVD: few different values, so that other ranks find them again."""
    limit = full // len(ranks)
    while limit < max(ranks):
        limit *= 2
    return min(limit, full)


def _ranks(found: list[_Statistics], rank: float, kappa: float, full: int) -> tuple[int, ...]:
    """Returns k_i; the order of the experts does not count."""
    average = math.fsum(one.dense for one in found) / len(found)
    shares = [(one.dense / average) ** kappa if average > 0.0 else 1.0 for one in found]
    parts = [rank * full / len(found) * share for share in shares]
    crowd = max(1.0, math.fsum(parts) / full)
    ranks = [max(1, math.floor(part / crowd + 1e-9)) for part in parts]
    while sum(ranks) > full:  # the ones that were raised to 1 take from the largest
        largest = max(ranks)
        ranks = [k - 1 if k == largest else k for k in ranks]
    return tuple(ranks)
