"""Singular vectors of task vectors, computed once per worker: thin factors, stacked bases, isotropic sums.

All linear algebra runs in float64 and on one CPU thread. LAPACK's bits change with the number of threads, and a
recipe must give the same bits in every process; float64 keeps what a change of machine can still move far below
float32's last digit. A parent's factors stay in float64, since polar factors magnify their errors; what a candidate
reads (orthogonal bases, merged task vectors) is stored in float32, or in float64 for float64 models.

Only matrices inside the layers have a spectrum worth merging. Embeddings and heads are tables of one row per token, not
maps between two spaces, and their SVD is the most expensive of all: methods leave them out unless their parameter
`heads` is true. Tensors of any other number of dimensions (norms, biases, stacked experts) are left out always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods._inputs import Inputs
from evomerge.methods._sums import fixed_norm1
from evomerge.recipe import layer_index

ZERO_SHARE = 1e-10  # a singular value below this share of its matrix's largest is zero: its vectors are arbitrary
MAX_CONDITION = 1e6  # above it stacked bases share a direction, and their polar factor is not unique


@dataclass(frozen=True, eq=False)
class Factors:
    """A thin SVD without its zeros: `u` (m, k), `s` (k,) in descending order, `v` (k, n), so that a = u diag(s) v."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """The number of singular triplets kept."""
        return self.s.numel()

    def leading(self, k: int) -> Factors:
        """Returns the first k triplets, as views."""
        return Factors(self.u[:, :k], self.s[:k], self.v[:k])

    def copied(self) -> Factors:
        """Returns copies without the memory that views would keep alive."""
        return Factors(self.u.clone(), self.s.clone(), self.v.clone())


@dataclass(frozen=True, eq=False)
class Stack:
    """Orthogonal bases of all experts side by side, `counts[i]` columns each: `u` (m, r), `s` (r,), `v` (r, n)."""

    u: Tensor
    s: Tensor
    v: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Room:
    """What fits the tables' budget, in numbers: `r (m + n)` and `m n`, summed over the matrices up to and with each.

    Candidates visit all tensors in one order. Once their tables outgrow the budget, each would be dropped before its
    next use; so tensors beyond the budget are computed again for every candidate (the tables' report counts them as
    dropped) and the others are kept. Parents' SVDs, which only other ranks need, are kept if everything fits.
    """

    budget: float
    bases: dict[str, int]
    sizes: dict[str, int]
    parents: bool

    def stacks(self, x: Inputs) -> bool:
        """Whether to keep the tensor's stacked bases."""
        return self.bases.get(x.name, 0) * stored_bytes(x) <= self.budget

    def merged(self, x: Inputs) -> bool:
        """Whether to keep one tensor of the tensor's size."""
        return self.sizes.get(x.name, 0) * stored_bytes(x) <= self.budget


_SHARE = 0.95  # of the budget: the rest is for small tables


def _room(x: Inputs) -> _Room:
    def make() -> _Room:
        bases, sizes, wide = {}, {}, 0
        total = size = 0
        for y in x.every():
            shape = y.reference.shape
            if is_matrix(y, bool(y.parameters.get("heads", False))):
                total, size = total + min(shape) * sum(shape), size + shape[0] * shape[1]
                bases[y.name], sizes[y.name], wide = total, size, max(wide, stored_bytes(y))
        budget = _SHARE * x.tables.budget_bytes
        return _Room(budget, bases, sizes, total * (8 + wide) <= budget)

    return x.family_table(("spectral_room", bool(x.parameters.get("heads", False))), make)


def fits(x: Inputs) -> bool:
    """Whether a table of the tensor's own size is worth keeping."""
    return _room(x).merged(x)


def stored_bytes(x: Inputs) -> int:
    """Returns the bytes per number of what `stored` makes."""
    return torch.promote_types(x.dtype, torch.float32).itemsize


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch's CPU kernels on one thread inside the block: their bits depend on nothing else then."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_matrix(x: Inputs, heads: bool) -> bool:
    """Whether the tensor is a non-empty matrix inside the layers, or any non-empty matrix with `heads`."""
    shape = x.reference.shape
    return len(shape) == 2 and min(shape) > 0 and (heads or layer_index(x.name) is not None)


def is_sound(x: Inputs) -> bool:
    """Whether all task vectors are finite; LAPACK refuses others, and a NaN must reach the result instead."""
    return x.table("finite", lambda: all(bool(x.delta(i).isfinite().all()) for i in range(len(x.experts))))


def mean(x: Inputs, weights: Sequence[float], lambda_: float) -> Tensor:
    """Returns base + lambda / K sum_i w_i d_i over all K experts: what tensors without a spectrum get."""
    factors = [w / len(weights) * lambda_ for w in weights]
    active = [i for i, factor in enumerate(factors) if factor != 0.0]
    if not active:
        return x.reference
    if len(active) == 1 and factors[active[0]] == 1.0:
        return x.experts[active[0]]
    total = x.delta(active[0]).mul_(factors[active[0]])
    for i in active[1:]:
        total.add_(x.delta(i).mul_(factors[i]))
    return total.add_(x.wide_base)


def moved(x: Inputs, tau: Tensor, scale: float) -> Tensor:
    """Returns base + scale * tau, computed in float64 and rounded once."""
    return (tau.double() * scale).add_(x.wide_base).to(x.dtype)


