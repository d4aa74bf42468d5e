"""What ends a search that nobody watches: its hours are over, or its machine fails one candidate after another."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from evomerge.errors import TooManyFailures
from evomerge.events import Budget
from evomerge.history import History

PACE = 50  # the latest candidates tell how long one takes
HOPELESS = 10  # so many failures in a row, and nothing else, end a search
LATEST = 50  # of so many candidates of this run ...
FAILING = 0.9  # ... a larger share that failed for these reasons is the machine's fault, not the recipes'
MACHINE = frozenset({"oom", "poison", "timeout", "error"})


class Clock:
    """The time that a search has spent and has left.

    Attributes:
        before_s: what earlier runs of the study have spent.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._started = time.monotonic()
        self._durations: deque[float] = deque(maxlen=PACE)
        self.before_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Of all runs."""
        return self.before_s + self._run_s

    @property
    def _run_s(self) -> float:
        return time.monotonic() - self._started

    def add(self, attrs: Mapping[str, Any]) -> None:
        """A candidate has ended; one that was evaluated tells how long that takes."""
        if "t_eval_s" in attrs:
            self._durations.append(attrs.get("t_merge_s", 0.0) + attrs["t_eval_s"])

    def over(self) -> str | None:
        """Why no further candidate starts: the time is spent, or too short for the median candidate; else None."""
        budget = self._budget
        limits = []
        if budget.seconds is not None:
            limits.append((budget.seconds - self.elapsed_s, f"the budget of {budget.seconds / 3600:g} hours"))
        if budget.run_seconds is not None:
            limits.append(
                (budget.run_seconds - self._run_s, f"the time of this run, {budget.run_seconds / 3600:g} hours,")
            )
        if not limits:
            return None
        left, what = min(limits)
        if left <= 0.0:
            return f"{what} is spent"
        usual = statistics.median(self._durations) if self._durations else 0.0
        return f"{what} leaves {left:.3g} s, and a candidate takes {usual:.3g} s" if left < usual else None


class Failures:
    """Watches how the candidates of this run end."""

    def __init__(self) -> None:
        self._latest: deque[str | None] = deque(maxlen=LATEST)

    def add(self, reason: str | None) -> None:
        """One candidate has ended; None if it did not fail.

        Raises:
            TooManyFailures: nearly all of the latest ones failed for reasons that are the machine's.
        """
        self._latest.append(reason)
        counts = Counter(r for r in self._latest if r in MACHINE)
        if len(self._latest) == LATEST and counts.total() > FAILING * LATEST:
            said = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
            raise TooManyFailures(
                f"{counts.total()} of the last {LATEST} candidates failed for reasons of the machine: {said}",
                hint="`evomerge status` lists the reasons; mend the machine, and the same command goes on",
            )


def require_hope(history: History, reason: str | None) -> None:
    """Raise TooManyFailures if the study has nothing but failures, and enough of them; `reason` is the last one's."""
    if history.failures_in_a_row >= HOPELESS and not history.anything_done:
        raise TooManyFailures(
            f"the first {history.failures_in_a_row} candidates all failed, the last with: {reason}",
            hint="`evomerge status` lists the reasons",
        )
