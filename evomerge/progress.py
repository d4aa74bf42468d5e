"""Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
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
        done: candidates finished before this run; `begin` takes them too.
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
        self._reasons: Counter[str] = Counter()
        self._front: tuple[np.ndarray, bool] | None = None  # non-dominated values; whether they keep the constraints
        self._rate: deque[float] = deque(maxlen=20)
        self._started = time.monotonic()
        self._quiet = quiet
        self._live: Live | None = None
        self.begin(done)

    def begin(self, done: Iterable[Event]) -> None:
        """Candidates that were finished before this run."""
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
        return front.volume(self._best(), reference, samples=SAMPLES).value

    def status(self, in_flight: int) -> str:
        """One line on how the search goes, for people at other machines."""
        parts = [f"{self._count} candidates"]
        if self._values:
            parts.append(f"{len(self._best())} on the front")
        speed = self._per_minute()
        if speed:
            parts.append(f"{speed:.1f}/min")
        parts.append(f"{in_flight} in flight")
        reasons = ", ".join(f"{n} {reason}" for reason, n in self._reasons.most_common())
        parts.append(f"{self._reasons.total()} failed" + (f" ({reasons})" if reasons else ""))
        left = self._seconds_left(speed) if speed else None
        if left is not None:
            parts.append(time.strftime("ends at %Y-%m-%d %H:%M UTC", time.gmtime(time.time() + left)))
        return ", ".join(parts)

    def _best(self) -> np.ndarray:
        """(N, M) the non-dominated values of the candidates that keep the constraints; of all while none does."""
        if self._front is None:
            values = np.array(list(self._values.values()))
            floors = self._floors(self._labelled)
            kept = np.ones(len(values), dtype=bool) if floors is None else front.at_least(values, floors)
            if kept.any():
                values = values[kept]
            self._front = values[front.non_dominated(values)], bool(kept.any())
        return self._front[0]

    def _add(self, values: np.ndarray) -> None:
        """Bring the front up to date: a study may have very many candidates, and few on it."""
        if self._front is None:
            return
        held, kept = self._front
        misses = self._misses(values)
        if not kept and not misses:
            self._front = values[None], True
        elif kept != misses and not (held >= values).all(axis=1).any():
            beaten = (values >= held).all(axis=1)
            self._front = np.concatenate([held[~beaten], values[None]]), kept

    def _misses(self, values: np.ndarray) -> bool:
        return violation(values, self._floors(self._labelled)) > 0.0

    def _take(self, event: Event) -> None:
        self._count += 1
        self._stopped += event.stopped is not None
        if event.values is not None:
            values = self._values[event.number] = oriented(event.values, self._ups)
            if event.label is not None:
                self._labelled[event.label] = event.values
                self._front = None  # constraints may depend on it
            self._add(values)
        elif event.reason is not None:
            self._reasons[event.reason] += 1

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
            best = np.max(self._best(), axis=0) * np.where(self._ups, 1.0, -1.0)
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
        recent = self._rate
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 0.0
        return 60.0 * (len(recent) - 1) / (recent[-1] - recent[0])

    def _seconds_left(self, per_minute: float) -> float | None:
        limits = []
        if self._budget.evaluations is not None:
            limits.append(max(0, self._budget.evaluations - self._count) / per_minute * 60)
        if self._budget.seconds is not None:
            limits.append(max(0.0, self._budget.seconds - self._rate[-1]))
        if self._budget.run_seconds is not None:
            limits.append(max(0.0, self._budget.run_seconds - (time.monotonic() - self._started)))
        return min(limits) if limits else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
