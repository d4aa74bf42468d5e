"""The geometric merge methods once more: pure Python, float64, on explicit vectors, straight from the text.

Nothing here is shared with the package: no Gram matrices, no chunks. Tensors are flat lists; `parts` lists the
positions that form one vector each, so that one restatement does for whole tensors, rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = list[float]
Parts = list[list[int]]


def parts_of(shape: Sequence[int], axis: int | None) -> Parts:
    """The positions of each vector: all elements, or those along the first (0) or last (-1) axis."""
    n = math.prod(shape)
    if axis is None or len(shape) < 2:
        return [list(range(n))]
    if axis == -1:
        return [list(range(start, start + shape[-1])) for start in range(0, n, shape[-1])]
    stride = n // shape[0]
    return [list(range(start, n, stride)) for start in range(stride)]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def add(vectors: Sequence[Vector], factors: Sequence[float]) -> Vector:
    return [math.fsum(f * v[j] for f, v in zip(factors, vectors, strict=True)) for j in range(len(vectors[0]))]


def scale(v: Vector, factor: float) -> Vector:
    return [factor * x for x in v]


def minus(a: Vector, b: Vector | None) -> Vector:
    return list(a) if b is None else [x - y for x, y in zip(a, b, strict=True)]


def plus(a: Vector, b: Vector | None) -> Vector:
    return list(a) if b is None else [x + y for x, y in zip(a, b, strict=True)]


def per_part(parts: Parts, vectors: Sequence[Vector], merge: object) -> Vector:
    result = [0.0] * len(vectors[0])
    for part in parts:
        merged = merge([[v[j] for j in part] for v in vectors])  # type: ignore[operator]
        for j, value in zip(part, merged, strict=True):
            result[j] = value
    return result


def nuslerp(base: Vector | None, experts: Sequence[Vector], weight: Sequence[float], parts: Parts) -> Vector:
    total = weight[0] + weight[1]
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5

    def arc(pair: list[Vector]) -> Vector:
        a, b = pair
        units = [scale(v, 1 / norm(v)) if norm(v) > 0 else v for v in pair]
        angle = math.acos(max(-1.0, min(1.0, dot(*units))))
        sine = math.sin(angle)
        if sine < 1e-6 or (sine < 1e-3 and angle > 1.5):
            return add([a, b], [1 - t, t])
        return add([a, b], [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine])

    return plus(per_part(parts, [minus(expert, base) for expert in experts], arc), base)


def multislerp(
    base: Vector | None, experts: Sequence[Vector], weight: Sequence[float], normalize: bool = True
) -> Vector | None:
    """With the tangent step that the package leaves out; None where the directions of 3 or more cancel."""
    if len(experts) == 1:
        return list(experts[0])
    total = math.fsum(weight) if normalize else 1.0
    chosen = [(w / total, minus(expert, base)) for w, expert in zip(weight, experts, strict=True) if w != 0]
    if not chosen:
        return plus([0.0] * len(experts[0]), base)
    shares, points = [w for w, _ in chosen], [y for _, y in chosen]
    lengths = [norm(y) for y in points]
    units = [scale(y, 1 / n) if n > 0 else y for y, n in zip(points, lengths, strict=True)]
    mean = add(units, shares)
    if norm(mean) < 1e-7 * math.fsum(map(abs, shares)):
        if len(points) > 2 and any(lengths):
            return None
        return plus(add(points, shares), base)
    mean = scale(mean, 1 / norm(mean))
    tangent = add([add([u, mean], [1.0, -dot(u, mean)]) for u in units], shares)
    far = norm(tangent) + 1e-8
    moved = add([mean, tangent], [math.cos(far), math.sin(far) / far])
    return plus(scale(moved, dot(shares, lengths)), base)


def karcher(points: Sequence[Vector], weight: Sequence[float], max_iter: int = 10, tol: float = 1e-5) -> Vector:
    total = math.fsum(weight)
    length = math.fsum(w * norm(v) for w, v in zip(weight, points, strict=True)) / total
    kept = [(w, scale(v, 1 / norm(v))) for w, v in zip(weight, points, strict=True) if w > 0 and norm(v) > 0]
    if not kept:
        return [0.0] * len(points[0])
    total = math.fsum(w for w, _ in kept)
    shares, units = [w / total for w, _ in kept], [u for _, u in kept]
    mean = add(units, shares)
    mean = units[0] if norm(mean) < tol else scale(mean, 1 / norm(mean))
    for _ in range(max_iter):
        step = [0.0] * len(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = max(-1.0, min(1.0, dot(mean, unit)))
            angle = math.acos(cosine)
            if tol <= angle <= math.pi - 1e-6:
                step = add([step, unit, mean], [1.0, *(f * share * angle / math.sin(angle) for f in (1, -cosine))])
        if norm(step) < tol:
            break
        mean = add([mean, step], [math.cos(norm(step)), math.sin(norm(step)) / norm(step)])
        mean = scale(mean, 1 / norm(mean))
    return scale(mean, length)


def stock_ratio(deltas: Sequence[Vector]) -> float:
    n, cosines = len(deltas), []
    for i in range(n):
        for j in range(i):
            if norm(deltas[i]) > 0 and norm(deltas[j]) > 0:
                cosine = dot(deltas[i], deltas[j]) / (norm(deltas[i]) * norm(deltas[j]))
                cosines.append(max(-1.0, min(1.0, cosine)))
    if not cosines:
        return 0.0
    mean = math.fsum(cosines) / len(cosines)
    divisor = 1 + (n - 1) * mean
    return n * mean / divisor if divisor > 1e-9 else 0.0


def model_stock(base: Vector, experts: Sequence[Vector], parts: Parts) -> Vector:
    def between(vectors: list[Vector]) -> Vector:
        start, *others = vectors
        t = stock_ratio([minus(v, start) for v in others])
        return add([start, *others], [1 - t, *([t / len(others)] * len(others))])

    return per_part(parts, [base, *experts], between)


def nearswap(base: Vector, expert: Vector, t: float, floor: float = 0.0) -> Vector:
    result = []
    for b, x in zip(base, expert, strict=True):
        far = max(abs(x - b), floor)
        share = 1.0 if far <= t else t / far
        result.append(share * x + (1 - share) * b)
    return result


def importances(base: Vector, expert: Vector, parts: Parts) -> Vector:
    def softmax(values: Vector) -> Vector:
        powers = [math.exp(value - max(values)) for value in values]
        return [power / math.fsum(powers) + 1e-8 for power in powers]

    def row(pair: list[Vector]) -> Vector:
        q, p = map(softmax, pair)
        divergence = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return [abs(x - b) * divergence for b, x in zip(*pair, strict=True)]

    return per_part(parts, [base, expert], row)


def fusion_threshold(importance: Vector, factor: float = 1.5) -> float:
    ranked, last = sorted(importance), len(importance) - 1
    low, middle, high = (ranked[math.floor(f * last)] for f in (0.25, 0.5, 0.75))
    return middle + factor * (high - low)


def ram(base: Vector, experts: Sequence[Vector], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Vector:
    deltas = [minus(expert, base) for expert in experts]
    made = [[abs(d) > epsilon for d in delta] for delta in deltas]
    count = [sum(mask[j] for mask in made) for j in range(len(base))]
    scales = []
    for mask in made:
        shared = sum(m and c > 1 for m, c in zip(mask, count, strict=True))
        unique = sum(m and c == 1 for m, c in zip(mask, count, strict=True))
        scales.append(1 + r * min(max(shared / max(unique, epsilon, 1e-300), 0.0), alpha))
    result = []
    for j, b in enumerate(base):
        changes = [(s, d[j]) for s, d, mask in zip(scales, deltas, made, strict=True) if mask[j]]
        if len(changes) == 1:
            b += changes[0][0] * changes[0][1]
        elif changes:
            b += math.fsum(d for _, d in changes) / len(changes)
        result.append(b)
    return result