def stored(x: Inputs, values: Tensor) -> Tensor:
    """Returns a table's float64 values rounded to what candidates read: float32, or wider if the model is."""
    return values.to(torch.promote_types(x.dtype, torch.float32))


def once(x: Inputs, kind: Hashable, make: Callable[[], Tensor | None]) -> Tensor | None:
    """Returns the merged task vector that `make` computes in float64, stored once per worker and `kind`."""

    def rounded() -> Tensor | None:
        values = make()
        return None if values is None else stored(x, values)

    return x.table(kind, rounded, keep=fits(x))


def thin_svd(a: Tensor, x: Inputs, zero: float | None = None) -> Factors:
    """Returns the thin SVD of a float64 matrix without the singular values of at most `zero`.

    `zero` defaults to ZERO_SHARE of the largest. A matrix of zeros gives k = 0.

    Raises:
        CandidateFailure: if LAPACK's iteration does not converge.
    """
    try:
        with one_thread():
            u, s, v = torch.linalg.svd(a, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CandidateFailure(
            f"the SVD of a {tuple(a.shape)} matrix of tensor {x.name!r} did not converge: {error}",
            hint="merge this tensor with another method, or check the checkpoint for extreme values",
            reason="svd_failed",
        ) from None
    floor = float(s[0]) * ZERO_SHARE if zero is None else zero
    return Factors(u, s, v).leading(int((s > floor).sum()))


def parent_svd(x: Inputs, i: int, limit: int) -> Factors:
    """Returns the `limit` leading triplets of expert i's task vector: one SVD per worker, shared by all methods."""

    def make() -> Factors:
        return thin_svd(x.delta(i).double(), x).leading(limit).copied()

    return x.table(("svd", limit), make, experts=(i,), keep=_room(x).parents)


def polar(a: Tensor, x: Inputs) -> tuple[Tensor, float]:
    """Returns P Qt of a = P D Qt (m, r), the nearest matrix with orthonormal columns, and a's condition number."""
    if a.shape[1] == 0:
        return a, 1.0
    factors = thin_svd(a, x, zero=0.0)
    if factors.rank < a.shape[1]:
        return a, math.inf
    with one_thread():
        return factors.u @ factors.v, float(factors.s[0] / factors.s[-1])


def stack(x: Inputs, ranks: tuple[int, ...], limit: int) -> Stack | None:
    """Returns the leading `ranks[i]` directions of every expert, orthogonalised together; once per worker.

    Experts without a change here (zero task vectors) take no part. None if the bases do not determine the result:
    no expert changes, an expert is not finite, or a condition number is above MAX_CONDITION.
    """

    def make() -> Stack | None:
        if not is_sound(x):
            return None
        parts = [parent_svd(x, i, limit).leading(rank) for i, rank in enumerate(ranks)]
        bases = stacked(x, parts)
        return None if bases is None else Stack(stored(x, bases.u), bases.s, stored(x, bases.v), bases.counts)

    return x.table(("stack", ranks, limit), make, keep=_room(x).stacks(x))


def stacked(x: Inputs, parts: Sequence[Factors]) -> Stack | None:
    """Orthogonalises bases side by side, in float64; None if they are empty, dependent, or too many for that."""
    total = sum(part.rank for part in parts)
    if not 0 < total <= min(x.reference.shape):
        return None
    u, condition = polar(torch.cat([part.u for part in parts], dim=1), x)
    v, other = polar(torch.cat([part.v for part in parts]).T, x)
    if max(condition, other) > MAX_CONDITION:
        return None
    counts = tuple(part.rank for part in parts)
    return Stack(u, torch.cat([part.s for part in parts]), v.T.contiguous(), counts)


def rebuilt(x: Inputs, bases: Stack, scales: Sequence[float]) -> Tensor:
    """Returns base + U diag(s_j * scales[i]) V, where column j is expert i's: one product, in float64, rounded once."""
    each = [scale for scale, count in zip(scales, bases.counts, strict=True) for _ in range(count)]
    factors = torch.tensor(each, dtype=torch.float64, device=bases.s.device)
    with one_thread():
        tau = (bases.u.double() * (bases.s * factors)) @ bases.v.double()
    return tau.add_(x.wide_base).to(x.dtype)


def square_norm(a: Tensor) -> float:
    """Returns the sum of squares in float64, in a fixed order."""
    squares = a.double().square()
    return fixed_norm1(squares)


def summed(x: Inputs) -> Tensor:
    """Returns the sum of the task vectors in float64."""
    total = x.delta(0).double()
    for i in range(1, len(x.experts)):
        total.add_(x.delta(i))
    return total


def isotropic(factors: Factors) -> Tensor:
    """Returns U V times the mean singular value: the same directions and nuclear norm, a flat spectrum."""
    if factors.rank == 0:
        return factors.u @ factors.v
    with one_thread():
        return (factors.u @ factors.v).mul_(float(factors.s.mean()))


def equal_rank(x: Inputs, share: float, heads: bool) -> int:
    """Returns the rank that every expert gets: `share` of min(m, n) / K, at least 1; 0 where there is no spectrum.

    Also 0 for matrices too small to give each expert a direction of its own.
    """
    count = len(x.experts)
    if not is_matrix(x, heads) or min(x.reference.shape) < count:
        return 0
    return max(1, math.floor(share * min(x.reference.shape) / count))
