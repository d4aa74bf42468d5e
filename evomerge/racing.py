"""Racing: a candidate is compared item by item with those scored in full, and stops when it is beaten.

A candidate is scored in parts of the search split (`fidelity.py` says which). After each part but the last, its items
are compared with the same items of fully scored rivals. Three rules stop it, in this order:

**beaten**: one rival is better in *every* objective with confidence; then no trade-off of objectives can make it the
study's choice. The test asks about the finite split, not about some larger population: is the candidate's score over
all N items, most of them not seen yet, at least the rival's? Since the order is random, the seen differences are a
simple random sample without replacement, and the chance of stopping a candidate that is in truth not beaten is at most
`RISK` in all:

* differences of one size only (0/1 items, say): an exact test on the discordant items. If m of n seen items differ, w
  of them in the candidate's favour, and the candidate is not beaten over all items, then w is hypergeometric with at
  least half of the discordant items of the split in its favour. How many there are is not known; the test takes the
  most that is possible, m + N - n, where the tail is heaviest (the limit is the sign test: McNemar 1947; that
  sampling without replacement is never wider is Hoeffding 1963, theorem 4).
* other differences: Student's t with the finite-population correction 1 - n / N (Cochran 1977, section 2.6), corrected
  for skewness in the candidate's favour (Johnson 1978, equation 2.7), after adding one imaginary item that favours the
  candidate by twice the largest difference seen. This is approximate: a candidate that is a little worse on nearly
  all items and owes its score to one in twenty can be lost, since few of those have been seen.

`RISK` is divided evenly over parts and rivals (Bonferroni), which holds whatever their dependence. Being better in
every objective is an intersection-union test (Berger 1982): its level is that of a single objective, uncorrected.

**outweighed** (several objectives): for *every* weighting of a fixed lattice (Das and Dennis 1998), with objectives
scaled to the front's range, the candidate is with confidence below the best rival, both in the weighted sum and in the
weighted minimum (Tchebycheff; without it the compromises on a front that bends inwards would be lost). A candidate
that is the best for some weighting can only be stopped if the test of that weighting errs, so the level is `RISK` over
parts and objectives (the minimum is a test for each of these) and needs no correction for weightings. This is a normal
approximation with the same imaginary item and correction, since sums over objectives have no exact test. It says
nothing of candidates that are on the front but the best for no weighting of the lattice.

**unpromising** (studies with epochs): where its epoch's share is scored, a candidate goes on only if for some weighting
its sum or minimum is within `GATE` standard errors of the best rival's. This is an allocation of effort and no proof:
of candidates exactly as good as the best, about one in six stops here.

Guards: no verdict on fewer than `FEWEST` items of an objective; the first two rules spare a candidate that trails by
less than `TINY` standard deviations of the rival's own items, however certain that is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr, stdtrit

from evomerge.fidelity import Part, count_at, item_order
from evomerge.front import non_dominated

Array = NDArray[np.float64]

RISK = 0.01  # of stopping a candidate that is not beaten, over all rungs and rivals; and of outweighing a best one
GATE = 1.0  # standard errors: what an epoch's last look allows a candidate to lack
FEWEST = 16  # items of an objective before any verdict
TINY = 0.02  # standard deviations of the rival's items; a point of accuracy where half of the items are right
MOST_RIVALS = 8
MOST_WEIGHTINGS = 16
MOST_BYTES = 400_000  # of rivals' items that travel with one job


@lru_cache(maxsize=16)
def weightings(n_objectives: int) -> tuple[tuple[float, ...], ...]:
    """The weightings: the finest lattice of shares that sum to 1 with at most 16 of them, and equal weights."""
    if n_objectives == 1:
        return ((1.0,),)
    steps = 1
    while math.comb(steps + n_objectives, n_objectives - 1) <= MOST_WEIGHTINGS:
        steps += 1
    lattice = [
        tuple(k / steps for k in ks)
        for ks in itertools.product(range(steps + 1), repeat=n_objectives)
        if sum(ks) == steps
    ]
    equal = (1.0 / n_objectives,) * n_objectives
    return tuple(lattice if equal in lattice else [*lattice, equal])


@dataclass(frozen=True, eq=False)
class Rival:
    """A fully scored candidate that others are compared with.

    Attributes:
        items: per objective `(n, ...)`, in the order of the race, up to the last part before the whole.
        values: per objective, over all N items.
        scales: per objective, the mean of b over all N items of the form (a, b); 1 for plain items.
        spreads: per objective, the standard deviation of the contributions of all N items.
    """

    number: int
    items: tuple[Array, ...]
    values: tuple[float, ...]
    scales: tuple[float, ...]
    spreads: tuple[float, ...]


class Verdict(NamedTuple):
    """A candidate stops: the rival that it was compared with, and the rule by its name."""

    rival: Rival
    rule: str


class _Gain(NamedTuple):
    """Per objective `(m,)`, what a candidate gains over a rival, positive where it is better."""

    mean: Array  # over all items, as the seen ones say
    variance: Array  # of that
    least: Array  # loss that counts


@dataclass(frozen=True, eq=False)
class Race:
    """What a worker needs to score a candidate in parts and to stop it early; plain data.

    Attributes:
        seed: with an objective's name it fixes the order of the items.
        rungs: shares of the items, ascending; the last is 1.
        rivals: none for a candidate that is scored in full whatever its scores are.
        maximize: per objective, whether larger is better.
        low, span: per objective, the worst value on the front, larger is better, and the range from there to the best;
            empty for a race by the first rule alone.
        gate: the share at which unpromising candidates stop; 1 for none.
    """

    seed: int
    rungs: tuple[float, ...]
    rivals: tuple[Rival, ...] = ()
    maximize: tuple[bool, ...] = ()
    low: tuple[float, ...] = ()
    span: tuple[float, ...] = ()
    gate: float = 1.0

    def verdict(self, items: Sequence[Array], sizes: Sequence[int], share: float | None = None) -> Verdict | None:
        """Whether a candidate stops, or None: it goes on.

        Args:
            items: per objective `(n, ...)`, the seen items in the order of the race.
            sizes: per objective, the number of items of the split.
            share: the rung that they make.
        """
        if not self.rivals or any(len(mine) < FEWEST for mine in items):
            return None
        looks = max(1, len(self.rungs) - 1)
        level = RISK / (looks * len(self.rivals))
        found = [(self._p_value(rival, items, sizes, level), rival) for rival in self.rivals]
        p_value, best = min(found, key=lambda f: f[0])
        if p_value <= level:
            return Verdict(best, "beaten")
        if not self.span:
            return None
        if len(items) > 1:
            z = float(-stdtrit(min(map(len, items)) - 1, RISK / (looks * len(items))))
            nearest = self._nearest(items, sizes, z, guarded=True)
            if nearest is not None:
                return Verdict(nearest, "outweighed")
        nearest = self._nearest(items, sizes, GATE, guarded=False) if share == self.gate else None
        return None if nearest is None else Verdict(nearest, "unpromising")

    def _p_value(self, rival: Rival, items: Sequence[Array], sizes: Sequence[int], level: float) -> float:
        """Of the hypothesis that this rival does not beat the candidate: the largest over objectives; 1 above level."""
        largest = 0.0
        for j, (mine, size, up) in enumerate(zip(items, sizes, self.maximize, strict=True)):
            difference = differences(mine, rival, j)
            if difference is None:
                return 1.0
            gain = difference if up else -difference
            if -gain.mean() < TINY * rival.spreads[j]:
                return 1.0
            largest = max(largest, p_not_beaten(gain, size))
            if largest > level:
                return 1.0  # whatever the other objectives say
        return largest

    def _nearest(self, items: Sequence[Array], sizes: Sequence[int], z: float, *, guarded: bool) -> Rival | None:
        """The rival whose weighted sum the candidate misses by least; None if it does not miss all sums and minima."""
        gains = [self._gains(rival, items, sizes, guarded=guarded) for rival in self.rivals]
        values = np.array([rival.values for rival in self.rivals]) * np.where(self.maximize, 1.0, -1.0)
        low, span = np.array(self.low), np.array(self.span)
        found: list[tuple[float, Rival]] = []
        for shares in np.array(weightings(len(self.maximize))):
            weight, used = shares / span, shares > 0.0
            sums, minima = values @ weight, ((values - low) / span)[:, used] / shares[used]
            first, second = int(sums.argmax()), int(minima.min(axis=1).argmax())
            one, other = gains[first], gains[second]
            if one is None or other is None:
                return None
            above = float(weight @ one.mean) + z * math.sqrt(float(weight**2 @ one.variance))
            if above >= 0.0 or -weight @ one.mean < weight @ one.least:
                return None
            needed = (low + float(minima[second].min()) * shares * span - values[second])[used]
            most = other.mean + z * np.sqrt(other.variance)
            if not ((most[used] < needed) & (needed - other.mean[used] >= other.least[used])).any():
                return None
            found.append((above, self.rivals[first]))
        return max(found, key=lambda f: f[0])[1]

    def _gains(self, rival: Rival, items: Sequence[Array], sizes: Sequence[int], *, guarded: bool) -> _Gain | None:
        """Over a rival; None where items do not compare. Guarded: with the imaginary item, and a least loss."""
        rows = []
        for j, (mine, size, up) in enumerate(zip(items, sizes, self.maximize, strict=True)):
            difference = differences(mine, rival, j)
            if difference is None:
                return None
            gain = difference if up else -difference
            if guarded:
                gain = np.append(gain, 2.0 * np.abs(gain).max() or rival.spreads[j])
            unseen = 1.0 / len(mine) - 1.0 / size
            rows.append((gain.mean(), gain.var(ddof=1) * unseen, TINY * rival.spreads[j] if guarded else 0.0))
        return _Gain(*np.array(rows).T)


def differences(mine: Array, rival: Rival, objective: int) -> Array | None:
    """Candidate minus rival `(n,)`, in the objective's unit, on the candidate's items; None if they do not compare."""
    theirs = rival.items[objective][: len(mine)]
    if mine.shape != theirs.shape or not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        return None
    if mine.ndim == 1:
        return mine - theirs
    if not np.array_equal(mine[:, 1], theirs[:, 1]):
        return None
    difference: Array = (mine[:, 0] - theirs[:, 0]) / rival.scales[objective]
    return difference


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


def _hypergeometric(wins: int, total: int, good: int, drawn: int) -> float:
    """Probability of at most `wins` good ones among `drawn` of `total`, of which `good` are good."""
    k = np.arange(max(0, drawn - (total - good)), wins + 1)
    ways = _log_choose(good, k) + _log_choose(total - good, drawn - k) - _log_choose(total, drawn)
    return min(1.0, float(np.exp(ways).sum()))


def _log_choose(n: Any, k: Any) -> Any:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)


def estimate(value: float, stderr: float, mine: Array, rival: Rival, objective: int, size: int) -> tuple[float, float]:
    """What a stopped candidate would score on all `size` items, with its standard error.

    The rival's full score plus the mean paired difference: every candidate that stops at a rung was scored on the same
    items, and if these happen to be easy, their plain mean flatters all of them alike. The error counts the items as a
    sample, as that of a full score does, and adds what the differences leave open (difference estimator; Cochran 1977,
    section 7.10).

    Args:
        value, stderr: of the seen items alone; the answer where the items do not compare.
    """
    difference = differences(mine, rival, objective)
    if difference is None or len(difference) < 2:
        return value, stderr
    n = len(difference)
    variance = stderr**2 * n / size + float(difference.var(ddof=1)) * (1.0 / n - 1.0 / size)
    return rival.values[objective] + float(difference.mean()), float(np.sqrt(variance))


class Rivals:
    """The fully scored candidates of a study, and which of them the next candidate has to beat.

    A single objective has one rival, the incumbent. Of a front, first come the best of each weighting, those of most
    weightings before others, then those with the best mean over objectives, each scaled to its range over the
    front; at most `MOST_RIVALS`, and fewer where their items would exceed `MOST_BYTES` per job. A weighting whose best
    does not travel is raced against the best that does.

    Args:
        objectives: name -> whether larger is better.
        load: number -> the items of every objective, in the split's order.
    """

    def __init__(self, objectives: Mapping[str, bool], load: Callable[[int], Sequence[Array]]) -> None:
        self._objectives, self._load = dict(objectives), load
        self._values: dict[int, tuple[float, ...]] = {}
        self._made: dict[tuple[int, Part], Rival] = {}

    def add(self, number: int, values: Sequence[float]) -> None:
        """A candidate was scored in full. values: in the objectives' own directions."""
        self._values[number] = tuple(values)

    def race(self, part: Part, *, to_the_end: bool = False) -> Race:
        """How the next candidate is scored.

        Args:
            part: the order of its items, its rungs and its gate.
            to_the_end: score it in full whatever comes, though in the same parts as any other, so that the same
                items share a batch.
        """
        if to_the_end or len(part.rungs) == 1 or not self._values:
            return Race(part.seed, part.rungs)
        numbers, low, span = self._chosen()
        self._made = {(n, part): self._made.get((n, part)) or self._make(n, part) for n in numbers}
        rivals: list[Rival] = []
        room = MOST_BYTES
        for rival in self._made.values():
            room -= sum(array.nbytes for array in rival.items)
            if rivals and room < 0:
                break
            rivals.append(rival)
        ups = tuple(self._objectives.values())
        return Race(part.seed, part.rungs, tuple(rivals), ups, tuple(low.tolist()), tuple(span.tolist()), part.gate)

    def _chosen(self) -> tuple[list[int], Array, Array]:
        """Numbers of the rivals, best first; the front's worst values and its ranges."""
        numbers = np.array(sorted(self._values))
        signs = np.where(list(self._objectives.values()), 1.0, -1.0)
        every = np.array([self._values[n] for n in numbers.tolist()]) * signs
        mask = non_dominated(every)
        numbers, values = numbers[mask], every[mask]
        span = np.where(np.ptp(values, axis=0) > 0.0, np.ptp(values, axis=0), np.ptp(every, axis=0))
        span = np.where(span > 0.0, span, 1.0)
        low = values.min(axis=0)
        scaled = (values - low) / span
        shares = np.array(weightings(len(signs)))
        smallest = np.where(shares > 0.0, scaled[:, None] / np.where(shares > 0.0, shares, 1.0), np.inf).min(axis=2)
        bests = np.r_[(scaled @ shares.T).argmax(axis=0), smallest.argmax(axis=0)]
        wins = np.bincount(bests, minlength=len(values))
        most = MOST_RIVALS if len(signs) > 1 else 1
        order = np.lexsort((-scaled.mean(axis=1), -wins))[:most]
        return [int(n) for n in numbers[order]], low, span

    def _make(self, number: int, part: Part) -> Rival:
        last = part.rungs[-2]
        items, scales, spreads = [], [], []
        for name, whole in zip(self._objectives, self._load(number), strict=True):
            order = item_order(part.seed, name, len(whole))
            items.append(whole[order[: count_at(len(whole), last)]])
            scale = float(whole[:, 1].mean()) if whole.ndim == 2 else 1.0
            scales.append(scale)
            spreads.append(float((whole[:, 0] / scale if whole.ndim == 2 else whole).std()))
        return Rival(number, tuple(items), self._values[number], tuple(scales), tuple(spreads))
