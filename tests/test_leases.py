"""Who may write: one controller or several, on both databases; the dead are replaced, and the late are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from evomerge import _study_writes, leases
from evomerge.errors import StudyConflict
from evomerge.leases import LEASES, OLD_LEASE, process_start
from evomerge.study import Header, NumberTaken, Study
from tests.databases import BOTH, database
from tests.test_study import BOUNDS, RECIPE, header, scores

Place = tuple[str, str]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with database(request.param, tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    monkeypatch.setattr(leases, "WATCH_S", 1.5)


def made(place: Place) -> Study:
    return Study.create(*place, header())


def child(target: Callable[..., None], *args: Any) -> Any:
    """A process that has begun; it is killed when the test ends, if it still runs."""
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def sql(study: Study, text: str, **values: Any) -> None:
    with study._session() as session:
        session.execute(sqlalchemy.text(text), {"study": study._id, **values})


def rewrite(study: Study, **changed: Any) -> None:
    """Change the row of the study's own lease behind its back."""
    with study._session() as session:
        key = f"{LEASES}{study.lease.fence}"
        held = json.loads(_study_writes.study_attrs(session, study._id, key)[key])
        _study_writes.set_study_attr(session, study._id, key, json.dumps({**held, **changed}))


def stop_heart(study: Study) -> None:
    study.lease._done.set()
    assert study.lease._heart is not None
    study.lease._heart.join()


def elsewhere(study: Study, **changed: Any) -> None:
    """Make the lease that of a process on another host, whose life only its heartbeat tells."""
    stop_heart(study)
    rewrite(study, host="elsewhere", boot="another", namespace="pid:[1]", **changed)
    study.lease._one_host = False


# -------------------------------------------------------------------- one controller


def _begin(place: Place, create: bool, barrier: Any, results: Any) -> None:
    study = None if create else Study.load(*place)
    barrier.wait()
    try:
        study = study or Study.create(*place, header())
        study.acquire()
        results.put("held")
        time.sleep(3)
    except StudyConflict:
        results.put("conflict")
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("create", [True, False])
def test_of_controllers_that_start_together_exactly_one_holds_the_study(place: Place, create: bool) -> None:
    if not create:
        made(place)
    barrier, results = FORK.Barrier(4), FORK.Queue()
    processes = [child(_begin, place, create, barrier, results) for _ in range(4)]
    assert sorted(results.get(timeout=60) for _ in processes) == ["conflict"] * 3 + ["held"]
    for process in processes:
        process.kill()
        process.join()


def _hold(place: Place, ready: Any, propose: int) -> None:
    study = Study.load(*place)
    study.acquire()
    for _ in range(propose):
        study.propose(RECIPE, None, BOUNDS)
    ready.set()
    time.sleep(60)


def test_the_second_controller_is_told_of_the_first_and_a_dead_one_is_no_obstacle(place: Place) -> None:
    study = made(place)
    study.propose(RECIPE, None, BOUNDS)  # by nobody: as studies from before leases had numbers
    assert study.candidate(0).owner is None
    ready = FORK.Event()
    other = child(_hold, place, ready, 2)
    assert ready.wait(60)
    with pytest.raises(StudyConflict, match=rf"process {other.pid} on {socket.gethostname()} \(seen \d+ s ago\)"):
        study.acquire()
    assert [c.owner for c in study.running()] == [1, 1, 1], "a start takes up what nobody runs"
    other.kill()
    other.join()
    started = time.monotonic()
    study.acquire()
    assert time.monotonic() - started < 1.0, "a process of this machine that is gone need not be watched"
    assert study.lease.fence == 2
    assert [c.owner for c in study.running()] == [2, 2, 2]
    assert study.finish(2, scores(0.5), 0, {})
    study.release()
    assert study.lease.controllers() == []


def test_fencing_numbers_only_grow(place: Place) -> None:
    study = made(place)
    seen = []
    for _ in range(3):
        study.acquire()
        seen.append(study.lease.fence)
        study.release()
    assert seen == [1, 2, 3]


def test_a_reused_process_number_is_not_the_old_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 600.0)
    study = made(place)
    study.acquire()
    stop_heart(study)
    rewrite(study, pid=os.getppid(), started=process_start(os.getppid()))
    with pytest.raises(StudyConflict, match=f"process {os.getppid()}"):
        Study.load(*place).acquire()
    rewrite(study, pid=os.getppid(), started="1")
    Study.load(*place).acquire()


def test_a_host_that_was_started_again_has_no_old_processes(tmp_path: Path) -> None:
    place = (f"sqlite:///{tmp_path / 'ledger.db'}", "x")
    study = made(place)
    study.acquire()
    stop_heart(study)
    rewrite(study, boot="before", pid=1, started=process_start(1))
    Study.load(*place).acquire()


