"""Several processes search one study: results are shared, numbers are not, and what a killed one ran is taken over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evomerge import company, status
from evomerge.cli import main
from evomerge.commands import find_study
from evomerge.events import Event
from evomerge.study import Header, Study
from evomerge.worker import Failed, Outcome
from tests.databases import BOTH, database
from tests.test_search import Answers, Fixed, new_study, search

Place = tuple[str, str]
POINTS = [(0.02 * i, 0.3) for i in range(60)]


class Slow(Answers):
    """Takes a moment for each candidate, and never ends one of them, which it says by making a file."""

    def __init__(self, hangs_at: int | None = None, said: Path | None = None) -> None:
        super().__init__()
        self.hangs_at, self.said = hangs_at, said

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        time.sleep(0.02)
        if self.hangs_at is not None and len(self.jobs) > self.hangs_at and self.said is not None:
            self.said.touch()
            time.sleep(timeout_s)
            return []
        return super().wait(timeout_s)


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with database(request.param, tmp_path) as found:
        Study.create(*found, Header({"seed": 3}, {"acc": True, "chat": True}))
        yield found


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A process that does some work; it is killed at the end, if it still runs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        end(pid)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it has ended, and was waited for


def joined(place: Place, evaluations: int, pool: Answers) -> None:
    study = Study.load(*place)
    study.acquire(join=True)
    search(study, Fixed(POINTS), evaluations, pool).run()
    study.release()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alone(evaluations: int) -> list[tuple[object, ...]]:
    study = new_study()
    search(study, Fixed(POINTS), evaluations).run()
    return [(c.number, c.state, c.params, c.values) for c in study.candidates()]


def check(study: Study, evaluations: int) -> None:
    """Each number once, each with the scores that it has in a search of one process, in an order without gaps."""
    candidates = study.candidates()
    assert [(c.number, c.state, c.params, c.values) for c in candidates] == alone(evaluations)
    assert sorted(c.arrival or 0 for c in candidates) == list(range(evaluations))


def test_what_a_killed_process_ran_is_taken_over(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "LOOK_S", 0.2)
    hangs = tmp_path / "hangs"
    with forked(lambda: joined(place, 20, Slow(3, hangs))) as first:
        until(hangs.exists)
        study = Study.load(*place)
        study.acquire(join=True)
        events: list[Event] = []

        def event(e: Event) -> None:
            events.append(e)
            if len(events) == 5:
                assert [c.number for c in study.running() if c.owner != study.lease.fence] == [3]
                end(first)

        optimizer = Fixed(POINTS)
        made = search(study, optimizer, 20, on_event=event)
        assert "20 evaluations" in made.run().why
        study.release()
    check(study, 20)
    assert [t.number for t in optimizer.told] == [
        c.number for c in sorted(study.candidates(), key=lambda c: c.arrival or 0)
    ]
    assert [e.number for e in events] == [t.number for t in optimizer.told][3:], "each is shown once, in its order"


def test_two_processes_share_the_numbers_and_tell_each_other_their_results(place: Place) -> None:
    with forked(lambda: joined(place, 40, Slow())) as other:
        until(lambda: len(Study.load(*place).candidates()) > 2)
        study, pool = Study.load(*place), Slow()
        study.acquire(join=True)
        optimizer = Fixed(POINTS)
        search(study, optimizer, 40, pool).run()
        os.waitpid(other, 0)
    check(study, 40)
    assert 0 < len(pool.jobs) < 40, "both took part"
    assert sorted(t.number for t in optimizer.told) == list(range(40))
    assert [t.number for t in optimizer.told] == [
        c.number for c in sorted(study.candidates(), key=lambda c: c.arrival or 0)
    ]


def test_a_search_waits_at_its_end_for_what_others_run(place: Place, tmp_path: Path) -> None:
    """So that whoever is left at the end of a night leaves a finished study."""
    hangs = tmp_path / "hangs"
    with forked(lambda: joined(place, 6, Slow(2, hangs))) as first:
        until(hangs.exists)
        study = Study.load(*place)
        study.acquire(join=True)
        made = search(study, Fixed(POINTS), 6)
        turns: list[int] = []

        def turn(in_flight: int) -> None:
            turns.append(in_flight)
            if study.counts()["done"] == 5 and len(turns) > 12:
                made.stop.set()  # a person does not have to wait

        made.on_turn = turn
        assert made.run().stopped
        assert study.counts()["running"] == 1
        end(first)
        assert not search(study, Fixed(POINTS), 6).run().stopped
    check(study, 6)


def test_joining_on_the_command_line(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=7"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "-o", "budget.evaluations=5"])
    assert ended.value.code == 0
    held = work / "held"

    def hold() -> None:
        study = find_study("study.yaml", None, None)
        study.lease.note = "12 candidates, 3.0/min"
        study.acquire()
        held.touch()
        time.sleep(300)

    with forked(hold) as other:
        until(held.exists)
        with pytest.raises(SystemExit) as refused:
            main(command)
        said = capfd.readouterr().err
        assert refused.value.code == 4 and f"is being searched by process {other}" in said and "--join" in said
        with pytest.raises(SystemExit) as ended:
            main([*command, "--join"])
        assert ended.value.code == 0
        shown = status.glance(find_study("study.yaml", None, None))
        assert shown["done"] == 7 and shown["running"] == 0
        searched = [v for k, v in shown.items() if k.startswith(f"searched by process {other}")]
        assert len(searched) == 1 and searched[0].startswith("12 candidates, 3.0/min (seen ")
    assert status.glance(find_study("study.yaml", None, None))["searched by"] == "nobody"
