"""Non-dominated sets, hypervolume, confidence of membership, statistical separation, picking one point of a front.

Every value is larger-is-better. Arrays of values are `(n, m)`: n candidates, m objectives. Rows with a NaN (failed
candidates) are never on a front and add no volume. Pure numpy and scipy; nothing here knows recipes or studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

FEW_POINTS = 24  # of a front in four or more dimensions: up to so many, the exact hypervolume takes below 0.1 s
SAMPLES = 20_000


def _matrix(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"values must be (candidates, objectives), got the shape {array.shape}")
    return array


def non_dominated(values: ArrayLike) -> Mask:
    """Return the mask `(n,)` of the rows that no other row dominates.

    A row dominates another if it is nowhere smaller and somewhere larger. Exact duplicates do not dominate each
    other: all of them are kept. Rows with a NaN are never on the front and dominate nothing.
    Time O(n * front * m), and O(n log n) for two objectives; memory O(n * m).
    """
    array = _matrix(values)
    mask = np.zeros(len(array), dtype=np.bool_)
    alive = np.flatnonzero(~np.isnan(array).any(axis=1))
    # In descending lexicographic order nobody is dominated by a later row: the head is always on the front.
    alive = alive[np.lexsort(-array[alive].T[::-1])]
    if array.shape[1] == 2 and len(alive):
        mask[alive] = _staircase(array[alive])
        return mask
    while len(alive):
        head = array[alive[0]]
        mask[alive[0]] = True
        rest = alive[1:]
        dominated = (array[rest] <= head).all(axis=1) & (array[rest] < head).any(axis=1)
        alive = rest[~dominated]
    return mask


def _staircase(rows: Array) -> Mask:
    """Return the mask `(n,)` of the non-dominated among rows `(n, 2)` in descending lexicographic order.

    A row is on the front if its second value is above those of all earlier rows, or if it repeats a row that is.
    """
    new = np.ones(len(rows), dtype=np.bool_)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    above = np.ones(len(rows), dtype=np.bool_)
    above[1:] = rows[1:, 1] > np.maximum.accumulate(rows[:-1, 1])
    mask: Mask = above[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return mask


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """Return the volume that the rows of `values` dominate above `reference` `(m,)`; exact.

    m <= 3 by sweeping (O(n log n), O(n^2 log n)); m >= 4 by the recursion of While, Bradstreet and Barone 2012 (WFG),
    exponential in the worst case: measured 0.03 s for 60 front points in 4 dimensions, 0.1 s for 30 in 6.
    Rows that are not above the reference in every objective add nothing.

    Raises:
        ValueError: the reference does not fit the values or is not finite.
    """
    array = _matrix(values)
    return _volume(_above(array, _reference(array, reference)))


def _above(array: Array, reference: Array) -> Array:
    """Return the front of the gains over the reference, positive in each objective."""
    gains = array - reference
    gains = gains[(gains > 0).all(axis=1)]  # drops NaN rows too
    return np.unique(gains[non_dominated(gains)], axis=0) if len(gains) else gains


def _volume(front: Array) -> float:
    """Return the volume between 0 and mutually non-dominated, distinct, positive rows."""
    n, m = front.shape
    if n == 0:
        return 0.0
    if n == 1 or m == 1:
        return float(front.max(axis=0).prod())
    if m == 2:
        return _area(front)
    if m == 3:
        front = front[np.argsort(-front[:, 2], kind="stable")]
        heights = front[:, 2] - np.append(front[1:, 2], 0.0)
        return float(sum(h * _area(front[: i + 1, :2]) for i, h in enumerate(heights) if h > 0))
    # WFG: each point's box minus what the later points cover of it. Worst in one objective first: the limited sets
    # of the early points, which have the most followers, then share that coordinate (measured twice as fast).
    front = front[np.argsort(front[:, -1], kind="stable")]
    return sum(_exclusive(front[i], front[i + 1 :]) for i in range(n))


def _area(points: Array) -> float:
    """Return the area under a 2-D staircase; `points` may hold dominated rows."""
    points = points[np.argsort(-points[:, 0], kind="stable")]
    reached = np.maximum.accumulate(points[:, 1])
    steps = points[:, 0] - np.append(points[1:, 0], 0.0)
    return float(steps @ reached)


def _exclusive(point: Array, others: Array) -> float:
    """Return the volume of the box of `point` that no row of `others` covers."""
    box = float(point.prod())
    if len(others) == 0:
        return box
    limited = np.minimum(others, point)
    return box - _volume(np.unique(limited[non_dominated(limited)], axis=0))


@dataclass(frozen=True)
class Volume:
    """A hypervolume with its standard error, which is 0 where it is exact."""

    value: float
    stderr: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.5g}" + (f" +- {self.stderr:.1g} (Monte Carlo)" if self.stderr else "")


def reference_of(anchors: ArrayLike) -> Array | None:
    """Return the point `(m,)` above which volumes of a study count: the worst of its known recipes `(k, m)`, each
    objective by itself; None if none has scores. It stays as it is, however far a search gets.
    """
    array = _matrix(anchors)
    array = array[~np.isnan(array).any(axis=1)]
    return array.min(axis=0) if len(array) else None


def volume(values: ArrayLike, reference: ArrayLike, seed: int = 0, samples: int = SAMPLES) -> Volume:
    """Return the hypervolume: exact up to three objectives or FEW_POINTS front points, by Monte Carlo beyond.

    Raises:
        ValueError: as `hypervolume`.
    """
    array = _matrix(values)
    if array.shape[1] <= 3 or len(_above(array, _reference(array, reference))) <= FEW_POINTS:
        return Volume(hypervolume(array, reference))
    return sampled_hypervolume(array, reference, seed, samples)


def sampled_hypervolume(values: ArrayLike, reference: ArrayLike, seed: int = 0, samples: int = SAMPLES) -> Volume:
    """Return an unbiased estimate of the hypervolume with its standard error; the same for the same seed.

    A point is drawn from one of the front points' boxes, chosen by volume, and counts one over the number of boxes
    that it lies in (Karp and Luby 1983; for hypervolumes Bringmann and Friedrich 2010, section 2). Unlike sampling
    one box around the front, this does not run out of hits in many dimensions.
    """
    array = _matrix(values)
    gains = _above(array, _reference(array, reference))
    if len(gains) == 0:
        return Volume(0.0)
    rng = np.random.default_rng([seed, *gains.shape])
    boxes = gains.prod(axis=1)
    chosen = rng.choice(len(gains), size=samples, p=boxes / boxes.sum())
    points = gains[chosen] * rng.random((samples, gains.shape[1]))
    covering = np.ones((samples, len(gains)), dtype=np.bool_)
    for j in range(gains.shape[1]):
        covering &= points[:, j, None] <= gains[None, :, j]
    shares = 1.0 / covering.sum(axis=1)
    return Volume(float(boxes.sum() * shares.mean()), float(boxes.sum() * shares.std(ddof=1) / np.sqrt(samples)))


def _reference(array: Array, reference: ArrayLike) -> Array:
    ref = np.asarray(reference, dtype=np.float64)
    if ref.shape != (array.shape[1],) or not np.isfinite(ref).all():
        raise ValueError(f"reference {ref} does not fit values of shape {array.shape}")
    return ref


def contributions(values: ArrayLike, reference: ArrayLike) -> Array:
    """Return, for each row, the volume above `reference` that this row alone dominates `(n,)`.

    Duplicates share their volume, so each contributes 0.
    """
    array, ref = _matrix(values), np.asarray(reference, dtype=np.float64)
    gains = array - ref
    good: Mask = np.asarray((gains > 0).all(axis=1))
    result = np.zeros(len(array))
    for i in np.flatnonzero(good & non_dominated(array)):
        others = good.copy()
        others[i] = False
        result[i] = max(0.0, _exclusive(gains[i], gains[others]))
    return result


def _normalised(array: Array, front: NDArray[np.intp]) -> Array:
    low, high = array[front].min(axis=0), array[front].max(axis=0)
    scaled: Array = (array[front] - low) / np.where(high > low, high - low, 1.0)
    return scaled


def knee(values: ArrayLike) -> int:
    """Return the row of the front that lies furthest beyond the plane through the front's extremes.

    With every objective scaled to [0, 1] over the front, that is the row with the largest sum (two objectives: the
    classical knee, the largest distance to the chord). Ties go to the first row.

    Raises:
        ValueError: there is no row without a NaN.
    """
    array = _matrix(values)
    return weighted(array, np.ones(array.shape[1]))


def weighted(values: ArrayLike, weights: ArrayLike) -> int:
    """Return the row of the front with the largest weighted sum of objectives scaled to [0, 1] over the front.

    Raises:
        ValueError: no row without a NaN, or weights that do not fit, are negative or all zero.
    """
    array = _matrix(values)
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (array.shape[1],) or not (w >= 0).all() or not w.sum() > 0:
        raise ValueError(f"weights must be {array.shape[1]} numbers >= 0, not all zero; got {w}")
    front = np.flatnonzero(non_dominated(array))
    if len(front) == 0:
        raise ValueError("the front is empty: every candidate has a NaN")
    return int(front[np.argmax(_normalised(array, front) @ w)])


def at_least(values: ArrayLike, floors: ArrayLike) -> Mask:
    """Return the mask `(n,)` of the rows that reach every floor `(m,)`; -inf is no floor. NaN reaches nothing."""
    array, low = _matrix(values), np.asarray(floors, dtype=np.float64)
    if low.shape != (array.shape[1],):
        raise ValueError(f"need {array.shape[1]} floors, got the shape {low.shape}")
    return np.asarray((array >= low).all(axis=1))


def weakest_link(values: ArrayLike, reference: ArrayLike) -> int:
    """Return the row of the front whose least gain over `reference` `(m,)` is the largest.

    Gains are divided by the largest gain that any row of the front has in that objective (its range over the front
    where none has any), so that no objective is favoured by its unit. Ties go to the larger sum of gains, then to
    the first row.

    Raises:
        ValueError: there is no row without a NaN.
    """
    array = _matrix(values)
    front = np.flatnonzero(non_dominated(array))
    if len(front) == 0:
        raise ValueError("the front is empty: every candidate has a NaN")
    gains = array[front] - _reference(array, reference)
    best = gains.max(axis=0)
    span = np.where(best > 0, best, np.ptp(gains, axis=0))
    scaled = gains / np.where(span > 0, span, 1.0)
    least, total = scaled.min(axis=1), scaled.sum(axis=1)
    return int(front[max(range(len(front)), key=lambda i: (least[i], total[i], -i))])


def membership(drawn: ArrayLike) -> Array:
    """Return how sure it is that each candidate is on the front: the share of resamples in which it is `(n,)`.

    `drawn` `(r, n, m)` are the values of all candidates in r resamples of the items, the same items for all
    (`intervals.resampled`), so what is hard for every candidate cancels.
    """
    array = np.asarray(drawn, dtype=np.float64)
    if array.ndim != 3 or len(array) == 0:
        raise ValueError(f"drawn values must be (resamples, candidates, objectives), got the shape {array.shape}")
    return np.asarray(np.mean([non_dominated(values) for values in array], axis=0))


def hopeful(values: ArrayLike, stderr: ArrayLike, errors: float = 4.0) -> Mask:
    """Return the mask `(n,)` of the rows that could be on the front if the errors `(n, m)` were known.

    A row is given up if some other one is better in every objective by more than `errors` standard errors of their
    difference, taken as if it were not paired: generous.
    """
    array, error = _matrix(values), np.nan_to_num(np.asarray(stderr, dtype=np.float64))
    mask: Mask = np.asarray(~np.isnan(array).any(axis=1))
    for i in np.flatnonzero(non_dominated(array)):
        ahead = array[i] - array > errors * np.hypot(error, error[i])
        mask[ahead.all(axis=1)] = False
    return mask


@dataclass(frozen=True)
class Difference:
    """A paired difference a - b over `n` common items, with its confidence interval [low, high]."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def separated(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0


