"""What a candidate must reach whoever its rivals are: the floors of constraints, and half of the best.

Two rules of a race, beside those that compare with rivals (`racing.py`):

**infeasible**: a constraint of the study file is missed. An objective that is scored whole (depth, latency) misses it
by its value, which is what the study records and chooses by: the candidate stops there, one that is too deep before any
forward pass. An objective with items misses it with confidence: "the score over all N items meets the limit" is tested
on the seen ones, exactly for 0/1 items. A candidate that meets all limits is stopped with a probability of at most
`RISK`, divided evenly over parts and limits (Bonferroni). Limits on objectives with items count only when some
candidate meets all limits: until then those that miss them by least are the best that there is, and are scored in full.

**hopeless** (studies with an objective that is scored whole): such studies have candidates that nothing beats, since
nothing else is as shallow, and that answer no better than by chance. A candidate stops if in *every* objective with
items it has with confidence lost more than half of the best: its score over all N items keeps less than the share
`keep` of what any candidate scored in full has, both counted from the worst possible value (`least_of`). Being below
in every objective is an intersection-union test (Berger 1982), so the level is `RISK` over parts. A candidate that
keeps half in one objective is a trade-off, whatever it lost elsewhere. Where guessing alone gives more than half of
the best the rule says nothing; a constraint does (`math >= 0.8 * base`).
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


@dataclass(frozen=True)
class Terms:
    """What a study's races need to know of its objectives, beside their directions; as its header holds it.

    Attributes:
        whole: objective -> "exact" or "measured", for those that are scored whole, in the first part.
        keep: share of the best that counts as hope; 0 for no such rule.
        ends: objective -> smallest and largest possible value, for those with items.
    """

    whole: Mapping[str, str] = field(default_factory=dict)
    keep: float = 0.0
    ends: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

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


def hopes_of(values: Array, names: Sequence[str], maximize: Sequence[bool], terms: Terms) -> tuple[float | None, ...]:
    """The least of hope per objective, from the values (n, m) of all candidates scored in full, in their own units.

    Empty where there is no such rule: no objective is scored whole, it is off, or an objective's ends are not known.
    """
    if not terms.whole or not terms.keep:
        return ()
    found: list[float | None] = []
    for j, (name, up) in enumerate(zip(names, maximize, strict=True)):
        if name in terms.whole:
            found.append(None)
            continue
        least = least_of(float(np.max(values[:, j]) if up else np.min(values[:, j])), terms.ends[name], up, terms.keep)
        if least is None:
            return ()
        found.append(least)
    return tuple(found)