def _pausable(place: Place, ready: Any, resumed: Any, results: Any) -> None:
    study = Study.load(*place)
    study.acquire()
    study.propose(RECIPE, None, BOUNDS)
    ready.set()
    resumed.wait(60)
    for write in (
        lambda: study.finish(0, scores(0.1), 0, {}),
        lambda: study.propose(RECIPE, None, BOUNDS),
        lambda: study.add_scores(0, "test", scores(0.1)["search"]),
    ):
        try:
            results.put(str(write()))
        except StudyConflict as error:
            results.put(str(error))


def test_a_controller_that_was_stopped_too_long_cannot_write(place: Place) -> None:
    study = made(place)
    ready, resumed, results = FORK.Event(), FORK.Event(), FORK.Queue()
    other = child(_pausable, place, ready, resumed, results)
    assert ready.wait(60)
    os.kill(other.pid, signal.SIGSTOP)
    time.sleep(2 * leases.LEASE_S)
    notes: list[str] = []
    study.transactions.on_note = notes.append
    study.acquire()
    assert [c.owner for c in study.running()] == [2] and "has not been heard of" in notes[0]
    os.kill(other.pid, signal.SIGCONT)
    resumed.set()
    for _ in range(3):
        assert "this process has lost the study" in results.get(timeout=30)
    assert study.candidate(0).state == "running"
    assert study.finish(0, scores(0.7), 0, {}) and study.candidate(0).values == (0.7, 2.3)
    other.join(10)
    assert study.lease.controllers()[0][0].fence == 2, "a release by the loser takes nothing from the holder"


def test_a_heartbeat_goes_on_and_tells_what_the_controller_says(place: Place) -> None:
    study = made(place)
    study.acquire()
    before = study.lease.controllers()[0][0].beat
    study.lease.note = "12 of 60"
    time.sleep(1.0)
    ((controller, age_s),) = Study.load(*place).lease.controllers()
    assert controller.beat > before and -0.1 < age_s < 1.0
    assert (controller.note, controller.pid) == ("12 of 60", os.getpid())
    study.release()


