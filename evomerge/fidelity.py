"""Which items of the search split a candidate is scored on, and in which order: rungs and epochs.

The items of an objective are put in an order that is the same for many candidates (common random numbers), and a
candidate is scored on growing shares of it: rung 1/8 is the first eighth of every objective's items. After each rung
but the last it may be stopped; `racing.py` has the rules.

Without epochs there is one order per study. With epochs each block of consecutive candidates has an order of its own,
and a candidate is scored on its epoch's share first: the subsets rotate, so that a search does not fit one set of
items, and grow with the budget, so that its end, where candidates are alike, sees more of them. Rungs are shares of the
epoch's subset; behind it a candidate that is still promising goes on to the whole split. Known recipes have no epoch:
they are scored on the whole split in the study's own order. All of this is a pure function of the study's header.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RUNGS = (0.125, 0.25, 0.5, 1.0)
WORTH_ITEMS = 64  # per objective; below, an eighth says nothing
SHARE = 0.125  # of the items in the first epochs; it doubles three times
FEWEST_CANDIDATES = 16  # of an epoch
WORTH_EPOCHS = 512  # items per objective; below, the whole split is cheap
GROWTH = (0.25, 0.5, 0.75)  # of the budget, where an epoch's share doubles


@dataclass(frozen=True)
class Epochs:
    """The epochs that a study file asks for.

    Attributes:
        share: of the items, in the first epochs.
        candidates: of an epoch; None for twice the workers and at least 16.
    """

    share: float = SHARE
    candidates: int | None = None


@dataclass(frozen=True)
class Fidelity:
    """What a study file says under `fidelity:`; None leaves a choice to evomerge.

    Attributes:
        rungs: shares of the items, empty for none.
        epochs: or False for none.
        keep: share of the best that a candidate must keep in some objective (`limits.py`); 0 for no such rule.
    """

    rungs: tuple[float, ...] | None = None
    epochs: Epochs | Literal[False] | None = None
    keep: float | None = None


def read_fidelity(value: Any) -> Fidelity:
    """The `fidelity:` of a study file: `off`, or some of `rungs:`, `epochs:` and `keep:`.

    Raises:
        ValueError: it is anything else, the rungs do not ascend to 1, or a number is out of range.
    """
    if value == "off":
        return Fidelity((), False)
    if not isinstance(value, dict) or not value or not set(value) <= {"rungs", "epochs", "keep"}:
        raise ValueError(
            "it is `off` or {rungs: [0.125, 0.25, 0.5, 1], epochs: {share: 0.125, candidates: 16}, keep: 0.5}, or some "
            "of these keys"
        )
    return Fidelity(
        _read_rungs(value["rungs"]) if "rungs" in value else None,
        _read_epochs(value["epochs"]) if "epochs" in value else None,
        _read_keep(value["keep"]) if "keep" in value else None,
    )


def _read_keep(value: Any) -> float:
    if value == "off":
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError("`keep:` is a share of the best score, above 0 and below 1, or `off`")
    return float(value)


def _read_rungs(rungs: Any) -> tuple[float, ...]:
    if not isinstance(rungs, list) or not rungs:
        raise ValueError("rungs are a list of shares such as [0.125, 0.25, 0.5, 1]")
    if any(isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 < r <= 1 for r in rungs):
        raise ValueError("rungs are shares of the items, above 0 and at most 1")
    if any(low >= high for low, high in itertools.pairwise(rungs)):
        raise ValueError("rungs ascend")
    if rungs[-1] != 1:
        raise ValueError("the last rung is 1 (whoever is never beaten is scored in full)")
    return tuple(float(share) for share in rungs)


def _read_epochs(value: Any) -> Epochs | Literal[False]:
    if value == "off":
        return False
    if not isinstance(value, dict) or not set(value) <= {"share", "candidates"}:
        raise ValueError("epochs are `off` or {share: 0.125, candidates: 16}")
    share, candidates = value.get("share", SHARE), value.get("candidates")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError("an epoch's share of the items is above 0 and below 1")
    if candidates is not None and (isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 2):
        raise ValueError("an epoch has a whole number of candidates, at least 2")
    return Epochs(float(share), candidates)


def epoch_of(number: int, known: int, evaluations: int, share: float, candidates: int) -> tuple[int, float] | None:
    """A candidate's epoch and its share of the items; None for one of the `known` recipes, which come first.

    An epoch is a block of `candidates` numbers. Its share doubles for every quarter of the budget of `evaluations`
    that is spent when it begins, up to 1.
    """
    if number < known:
        return None
    epoch = (number - known) // candidates
    begins = known + epoch * candidates
    return epoch, min(1.0, share * 2 ** sum(begins >= point * evaluations for point in GROWTH))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's order of items, from the study's."""
    return int.from_bytes(hashlib.sha256(f"{seed}:epoch {epoch}".encode()).digest()[:7])


@dataclass(frozen=True)
class Part:
    """How a candidate is scored.

    Attributes:
        seed: of the order of its items.
        rungs: shares of all items, ascending; the last is 1.
        gate: the epoch's share, where the unpromising stop; 1 without epochs.
    """

    seed: int
    rungs: tuple[float, ...]
    gate: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Rungs and epochs of a study, as its header holds them.

    Attributes:
        rungs: empty for none.
        epochs: the arguments of `epoch_of` behind its first; empty for none.
    """

    seed: int
    rungs: tuple[float, ...]
    epochs: Mapping[str, Any]

    def part(self, number: int, *, to_the_end: bool = False) -> Part | None:
        """How candidate `number` is scored; None for at once.

        Args:
            to_the_end: it is one that is scored in full whatever comes, and has no epoch.
        """
        found = None if to_the_end else self._epoch(number)
        if found is None:
            return Part(self.seed, self.rungs) if self.rungs else None
        epoch, share = found
        inside = {share * rung for rung in self.rungs or (1.0,)}
        rungs = sorted(inside | {rung for rung in self.rungs if rung > share} | {1.0})
        return Part(epoch_seed(self.seed, epoch), tuple(rungs), share)

    def attrs(self, number: int, *, to_the_end: bool = False) -> dict[str, Any]:
        """What the study records of a candidate's epoch."""
        found = None if to_the_end else self._epoch(number)
        return {} if found is None else {"epoch": found[0], "epoch_share": found[1]}

    def _epoch(self, number: int) -> tuple[int, float] | None:
        return epoch_of(number, **self.epochs) if self.epochs else None


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
        share: of the items that were scored; 0 if none was.
        beaten_by: the number of the rival that it was compared with.
        positions: objective -> the scored items' positions in the split, ascending.
        rule: by which it was stopped: beaten, infeasible, outweighed, hopeless or unpromising; see `racing`.
        objective: whose limit an infeasible candidate misses.
    """

    share: float
    beaten_by: int
    positions: Mapping[str, NDArray[np.intp]]
    rule: str = "beaten"
    objective: str = ""

    def __str__(self) -> str:
        where = f"stopped at {share_text(self.share)}" if self.share else "stopped before scoring"
        if self.rule == "infeasible":
            return f"{where}, infeasible: {self.objective} misses its limit"
        if self.rule == "hopeless":
            return f"{where}, hopeless: little is left in every objective with items"
        how = {"beaten": "beaten by", "outweighed": "for every weighting beaten, nearest by"}
        return f"{where}, {how.get(self.rule, 'unpromising beside')} #{self.beaten_by}"
