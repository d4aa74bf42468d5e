"""Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.live import Live

from evomerge import front
from evomerge.history import Floors
from evomerge.optimizers import violation
from evomerge.search import Budget, Event, oriented

SAMPLES = 4000  # for a volume that has to be sampled: it is computed at every candidate


class Progress:
    """Counts what the search reports. Use as a context manager and pass `event` to Search.

    Args:
        objectives: name -> whether larger is better.
        done: candidates finished before this run (number, label, values or None).
        known: how many candidates are the known recipes: they fix hypervolume's reference point.
        quiet: show nothing.
        floors: what constraints demand, as for `Search`; candidates that miss them are marked and not counted as good.
    """

    def __init__(
        self,
        objectives: Mapping[str, bool],
        budget: Budget,
        done: list[Event],
        known: int,
        quiet: bool = False,
        floors: Floors = lambda labelled: None,
    ) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._names = list(objectives)
        self._ups = list(objectives.values())
        self._budget = budget
        self._known = known
        self._values: dict[int, np.ndarray] = {}
        self._labelled: dict[str, Sequence[float]] = {}
        self._floors = floors
        self._count = self._stopped = 0
        self._rate: list[float] = []
        self._quiet = quiet
        self._live: Live | None = None
        for event in done:
            self._take(event)

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(self._line(None), console=self._console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, value, trace)

    def event(self, event: Event) -> None:
        """One more candidate is recorded."""
        self._take(event)
        self._rate.append(event.elapsed_s)
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(self._line(event))
        else:
            print(self._line(event), file=sys.stderr, flush=True)

    def hypervolume(self) -> float | None:
        """Volume above the componentwise worst of the known recipes (`front.volume`); None before they are scored."""
        anchors = [v for n, v in self._values.items() if n < self._known]
        reference = front.reference_of(anchors) if anchors else None
        if reference is None:
            return None
        return front.volume(self._feasible(), reference, samples=SAMPLES).value

    def _feasible(self) -> np.ndarray:
        """(N, M) values of the candidates that keep the constraints, larger is better; all while none does."""
        values = np.array(list(self._values.values()))
        kept = np.array([not self._misses(row) for row in values])
        return values[kept] if kept.any() else values

    def _misses(self, values: np.ndarray) -> bool:
        return violation(values, self._floors(self._labelled)) > 0.0

    def _take(self, event: Event) -> None:
        self._count += 1
        self._stopped += event.stopped is not None
        if event.values is not None:
            self._values[event.number] = oriented(event.values, self._ups)
            if event.label is not None:
                self._labelled[event.label] = event.values

    def _line(self, event: Event | None) -> str:
        parts = [f"{self._count}/{self._budget.evaluations or '-'}"]
        if event is not None:
            label = f" {event.label or event.source}" if event.label or event.source else ""
            if event.stopped is not None:
                shown = event.stopped
            elif event.values is None:
                shown = f"failed ({event.reason})"
            else:
                shown = " ".join(f"{n}={v:.4f}" for n, v in zip(self._names, event.values, strict=True))
            if event.values is not None and self._misses(oriented(event.values, self._ups)):
                shown += " (misses a constraint)"
            twin = f" (as #{event.same_as})" if event.same_as is not None else ""
            parts.append(f"#{event.number}{label}: {shown}{twin}")
        if self._stopped:
            parts.append(f"{self._stopped} stopped")
        if self._values:
            best = np.max(self._feasible(), axis=0) * np.where(self._ups, 1.0, -1.0)
            parts.append("best " + " ".join(f"{v:.4f}" for v in best))
        volume = self.hypervolume()
        if volume:  # none above the known recipes says nothing
            parts.append(f"hv {volume:.5g}")
        speed = self._per_minute()
        if speed:
            parts.append(f"{speed:.1f}/min")
            left = self._seconds_left(speed)
            if left is not None:
                parts.append(f"{_duration(left)} left")
        return " | ".join(parts)

    def _per_minute(self) -> float:
        recent = self._rate[-20:]
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 0.0
        return 60.0 * (len(recent) - 1) / (recent[-1] - recent[0])

    def _seconds_left(self, per_minute: float) -> float | None:
        limits = []
        if self._budget.evaluations is not None:
            limits.append(max(0, self._budget.evaluations - self._count) / per_minute * 60)
        if self._budget.seconds is not None:
            limits.append(max(0.0, self._budget.seconds - self._rate[-1]))
        return min(limits) if limits else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
