"""What ends a search that nobody watches, and what it says of itself to other machines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from evomerge import front, status
from evomerge.errors import StorageError, TooManyFailures
from evomerge.events import Budget, Event
from evomerge.nights import FAILING, LATEST, Clock, Failures
from evomerge.progress import Progress
from evomerge.study import Study
from evomerge.worker import Failed, Outcome
from tests.small_studies import right, study_of
from tests.test_search import Answers, Fixed, new_study, search


def test_no_candidate_starts_that_would_not_end_in_time() -> None:
    clock = Clock(Budget(seconds=100.0))
    assert clock.over() is None
    for seconds in (30.0, 50.0, 70.0):
        clock.add({"t_merge_s": 10.0, "t_eval_s": seconds})
    clock.add({"same_as": 2})  # took no time, and says nothing of how long one takes
    clock.before_s = 39.0
    assert clock.over() is None
    clock.before_s = 41.0
    assert "leaves 59 s, and a candidate takes 60 s" in (clock.over() or "")
    clock.before_s = 100.0
    assert clock.over() == "the budget of 0.0277778 hours is spent"


def test_the_hours_of_a_run_do_not_count_earlier_runs() -> None:
    clock = Clock(Budget(run_seconds=3600.0))
    clock.before_s = 1e6
    assert clock.over() is None
    over = Clock(Budget(seconds=1e9, run_seconds=0.0)).over()
    assert over == "the time of this run, 0 hours, is spent"


def test_a_search_starts_nothing_that_takes_longer_than_what_is_left() -> None:
    class Long(Answers):
        def wait(self, timeout_s: float) -> list[Outcome | Failed]:
            job = self._queue.pop(0)
            scores = {name: self.scores(job.recipe, name) for name in self.items}
            return [Outcome(job.number, {"search": scores}, 0.0, 3600.0, 0, "here")]

    study = new_study()
    made = search(study, Fixed([(0.1, 0.1), (0.2, 0.2)]), None, Long())
    made.budget = Budget(run_seconds=1800.0)
    ending = made.run()
    assert "a candidate takes 3.6e+03 s" in ending.why and not ending.stopped
    assert study.counts()["done"] == 1


def test_nearly_all_of_the_latest_failing_ends_a_search_and_says_of_what() -> None:
    most = int(FAILING * LATEST)
    watched = Failures()
    for _ in range(LATEST - most):
        watched.add(None)
    for n in range(most):
        watched.add("oom" if n % 2 else "timeout")
    with pytest.raises(TooManyFailures, match=rf"{most + 1} of the last {LATEST} .*23 timeout, 23 oom") as raised:
        watched.add("oom")
    assert raised.value.exit_code == 5


def test_recipes_that_cannot_be_merged_are_not_the_machines_fault() -> None:
    watched = Failures()
    for _ in range(2 * LATEST):
        watched.add("non_finite")


def test_a_machine_that_breaks_during_the_night_ends_the_search() -> None:
    class Breaking(Answers):
        def wait(self, timeout_s: float) -> list[Outcome | Failed]:
            found = super().wait(timeout_s)[0]
            return [found if found.number < 5 else Failed(found.number, "error", "CUDA error: device lost")]

    study = new_study()
    points = [(0.01 * i, 0.3) for i in range(100)]
    with pytest.raises(TooManyFailures, match="46 error"):
        search(study, Fixed(points), 100, Breaking()).run()
    assert study.counts() == {"done": 5, "stopped": 0, "failed": 46, "running": 0}
    # The next run is not judged by what failed in this one.
    assert "60 evaluations" in search(study, Fixed(points), 60, Breaking()).run().why


def event(number: int, values: tuple[float, ...] | None) -> Event:
    return Event(number, "base" if number == 0 else None, values, None, None if values else "oom", None, 10.0 * number)


def test_the_front_that_is_kept_up_to_date_is_the_front() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (60, 2)) / 5
    limit = np.array([-np.inf, 0.6])
    for floor in (None, limit, np.array([2.0, 2.0])):

        def floors(labelled: Mapping[str, Sequence[float]], floor: np.ndarray | None = floor) -> np.ndarray | None:
            return floor

        progress = Progress({"a": True, "b": True}, Budget(99), [], known=1, quiet=True, floors=floors)
        for n, row in enumerate(values):
            progress.event(event(n, tuple(row)))
            kept = values[: n + 1]
            good = kept if floor is None else kept[(kept >= floor).all(axis=1)]
            best = good if len(good) else kept
            expected = np.unique(best[front.non_dominated(best)], axis=0)
            assert np.unique(progress._best(), axis=0).tolist() == expected.tolist()


def test_the_status_line_says_what_a_person_wants_to_know_in_the_morning() -> None:
    progress = Progress({"acc": True}, Budget(20), [event(0, (0.5,))], known=1, quiet=True)
    for n in range(1, 5):
        progress.event(event(n, None if n == 2 else (0.5 + 0.01 * n,)))
    line = progress.status(3)
    assert line.startswith("5 candidates, 1 on the front, 6.0/min, 3 in flight, 1 failed (1 oom), ends at 20")
    assert line.endswith(" UTC")


def test_watching_goes_on_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, shown = study_of([right(100), right(120)]), list[dict[str, Any]]()
    study.lease.note = "2 candidates, 8.0/min"
    study.acquire()
    glance = status.glance

    def sometimes(seen: Study) -> dict[str, Any]:
        if len(shown) == 1 and not capsys.readouterr().err:
            print("away", flush=True)
            shown.append({})
            raise StorageError("the server is away")
        return glance(seen)

    def show(data: dict[str, Any]) -> None:
        shown.append(data)
        if len(shown) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "glance", sometimes)
    status.watch_study(study, show, every_s=0.0)
    study.release()
    assert len(shown) == 4 and shown[0]["done"] == 2
    assert any("2 candidates, 8.0/min (seen" in str(v) for v in shown[3].values())
    assert "the server is away" in capsys.readouterr().err


def test_a_status_line_is_renewed_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of([right(100)])
    progress = Progress({"acc": True}, Budget(20), [], known=1, quiet=True)
    teller = status.Teller(study, progress)
    teller.turn(1)
    assert "1 in flight" in study.lease.note
    teller.turn(2)
    assert "1 in flight" in study.lease.note
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + status.TELL_S)
    teller.turn(2)
    assert "2 in flight" in study.lease.note


def test_a_study_of_very_many_candidates_has_the_same_status_in_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [(right(100 + 7 * (i % 5)), right(150 - 9 * i)) for i in range(12)]
    study = study_of(scores, objectives={"a": True, "b": True}, labels={0: "base"},
                     identity={"constraints": ["a >= base"], "experts": {}})  # fmt: skip
    study.propose(study.candidate(0).recipe, None, {})
    study.fail(12, "oom", "no memory", None)
    whole = status.status_of(study)
    monkeypatch.setattr(status, "MANY", 3)
    short = status.status_of(study)
    same = ("candidates", "done", "failed", "running", "front", "constraints", "best a", "best b", "failed: oom")
    assert {k: whole[k] for k in same} == {k: short[k] for k in same}
    assert "evomerge front" in short["winner"]
