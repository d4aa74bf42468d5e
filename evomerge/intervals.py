"""95 % intervals of scores and of differences between scores, from their items. Pure numpy and scipy.

A score is a function of two sums over its items: a mean is sum(x) / sum(1), bits per byte is sum(bits) / sum(bytes),
a perplexity exp(-sum / sum). Which one it is, is read off the items: the form whose value is the score's own. Other
scores (F1, BLEU, a median) have no such form here: theirs is value +- 1.96 standard errors.

Three methods, chosen by the items (docs/scores.md has their measured coverage):

- `wilson`, for shares of items that are 0 or 1: a share of exactly 0 or 1 keeps an honest interval.
- `bootstrap`, for other means and ratios: items are resampled with replacement and the percentiles taken a
  little further out, which undoes the percentile interval's narrowness for few items (the expanded percentile
  interval; Hesterberg, "What Teachers Should Know About the Bootstrap", 2015).
- `normal`, for scores without a form.

Paired comparisons resample the items' differences; those of 0/1 items get two more items, one won and one lost, as
in the interval of Bonett and Price (2012): two models that agree on every item seen need not agree on the next.
The seed is fixed, so an interval is a pure function of the items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Array = NDArray[np.float64]
Link = Callable[[Array], Array]

RESAMPLES = 2000
SEED = 20_240_229
BLOCK = 1_000_000  # entries of one table of counts: 8 MB
Z95 = 1.959964  # of the standard normal distribution
LINKS: tuple[Link, ...] = (lambda r: r, lambda r: np.exp(-r), lambda r: -r / math.log(2))  # of lm-eval's aggregates


class Scored(Protocol):
    """What has a value, its standard error and its items: `evomerge.objectives.Scores`."""

    @property
    def value(self) -> float:
        """The aggregate."""

    @property
    def stderr(self) -> float:
        """Standard error of `value` over items."""

    @property
    def items(self) -> np.ndarray:
        """(N,) or (N, 2)."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; `low` and `high` are NaN if nothing is known (one item).

    Attributes:
        method: "wilson", "bootstrap", "normal" or "none".
    """

    value: float
    low: float
    high: float
    method: str = "bootstrap"

    @property
    def separated(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4f}"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(score: Scored) -> Interval:
    """The 95 % interval of a score.

    One item alone says nothing about the spread (and a cost, such as the number of layers, has none): no interval.
    """
    n = len(score.items)
    if n < 2:
        return Interval(score.value, math.nan, math.nan, "none")
    if is_share(score):
        return _wilson(float(score.items.sum()), n)
    form = _form(score)
    if form is None:
        half = Z95 * score.stderr
        return Interval(score.value, score.value - half, score.value + half, "normal")
    sums, link = form
    totals = _resampled(sums)
    low, high = _percentiles(link(totals[:, 0] / totals[:, 1])[:, None], n)
    return Interval(score.value, float(low[0]), float(high[0]))


def paired(a: Scored, b: Scored) -> Interval:
    """The difference a - b of two scores on the same items, with its 95 % paired bootstrap interval.

    Scores without a form, for which items cannot be paired, get the interval of independent scores: wider.

    Raises:
        ValueError: the numbers of items differ.
    """
    return leads([[a]], [b], [1.0])[0]


def leads(others: Sequence[Sequence[Scored]], reference: Sequence[Scored], weights: ArrayLike) -> list[Interval]:
    """For each of several candidates, its weighted lead over a reference, with its 95 % paired bootstrap interval.

    The lead is sum_j weights[j] * (other[j] - reference[j]). Items are resampled within each objective.
    Objectives with equally many items share their draws: where these are the same items (acc and acc_norm of
    one task) their correlation counts, and where they are not it is zero on average. An objective of one item adds its
    difference as if it were exact.

    Args:
        others: per candidate, one score per objective.
        weights: (M,) one per objective; negative where smaller is better.

    Raises:
        ValueError: two scores of one objective have different numbers of items.
    """
    drawn, values, smallest, method = _drawn_leads(others, reference, np.asarray(weights, dtype=np.float64))
    if method == "none":
        return [Interval(v, math.nan, math.nan, "none") for v in values]
    low, high = _percentiles(drawn, smallest)
    return [Interval(v, float(lo), float(hi), method) for v, lo, hi in zip(values, low, high, strict=True)]


def _drawn_leads(
    others: Sequence[Sequence[Scored]], reference: Sequence[Scored], w: Array
) -> tuple[Array, list[float], int, str]:
    """(RESAMPLES, K) leads on resampled items, the K leads themselves, the fewest items of an objective, the method."""
    drawn = np.zeros((RESAMPLES, len(others)))
    smallest = 0
    methods = set()
    for j, base in enumerate(reference):
        column = [scores[j] for scores in others]
        for score in column:
            if score.items.shape != base.items.shape:
                raise ValueError(
                    f"objective {j}: a paired comparison needs the same items; got {len(score.items)} and "
                    f"{len(base.items)} of them"
                )
        n = len(base.items)
        if n < 2:
            drawn += w[j] * np.array([s.value - base.value for s in column])
            continue
        differences, method = _drawn_differences(column, base)
        methods.add(method)
        drawn += w[j] * differences
        smallest = min(smallest or n, n)
    values = [sum(float(w[j]) * (s.value - r.value) for j, (s, r) in enumerate(zip(scores, reference, strict=True)))
              for scores in others]  # fmt: skip
    method = ("normal" if methods == {"normal"} else "bootstrap") if methods else "none"
    return drawn, values, smallest, method


@dataclass(frozen=True)
class Test:
    """A two-sided paired test of "there is no difference".

    Attributes:
        lead: the difference with its interval.
        p_value: NaN where nothing can be tested (single numbers).
        method: "mcnemar" (exact), "bootstrap", "normal" or "none".
    """

    __test__ = False  # not pytest's

    lead: Interval
    p_value: float
    method: str


def lead_test(other: Sequence[Scored], reference: Sequence[Scored], weights: ArrayLike) -> Test:
    """Test a weighted lead, as in `leads`.

    A single objective of 0/1 items has the exact test of McNemar (1947): a binomial test of the items that only one of
    the two gets right. Elsewhere the p-value is twice the smaller tail of the resampled leads beyond 0, with one
    added to both counts (Davison and Hinkley 1997, section 4.2): never below 2 / (RESAMPLES + 1).

    Raises:
        ValueError: two scores of one objective have different numbers of items.
    """
    w = np.asarray(weights, dtype=np.float64)
    found = leads([other], reference, w)[0]
    if len(w) == 1 and len(other[0].items) > 1 and is_share(other[0]) and is_share(reference[0]):
        won = int((other[0].items > reference[0].items).sum())
        lost = int((other[0].items < reference[0].items).sum())
        p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
        return Test(found, p_value, "mcnemar")
    if found.method == "none":
        return Test(found, math.nan, "none")
    drawn = _drawn_leads([other], reference, w)[0][:, 0]
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Test(found, min(1.0, 2.0 * (tail + 1) / (len(drawn) + 1)), found.method)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected so that the chance of any false finding keeps its level (Holm 1979).

    NaN stays NaN and is not counted as a test.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    worst = 0.0
    for rank, i in enumerate(tested[np.argsort(p[tested], kind="stable")]):
        worst = max(worst, min(1.0, float(p[i]) * (len(tested) - rank)))
        adjusted[i] = worst
    return [float(v) for v in adjusted]


def resampled(column: Sequence[Scored]) -> Array:
    """Values of K scores of one objective on resampled items, the same items for all. (RESAMPLES, K).

    Objectives of equally many items share their draws, as in `leads`. A score of one item stays as it is; one
    without a form gets normal noise of its own.

    Raises:
        ValueError: the numbers of items differ.
    """
    n = len(column[0].items)
    if any(len(score.items) != n for score in column):
        raise ValueError(f"values on the same items are wanted; got {sorted({len(s.items) for s in column})} of them")
    if n < 2:
        return np.tile([score.value for score in column], (RESAMPLES, 1))
    forms = [_form(score) for score in column]
    known = [k for k, form in enumerate(forms) if form is not None]
    drawn = np.empty((RESAMPLES, len(column)))
    if known:
        totals = _resampled(np.concatenate([form[0] for form in forms if form is not None], axis=1))
        for place, k in enumerate(known):
            form = forms[k]
            assert form is not None
            drawn[:, k] = form[1](totals[:, 2 * place] / totals[:, 2 * place + 1])
    for k in sorted(set(range(len(column))) - set(known)):
        noise = np.random.default_rng([SEED, n, k]).standard_normal(RESAMPLES)
        drawn[:, k] = column[k].value + column[k].stderr * noise
    return drawn


@dataclass(frozen=True)
class Spread:
    """How far two scores of one model are apart.

    Attributes:
        item: the largest difference of an item; infinite if their numbers differ.
        value: the difference of the values.
    """

    item: float
    value: float

    def __str__(self) -> str:
        return f"two scores of one model differ by {self.value:.3g}, an item by up to {self.item:.3g}"


def spread(first: Scored, second: Scored) -> Spread | None:
    """The difference of two scores of the same model on the same items; None if they agree to the bit."""
    same = first.value == second.value and np.array_equal(first.items, second.items, equal_nan=True)
    if same:
        return None
    if first.items.shape != second.items.shape:
        return Spread(math.inf, abs(first.value - second.value))
    return Spread(float(np.max(np.abs(first.items - second.items))), abs(first.value - second.value))


def is_share(score: Scored) -> bool:
    """Whether all items are 0 or 1 and the score is their mean."""
    items = score.items
    return items.ndim == 1 and bool(np.isin(items, (0.0, 1.0)).all()) and _close(float(items.mean()), score.value)


def _form(score: Scored) -> tuple[Array, Link] | None:
    """(N, 2) numerators and denominators, and the link, that give the score's own value; or None."""
    items = np.asarray(score.items, dtype=np.float64)
    if items.ndim == 1:
        items = np.stack([items, np.ones(len(items))], axis=1)
    if items.ndim != 2 or items.shape[1] != 2 or not (items[:, 1] > 0).all():
        return None
    top, bottom = items.sum(axis=0)
    with np.errstate(over="ignore"):
        for link in LINKS:
            if _close(float(link(np.array([top / bottom]))[0]), score.value):
                return items, link
    return None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _wilson(right: float, n: int) -> Interval:
    """Wilson's score interval of a share (1927)."""
    share = right / n
    shrunk = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / shrunk
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / shrunk
    # At 0 and 1 the bound is the value itself, but for rounding.
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == n else centre + half
    return Interval(share, low, high, "wilson")


