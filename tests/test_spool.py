"""Outcomes that wait on the disk: kept through kills and outages, recorded once, and never read from a torn file."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import storage
from evomerge.errors import StorageError, StudyConflict
from evomerge.fidelity import Stopped
from evomerge.objectives import Scores
from evomerge.spool import Spool, Torn, spool_folder
from evomerge.storage_url import normal
from evomerge.study import Study
from tests.databases import BOTH, database, postgres_url
from tests.test_study import BOUNDS, RECIPE, header, scores

FORK = multiprocessing.get_context("fork")
UID = "0123456789abcdef"


def record(number: int = 7, **changed: Any) -> dict[str, Any]:
    whole = {"number": number, "state": "COMPLETE", "ended": "2026-11-21T22:00:00.000001", "values": [0.1 + 0.2]}
    return {**whole, "user": {"arrival": 3, "note": "ü"}, "system": {"a:000": "2:eJx"}, **changed}


def test_an_outcome_comes_back_exactly(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", UID)
    assert spool.numbers() == []
    path = spool.put(record())
    assert [p.name for p in spool.folder.iterdir()] == [path.name]
    assert spool.numbers() == [7] and spool.read(7) == record()
    assert Spool(tmp_path / "spool", "f" * 32).numbers() == [], "a folder may hold files of several studies"
    spool.drop(path)
    spool.drop(path)
    assert spool.numbers() == []


def test_a_server_has_a_folder_by_the_studys_name(tmp_path: Path) -> None:
    assert spool_folder(tmp_path / "x.db", "demo") == tmp_path / "spool"
    assert spool_folder(None, "demo") == Path("runs/demo/spool")
    assert spool_folder(None, "../../etc") == Path("runs/_.._etc/spool")
    assert spool_folder(None, "..") == Path("runs/_/spool")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_torn_file_is_set_aside_and_never_recorded(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("torn")
    spool = Spool(folder, UID)
    path = spool.put(record())
    whole = path.read_bytes()
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    notes: list[str] = []
    assert spool.records(notes.append) == []
    assert [p.suffix for p in folder.iterdir()] == [".bad"] and len(notes) == 1 and ".bad" in notes[0]
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "held",
    [
        {"study": "f" * 32, "record": record()},
        {"study": UID, "record": record(8)},
        {"study": UID, "record": record(state="RUNNING")},
        {"study": UID, "record": record(values=[float("nan")])},
        {"study": UID, "record": record(values=["0.5"])},
        {"study": UID, "record": record(ended="yesterday")},
        {"study": UID, "record": record(system={"a": 1})},
        {"study": UID, "record": [1]},
        {"study": UID},
        ["nothing"],
        7,
    ],
)
def test_a_file_of_something_else_is_refused_even_with_a_right_checksum(tmp_path: Path, held: Any) -> None:
    import hashlib

    spool = Spool(tmp_path, UID)
    path = spool.put(record())
    body = json.dumps(held).encode()
    path.write_bytes(f"evomerge-spool 1 {hashlib.sha256(body).hexdigest()}\n".encode() + body)
    with pytest.raises(Torn):
        spool.read(7)


# -------------------------------------------------------------------- a study with a failing database


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    monkeypatch.chdir(tmp_path)  # a server's studies spool below runs/
    monkeypatch.setattr(storage, "PAUSES_S", (0.05, 0.2))
    monkeypatch.setattr(storage, "BUSY_S", 0.2)
    with database(request.param, tmp_path) as found:
        yield found


def begun(place: tuple[str, str], candidates: int = 3) -> Study:
    study = Study.create(*place, header())
    study.acquire()
    for _ in range(candidates):
        study.propose(RECIPE, None, BOUNDS)
    return study


def spooled(study: Study) -> list[int]:
    assert study._spool is not None
    return study._spool.numbers()


def test_nothing_stays_in_the_spool_when_all_is_well(place: tuple[str, str]) -> None:
    study = begun(place)
    study.finish(0, scores(0.5), 0, {})
    study.fail(1, "crash", "no", 1)
    assert study._spool is not None and spooled(study) == []
    assert list(study._spool.folder.iterdir()) == []
    study.release()


def _killed_before_the_database(place: tuple[str, str]) -> None:
    study = Study.load(*place)
    study.acquire()

    def kill(record: Any) -> bool:
        if record["number"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    study._record = kill  # type: ignore[method-assign, assignment]
    study._spool.drop = lambda path: None  # type: ignore[union-attr, method-assign]
    study.finish(0, scores(0.5), 0, {"t_eval_s": 2.0})
    positions = {"acc": np.array([0, 3]), "bits": np.array([1])}
    seen = {"acc": Scores(0.4, 0.2, np.array([1.0, 0.0])), "bits": Scores(2.5, 0.3, np.ones((1, 2)))}
    study.stop(1, seen, Stopped(0.125, 0, positions), 1, {})
    study.fail(2, "crash", "it broke", 2)


def test_what_a_killed_controller_had_found_is_recorded_by_the_next(place: tuple[str, str]) -> None:
    study = begun(place, 4)
    study.release()
    child = FORK.Process(target=_killed_before_the_database, args=(place,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [c.state for c in study.candidates()] == ["running"] * 4
    notes: list[str] = []
    study.transactions.on_note = notes.append
    study.acquire()
    assert notes == ["3 outcomes that had not reached the database are recorded now"]
    done, stopped, failed, left = study.candidates()
    assert (done.state, done.values, done.attrs["t_eval_s"], done.arrival) == ("done", (0.5, 2.5), 2.0, 0)
    assert (stopped.state, stopped.estimate, stopped.arrival) == ("stopped", (0.4, 2.5), 1)
    assert (failed.state, failed.reason, failed.arrival) == ("failed", "crash", 2)
    assert left.state == "running" and spooled(study) == []
    stored = study.scores(0, "search")
    assert stored is not None and np.array_equal(stored["acc"].items, scores(0.5)["search"]["acc"].items)
    study.release()


def test_an_outcome_that_another_has_recorded_is_dropped(place: tuple[str, str]) -> None:
    study = begun(place)
    assert study._spool is not None
    study._spool.put({**record(0, values=[0.9, 0.9]), "user": {"arrival": 0}, "system": {}})
    study._spool.put({**record(1, values=[0.9, 0.9]), "user": {}, "system": {}})
    study.finish(0, scores(0.5), 0, {})
    study._spool.put({**record(0, values=[0.9, 0.9]), "user": {"arrival": 0}, "system": {}})
    again = Study.load(*place)
    again.acquire(join=True)
    assert again.candidate(0).values == (0.5, 2.5)
    assert spooled(again) == [1], "candidate 1 is a living controller's: its outcome is its own"
    assert again.candidate(1).state == "running"
    again.release()
    study.release()


class Proxy:
    """A server on a port of this machine that passes bytes on to PostgreSQL, until it is cut."""

    def __init__(self, url: str) -> None:
        parsed = sqlalchemy.engine.make_url(normal(url))
        self._target = (parsed.host or "127.0.0.1", parsed.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = parsed.set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)
        self.cut = False
        self._deaf = False
        self.break_at: Callable[[bytes], bool] = lambda data: False
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                here.close()
                continue
            there = socket.create_connection(self._target)
            self._open += [here, there]
            for a, b, watched in ((here, there, True), (there, here, False)):
                threading.Thread(target=self._pass, args=(a, b, watched), daemon=True).start()

    def _pass(self, a: socket.socket, b: socket.socket, watched: bool) -> None:
        while True:
            try:
                data = a.recv(65536)
            except OSError:
                return
            if not data:
                b.close()
                return
            if watched and self.break_at(data):
                self._deaf = True
                b.sendall(data)  # the server hears it ...
                time.sleep(0.3)
                self.disconnect()  # ... and its answer is lost
                self._deaf = False
                return
            if self._deaf and not watched:
                continue
            try:
                b.sendall(data)
            except OSError:
                return

    def disconnect(self) -> None:
        for each in self._open:
            _slam(each)
        self._open.clear()

    def close(self) -> None:
        self.cut = True
        self._listener.close()
        self.disconnect()


def _slam(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


@pytest.fixture
def proxied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "PAUSES_S", (0.05, 0.2))
    with database("postgres", tmp_path) as (url, name):
        proxy = Proxy(url)
        yield proxy, name
        proxy.close()


@pytest.mark.postgres
def test_a_cut_network_is_waited_for(proxied: tuple[Proxy, str]) -> None:
    proxy, name = proxied
    study = begun((proxy.url, name))
    notes: list[str] = []
    study.transactions.on_note = notes.append
    proxy.cut = True
    proxy.disconnect()
    threading.Timer(1.5, lambda: setattr(proxy, "cut", False)).start()
    assert study.finish(0, scores(0.5), 0, {})
    assert study.candidate(0).values == (0.5, 2.5) and spooled(study) == []
    assert len(notes) == 2 and "trying again" in notes[0] and "answers again" in notes[1]
    study.release()


@pytest.mark.postgres
@pytest.mark.parametrize("what", ["finish", "propose"])
def test_a_commit_whose_answer_is_lost_is_not_done_twice(proxied: tuple[Proxy, str], what: str) -> None:
    proxy, name = proxied
    study = begun((proxy.url, name), 1)
    study.lease._done.set()
    cuts: list[bytes] = []

    def at_commit(data: bytes) -> bool:
        if b"COMMIT" in data and not cuts:
            cuts.append(data)
            return True
        return False

    proxy.break_at = at_commit
    if what == "finish":
        assert study.finish(0, scores(0.5), 0, {}), "it is our own record that is there already"
        assert study.candidate(0).values == (0.5, 2.5)
    else:
        assert study.propose(RECIPE, None, BOUNDS) == 1
    assert cuts and len(study.candidates()) == (1 if what == "finish" else 2)
    assert not study.fail(0, "crash", "late", 1) or what == "propose"
    study.release()


@pytest.mark.postgres
def test_a_server_that_ends_all_connections_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with database("postgres", tmp_path) as place:
        study = begun(place)
        admin = sqlalchemy.create_engine(normal(postgres_url()))
        with study._session() as session:
            pid = session.execute(sqlalchemy.text("select pg_backend_pid()")).scalar_one()
        with admin.connect() as connection:
            connection.execute(sqlalchemy.text("select pg_terminate_backend(:pid)"), {"pid": pid})
        assert study.finish(0, scores(0.5), 0, {})
        study.release()
        admin.dispose()


def test_a_lock_that_lasts_is_waited_for_and_then_the_outcome_is_kept(
    place: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge._study_writes.LOCK_WAIT_MS", 200)
    study = begun(place)
    study.lease._done.set()
    study.transactions.patience_s = 1.0
    holder = Study.load(*place)
    with holder._session() as session:
        from evomerge._study_writes import lock_study

        lock_study(session, holder._id)
        started = time.monotonic()
        with pytest.raises(StorageError):
            study.finish(0, scores(0.5), 0, {})
        assert time.monotonic() - started < 20
    assert spooled(study) == [0], "nothing that was scored is lost"
    assert study.candidate(0).state == "running"
    again = Study.load(*place)
    again.acquire()
    assert again.candidate(0).values == (0.5, 2.5) and spooled(again) == []
    with pytest.raises(StudyConflict, match="lost the study"):
        study.finish(1, scores(0.5), 1, {})
    again.release()


def test_a_database_that_comes_back_in_time_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.05, 0.2))
    monkeypatch.setattr(storage, "BUSY_S", 0.1)
    place = (f"sqlite:///{tmp_path / 'ledger.db'}", "x")
    study = begun(place)
    blocker = sqlite3.connect(tmp_path / "ledger.db", check_same_thread=False)
    blocker.execute("begin immediate")
    notes: list[str] = []
    study.transactions.on_note = notes.append
    threading.Timer(1.0, blocker.rollback).start()
    assert study.finish(0, scores(0.5), 0, {})
    assert "locked" in notes[0] and "answers again" in notes[1]
    study.release()


def test_who_only_looks_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BUSY_S", 0.1)
    study = Study.create(f"sqlite:///{tmp_path / 'ledger.db'}", "x", header())
    (tmp_path / "ledger.db").write_bytes(b"")
    started = time.monotonic()
    with pytest.raises(StorageError):
        study.candidates()
    assert time.monotonic() - started < 5


def test_a_spool_that_cannot_be_written_does_not_stop_the_record(tmp_path: Path) -> None:
    study = begun((f"sqlite:///{tmp_path / 'ledger.db'}", "x"))
    (tmp_path / "spool").write_text("a file where the folder belongs")
    notes: list[str] = []
    study.transactions.on_note = notes.append
    assert study.finish(0, scores(0.5), 0, {})
    assert "not spooled" in notes[0]
    study.release()
