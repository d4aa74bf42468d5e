"""The spectral merge methods once more: plain numpy (and torch's own Adam), float64, straight from the text.

Nothing here is shared with the package. A model is a list of tensors; each function takes the task vectors of one
tensor, or of all tensors of a model where the method looks at the whole. `None` says: the text leaves this open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]
ZERO, MAX_CONDITION = 1e-10, 1e6


def mean(deltas: Sequence[Array], weight: Sequence[float]) -> Array:
    return sum((w * d for w, d in zip(weight, deltas, strict=True)), np.zeros_like(deltas[0])) / len(deltas)


def svd(a: Array, zero: float | None = None) -> tuple[Array, Array, Array]:
    """Full SVD, cut to the singular values above `zero` (default: 1e-10 of the largest)."""
    u, s, v = np.linalg.svd(a, full_matrices=True)
    k = sum(1 for value in s if value > (ZERO * s[0] if zero is None else zero))
    return u[:, :k], s[:k], v[:k]


def orthogonal(parts: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array] | None:
    u = np.concatenate([part[0] for part in parts], axis=1)
    v = np.concatenate([part[2] for part in parts], axis=0)
    s = np.concatenate([part[1] for part in parts])
    if not 0 < len(s) <= min(u.shape[0], v.shape[1]):
        return None
    if max(np.linalg.cond(u), np.linalg.cond(v)) > MAX_CONDITION:
        return None
    return scipy.linalg.polar(u)[0], s, scipy.linalg.polar(v)[0]


def tsv_m(
    deltas: Sequence[Array],
    weight: Sequence[float],
    rank: float = 1.0,
    ranks: Sequence[int] | None = None,
    otherwise: Sequence[float] | None = None,
) -> Array:
    d = deltas[0]
    if d.ndim != 2 or min(d.shape) < len(deltas):
        return mean(deltas, weight)
    equal = max(1, math.floor(rank * min(d.shape) / len(deltas)))
    parts = []
    for delta, w, k in zip(deltas, weight, ranks or [equal] * len(deltas), strict=True):
        u, s, v = svd(delta)
        parts.append((u[:, :k], w * s[:k], v[:k]))
    joined = orthogonal(parts)
    return mean(deltas, otherwise or weight) if joined is None else joined[0] @ np.diag(joined[1]) @ joined[2]


def r_tsvm(deltas: Sequence[Array], weight: Sequence[float], rank: float, outlier: float, kappa: float) -> Array:
    count, full = len(deltas), min(deltas[0].shape) if deltas[0].ndim == 2 else 0
    if full < count:
        return mean(deltas, weight)
    mass, dense = [], []
    for delta in deltas:
        size = np.abs(delta)
        far = size > size.mean() + 3 * size.std()
        mass.append(float(size[far].sum()))
        dense.append(float((size > 0.1 * size.mean()).mean()))
    share = [count * m / sum(mass) if sum(mass) > 0 else 1.0 for m in mass]
    scaled = [w * (1 + outlier * (a - 1)) for w, a in zip(weight, share, strict=True)]
    wanted = [(rank * full / count) * ((q / np.mean(dense)) ** kappa if max(dense) > 0 else 1.0) for q in dense]
    if sum(wanted) > full:
        wanted = [value * full / sum(wanted) for value in wanted]
    ranks = [max(1, math.floor(value + 1e-9)) for value in wanted]
    while sum(ranks) > full:
        ranks = [k - (k == max(ranks)) for k in ranks]
    return tsv_m(deltas, scaled, ranks=ranks, otherwise=weight)


def iso_c(deltas: Sequence[Array]) -> Array:
    if deltas[0].ndim != 2:
        return mean(deltas, [1.0] * len(deltas))
    u, s, v = svd(sum(deltas))
    return u @ v * (s.mean() if len(s) else 0.0)


def iso_cts(deltas: Sequence[Array], common: float) -> Array:
    total = sum(deltas)
    if deltas[0].ndim != 2:
        return mean(deltas, [1.0] * len(deltas))
    full = min(deltas[0].shape)
    own = math.floor((1 - common) * full / len(deltas) + 1e-9)
    if own == 0:
        return iso_c(deltas)
    u, s, v = svd(total)
    keep = full - own * len(deltas)
    parts = [(u[:, :keep], s[:keep], v[:keep])]
    for delta in deltas:
        outside = (np.eye(len(delta)) - u[:, :keep] @ u[:, :keep].T) @ delta
        a, b, c = svd(outside, zero=ZERO * float(np.linalg.norm(delta)))
        parts.append((a[:, :own], b[:own], c[:own]))
    joined = orthogonal(parts)
    return iso_c(deltas) if joined is None else joined[0] @ joined[2] * joined[1].mean()


def wudi(deltas: Sequence[Array], ridge: float) -> Array:
    """Least squares on stacked rows: ||d_i (tau - d_i)t|| / ||d_i|| for every i, and the pull towards the sum."""
    used = [d for d in deltas if np.any(d != 0)]
    if deltas[0].ndim != 2 or not used:
        return mean(deltas, [1.0] * len(deltas))
    total = sum(deltas)
    n = deltas[0].shape[1]
    pull = math.sqrt(ridge * len(used) / n)
    rows = [d / np.linalg.norm(d) for d in used]
    left = np.concatenate([*rows, pull * np.eye(n)])
    right = np.concatenate([*(row @ d.T for row, d in zip(rows, used, strict=True)), pull * total.T])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


def wudi_loss(tau: Array, deltas: Sequence[Array]) -> float:
    return sum(float(np.linalg.norm((tau - d) @ d.T) ** 2 / np.linalg.norm(d) ** 2) for d in deltas if np.any(d != 0))


def opcm(model: Sequence[Sequence[Array]], alpha: float) -> list[Array]:
    """The released loop, step by step, with full square bases and the running scale."""
    tau = [deltas[0].copy() for deltas in model]
    norms, scale = [norm([deltas[0] for deltas in model])], 1.0
    for t in range(1, len(model[0])):
        for j, deltas in enumerate(model):
            delta = deltas[t]
            if delta.ndim == 2 and np.any(tau[j] != 0):
                delta = _projected(delta, tau[j], alpha)
            tau[j] = scale * tau[j] + delta
        norms.append(norm([deltas[t] for deltas in model]))
        average = sum(norms) / len(norms)
        size = norm(tau)
        scale = size / average if average else 1.0
        tau = [one * (average / size if size else 1.0) for one in tau]
    return tau


def _projected(delta: Array, tau: Array, alpha: float) -> Array:
    u, s, v = np.linalg.svd(tau, full_matrices=True)
    running = np.cumsum(s) / np.sum(s)
    r = next(i for i, value in enumerate(running) if value > alpha)
    inside = u.T @ delta @ v.T
    for j, value in enumerate(s):
        if value > ZERO * s[0]:
            inside[j, j] = 0.0
    inside[:r, :r] = 0.0
    return u @ inside @ v


def norm(tensors: Sequence[Array]) -> float:
    return math.sqrt(sum(float(np.sum(tensor**2)) for tensor in tensors))


def doge_learn(
    deltas: Sequence[Array], eta: float, lr: float, subspace: float, steps: int, absolute: bool
) -> tuple[Array, list[float]]:
    """Delta by torch's Adam and autograd, and the scales l_i."""
    used = [d for d in deltas if np.any(d != 0)]
    scale = 1.0
    if not absolute:
        scale = math.sqrt(float(np.mean([np.mean(d**2) for d in used])))
        eta = eta * float(np.mean([np.linalg.norm(d / scale) for d in used]))
    unit = [torch.tensor(d / scale) for d in deltas]
    sizes = [float(torch.linalg.norm(d)) for d in unit]
    factors = [eta / size if size else 0.0 for size in sizes]
    full = min(deltas[0].shape)
    limit = max(1, full // len(deltas))
    parts = [svd(d)[0][:, :limit] for d in used]
    stacked = np.concatenate([u * (1 - 1e-6 * np.arange(u.shape[1]) / limit) for u in parts], axis=1)
    basis = torch.tensor(np.linalg.svd(stacked)[0][:, : math.floor(full / subspace)])
    correction = torch.zeros_like(unit[0], requires_grad=True)
    adam = torch.optim.Adam([correction], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for d in unit:
            merged = sum(f * (other + correction) for f, other in zip(factors, unit, strict=True))
            loss = loss + ((d * (d - merged)).sum(dim=1) ** 2).sum()
        loss.backward()
        gradient = correction.grad
        assert gradient is not None
        correction.grad = gradient - basis @ (basis.T @ gradient)
        adam.step()
    if absolute:
        return correction.detach().numpy(), factors
    return correction.detach().numpy() * scale, factors


def doge(
    model: Sequence[Sequence[Array]],
    weight: Sequence[float],
    keep: float,
    eta: float,
    lr: float,
    subspace: float,
    steps: int,
    absolute: bool,
) -> list[Array]:
    """All tensors given are matrices of the model; returns their merged task vectors."""
    learnt = [doge_learn(deltas, eta, lr, subspace, steps, absolute) for deltas in model]
    result = [np.zeros_like(deltas[0]) for deltas in model]
    for i, w in enumerate(weight):
        entries = [
            (-float(np.float32(abs(v))), j, at) for j, deltas in enumerate(model) for at, v in enumerate(deltas[i].flat)
        ]
        chosen = sorted(entries)[: max(1, math.floor(keep * len(entries)))]
        for size, j, at in chosen:
            if size != 0:
                delta, factors = learnt[j]
                result[j].flat[at] += w * factors[i] * (model[j][i].flat[at] + delta.flat[at])
    return result