def test_a_proposal_is_a_heartbeat_in_the_same_transaction(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    study = made(place)
    study.acquire()
    stop_heart(study)
    before = study.lease.controllers()[0][0].beat
    time.sleep(0.05)
    assert study.propose(RECIPE, None, BOUNDS) == 0
    after = study.lease.controllers()[0][0].beat
    assert after > before and study.candidate(0).owner == study.lease.fence

    def broken(*args: Any) -> None:
        raise RuntimeError("here")

    monkeypatch.setattr(_study_writes, "insert_attrs", broken)
    with pytest.raises(RuntimeError, match="here"):
        study.propose(RECIPE, None, BOUNDS)
    assert len(study.candidates()) == 1, "a candidate without an owner is never seen"
    assert study.lease.controllers()[0][0].beat == after


# -------------------------------------------------------------------- clocks


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_clock_that_is_set_kills_nobody(place: Place, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """The database's clock jumps between the holder's heartbeats and the second controller's look."""
    study, second = made(place), Study.load(*place)
    study.acquire()
    far = {"host": "elsewhere", "boot": "another", "namespace": "pid:[1]"}
    study.lease._mine = leases.replace(study.lease._mine, **far)  # what each heartbeat writes
    second.lease._one_host = False
    time.sleep(0.5)
    real = _study_writes.now_s
    looks = 0

    def stepped(session: Any) -> float:
        """The heart of the holder is in another thread: it knows of the step with its next beat."""
        nonlocal looks
        if threading.current_thread() is not threading.main_thread():
            return real(session) + (step_s if looks > 4 else 0.0)
        looks += 1
        return real(session) + step_s

    monkeypatch.setattr(leases, "now_s", stepped)
    with pytest.raises(StudyConflict, match="on elsewhere"):
        second.acquire()
    assert looks > 4, "it was watched"
    stop_heart(study)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_hosts_with_wrong_clocks_agree(place: Place, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    study = made(place)
    study.acquire()
    elsewhere(study)
    second = Study.load(*place)
    second.lease._one_host = False
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step_s)
    with pytest.raises(StudyConflict, match="on elsewhere"):
        second.acquire()
    time.sleep(leases.LEASE_S)
    second.acquire()
    assert second.lease.fence == 2


def test_the_clock_is_the_databases(place: Place) -> None:
    study = made(place)
    with study._session() as session:
        first = _study_writes.now_s(session)
        time.sleep(0.2)
        second = _study_writes.now_s(session)
    assert 0.1 < second - first < 5.0, "not the start of the transaction"
    assert abs(first - time.time()) < 60


# -------------------------------------------------------------------- several controllers


def test_a_second_controller_joins(place: Place) -> None:
    first, second = made(place), Study.load(*place)
    first.acquire()
    first.propose(RECIPE, None, BOUNDS, number=0)
    second.acquire(join=True)
    assert (first.lease.fence, second.lease.fence) == (1, 2)
    assert [c.owner for c in second.running()] == [1], "what a living controller runs is left to it"
    with pytest.raises(NumberTaken):
        second.propose(RECIPE, None, BOUNDS, number=0)
    assert second.propose(RECIPE, None, BOUNDS, number=1) == 1
    assert second.finish(1, scores(0.5), None, {})
    assert [(c.number, c.arrival) for c in first.ended_since(0)] == [(1, 0)]
    assert first.finish(0, scores(0.7), None, {})
    assert [(c.number, c.arrival) for c in first.ended_since(1)] == [(0, 1)]
    assert [c.number for c in second.ended_since(0)] == [1, 0]
    assert first.ended_since(2) == []
    first.release()
    second.release()


def test_the_dead_ones_candidates_are_taken_up_by_those_beside_it(place: Place) -> None:
    study = made(place)
    study.acquire()
    ready = FORK.Event()
    other = child(_joined, place, ready)
    assert ready.wait(60)
    assert study.adopt() == []
    other.kill()
    other.join()
    assert [c.number for c in study.adopt()] == [0, 1]
    assert [c.owner for c in study.running()] == [1, 1]
    assert [c.fence for c, _ in study.lease.controllers()] == [1]
    study.release()


def _joined(place: Place, ready: Any) -> None:
    study = Study.load(*place)
    study.acquire(join=True)
    for _ in range(2):
        study.propose(RECIPE, None, BOUNDS)
    ready.set()
    time.sleep(60)


def _work(place: Place, count: int) -> None:
    study = Study.load(*place)
    study.acquire(join=True)
    for _ in range(count):
        number = study.propose(RECIPE, {"red.weight": 0.5, "blue.density": 0.5}, BOUNDS)
        assert study.finish(number, scores(0.5), None, {"by": os.getpid()})
    study.release()


def test_numbers_and_arrivals_of_many_controllers_have_no_gaps(place: Place) -> None:
    study = made(place)
    processes = [child(_work, place, 5) for _ in range(3)]
    seen: list[int] = []
    deadline = time.monotonic() + 90
    while len(seen) < 15 and time.monotonic() < deadline:
        fresh = study.ended_since(len(seen))
        assert [c.arrival for c in fresh] == list(range(len(seen), len(seen) + len(fresh))), "nothing comes in late"
        seen += [c.number for c in fresh]
        time.sleep(0.01)
    for process in processes:
        process.join()
    assert sorted(seen) == list(range(15))
    assert len({c.attrs["by"] for c in study.candidates()}) == 3
    assert [c.number for c in study.candidates()] == list(range(15))


# -------------------------------------------------------------------- studies from before


def test_a_study_from_before_leases_had_numbers_is_taken_up(place: Place) -> None:
    study = made(place)
    for _ in range(3):
        study.propose(RECIPE, None, BOUNDS)
    study.finish(1, scores(0.7), 0, {})
    sql(study, "delete from trial_system_attributes where key = 'evomerge:claim' and trial_id in "
               "(select trial_id from trials where study_id = :study)")  # fmt: skip
    sql(study, "delete from study_system_attributes where study_id = :study and key <> 'evomerge:header'")
    old = {"token": "t", "host": socket.gethostname(), "pid": os.getppid(), "beat": time.time()}
    with study._session() as session:
        started = process_start(os.getppid())
        _study_writes.set_study_attr(session, study._id, OLD_LEASE, json.dumps({**old, "started": started}))
    again = Study.load(*place)
    with pytest.raises(StudyConflict, match=f"process {os.getppid()}"):
        again.acquire()
    with study._session() as session:
        _study_writes.set_study_attr(session, study._id, OLD_LEASE, json.dumps({**old, "started": "1"}))
    again.acquire()
    assert [(c.number, c.owner) for c in again.running()] == [(0, 1), (2, 1)]
    assert again.finish(0, scores(0.6), None, {})
    assert again.candidate(0).arrival == 1, "the database counts on from what has ended"
    again.release()


def test_a_header_is_all_that_reading_needs(place: Place) -> None:
    study = made(place)
    sql(study, "delete from study_system_attributes where study_id = :study and key <> 'evomerge:header'")
    again = Study.load(*place)
    assert isinstance(again.header, Header) and again.candidates() == [] and again.lease.controllers() == []
