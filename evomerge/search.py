"""The search loop: ask, record, submit, collect, record, tell. Start reading here.

Everything that the loop knows is in the study: it can be killed between any two statements, and `run` on the
same study continues. Optimizers are replayed from the recorded results; candidates that were running are
evaluated again under their own numbers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from evomerge import faults
from evomerge.errors import TooManyFailures
from evomerge.fidelity import Rivals, Stopped
from evomerge.objectives import Scores
from evomerge.optimizers import Optimizer, Result
from evomerge.pool import Pool
from evomerge.recipe import Recipe
from evomerge.space import Natural, SearchSpace
from evomerge.study import Candidate, Study
from evomerge.worker import Failed, Job, Outcome

HOPELESS = 10  # so many failures in a row, and nothing else, end a search


@dataclass(frozen=True)
class Budget:
    """When to stop asking: candidates in the study, or seconds of searching; None is no limit."""

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Event:
    """One candidate is recorded as finished: what a progress display needs."""

    number: int
    label: str | None
    values: tuple[float, ...] | None
    stderr: tuple[float, ...] | None
    reason: str | None
    same_as: int | None
    elapsed_s: float
    stopped: str | None = None


@dataclass
class Search:
    """One study being searched by one controller.

    Attributes:
        start_pool: makes the pool when the first candidate needs it, and not before.
        known: (label, recipe) of the candidates 0..k that every study starts with.
        on_event: called after each candidate's record is durable.
        stop: set it to stop asking; candidates in flight are still recorded.
        on_note: told once what people should know of how the workers score.
    """

    study: Study
    space: SearchSpace
    optimizer: Optimizer
    start_pool: Callable[[], Pool]
    budget: Budget
    known: Sequence[tuple[str, Recipe]] = ()
    on_event: Callable[[Event], None] = field(default=lambda event: None)
    stop: threading.Event = field(default_factory=threading.Event)
    on_note: Callable[[str], None] = field(default=lambda note: None)

    def run(self) -> str:
        """Search until the budget is spent or `stop` is set; returns "budget" or "stopped".

        Raises:
            TooManyFailures: no candidate gets a score.
            StorageError: the database failed; what was recorded is safe.
        """
        self._pool: Pool | None = None
        try:
            self._begin()
            while True:
                while self._may_ask() and len(self._in_flight) < self._workers().size:
                    self._propose()
                if not self._in_flight:
                    return "stopped" if self.stop.is_set() else "budget"
                for result in self._workers().wait(timeout_s=1.0):
                    self._record(result)
        finally:
            if self._pool is not None:
                self._pool.close()

    def _workers(self) -> Pool:
        if self._pool is None:
            self._pool = self.start_pool()
        return self._pool

    # ---------------------------------------------------------------- history

    def _begin(self) -> None:
        """Rebuild everything from the study, and take up what was running."""
        self._clock = time.monotonic()
        self._in_flight: dict[int, Recipe] = {}
        self._points: dict[int, np.ndarray] = {}
        self._waiting: dict[int, list[int]] = {}
        self._labels: dict[int, str | None] = {}
        self._finished: dict[str, Candidate] = {}
        self._failures_in_a_row = 0
        self._notes: set[str] = set()
        header = self.study.header
        self._rivals = Rivals(header.identity.get("seed", 0), header.rungs, header.objectives, self.study.items)
        candidates = self.study.candidates()
        self._count = len(candidates)
        ended = sorted((c for c in candidates if c.state != "running"), key=lambda c: c.arrival or 0)
        self._arrivals = len(ended)
        self._before_s = max((c.attrs.get("elapsed_s", 0.0) for c in ended), default=0.0)
        # All candidates share one size of batches, since the last bits of a score depend on it. Memory may lower it.
        self._batch_tokens = min((c.attrs["batch_tokens"] for c in ended if "batch_tokens" in c.attrs), default=None)
        for candidate in ended:
            self._keep(candidate)
            self._tell(candidate)
        for candidate in candidates:
            if candidate.state == "running":
                self._launch(candidate.number, candidate.label, candidate.recipe, candidate.params)

    def _keep(self, candidate: Candidate) -> None:
        """Remember the first candidate of each recipe; later ones have to beat those that were scored in full."""
        if candidate.fingerprint not in self._finished:
            self._finished[candidate.fingerprint] = candidate
            if candidate.values is not None:
                self._rivals.add(candidate.number, candidate.values)

    def _elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._clock

    def _may_ask(self) -> bool:
        if self.stop.is_set():
            return False
        if self.budget.evaluations is not None and self._count >= self.budget.evaluations:
            return False
        return self.budget.seconds is None or self._elapsed_s() < self.budget.seconds

    # ---------------------------------------------------------------- out

    def _propose(self) -> None:
        """Ask for one candidate, record it as running, and send it out."""
        number = self._count
        faults.point("proposing")
        label: str | None = None
        if number < len(self.known):
            label, recipe = self.known[number]
            params = self.space.point_of(recipe)
        else:
            pending = [x for _, x in sorted(self._points.items())]
            params = self.space.decode(self.optimizer.ask(number, pending))
            recipe = self.space.recipe(params)
        domains = {g.name: g.domain for g in self.space.genes}
        recorded = self.study.propose(recipe, params, domains, label)
        if recorded != number:
            raise RuntimeError(f"candidate {number} was recorded as {recorded}: two controllers?")
        faults.point("recording")
        self._count += 1
        self._launch(number, label, recipe, params)

    def _launch(self, number: int, label: str | None, recipe: Recipe, params: Mapping[str, Natural] | None) -> None:
        """Evaluate a recorded candidate, unless an equal recipe has been or is being evaluated."""
        self._labels[number] = label
        fingerprint = recipe.fingerprint
        earlier = self._finished.get(fingerprint)
        if earlier is not None:
            self._copy(number, earlier)
            return
        twin = next((n for n, r in self._in_flight.items() if r.fingerprint == fingerprint), None)
        if params is not None:
            self._points[number] = self.space.encode(params)
        self._in_flight[number] = recipe
        if twin is not None:
            self._waiting.setdefault(twin, []).append(number)
            return
        race = self._rivals.race(to_the_end=number < len(self.known))
        # The first candidate is scored twice: whether scores repeat is worth knowing before they are compared.
        self._workers().submit(Job(number, recipe, race=race, batch_tokens=self._batch_tokens, twice=number == 0))

    # ---------------------------------------------------------------- back

    def _record(self, result: Outcome | Failed) -> None:
        """Make one result durable, report it, and tell the optimizer."""
        number = result.number
        faults.point("finishing")
        if isinstance(result, Outcome):
            for note in result.notes:
                if note not in self._notes:
                    self._notes.add(note)
                    self.on_note(note)
            self._batch_tokens = min(result.batch_tokens, self._batch_tokens or result.batch_tokens)
            self._close(number, result.scores, result.attrs, result.stopped)
        else:
            self._close_failed(number, result.reason, result.message)
        done = self._finished[self._in_flight[number].fingerprint]
        del self._in_flight[number]
        for twin in self._waiting.pop(number, []):
            self._copy(twin, done)
            del self._in_flight[twin]

    def _copy(self, number: int, earlier: Candidate) -> None:
        """Record a candidate whose recipe is known already: nothing is scored twice."""
        faults.point("finishing")
        if earlier.state == "failed":
            message = f"the same recipe as candidate {earlier.number}, which failed"
            self._close_failed(number, str(earlier.reason), message, earlier.number)
            return
        same = {"same_as": earlier.number}
        if earlier.state == "stopped":
            estimates, stopped = self.study.partial_scores(earlier.number)
            self._close(number, {"search": estimates}, same, stopped)
            return
        scores = self.study.scores(earlier.number, "search")
        assert scores is not None
        self._close(number, {"search": scores}, same)

    def _close(
        self,
        number: int,
        scores: Mapping[str, Mapping[str, Scores]],
        attrs: Mapping[str, object],
        stopped: Stopped | None = None,
    ) -> None:
        elapsed = self._elapsed_s()
        rows = {**attrs, "elapsed_s": round(elapsed, 3)}
        if stopped is not None:
            self.study.stop(number, scores["search"], stopped, self._arrivals, rows)
        else:
            self.study.finish(number, scores, self._arrivals, rows)
        self._after_close(number, elapsed)

    def _close_failed(self, number: int, reason: str, message: str, same_as: int | None = None) -> None:
        elapsed = self._elapsed_s()
        self.study.fail(number, reason, message, self._arrivals, {"elapsed_s": round(elapsed, 3)})
        self._after_close(number, elapsed, same_as)

    def _after_close(self, number: int, elapsed: float, same_as: int | None = None) -> None:
        candidate = self.study.candidate(number)
        self._arrivals += 1
        self._points.pop(number, None)
        self._keep(candidate)
        self.on_event(
            Event(
                number=number,
                label=self._labels.pop(number, None),
                values=candidate.values,
                stderr=candidate.stderr,
                reason=candidate.reason,
                same_as=candidate.attrs.get("same_as", same_as),
                elapsed_s=elapsed,
                stopped=candidate.stopped,
            )
        )
        faults.point("telling")
        self._tell(candidate)
        if self._failures_in_a_row >= HOPELESS and not any(c.state == "done" for c in self._finished.values()):
            raise TooManyFailures(
                f"the first {self._failures_in_a_row} candidates all failed, the last with: {candidate.reason}",
                hint="`evomerge status` lists the reasons",
            )

    def _tell(self, candidate: Candidate) -> None:
        self._failures_in_a_row = self._failures_in_a_row + 1 if candidate.state == "failed" else 0
        # A stopped candidate counts with its estimate: leaving the beaten ones out would bias every ranking.
        values, stderr = candidate.values or candidate.estimate, candidate.stderr or candidate.estimate_stderr
        ups = list(self.study.header.objectives.values())
        self.optimizer.tell(
            Result(
                number=candidate.number,
                x=self.space.encode(candidate.params) if candidate.params else None,
                values=oriented(values, ups) if values is not None else None,
                stderr=np.array(stderr) if stderr is not None else None,
            )
        )


def oriented(values: ArrayLike, maximize: Sequence[bool]) -> np.ndarray:
    """Values with larger-is-better signs. values: (M,) or (N, M)."""
    signs = np.where(np.asarray(maximize), 1.0, -1.0)
    return np.asarray(values, dtype=np.float64) * signs
