"""The merge methods once more: pure Python, float64, one element at a time, straight from the text.

Nothing here is shared with the package. Tensors are flat lists. `keep` holds one list of booleans
per expert (or None for "all") where a method drops at random.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

Vector = list[float]


def differences(base: Vector, experts: Sequence[Vector]) -> list[Vector]:
    return [[x - b for x, b in zip(expert, base, strict=True)] for expert in experts]


def linear(experts: Sequence[Vector], weight: Sequence[float], normalize: bool = True) -> Vector:
    divisor = math.fsum(weight) if normalize else 1.0
    return [
        math.fsum(w * expert[j] for w, expert in zip(weight, experts, strict=True)) / divisor
        for j in range(len(experts[0]))
    ]


def passthrough(model: Vector, scale: float, shift: float) -> Vector:
    return [scale * x + shift for x in model]


def slerp(a: Vector, b: Vector, t: float) -> Vector:
    def unit(v: Vector) -> Vector:
        norm = math.sqrt(math.fsum(x * x for x in v))
        return [x / norm for x in v] if norm > 1e-8 else v

    cosine = math.fsum(x * y for x, y in zip(unit(a), unit(b), strict=True))
    if abs(cosine) > 0.9995:
        return [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    angle = math.acos(cosine)
    p, q = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [p * x + q * y for x, y in zip(a, b, strict=True)]


def top(delta: Vector, density: float) -> list[bool]:
    """The k largest magnitudes, ties by lowest index, zeros never."""
    if density >= 1:
        return [x != 0 for x in delta]
    if density <= 0:
        return [False] * len(delta)
    k = max(1, math.floor(density * len(delta)))
    order = sorted(range(len(delta)), key=lambda j: (-abs(delta[j]), j))[:k]
    return [j in order and delta[j] != 0 for j in range(len(delta))]


def masked(delta: Vector, keep: Sequence[bool] | None, density: float, rescale: str) -> Vector:
    if density >= 1 or keep is None:
        return list(delta)
    kept = [x if k else 0.0 for x, k in zip(delta, keep, strict=True)]
    if rescale == "inv_prob" and density > 0:
        return [x / density for x in kept]
    before, after = math.fsum(map(abs, delta)), math.fsum(map(abs, kept))
    if rescale == "l1" and after > 0:
        return [x * before / after for x in kept]
    return kept


def add_up(
    base: Vector,
    deltas: Sequence[Vector],
    weight: Sequence[float],
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Vector:
    divisor = math.fsum(weight) if normalize else 1.0
    divisor = divisor if abs(divisor) >= 1e-8 else 1.0
    return [
        b + lambda_ * math.fsum(w * d[j] for w, d in zip(weight, deltas, strict=True)) / divisor
        for j, b in enumerate(base)
    ]


def elect(
    base: Vector,
    deltas: Sequence[Vector],
    weight: Sequence[float],
    lambda_: float = 1.0,
    normalize: bool = True,
    weighted: bool = True,
) -> Vector:
    result = []
    for j, b in enumerate(base):
        entries = [(w, d[j]) for w, d in zip(weight, deltas, strict=True) if w != 0]
        votes = [w * d if weighted else d for w, d in entries]
        positive = math.fsum(votes) >= 0
        agree = [(w, d) for (w, d), vote in zip(entries, votes, strict=True) if (vote > 0 if positive else vote < 0)]
        total = math.fsum(w * d for w, d in agree)
        divisor = math.fsum(w for w, _ in agree) if normalize else 1.0
        result.append(b + lambda_ * total / (divisor if abs(divisor) >= 1e-8 else 1.0))
    return result


def ties(
    base: Vector,
    experts: Sequence[Vector],
    weight: Sequence[float],
    density: Sequence[float],
    lambda_: float = 1.0,
    normalize: bool = True,
    rescale: str = "none",
    weighted: bool = True,
) -> Vector:
    deltas = [masked(d, top(d, rho), rho, rescale) for d, rho in zip(differences(base, experts), density, strict=True)]
    return elect(base, deltas, weight, lambda_, normalize, weighted)


def keep_mask(n: int, density: float, *, seed: int, tensor_name: str, stream: int, offset: int = 0) -> list[bool]:
    """The counter-based mask with plain Python integers."""
    key = []
    for text in (f"{seed}|{tensor_name}", f"{seed}|{tensor_name}|{stream}"):
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"evomerge mask").digest()
        key.append(int.from_bytes(digest[:4], "little"))
    key.append(int.from_bytes(digest[4:], "little"))
    word = 2**32

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % word
        h ^= h >> 13
        h = h * 0xC2B2AE35 % word
        return h ^ (h >> 16)

    result = []
    for i in range(offset, offset + n):
        h = mix(i % word ^ key[0])
        h = (h + key[1] + i // word * 0x9E3779B9) % word
        result.append(mix(h ^ key[2]) < math.floor(density * word))
    return result


def breadcrumbs(delta: Vector, density: float, gamma: float) -> Vector:
    """Without the floor(gamma n) largest, the next floor(density n); everything at density 1."""
    if density >= 1:
        return list(delta)
    if density <= 0:
        return [0.0] * len(delta)
    n = len(delta)
    keep = math.floor(density * n)
    top = min(math.floor(gamma * n), n - keep)
    order = sorted(range(n), key=lambda j: (-abs(delta[j]), j))[top : top + keep]
    return [x if j in order else 0.0 for j, x in enumerate(delta)]


def della(
    delta: Vector, row: int, density: float, epsilon: float, *, seed: int, tensor_name: str, stream: int
) -> Vector:
    """Keep probabilities by rank in the row, kept entries divided by them."""
    result = list(delta)
    for start in range(0, len(delta), row):
        places = sorted(range(start, start + row), key=lambda j: (abs(delta[j]), j))
        for rank, j in enumerate(places):
            u = rank / (row - 1) if row > 1 else 0.5
            q = (density - epsilon) + 2 * epsilon * u
            (kept,) = keep_mask(1, q, seed=seed, tensor_name=tensor_name, stream=stream, offset=j)
            result[j] = delta[j] / q if kept else 0.0
    return result


def sce(base: Vector, deltas: Sequence[Vector], share: float, sum_all: bool = False) -> Vector:
    k, n = len(deltas), len(base)
    variance = []
    for j in range(n):
        column = [d[j] for d in deltas]
        mean = math.fsum(column) / k
        value = math.fsum((x - mean) ** 2 for x in column) / k
        variance.append(0.0 if value <= 1e-12 * math.fsum(x * x for x in column) / k else value)
    varying = sum(v > 0 for v in variance)
    keep = [True] * n
    if share < 1 and varying:
        order = sorted(range(n), key=lambda j: (-variance[j], j))[: max(1, math.floor(share * varying))]
        keep = [j in order for j in range(n)]
    masked_ones = [[x if m else 0.0 for x, m in zip(d, keep, strict=True)] for d in deltas]
    squares = [math.fsum(x * x for x in d) for d in masked_ones]
    total = math.fsum(squares)
    weight = [s / total if total else 1 / k for s in squares]
    return elect(base, list(deltas) if sum_all else masked_ones, weight, weighted=False)
