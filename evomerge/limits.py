"""What a candidate must reach whoever its rivals are: the floors of constraints, and half of the best.

Two rules of a race, beside those that compare with rivals (`racing.py`):

**infeasible**: a constraint of the study file is missed. An objective that is scored whole (depth, latency) misses it
by its value, which is what the study records and chooses by: the candidate stops there, one that is too deep before any
forward pass. An objective with items misses it with confidence: "the score over all N items meets the limit" is tested
on the seen ones, exactly for 0/1 items. A candidate that meets all limits is stopped with a probability of at most
`RISK`, divided evenly over parts and limits (Bonferroni). Limits on objectives with items count only when some
candidate meets all limits: until then those that miss them by least are the best that there is, and are scored in full.

**hopeless** (studies with an objective that is scored whole, or with `keep:`): such studies have candidates that
nothing beats, since nothing else is as shallow, and that answer no better than by chance. A candidate stops if in
*every* objective with items it has with confidence lost most of the best: its score over all N items keeps less than
the share `keep` of what any candidate scored in full has. Among candidates that meet all constraints, that is: until
one of them is scored in full nobody is hopeless, since the best that miss a limit are no choice. Both are counted from
what guessing gives, where the objective says what that is and the best one surely knows more (by `SURE` standard
errors), and otherwise from the worst value (`least_of`). Being below in every objective is an intersection-union test
(Berger 1982), so the level is `RISK` over parts. A candidate that keeps the share in one objective is a trade-off,
whatever it lost elsewhere.

With three objectives or more, keeping less than half of each may be a trade-off too: an even mixture of m specialists
keeps 1 / m of each. So the share is half only if a candidate that is scored in full keeps half of all objectives, and
otherwise as much as one keeps of all, but at least 1 / m. In the first case a hopeless candidate is worse than that one
in every objective with items. In the second it is the best for no weighted sum of the kept shares: for weights that sum
to 1 it has less than 1 / m, and the best one in the objective of the largest weight has at least that (unless it is
worse than guessing in others).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evomerge.finite_split import p_reaches

Array = NDArray[np.float64]

KEEP = 0.5  # of the best, what a candidate has to keep in at least one objective
SURE = 3.0  # standard errors by which the best must exceed guessing before its lead over guessing is what counts


@dataclass(frozen=True)
class Terms:
    """What a study's races need to know of its objectives, beside their directions; as its header holds it.

    Attributes:
        whole: objective -> "exact" or "measured", for those that are scored whole, in the first part.
        keep: share of the best that counts as hope; 0 for no such rule.
        even: share that counts as hope whatever `keep` says, where nobody is known to keep more of all objectives.
        ends: objective -> smallest and largest possible value, for those with items.
        chance: objective -> what guessing gives, for those with items that say so. Studies from before have none.
    """

    whole: Mapping[str, str] = field(default_factory=dict)
    keep: float = 0.0
    ends: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    even: float = 1.0

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Terms:
        """From a header's mapping; an empty one is that of a study without such objectives."""
        return cls(**stored)


class Whole(NamedTuple):
    """The score of an objective that is scored whole.

    Attributes:
        value: in the objective's unit.
        stderr: of the value; 0 for an exact one.
        runs: number of measurements.
    """

    value: float
    stderr: float
    runs: int


@dataclass(frozen=True)
class Limits:
    """What a candidate of a race must reach.

    Attributes:
        floors: per objective in its own unit, what a constraint demands; None for nothing.
        hopes: per objective in its own unit, the least of hope; None for objectives that are scored whole. Empty for no
            such rule.
        settled: whether some candidate meets all floors, so that floors of objectives with items count.
    """

    floors: tuple[float | None, ...] = ()
    hopes: tuple[float | None, ...] = ()
    settled: bool = False

    def missed(self, whole: Mapping[int, Whole], maximize: Sequence[bool]) -> int | None:
        """Index of an objective whose value misses its floor, of those that are scored whole; None if there is none."""
        for j, score in whole.items():
            floor = self.floors[j] if self.floors else None
            if floor is not None and (score.value < floor if maximize[j] else score.value > floor):
                return j
        return None

    def infeasible(
        self, items: Mapping[int, Array], sizes: Mapping[int, int], maximize: Sequence[bool], level: float
    ) -> int | None:
        """Index of the objective with items that surely misses its floor, the surest first; None if none does.

        Args:
            items: index of the objective -> the seen ones; only objectives with enough of them.
            level: of the test, over all floors.
        """
        found = [(j, floor) for j in items if self.settled and self.floors and (floor := self.floors[j]) is not None]
        p_values = [(p_reaches(items[j], sizes[j], floor, maximize[j]), j) for j, floor in found]
        if not p_values:
            return None
        p_value, worst = min(p_values)
        return worst if p_value <= level / len(p_values) else None

    def hopeless(
        self, items: Mapping[int, Array], sizes: Mapping[int, int], maximize: Sequence[bool], level: float
    ) -> bool:
        """Whether the candidate surely lacks hope in every objective with items. items: of all of those."""
        hopes = {j: hope for j, hope in enumerate(self.hopes) if hope is not None}
        if not hopes or set(hopes) != set(items):
            return False
        return all(p_reaches(items[j], sizes[j], hope, maximize[j]) <= level for j, hope in hopes.items())


def least_of(best: float, ends: Sequence[float | None], maximize: bool, keep: float) -> float | None:
    """The score that keeps the share `keep` of the best one, counted from the worst possible; None where nobody knows.

    Where smaller is better and values have no upper end, as bits per byte, it is 1 / keep times as far from the
    lower end as the best: twice the bits for one half.
    """
    low, high = ends
    worst, ideal = (low, high) if maximize else (high, low)
    if worst is not None:
        return worst + keep * (best - worst)
    if ideal is None or math.isclose(best, ideal):
        return None
    return ideal + (best - ideal) / keep


def kept_of(values: Array, best: float, ends: Sequence[float | None], maximize: bool) -> Array:
    """The shares of the best score that values `(n,)` keep; the inverse of `least_of`, which must not give None."""
    low, high = ends
    worst, ideal = (low, high) if maximize else (high, low)
    if worst is not None:
        return (values - worst) / (best - worst) if best != worst else np.ones_like(values)
    assert ideal is not None
    return np.asarray((best - ideal) / (values - ideal))


def hopes_of(
    values: Array, stderr: Array, names: Sequence[str], maximize: Sequence[bool], terms: Terms
) -> tuple[float | None, ...]:
    """The least of hope per objective, from candidates scored in full, in the objectives' own units.

    Empty where there is no such rule: it is off, or an objective's ends are not known.

    Args:
        values, stderr: (n, m).
    """
    if not terms.keep:
        return ()
    found: dict[int, tuple[float, tuple[float | None, float | None]]] = {}
    for j, (name, up) in enumerate(zip(names, maximize, strict=True)):
        if name in terms.whole:
            continue
        i = int(np.argmax(values[:, j]) if up else np.argmin(values[:, j]))
        best, chance = float(values[i, j]), terms.chance.get(name)
        low, high = terms.ends[name]
        if chance is not None and (best - chance if up else chance - best) > SURE * stderr[i, j]:
            low, high = (chance, high) if up else (low, chance)
        if least_of(best, (low, high), up, terms.keep) is None:
            return ()
        found[j] = best, (low, high)
    kept = [kept_of(values[:, j], best, ends, maximize[j]) for j, (best, ends) in found.items()]
    keep = min(terms.keep, max(terms.even, float(np.min(kept, axis=0).max()))) if kept else terms.keep
    return tuple(least_of(*found[j], maximize[j], keep) if j in found else None for j in range(len(names)))
