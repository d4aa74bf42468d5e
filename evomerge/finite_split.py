"""Tests about the score over a whole split of N items, of which a random n were seen.

They ask about the finite split, not about some larger population: the seen items are a simple random sample without
replacement, and what is not seen yet can only be so much. `racing.py` and `limits.py` use them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr

Array = NDArray[np.float64]


def p_not_beaten(gain: Array, size: int) -> float:
    """P-value of "over all `size` items the mean gain is not negative", from the gains `(n,)` of the seen ones."""
    n = len(gain)
    total = float(gain.sum())
    if n < 2 or total >= 0.0:
        return 1.0
    moved = np.abs(gain[gain != 0.0])
    if np.allclose(moved, moved[0], rtol=1e-9, atol=0.0):
        m, wins = len(moved), int((gain > 0.0).sum())
        most = m + size - n
        most -= most % 2 if most > m else 0  # of an odd number more than half are in its favour: a lighter tail
        return _hypergeometric(wins, most, -(-most // 2), m)
    guarded = np.append(gain, 2.0 * moved.max())
    deviation = float(guarded.std(ddof=1))
    spread = float(gain.std(ddof=1))
    skew = max(0.0, float(((gain - gain.mean()) ** 3).mean()))
    mean = float(guarded.mean()) + skew / spread**2 * (1.0 / (6.0 * n) + (gain.mean() / spread) ** 2 / 3.0)
    unseen = 1.0 - n / size
    if mean >= 0.0 or unseen <= 0.0:
        return 1.0 if mean >= 0.0 else 0.0
    return float(stdtr(n - 1, mean / (deviation * np.sqrt(unseen / n))))


def p_reaches(items: Array, size: int, limit: float, maximize: bool) -> float:
    """P-value of "over all `size` items the score is not worse than `limit`", from the seen items.

    For 0/1 items it is exact: the right ones among the seen are hypergeometric, and their number in the split is at
    least what the limit demands, where the tail is heaviest. Otherwise it is the test of `p_not_beaten`.

    Args:
        items: `(n,)` whose mean is the score, or `(n, 2)` of the form (a, b) for sum of a / sum of b.
        limit: in the objective's own unit.
    """
    if not np.isfinite(items).all() or math.isnan(limit):
        return 1.0
    if items.ndim == 2:
        loss = limit * items[:, 1] - items[:, 0]
        return p_not_beaten(-loss if maximize else loss, size)
    if not np.isin(items, (0.0, 1.0)).all():
        return p_not_beaten(items - limit if maximize else limit - items, size)
    good = items if maximize else 1.0 - items
    least = math.ceil(size * (limit if maximize else 1.0 - limit) - 1e-9)
    if least <= 0 or least > size:
        return 1.0 if least <= 0 else 0.0
    return _hypergeometric(int(good.sum()), size, least, len(items))


def _hypergeometric(wins: int, total: int, good: int, drawn: int) -> float:
    """Probability of at most `wins` good ones among `drawn` of `total`, of which `good` are good."""
    k = np.arange(max(0, drawn - (total - good)), min(wins, good) + 1)
    ways = _log_choose(good, k) + _log_choose(total - good, drawn - k) - _log_choose(total, drawn)
    return min(1.0, float(np.exp(ways).sum()))


def _log_choose(n: Any, k: Any) -> Any:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
