"""TSV-M: every task keeps its leading singular directions, made orthogonal to the others'."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from evomerge.methods import Inputs, PerExpert, Range, method
from evomerge.methods._spectral import equal_rank, mean, rebuilt, stack


@method("tsv_m", source="Gargiulo et al. 2025 (Task Singular Vectors), arXiv 2412.00081")
def tsv_m(
    x: Inputs,
    *,
    weight: Annotated[PerExpert, Range(0.0, 1.2)] = 1.0,
    lambda_: Annotated[float, Range(0.3, 2.0)] = 1.0,
    rank: Annotated[float, Range(0.2, 1.0, limits=(0.0, 1.0))] = 1.0,
    heads: bool = False,
) -> Tensor:
    """Keeps each task vector's leading singular directions and decorrelates them across tasks.

    Per matrix (m, n) and K experts: d_i = U_i S_i Vt_i, cut to the k = max(1, floor(rank * min(m, n) / K)) leading
    triplets; U = [U_1 ... U_K] = P D Qt is replaced by its polar factor P Qt, likewise V; tau = U diag(w_i S_i) Vt and
    the result is base + lambda tau. `rank` is the share of the equal part min(m, n) / K that each expert gets: above
    1 the columns could not be orthogonal. A weight scales an expert's singular values only: at weight 0 its directions
    still count against the others', so the result is continuous there. The norm of tau is that of the kept values.

    SVDs and polar factors depend on the models and `rank` alone; other candidates cost one product per matrix.

    Everything else gets the mean lambda / K sum_i w_i d_i: tensors that are not matrices, embeddings and heads unless
    `heads`, matrices with min(m, n) < K, and matrices whose stacked bases have a condition number above 1e6. The
    last is so for duplicated experts: forced apart, their directions would be arbitrary; merge near-duplicates first.
    Zero task vectors, and singular values below 1e-10 of the largest, take no part. One expert is returned as it is.
    """
    weights = x.each(weight)
    if lambda_ == 0.0 or not any(weights):
        return x.reference
    k = equal_rank(x, rank, heads)
    whole = len(weights) == 1 and k == min(x.reference.shape, default=0)
    bases = None if k == 0 or whole else stack(x, (k,) * len(weights), equal_rank(x, 1.0, heads))
    if bases is None:
        return mean(x, weights, lambda_)
    return rebuilt(x, bases, [w * lambda_ for w in weights])
