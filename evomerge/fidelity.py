"""Rungs: scoring candidates on growing parts of the search split, and the test that stops those already beaten.

The items of an objective are put in one order per study, the same for every candidate (common random numbers), and
a rung is a share of that order: rung 1/8 is the first eighth of every objective's items. After each rung but the last
a candidate is compared, item by item, with fully scored rivals: the incumbent of a single objective, members of the
front of several. It stops only if one rival is better in *every* objective with confidence; then no trade-off of
objectives can make it the study's choice.

The test asks about the finite split, not about some larger population: is the candidate's score over all N items, most
of them not seen yet, at least the rival's? Since the order is random, the seen differences are a simple random sample
without replacement, and the chance of stopping a candidate that is in truth not beaten is at most `RISK` in all:

* differences of one size only (0/1 items, say): an exact test on the discordant items. If m of n seen items differ, w
  of them in the candidate's favour, and the candidate is not beaten over all items, then w is hypergeometric with at
  least half of the discordant items of the split in its favour. How many there are is not known; the test takes the
  most that is possible, m + N - n, where the tail is heaviest (the limit is the sign test: McNemar 1947; that
  sampling without replacement is never wider is Hoeffding 1963, theorem 4).
* other differences: Student's t with the finite-population correction 1 - n / N (Cochran 1977, section 2.6), corrected
  for skewness in the candidate's favour (Johnson 1978, equation 2.7), after adding one imaginary item that favours the
  candidate by twice the largest difference seen. This is approximate: a candidate that is a little worse on nearly
  all items and owes its score to one in twenty can be lost, since few of those have been seen.

`RISK` is divided evenly over rungs and rivals (Bonferroni), which holds whatever their dependence. Being better in
every objective is an intersection-union test (Berger 1982): its level is that of a single objective, uncorrected.
Two guards come on top: no verdict on fewer than `FEWEST` items, and none on a candidate that trails by less than
`TINY` standard deviations of the rival's own items, however certain that is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr

from evomerge.front import non_dominated

Array = NDArray[np.float64]

RUNGS = (0.125, 0.25, 0.5, 1.0)
RISK = 0.01  # of stopping a candidate that is not beaten, over all rungs and rivals
FEWEST = 16  # items of an objective before any verdict
TINY = 0.02  # standard deviations of the rival's items; a point of accuracy where half of the items are right
MOST_RIVALS = 8
MOST_BYTES = 400_000  # of rivals' items that travel with one job
WORTH_ITEMS = 64  # per objective; below, an eighth says nothing


def read_rungs(value: Any) -> tuple[float, ...]:
    """The rungs of a study file's `fidelity:`, which is `off` (no rungs) or `{rungs: [0.25, 0.5, 1]}`.

    Raises:
        ValueError: it is anything else, or the rungs do not ascend to 1.
    """
    if value == "off":
        return ()
    rungs = value.get("rungs") if isinstance(value, dict) and set(value) == {"rungs"} else None
    if not isinstance(rungs, list) or not rungs:
        raise ValueError("it is `off` or {rungs: [...]}, a list of shares such as [0.125, 0.25, 0.5, 1]")
    if any(isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 < r <= 1 for r in rungs):
        raise ValueError("rungs are shares of the items, above 0 and at most 1")
    if any(low >= high for low, high in itertools.pairwise(rungs)):
        raise ValueError("rungs ascend")
    if rungs[-1] != 1:
        raise ValueError("the last rung is 1 (whoever is never beaten is scored in full)")
    return tuple(float(share) for share in rungs)


def share_text(share: float) -> str:
    """A share for people: 1/8, or 12.3 % where no small fraction is meant."""
    fraction = Fraction(share).limit_denominator(64)
    return str(fraction) if abs(float(fraction) - share) < 1e-9 else f"{share:.1%}".replace("%", " %")


@lru_cache(maxsize=64)
def item_order(seed: int, name: str, n: int) -> NDArray[np.intp]:
    """The order `(n,)` in which an objective's items are scored, as positions in the split.

    A sort by hashes, not a generator's permutation: it must be the same in every later version of numpy.
    """
    keys = [hashlib.sha256(f"{seed}:{name}:{i}".encode()).digest()[:8] for i in range(n)]
    order = np.argsort(np.frombuffer(b"".join(keys), dtype=">u8"), kind="stable")
    order.flags.writeable = False  # it is shared by all callers
    return order


def count_at(n: int, share: float) -> int:
    """How many of n items a rung holds: at least one, all at share 1."""
    return min(n, max(1, round(n * share)))


def new_items(order: NDArray[np.intp], rungs: Sequence[float], index: int) -> NDArray[np.intp]:
    """Positions, ascending, of the items that rung `index` adds to the rungs before it."""
    before = count_at(len(order), rungs[index - 1]) if index else 0
    return np.sort(order[before : count_at(len(order), rungs[index])])


def additive(aggregate: Callable[[Array], float]) -> bool:
    """Whether a score is the mean of its items, or of (a, b) items the sum of a over the sum of b.

    Only such scores can be compared item by item. `aggregate` is tried on made-up items of both forms.
    """
    flat = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    pairs = np.array([[3.0, 2.0], [5.0, 4.0], [1.0, 2.0]])
    for items, expected in ((flat, 0.6), (pairs, 9.0 / 8.0)):
        try:
            if np.isclose(aggregate(items), expected, rtol=1e-9, atol=0.0):
                return True
        except Exception:  # metrics raise whatever they meet in items of a form that they do not know
            continue
    return False


@dataclass(frozen=True, eq=False)
class Stopped:
    """Where a candidate was stopped.

    Attributes:
        share: of the items that were scored.
        beaten_by: the rival's number.
        positions: objective -> the scored items' positions in the split, ascending.
    """

    share: float
    beaten_by: int
    positions: Mapping[str, NDArray[np.intp]]


@dataclass(frozen=True, eq=False)
class Rival:
    """A fully scored candidate that others are compared with.

    Attributes:
        items: per objective `(n, ...)`, in the study's item order, up to the last rung before the whole.
        values: per objective, over all N items.
        scales: per objective, the mean of b over all N items of the form (a, b); 1 for plain items.
        spreads: per objective, the standard deviation of the contributions of all N items.
    """

    number: int
    items: tuple[Array, ...]
    values: tuple[float, ...]
    scales: tuple[float, ...]
    spreads: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Race:
    """What a worker needs to score a candidate in rungs and to stop it early; plain data.

    Attributes:
        seed: of the study; with an objective's name it fixes the order of the items.
        rungs: shares of the items, ascending; the last is 1.
        rivals: none for a candidate that is scored in full whatever its scores are.
        maximize: per objective, whether larger is better.
    """

    seed: int
    rungs: tuple[float, ...]
    rivals: tuple[Rival, ...] = ()
    maximize: tuple[bool, ...] = ()

    def verdict(self, items: Sequence[Array], sizes: Sequence[int]) -> Rival | None:
        """The rival by which a candidate is beaten for certain, or None: it goes on.

        Args:
            items: per objective `(n, ...)`, the seen items in the study's order.
            sizes: per objective, the number of items of the split.
        """
        level = RISK / max(1, (len(self.rungs) - 1) * len(self.rivals))
        found = [(self._p_value(rival, items, sizes, level), rival) for rival in self.rivals]
        p_value, best = min(found, default=(1.0, None), key=lambda f: f[0])
        return best if p_value <= level else None

    def _p_value(self, rival: Rival, items: Sequence[Array], sizes: Sequence[int], level: float) -> float:
        """Of the hypothesis that this rival does not beat the candidate: the largest over objectives; 1 above level."""
        largest = 0.0
        for j, (mine, size, up) in enumerate(zip(items, sizes, self.maximize, strict=True)):
            difference = differences(mine, rival, j)
            if difference is None or len(difference) < FEWEST:
                return 1.0
            gain = difference if up else -difference
            if -gain.mean() < TINY * rival.spreads[j]:
                return 1.0
            largest = max(largest, p_not_beaten(gain, size))
            if largest > level:
                return 1.0  # whatever the other objectives say
        return largest


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

    A single objective has one rival, the incumbent. Of a front, those with the best mean over objectives, each scaled
    to its range over the front, come first, since they dominate most; at most `MOST_RIVALS`, and fewer where their
    items would exceed `MOST_BYTES` per job.

    Args:
        seed: of the study.
        rungs: shares, the last is 1; empty for a study that stops nothing.
        objectives: name -> whether larger is better.
        load: number -> the items of every objective, in the split's order.
    """

    def __init__(
        self,
        seed: int,
        rungs: Sequence[float],
        objectives: Mapping[str, bool],
        load: Callable[[int], Sequence[Array]],
    ) -> None:
        self._seed, self._rungs, self._objectives, self._load = seed, tuple(rungs), dict(objectives), load
        self._values: dict[int, tuple[float, ...]] = {}
        self._made: dict[int, Rival] = {}

    def add(self, number: int, values: Sequence[float]) -> None:
        """A candidate was scored in full. values: in the objectives' own directions."""
        self._values[number] = tuple(values)

    def race(self, *, to_the_end: bool) -> Race | None:
        """How the next candidate is scored; None where the study has no rungs.

        Args:
            to_the_end: score it in full whatever comes, though in the same parts as any other, so that the same
                items share a batch.
        """
        if not self._rungs:
            return None
        chosen = () if to_the_end or len(self._rungs) == 1 else self._chosen()
        self._made = {number: self._made.get(number) or self._make(number) for number in chosen}
        rivals: list[Rival] = []
        room = MOST_BYTES
        for rival in self._made.values():
            room -= sum(array.nbytes for array in rival.items)
            if rivals and room < 0:
                break
            rivals.append(rival)
        return Race(self._seed, self._rungs, tuple(rivals), tuple(self._objectives.values()))

    def _chosen(self) -> list[int]:
        """Numbers of the rivals, best first."""
        if not self._values:
            return []
        numbers = np.array(sorted(self._values))
        signs = np.where(list(self._objectives.values()), 1.0, -1.0)
        values = np.array([self._values[n] for n in numbers.tolist()]) * signs
        mask = non_dominated(values)
        numbers, values = numbers[mask], values[mask]
        spread = np.ptp(values, axis=0)
        mean = ((values - values.min(axis=0)) / np.where(spread > 0.0, spread, 1.0)).mean(axis=1)
        most = MOST_RIVALS if len(signs) > 1 else 1
        return [int(n) for n in numbers[np.argsort(-mean, kind="stable")][:most]]

    def _make(self, number: int) -> Rival:
        last = self._rungs[-2]
        items, scales, spreads = [], [], []
        for name, whole in zip(self._objectives, self._load(number), strict=True):
            order = item_order(self._seed, name, len(whole))
            items.append(whole[order[: count_at(len(whole), last)]])
            scale = float(whole[:, 1].mean()) if whole.ndim == 2 else 1.0
            scales.append(scale)
            spreads.append(float((whole[:, 0] / scale if whole.ndim == 2 else whole).std()))
        return Rival(number, tuple(items), self._values[number], tuple(scales), tuple(spreads))
