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

from evomerge import faults
from evomerge.company import Company
from evomerge.events import Budget, Ending, Event
from evomerge.fidelity import Stopped
from evomerge.history import Floors, History, event_of, oriented
from evomerge.nights import Clock, Failures, require_hope
from evomerge.objectives import Scores
from evomerge.optimizers import Exhausted, Optimizer, Recommends
from evomerge.pool import Pool
from evomerge.recipe import Recipe
from evomerge.space import Natural
from evomerge.spaces import Space
from evomerge.study import Candidate, NumberTaken, Study
from evomerge.worker import Failed, Job, Outcome

__all__ = ["Budget", "Ending", "Event", "Search", "oriented"]

REPEATS = 100  # so many proposals in a row that were known already, and none in flight, end one too
CONFIRMED = 4  # candidates at the end of a budget that the optimizer recommends, at most ...
CONFIRMED_SHARE = 0.1  # ... this share of what the budget leaves beside the known recipes


@dataclass
class Search:
    """One study being searched by one controller.

    Attributes:
        start_pool: makes the pool when the first candidate needs it, and not before.
        known: (label, recipe) of the candidates 0..k that every study starts with.
        on_begin: told the candidates that had ended before, in their order.
        on_event: called after each candidate's record is durable.
        on_turn: called at least every few seconds, with the number of candidates in flight.
        stop: set it to stop asking; candidates in flight are still recorded.
        on_note: told once what people should know of how the workers score.
        floors: what constraints demand; see `History`.
    """

    study: Study
    space: Space
    optimizer: Optimizer
    start_pool: Callable[[], Pool]
    budget: Budget
    known: Sequence[tuple[str, Recipe]] = ()
    on_begin: Callable[[Sequence[Candidate]], None] = field(default=lambda ended: None)
    on_event: Callable[[Event], None] = field(default=lambda event: None)
    on_turn: Callable[[int], None] = field(default=lambda in_flight: None)
    stop: threading.Event = field(default_factory=threading.Event)
    on_note: Callable[[str], None] = field(default=lambda note: None)
    floors: Floors = field(default=lambda labelled: None)

    def run(self) -> Ending:
        """Search until the budget is spent, `stop` is set, or nothing is left to propose.

        Raises:
            TooManyFailures: no candidate gets a score, or nearly none any more.
            StudyConflict: this process was held to be dead, and others have taken the study up.
            StorageError: the database failed; what was recorded is safe.
        """
        self._pool: Pool | None = None
        try:
            self._begin()
            while True:
                while self._over() is None and len(self._in_flight) < self._workers().size:
                    self._propose()
                if self._in_flight:
                    for result in self._workers().wait(timeout_s=1.0):
                        self._record(result)
                else:
                    why = self._over()
                    if why is not None and (self.stop.is_set() or self._company.is_alone()):
                        self._catch_up()
                        return Ending(why, stopped=self.stop.is_set())
                    time.sleep(0.2)  # what others run is theirs, unless they die: then it is taken up here
                self._look_around()
                self.on_turn(len(self._in_flight))
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
        self._clock, self._failures, self._company = Clock(self.budget), Failures(), Company(self.study)
        self._in_flight: dict[int, Recipe] = {}
        self._points: dict[int, np.ndarray] = {}
        self._waiting: dict[int, list[int]] = {}
        self._sources: dict[int, str] = {}
        self._notes: set[str] = set()
        self._exhausted: str | None = None
        # All candidates share one size of batches, since the last bits of a score depend on it. Memory may lower it.
        self._batch_tokens: int | None = None
        wants_items = bool(getattr(self.optimizer, "wants_items", False))
        self._history = History(self.study, self.space, self.floors, wants_items=wants_items)
        self._count = sum(self.study.counts().values())
        ended = self._company.ended()
        self._clock.before_s = max((c.attrs.get("elapsed_s", 0.0) for c in ended), default=0.0)
        for candidate in ended:
            self._remember(candidate)
            self.optimizer.tell(self._history.result(candidate))
        self.on_begin(ended)
        self._take_up(self._company.own())

    def _take_up(self, running: Sequence[Candidate]) -> None:
        """Evaluate candidates that were recorded as running by somebody who is gone."""
        for candidate in running:
            if candidate.source is not None:
                self._sources[candidate.number] = candidate.source
            self._launch(candidate.number, candidate.recipe, candidate.params)

    def _look_around(self) -> None:
        """Learn what other controllers have ended, and take up what dead ones ran."""
        if self._company.is_due:
            self._catch_up()
        if not self.stop.is_set():
            self._take_up(self._company.adopted(self._in_flight))

    def _remember(self, candidate: Candidate) -> None:
        tokens = candidate.attrs.get("batch_tokens", self._batch_tokens)
        self._batch_tokens = min(tokens, self._batch_tokens or tokens) if tokens is not None else None
        self._clock.add(candidate.attrs)
        self._history.add(candidate)

    def _over(self) -> str | None:
        """Why nothing more is asked, or None."""
        if self.stop.is_set():
            return "stopped on request"
        if self._exhausted is not None:
            return self._exhausted
        if self._history.copies_in_a_row >= REPEATS:
            repeat = f"the last {REPEATS} proposals repeat recipes that are known"
            self._exhausted = f"{repeat}: the space holds no others, or this optimizer finds none"
            return self._exhausted
        if self.budget.evaluations is not None and self._count >= self.budget.evaluations:
            return f"the budget of {self.budget.evaluations} evaluations is spent"
        return self._clock.over()

    # ---------------------------------------------------------------- out

    def _propose(self) -> None:
        """Ask for one candidate, record it as running, and send it out."""
        number = self._count
        faults.point("proposing")
        label: str | None = None
        source: str | None = None
        if number < len(self.known):
            label, recipe = self.known[number]
            params = self.space.point_of(recipe)
        else:
            try:
                params, source = self._recommended() or (self._asked(number), None)
            except Exhausted as error:
                self._exhausted = str(error)
                return
            recipe = self.space.recipe(params)
        try:
            self.study.propose(recipe, params, {g.name: g.domain for g in self.space.genes}, label, source, number)
        except NumberTaken:
            self._count = sum(self.study.counts().values())
            self._catch_up()
            return
        faults.point("recording")
        self._count += 1
        if source is not None:
            self._sources[number] = source
        self._launch(number, recipe, params)

    def _asked(self, number: int) -> dict[str, Natural]:
        others = {n: self.space.encode(c.params) for n, c in self._company.others.items() if c.params is not None}
        pending = [x for _, x in sorted((others | self._points).items())]
        return self.space.decode(self.optimizer.ask(number, pending))

    def _recommended(self) -> tuple[dict[str, Natural], str] | None:
        """At the end of a budget of evaluations, the next point that the optimizer expects to be the best, and why.

        The winner is chosen among whole scores: what the optimizer knows better than any result has to get one.
        """
        if self.budget.evaluations is None or not isinstance(self.optimizer, Recommends):
            return None
        searched = self.budget.evaluations - len(self.known)
        if self.budget.evaluations - self._count > min(CONFIRMED, int(searched * CONFIRMED_SHARE)):
            return None
        running = [number for number in self._sources if number in self._points]
        points, wishes = [self._points[n] for n in running], {self._sources[n] for n in running}
        return self._history.next_wish(self.optimizer.recommend(), points, wishes)

    def _launch(self, number: int, recipe: Recipe, params: Mapping[str, Natural] | None) -> None:
        """Evaluate a recorded candidate, unless an equal recipe has been or is being evaluated."""
        fingerprint = recipe.fingerprint
        to_the_end = self._to_the_end(number)
        earlier = self._history.finished.get(fingerprint)
        if earlier is not None and not (to_the_end and earlier.state == "stopped"):
            self._copy(number, earlier)
            return
        twin = next((n for n, r in self._in_flight.items() if r.fingerprint == fingerprint), None)
        if params is not None:
            self._points[number] = self.space.encode(params)
        self._in_flight[number] = recipe
        if twin is not None:
            self._waiting.setdefault(twin, []).append(number)
            return
        race = self._history.race(number, to_the_end=to_the_end)
        # The first candidate is scored twice: whether scores repeat is worth knowing before they are compared.
        self._workers().submit(Job(number, recipe, race=race, batch_tokens=self._batch_tokens, twice=number == 0))

    def _to_the_end(self, number: int) -> bool:
        """Whether a candidate is scored in full whatever comes: known recipes and recommended ones are."""
        return number < len(self.known) or number in self._sources

    # ---------------------------------------------------------------- back

    def _record(self, result: Outcome | Failed) -> None:
        """Make one result durable, report it, and tell the optimizer."""
        number = result.number
        faults.point("finishing")
        to_the_end = self._to_the_end(number)
        if isinstance(result, Outcome):
            for note in result.notes:
                if note not in self._notes:
                    self._notes.add(note)
                    self.on_note(note)
            attrs = self._history.attrs(result, to_the_end=to_the_end)
            self._close(number, self._history.refined(result), attrs, result.stopped)
        else:
            self._close_failed(number, result.reason, result.message)
        del self._in_flight[number]
        self._failures.add(None if isinstance(result, Outcome) else result.reason)
        for twin in self._waiting.pop(number, []):
            self._launch(twin, self._in_flight.pop(twin), None)

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
        rows = {**attrs, "elapsed_s": round(self._clock.elapsed_s, 3)}
        # Whether another process has recorded it in the meantime does not matter: what is recorded comes back.
        if stopped is not None:
            self.study.stop(number, scores["search"], stopped, None, rows)
        else:
            self.study.finish(number, scores, None, rows)
        self._catch_up()

    def _close_failed(self, number: int, reason: str, message: str, same_as: int | None = None) -> None:
        rows: dict[str, object] = {"elapsed_s": round(self._clock.elapsed_s, 3)}
        if same_as is not None:
            rows["same_as"] = same_as
        self.study.fail(number, reason, message, None, rows)
        self._catch_up()

    def _catch_up(self) -> None:
        """Report what has ended, whoever evaluated it, and tell the optimizer, in the order in which it ended."""
        for candidate in self._company.ended():
            self._points.pop(candidate.number, None)
            self._sources.pop(candidate.number, None)
            self._remember(candidate)
            self.on_event(event_of(candidate, self._clock.elapsed_s))
            faults.point("telling")
            self.optimizer.tell(self._history.result(candidate))
            require_hope(self._history, candidate.reason)
