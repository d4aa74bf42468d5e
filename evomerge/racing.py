"""Racing: a candidate is compared item by item with those scored in full, and stops when it is beaten.

A candidate is scored in parts of the search split (`fidelity.py` says which). After each part but the last, its items
are compared with the same items of fully scored rivals. Three rules of comparison stop it:

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

**infeasible** and **hopeless** are not about rivals: `limits.py`. The order is beaten, infeasible, outweighed,
hopeless, unpromising; an objective that is scored whole and misses its limit comes before all.

**Objectives that are scored whole**: the depth of a model is known before any forward pass, its latency is measured
once, beside the first part of the others' items. Their part in the rules:

* exact ones (depth, size) are compared by value, without error. A rival beats a candidate if it is *at least equal* in
  all of these and better with confidence in every objective with items: of two models of one depth the better one
  wins, and no verdict waits for a difference in depth that cannot come. The level is that of the other objectives.
* measured ones (latency) are compared by Welch's t test on the values and their standard errors (Welch 1947); as a term
  of a sum its variance is widened to what the t distribution asks for at that level. The error is that of runs within
  one candidate: a machine that slows down between two candidates is not in it.
* in `outweighed` and `unpromising` an exact objective in which the candidate and all rivals are equal has no weight.
  For a weighting of exact objectives alone a candidate with the best value ties with the rivals of that value; ties
  are decided by the other objectives: it goes on if for some weighting of these it is not below the best of them.

With constraints the rivals are feasible ones, once there are any. Until then only the first rule compares with rivals:
one that is better in everything misses every limit by less, but infeasible models that outweigh a candidate together
could cost the first feasible one.

Guards: no verdict on fewer than `FEWEST` items of an objective; the first two rules spare a candidate that trails by
less than `TINY` standard deviations of the rival's own items, however certain that is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtr, stdtrit

from evomerge.finite_split import p_not_beaten
from evomerge.limits import Limits, Whole

Array = NDArray[np.float64]

RISK = 0.01  # of stopping a candidate that is not beaten, over all rungs and rivals; and of outweighing a best one
GATE = 1.0  # standard errors: what an epoch's last look allows a candidate to lack
FEWEST = 16  # items of an objective before any verdict
TINY = 0.02  # standard deviations of the rival's items; a point of accuracy where half of the items are right
SAME = 1e-12  # of a range: exact values that differ by rounding alone
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
        items: per objective `(n, ...)`, in the order of the race, up to the last part before the whole; empty for one
            that is scored whole.
        values: per objective, over all N items.
        scales: per objective, the mean of b over all N items of the form (a, b); 1 for plain items.
        spreads: per objective, the standard deviation of the contributions of all N items.
        whole: index of an objective -> its score, for those that are scored whole.
    """

    number: int
    items: tuple[Array, ...]
    values: tuple[float, ...]
    scales: tuple[float, ...]
    spreads: tuple[float, ...]
    whole: Mapping[int, Whole] = field(default_factory=dict)


class Verdict(NamedTuple):
    """A candidate stops: the rival that it is compared with, the rule by its name, and the objective that decided."""

    rival: Rival
    rule: str
    objective: int | None = None


