"""The methods with statistics once more: pure Python, float64, one element at a time, straight from the formulas.

Nothing here is shared with the package. Tensors are flat lists, matrices lists of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Vector = list[float]
Matrix = list[Vector]


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def rescaled(values: Vector) -> Vector:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def pcb(deltas: Sequence[Vector], scales: Sequence[float], density: float, clamp: float, version: str) -> Vector:
    k, n = len(deltas), len(deltas[0])
    limits = [(quantile([abs(v) for v in d], clamp), quantile([abs(v) for v in d], 1 - clamp)) for d in deltas]
    sizes = [[min(max(abs(v), low), high) for v in d] for d, (low, high) in zip(deltas, limits, strict=True)]
    signs = [[(v > 0) - (v < 0) for v in d] for d in deltas]
    levels = [rescaled(s) for s in sizes]
    shares = []
    for i in range(k):
        scores = []
        for j in range(n):
            if version == "A":
                between = math.tanh(deltas[i][j] * math.fsum(d[j] for d in deltas))
            else:
                mine = signs[i][j] * levels[i][j]
                between = math.fsum(math.tanh(mine * signs[e][j] * levels[e][j]) for e in range(k))
            scores.append(math.exp(k * levels[i][j] ** 2) * between)
        threshold = quantile(scores, 1 - density)
        shares.append(rescaled([max(score, threshold) for score in scores]))
    result = []
    for j in range(n):
        total = math.fsum(scales[i] * signs[i][j] * sizes[i][j] * shares[i][j] for i in range(k))
        result.append(total / max(math.fsum(s[j] for s in shares), 1e-12))
    return result


def varm_shares(squares: Sequence[float], temperature: float = 1.0) -> Vector:
    if math.fsum(squares) == 0:
        return [1 / len(squares)] * len(squares)
    powers = [s ** (1 / temperature) for s in squares]
    return [p / math.fsum(powers) for p in powers]


def varm(deltas: Sequence[Vector], temperature: float = 1.0, by_element: bool = False) -> Vector:
    n = len(deltas[0])
    whole = varm_shares([math.fsum(v * v for v in d) / max(n, 1) for d in deltas], temperature)
    result = []
    for j in range(n):
        weights = varm_shares([d[j] ** 2 for d in deltas], temperature) if by_element else whole
        result.append(math.fsum(w * d[j] for w, d in zip(weights, deltas, strict=True)))
    return result


def tall_mask(delta: Vector, vector: Vector, limit: float) -> list[bool]:
    return [abs(d) > limit * abs(v - d) for d, v in zip(delta, vector, strict=True)]


def consensus(
    deltas: Sequence[Vector], vector: Vector, limits: Sequence[float], k: float, votes: Sequence[float]
) -> Vector:
    """`deltas` are weighted already, `vector` is what they are merged to."""
    masks = [tall_mask(d, vector, limit) for d, limit in zip(deltas, limits, strict=True)]
    counts = [math.fsum(vote for vote, m in zip(votes, masks, strict=True) if m[j]) for j in range(len(vector))]
    return [v if count >= k else 0.0 for v, count in zip(vector, counts, strict=True)]


def places(values: Sequence[object]) -> list[int]:
    """The place of each value in ascending order, equal ones from left to right."""
    order = sorted(range(len(values)), key=lambda j: values[j])  # type: ignore[arg-type,return-value]
    return [order.index(j) for j in range(len(values))]


def widen_weights(ranks: Sequence[list[int]], ratio: float, calibration: float) -> list[Vector]:
    """From one list of places per model to one list of scores per model."""
    n = len(ranks[0])
    result = []
    for mine in ranks:
        mean = Fraction(sum(mine), n * n)
        scores = []
        for j in range(n):
            score = math.exp(mine[j] / n) / math.fsum(math.exp(r[j] / n) for r in ranks)
            scores.append(calibration if Fraction(mine[j], n) > Fraction(ratio) * mean else score)
        result.append(scores)
    return result


def widen_vector(base: Vector, experts: Sequence[Vector], ratio: float, calibration: float) -> Vector:
    deltas = [[e - b for e, b in zip(expert, base, strict=True)] for expert in experts]
    weights = widen_weights([places([abs(v) for v in d]) for d in deltas], ratio, calibration)
    return [math.fsum(w[j] * d[j] for w, d in zip(weights, deltas, strict=True)) for j in range(len(base))]


def widen_matrix(base: Matrix, experts: Sequence[Matrix], ratio: float, calibration: float) -> Matrix:
    """The merged task vector; columns as they are written, so transpose an embedding first."""
    columns = list(zip(*base, strict=True))
    lengths, turns = [], []
    for expert in experts:
        longer, turned = [], []
        for before, after in zip(columns, zip(*expert, strict=True), strict=True):
            norm2, other2 = math.fsum(v * v for v in before), math.fsum(v * v for v in after)
            longer.append(abs(math.sqrt(other2) - math.sqrt(norm2)))
            dot = Fraction(math.fsum(u * v for u, v in zip(before, after, strict=True)))
            square = Fraction(norm2) * Fraction(other2)  # 1 - cos grows as cos |cos| falls
            turned.append(-dot * abs(dot) / square if square else Fraction(-1))
        lengths.append(places(longer))
        turns.append(places(turned))
    by_length = widen_weights(lengths, ratio, calibration)
    by_turn = widen_weights(turns, ratio, calibration)
    weights = [[(a + b) / 2 for a, b in zip(p, q, strict=True)] for p, q in zip(by_length, by_turn, strict=True)]
    return [
        [
            math.fsum(w[j] * (expert[i][j] - base[i][j]) for w, expert in zip(weights, experts, strict=True))
            for j in range(len(columns))
        ]
        for i in range(len(base))
    ]


def outer_share(layer: int, n_layers: int, bottom: int, top: int, transition: int) -> Fraction:
    """Layer swapping: every block's share written out from both ends."""
    shares = [Fraction(0)] * n_layers
    for ends, width in ((range(n_layers), bottom), (range(n_layers - 1, -1, -1), top)):
        if width == 0:
            continue
        line = [Fraction(1)] * width + [Fraction(transition + 1 - j, transition + 1) for j in range(1, transition + 1)]
        for block, share in zip(ends, line, strict=False):
            shares[block] = max(shares[block], share)
    return shares[layer]


def metric_weights(metrics: Sequence[float], p: float, by: str) -> Vector:
    raw = [(1 / m) ** p if by == "loss" else m**p for m in metrics]
    return [r / math.fsum(raw) for r in raw]


def norm1(values: Sequence[float]) -> float:
    return math.fsum(abs(v) for v in values)