def _drawn_differences(column: Sequence[Scored], base: Scored) -> tuple[Array, str]:
    """(RESAMPLES, K) differences of K scores to one, on resampled items; and the method."""
    if is_share(base) and all(is_share(s) for s in column):
        gaps = np.stack([s.items - base.items for s in column], axis=1)
        gaps = np.concatenate([gaps, np.ones((1, len(column))), -np.ones((1, len(column)))])
        return _resampled(gaps) / len(gaps), "bootstrap"
    forms = [_form(s) for s in (base, *column)]
    known = [f for f in forms if f is not None]
    if len(known) < len(forms):
        gaps = np.array([s.value - base.value for s in column])
        errors = np.array([math.hypot(s.stderr, base.stderr) for s in column])
        ranks = (np.arange(RESAMPLES) + 0.5) / RESAMPLES
        noise = np.random.default_rng([SEED, len(base.items)]).permutation(special.ndtri(ranks))
        return gaps + noise[:, None] * errors, "normal"
    totals = _resampled(np.concatenate([sums for sums, _ in known], axis=1))
    drawn = np.stack([link(totals[:, 2 * k] / totals[:, 2 * k + 1]) for k, (_, link) in enumerate(known)], axis=1)
    return drawn[:, 1:] - drawn[:, :1], "bootstrap"


def _resampled(columns: Array) -> Array:
    """Sums of resampled rows. columns: (N, C) -> (RESAMPLES, C)."""
    n = len(columns)
    rows = max(1, BLOCK // n)
    blocks = [_counts(n, start, min(rows, RESAMPLES - start)) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([counts @ columns for counts in blocks])


@lru_cache(maxsize=8)
def _counts(n: int, start: int, rows: int) -> Array:
    """How often each of n items is drawn in some of the resamples. (rows, n)."""
    drawn = np.random.default_rng([SEED, n, start]).integers(0, n, (rows, n))
    drawn += n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _percentiles(drawn: Array, n: int) -> tuple[Array, Array]:
    """The expanded 95 % percentiles of each column, for n items."""
    tail = float(special.ndtr(-math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, 0.975)))
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return low, high