def separated(items_a: ArrayLike, items_b: ArrayLike, level: float = 0.95) -> Difference:
    """Return the mean paired difference of two per-item score arrays `(n,)` with Student's t interval.

    The arrays hold the same items in the same order; items that are NaN in either are left out. With fewer
    than two common items the interval is infinite, so nothing is ever separated by it.

    Raises:
        ValueError: different lengths, or a level outside (0, 1).
    """
    a, b = np.asarray(items_a, dtype=np.float64), np.asarray(items_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not 0 < level < 1:
        raise ValueError(f"need two equal item lists and 0 < level < 1: {a.shape}, {b.shape}, {level}")
    difference = a - b
    difference = difference[~np.isnan(difference)]
    n = len(difference)
    mean = float(difference.mean()) if n else float("nan")
    if n < 2:
        return Difference(mean, float("-inf"), float("inf"), n)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    return Difference(mean, mean - half, mean + half, n)


def mutually_separated(items: Sequence[Sequence[ArrayLike]], level: float = 0.95) -> tuple[int, ...]:
    """Return the largest group of front points in which every pair is really different.

    `items[p][j]` are the per-item scores of point p on objective j. Two points are different if the paired
    interval of at least one objective excludes zero, with Bonferroni's correction over the objectives.
    The first largest group in index order; exact (branch and bound) up to 30 points, greedy above.
    """
    n = len(items)
    different = np.zeros((n, n), dtype=np.bool_)
    for i in range(n):
        for j in range(i):
            strict = 1 - (1 - level) / max(1, len(items[i]))
            pairs = zip(items[i], items[j], strict=True)
            different[i, j] = different[j, i] = any(separated(a, b, strict).separated for a, b in pairs)
    best: tuple[int, ...] = ()
    stack: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), tuple(range(n)))]
    while stack:
        chosen, allowed = stack.pop()
        if len(chosen) > len(best):
            best = chosen
        if not allowed or len(chosen) + len(allowed) <= len(best):
            continue
        head, rest = allowed[0], allowed[1:]
        if n <= 30:
            stack.append((chosen, rest))
        stack.append(((*chosen, head), tuple(k for k in rest if different[head, k])))
    return best
