"""From items to one value with a standard error, for means and for metrics of a whole corpus."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from evomerge.errors import CandidateFailure
from evomerge.objectives import Scores, mean_scores

RESAMPLES = 200
MIN_RESAMPLES = 20
TEXT_ITEMS = 20_000  # texts that one standard error may score again: BLEU of them takes a few seconds

Aggregate = Callable[[list[Any]], Any]


def aggregated(name: str, aggregate: Aggregate, items: list[Any]) -> Scores:
    """lm-eval's aggregate of the items, with its standard error.

    Args:
        name: objective and metric, for messages.
        aggregate: list of items -> number.
        items: as lm-eval's `process_results` gives them: numbers, or (reference, answer) pairs.

    Returns:
        `Scores` whose items are numbers: the items themselves if they are numbers or tuples of numbers
        of one length, and otherwise the aggregate of each item alone (0 where it has none).

    Raises:
        CandidateFailure: the items, or their aggregate, are not finite.
    """
    array = numbers_of(items)
    if array is not None and not np.isfinite(array).all():
        raise CandidateFailure(f"{name}: an item is not finite", reason="scores")
    if array is not None and array.ndim == 1 and getattr(aggregate, "__name__", "") == "mean":
        return mean_scores(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample of one class, say, is fine here
        value = _value(name, aggregate, items)
        stored = array if array is not None else np.array([_tried(aggregate, [i]) or 0.0 for i in items])
        return Scores(value, _stderr(aggregate, items, stored, numbers=array is not None), stored)


def numbers_of(items: list[Any]) -> np.ndarray | None:
    """The items as (N,) or (N, m) float64, or None if they are texts."""
    try:
        array = np.asarray(items)
    except ValueError:  # items of unequal shapes
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" and array.ndim in (1, 2) else None


def _value(name: str, aggregate: Aggregate, items: list[Any]) -> float:
    try:
        value = float(aggregate(items))
    except Exception as error:  # lm-eval, sacrebleu and sklearn raise whatever they meet
        raise CandidateFailure(
            f"{name}: lm-eval cannot aggregate the items: {type(error).__name__}: {error}", reason="scores"
        ) from error
    if not np.isfinite(value):
        raise CandidateFailure(f"{name}: the aggregate is not finite", reason="scores")
    return value


def _tried(aggregate: Aggregate, items: list[Any]) -> float | None:
    try:
        value = float(aggregate(items))
    except Exception:  # as in _value
        return None
    return value if np.isfinite(value) else None


def _stderr(aggregate: Aggregate, items: list[Any], stored: np.ndarray, *, numbers: bool) -> float:
    """Spread of the aggregate over resampled items, with a fixed seed.

    Samples that have no aggregate are left out; if fewer than MIN_RESAMPLES have one, the answer is
    the standard error of the mean of the items' own values instead.
    """
    rng = np.random.default_rng(0)
    n = len(items)
    rounds = RESAMPLES if numbers else max(MIN_RESAMPLES, min(RESAMPLES, TEXT_ITEMS // n))
    tried = [_tried(aggregate, [items[i] for i in rng.integers(0, n, n)]) for _ in range(rounds)]
    values = [v for v in tried if v is not None]
    if len(values) >= min(MIN_RESAMPLES, rounds):
        return float(np.std(values, ddof=1))
    return float(stored.std(axis=0, ddof=1).max() / np.sqrt(n)) if n > 1 else 0.0