class _Seen(NamedTuple):
    """What is known of a candidate: per objective the items and the number of all, and scores of whole objectives."""

    items: Mapping[int, Array]
    sizes: Sequence[int]
    whole: Mapping[int, Whole]

    @property
    def exact(self) -> set[int]:
        """Objectives whose value has no error."""
        return {j for j, score in self.whole.items() if score.stderr == 0.0}


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
            empty for a race without the rules `outweighed` and `unpromising`.
        gate: the share at which unpromising candidates stop; 1 for none.
        limits: what a candidate must reach whoever its rivals are.
    """

    seed: int
    rungs: tuple[float, ...]
    rivals: tuple[Rival, ...] = ()
    maximize: tuple[bool, ...] = ()
    low: tuple[float, ...] = ()
    span: tuple[float, ...] = ()
    gate: float = 1.0
    limits: Limits = field(default_factory=Limits)

    def missed(self, whole: Mapping[int, Whole]) -> Verdict | None:
        """Whether a candidate stops for the objectives that are scored whole alone: index of the objective -> score."""
        objective = self.limits.missed(whole, self.maximize) if self.rivals else None
        return None if objective is None else Verdict(self.rivals[0], "infeasible", objective)

    def verdict(
        self,
        items: Sequence[Array],
        sizes: Sequence[int],
        share: float | None = None,
        whole: Mapping[int, Whole] | None = None,
    ) -> Verdict | None:
        """Whether a candidate stops, or None: it goes on.

        Args:
            items: per objective `(n, ...)`, the seen items in the order of the race.
            sizes: per objective, the number of items of the split.
            share: the rung that they make.
            whole: index of an objective -> its score, for those that are scored whole; their items do not count.
        """
        if not self.rivals:
            return None
        whole = whole or {}
        seen = _Seen({j: mine for j, mine in enumerate(items) if j not in whole}, sizes, whole)
        fewest = min(map(len, seen.items.values()))
        looks = max(1, len(self.rungs) - 1)
        found = self.missed(whole)
        if found is None and fewest >= FEWEST:
            found = self._beaten(seen, RISK / (looks * len(self.rivals)))
        if found is not None:
            return found
        enough = {j: mine for j, mine in seen.items.items() if len(mine) >= FEWEST}
        all_sizes = dict(enumerate(sizes))
        objective = self.limits.infeasible(enough, all_sizes, self.maximize, RISK / looks)
        if objective is not None:
            return Verdict(self.rivals[0], "infeasible", objective)
        if fewest < FEWEST:
            return None
        if self.span and len(items) > 1:
            z = float(-stdtrit(fewest - 1, RISK / (looks * len(items))))
            nearest = self._nearest(seen, z, guarded=True)
            if nearest is not None:
                return Verdict(nearest, "outweighed")
        if self.limits.hopeless(seen.items, all_sizes, self.maximize, RISK / looks):
            return Verdict(self.rivals[0], "hopeless")
        nearest = self._nearest(seen, GATE, guarded=False) if self.span and share == self.gate else None
        return None if nearest is None else Verdict(nearest, "unpromising")

    def _beaten(self, seen: _Seen, level: float) -> Verdict | None:
        found = [(self._p_value(rival, seen, level), rival) for rival in self.rivals]
        p_value, best = min(found, key=lambda f: f[0])
        return Verdict(best, "beaten") if p_value <= level else None

    def _p_value(self, rival: Rival, seen: _Seen, level: float) -> float:
        """Of the hypothesis that this rival does not beat the candidate: the largest over objectives; 1 above level."""
        largest = 0.0
        for j, up in enumerate(self.maximize):
            if j in seen.whole:
                largest = max(largest, _p_whole(seen.whole[j], rival, j, up))
            else:
                difference = differences(seen.items[j], rival, j)
                if difference is None:
                    return 1.0
                gain = difference if up else -difference
                if -gain.mean() < TINY * rival.spreads[j]:
                    return 1.0
                largest = max(largest, p_not_beaten(gain, seen.sizes[j]))
            if largest > level:
                return 1.0  # whatever the other objectives say
        return largest

    def _nearest(self, seen: _Seen, z: float, *, guarded: bool) -> Rival | None:
        """The rival whose weighted sum the candidate misses by least; None if it does not miss all sums and minima."""
        gains = [self._gains(rival, seen, z, guarded=guarded) for rival in self.rivals]
        constant = {j for j in seen.exact if all(g is None or (g.mean[j], g.variance[j]) == (0.0, 0.0) for g in gains)}
        columns = [j for j in range(len(self.maximize)) if j not in constant]
        if guarded and len(columns) < 2:
            return None  # in one objective the best rival beats a candidate, or nobody does
        found = self._missed_by(range(len(gains)), columns, gains, seen.exact, z)
        return None if found is None else self.rivals[found[1]]

    def _missed_by(
        self, members: Sequence[int], columns: Sequence[int], gains: Sequence[_Gain | None], exact: set[int], z: float
    ) -> tuple[float, int] | None:
        """How near the candidate comes to a rival's weighted sum, and to whose; None if it does not miss them all.

        Args:
            members: the rivals that count, as indices.
            columns: the objectives that count; those in `exact` have no error.
        """
        signs = np.where(self.maximize, 1.0, -1.0)
        values = (np.array([self.rivals[i].values for i in members]) * signs)[:, columns]
        low, span = np.array(self.low)[columns], np.array(self.span)[columns]
        found: list[tuple[float, int]] = []
        for shares in np.array(weightings(len(columns))):
            weight, used = shares / span, shares > 0.0
            sums, minima = values @ weight, ((values - low) / span)[:, used] / shares[used]
            first, second = members[int(sums.argmax())], members[int(minima.min(axis=1).argmax())]
            one, other = gains[first], gains[second]
            if one is None or other is None:
                return None
            lead = float(weight @ one.mean[columns])
            decided = [j for j, has in zip(columns, used, strict=True) if has]
            if exact.issuperset(decided) and abs(lead) < SAME:
                tied = self._tied(members, decided, gains)
                rest = [j for j in columns if j not in decided]
                nearest = self._missed_by(tied, rest, gains, exact, z) if tied and rest else None
                if nearest is None:
                    return None
                found.append(nearest)
                continue
            above = lead + z * math.sqrt(float(weight**2 @ one.variance[columns]))
            if above >= 0.0 or -lead < weight @ one.least[columns]:
                return None
            best = float(minima.min(axis=1).max())
            needed = (low + best * shares * span - values[members.index(second)])[used]
            mean, error = other.mean[columns][used], np.sqrt(other.variance[columns][used])
            if not ((mean + z * error < needed) & (needed - mean >= other.least[columns][used])).any():
                return None
            found.append((above, first))
        return max(found, key=lambda f: f[0])

    def _tied(self, members: Sequence[int], columns: Sequence[int], gains: Sequence[_Gain | None]) -> list[int]:
        """Rivals that equal the candidate in these objectives."""
        return [i for i in members if (gain := gains[i]) is not None and not gain.mean[columns].any()]

    def _gains(self, rival: Rival, seen: _Seen, z: float, *, guarded: bool) -> _Gain | None:
        """Over a rival; None where items do not compare. Guarded: with the imaginary item, and a least loss."""
        rows = []
        for j, up in enumerate(self.maximize):
            least = TINY * rival.spreads[j] if guarded else 0.0
            if j in seen.whole:
                rows.append((*_gain_of(seen.whole[j], rival.whole[j], up, z), least))
                continue
            mine = seen.items[j]
            difference = differences(mine, rival, j)
            if difference is None:
                return None
            gain = difference if up else -difference
            if guarded:
                gain = np.append(gain, 2.0 * np.abs(gain).max() or rival.spreads[j])
            unseen = 1.0 / len(mine) - 1.0 / seen.sizes[j]
            rows.append((gain.mean(), gain.var(ddof=1) * unseen, least))
        return _Gain(*np.array(rows).T)


def _p_whole(mine: Whole, rival: Rival, objective: int, up: bool) -> float:
    """P-value of "the candidate is better" (exact: 0 or 1) or "not worse" (measured) in an objective scored whole."""
    theirs = rival.whole[objective]
    gain = mine.value - theirs.value if up else theirs.value - mine.value
    error, freedom = _welch(mine, theirs)
    if error == 0.0:
        return float(gain > 0.0)
    return 1.0 if -gain < TINY * rival.spreads[objective] else float(stdtr(freedom, gain / error))


def _gain_of(mine: Whole, theirs: Whole, up: bool, z: float) -> tuple[float, float]:
    """What a candidate gains, and its variance: wide enough that z standard errors are the t distribution's."""
    gain = mine.value - theirs.value if up else theirs.value - mine.value
    error, freedom = _welch(mine, theirs)
    widened = error * float(stdtrit(freedom, float(ndtr(-z)))) / z if error > 0.0 else 0.0
    return gain, widened**2


def _welch(mine: Whole, theirs: Whole) -> tuple[float, float]:
    """The standard error of a difference, and its degrees of freedom (Welch 1947)."""
    a, b = mine.stderr**2, theirs.stderr**2
    if a + b == 0.0:
        return 0.0, 1.0
    return math.sqrt(a + b), (a + b) ** 2 / (a**2 / max(1, mine.runs - 1) + b**2 / max(1, theirs.runs - 1))


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
