"""The score of a partly scored candidate from the items of fully scored ones: regression and an unbiased correction.

What a search has is a matrix, items by candidates. A new candidate's outcomes on n of the N items are regressed (ridge)
on the outcomes of earlier candidates on the same items: rows are items, features are candidates. The regression
predicts all N items, and the mean of what it gets wrong on the seen ones is added, each predicted without itself.
That correction makes the estimate unbiased whatever the regression is worth, since the seen items are a simple random
sample of the split (the generalised difference estimator: Cassel, Sarndal and Wretman 1976; Cochran 1977, section
7.10; with cross-fitting, Robins, Rotnitzky and Zhao 1994 call it AIPW). A poor regression costs precision alone.

The standard error has two parts, as that of `racing.estimate`: what the seen items leave open about the split, from the
cross-fitted residuals with the finite-population correction 1 - n / N, and the items of the split as a sample.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEWEST_CANDIDATES = 12  # scored in full before there is a regression
MOST_CANDIDATES = 64  # the newest: a search comes closer, so they are the most like the next one
FEWEST_ITEMS = 16
PENALTIES = tuple(10.0**k for k in np.arange(-3.0, 3.1, 0.5))  # ridge, per item and unit of a feature's variance


class Estimate(NamedTuple):
    """A score over all items of a split, its standard error, and the share of the seen items' variance explained."""

    value: float
    stderr: float
    gain: float


def regress(features: NDArray[np.floating], seen: Array, positions: NDArray[np.intp]) -> Estimate | None:
    """Estimate a candidate's mean over all N items from its outcomes on n randomly chosen ones.

    Args:
        features: (N, k) outcomes of k candidates scored in full.
        seen: (n,) the candidate's outcomes.
        positions: (n,) which of the N items they are.

    Returns:
        None where nothing can be learned: fewer than 16 items, no spread, outcomes that are not finite, or a
        regression that predicts left-out items no better than their mean does.
    """
    n, size = len(seen), len(features)
    if n < FEWEST_ITEMS or n > size or not (np.isfinite(seen).all() and np.isfinite(features).all()):
        return None
    variance = float(seen.var(ddof=1))
    wide = np.asarray(features, dtype=np.float64)
    centred = wide - wide[positions].mean(axis=0)
    left, singular, right = np.linalg.svd(centred[positions], full_matrices=False)
    kept = singular > 1e-9 * max(1.0, float(singular[0]) if len(singular) else 0.0)
    if variance <= 0.0 or not kept.any():
        return None
    left, singular, right = left[:, kept], singular[kept], right[kept]
    target = seen - seen.mean()
    unit = float((singular**2).sum()) / len(singular)
    squares = singular**2 / (singular**2 + unit * np.array(PENALTIES)[:, None])  # (penalties, rank)
    fitted = (squares * (left.T @ target)) @ left.T
    leverage = squares @ (left**2).T + 1.0 / n
    residuals = (target - fitted) / np.maximum(1.0 - leverage, 1e-6)  # of each item, predicted without it
    errors = (residuals**2).mean(axis=1)
    best = int(np.argmin(errors))
    # Predicting each item by the mean of the others is wrong by n / (n - 1) times its distance from the mean of all.
    gain = 1.0 - float(errors[best]) / (variance * n / (n - 1))
    if gain <= 0.0:
        return None
    weights = right.T @ (squares[best] / singular * (left.T @ target))
    predicted = seen.mean() + centred @ weights
    value = float(predicted.mean() + residuals[best].mean())
    open_variance = float(residuals[best].var(ddof=1)) * (1.0 / n - 1.0 / size)
    return Estimate(value, float(np.sqrt(open_variance + variance / size)), gain)


class ItemMatrix:
    """The items of the newest candidates scored in full, one matrix per objective, read when they are needed.

    Memory is 64 x N x 4 bytes per objective at most.

    Args:
        load: number -> the items of every objective, in the split's order.
    """

    def __init__(self, load: Callable[[int], Sequence[Array]]) -> None:
        self._load = load
        self._columns: OrderedDict[int, tuple[NDArray[np.float32], ...] | None] = OrderedDict()

    def add(self, number: int) -> None:
        """A candidate was scored in full; the oldest of more than 64 is forgotten."""
        self._columns[number] = None
        if len(self._columns) > MOST_CANDIDATES:
            self._columns.popitem(last=False)

    def estimate(self, objective: int, seen: Array, positions: NDArray[np.intp]) -> Estimate | None:
        """`regress` on the objective with this index, inside the range of its items; None where it does not serve.

        Beside the cases of `regress` these are fewer than 12 candidates, and items of the form (a, b).
        """
        if len(self._columns) < FEWEST_CANDIDATES or seen.ndim != 1:
            return None
        for number, column in self._columns.items():
            if column is None:
                self._columns[number] = tuple(np.asarray(i, dtype=np.float32) for i in self._load(number))
        features = np.stack([c[objective] for c in self._columns.values() if c is not None], axis=1)
        found = regress(features, seen, positions)
        if found is None:
            return None
        low, high = min(features.min(), seen.min()), max(features.max(), seen.max())
        return found._replace(value=float(np.clip(found.value, low, high)))
