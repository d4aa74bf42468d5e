"""Faults in whole searches, by the rows of docs/reliability.md, whose table says where each row is tested."""

from __future__ import annotations

import os
import re
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge import _study_writes, leases, storage
from evomerge.study import Study
from tests.conftest import study_rows
from tests.databases import BOTH, database
from tests.faults.invariants import MARK, Run, check_invariants
from tests.faults.searches import FORK, Tiny, ended

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 180.0  # of these tests with a busy machine
_expected: dict[int, tuple[list[Any], list[int]]] = {}


@pytest.fixture(autouse=True)
def _imported_before_forking(family: Path) -> None:
    """What a search imports, imported once: the forked searches then start at once."""
    import cma  # noqa: F401

    from evomerge.model import LiveModel

    LiveModel(str(family / "base"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.05, 0.2))


@pytest.fixture(params=BOTH)
def tiny(request: pytest.FixtureRequest, work: Path) -> Iterator[Tiny]:
    with database(request.param, work) as (url, name):
        yield Tiny(url, name)


def result_of(tiny: Tiny) -> tuple[list[Any], list[int]]:
    from evomerge.rescore import front_of

    study = tiny.study
    return study_rows(study), [c.number for c in front_of(study, study.candidates())]


def without_faults(tiny: Tiny) -> tuple[list[Any], list[int]]:
    """What the same search gives when nothing happens to it, in a database of its own; searched once."""
    held = _expected.get(tiny.evaluations)
    if held is not None:
        return held
    other = Tiny("sqlite:///apart/ledger.db", tiny.name, tiny.evaluations, tiny.more)
    assert other.run(log="apart.txt") == 0, Path("apart.txt").read_text()
    found = _expected[tiny.evaluations] = result_of(other)
    Path("acks.txt").unlink()
    return found


def wait_for(done: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, f"not in {PATIENCE_S:g} s: {what}"
        time.sleep(0.05)


def check(tiny: Tiny, **more: Any) -> list[Any]:
    run = Run(tiny.acknowledged(), budget=tiny.evaluations, overrides=tiny.overrides, **more)
    return check_invariants(tiny.url, tiny.name, run)


# -------------------------------------------------------------------- rows 1 to 3: workers


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("sqlite", "{local: 2, threads: 1, timeout_s: 15}"),
    ],
)
def test_workers_that_die_at_each_stage_hang_or_meet_poison(
    work: Path, kind: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One search: workers die while opening, merging, scoring and reporting; one candidate is poison, one hangs."""
    monkeypatch.setenv(MARK, str(work))
    fault = (
        f"opening:1@{work}/once0,merging:#2@{work}/once1,scoring:2@{work}/once2,reporting:#4@{work}/once3,"
        "merging:#6,merging:#7=hang"
    )
    with database(kind, work) as (url, name):
        tiny = Tiny(url, name, 10, (f"workers={pool}",))
        started = time.monotonic()
        assert tiny.run(fault, inline=False) == 0, Path("log.txt").read_text()
        took_s = time.monotonic() - started
        found = check(tiny, mark=str(work), replay="parallel", took_s=took_s, limit_s=280, rescore=[0])
        assert all((work / f"once{i}").exists() for i in range(4)), "every fault has struck"
        states = {c.number: (c.state, c.reason) for c in found}
        assert states[6] == ("failed", "poison") and states[7] == ("failed", "timeout")
        assert {states[n] for n in states if n not in (6, 7)} == {("done", None)}
        assert sorted(tiny.acknowledged()) == list(range(10))


# -------------------------------------------------------------------- row 4: the controller at every ledger call


def _count_transactions(limit: int | None) -> None:
    """Kill this process after its `limit`-th transaction; without a limit, write their number to calls.txt."""
    once, calls = storage.Transactions.once, 0

    def counted(self: Any, work: Any) -> Any:
        nonlocal calls
        value = once(self, work)
        calls += 1
        if limit is None:
            Path("calls.txt").write_text(str(calls))
        elif calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    storage.Transactions.once = counted  # type: ignore[method-assign]


def crash_after(tiny: Tiny, expected: Any, n: int) -> None:
    """One search that is killed after its n-th transaction, and one that goes on."""
    for path in (*Path("runs").rglob("*"), Path("acks.txt")):
        if path.is_file():
            path.unlink()
    assert tiny.run(prelude=lambda: _count_transactions(n)) == -signal.SIGKILL
    assert tiny.run() == 0, f"after call {n}: {Path('log.txt').read_text()}"
    check(tiny, expected=expected)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.85])
def test_a_kill_after_some_calls_of_the_database(work: Path, share: float) -> None:
    tiny = Tiny(evaluations=7)
    expected, calls = _calls(tiny)
    crash_after(tiny, expected, max(1, int(calls * share)))


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_kill_after_every_call_of_the_database(work: Path) -> None:
    tiny = Tiny(evaluations=7)
    expected, calls = _calls(tiny)
    for n in range(1, calls + 1):
        crash_after(tiny, expected, n)


def _calls(tiny: Tiny) -> tuple[Any, int]:
    assert tiny.run(prelude=lambda: _count_transactions(None)) == 0, Path("log.txt").read_text()
    return result_of(tiny), int(Path("calls.txt").read_text())


# -------------------------------------------------------------------- rows 7 and 8: other controllers


def _hold(url: str, name: str, ready: Any) -> None:
    study = Study.load(url, name)
    study.acquire()
    ready.set()
    time.sleep(600)


def test_a_second_search_of_one_study_ends_with_4_and_names_the_first(tiny: Tiny) -> None:
    assert tiny.run("recording:4") == -signal.SIGKILL
    ready = FORK.Event()
    holder = FORK.Process(target=_hold, args=(tiny.url, tiny.name, ready), daemon=True)
    holder.start()
    assert ready.wait(PATIENCE_S)
    before = study_rows(tiny.study)
    assert tiny.run(log="second.txt") == 4
    assert f"process {holder.pid} on" in Path("second.txt").read_text()
    assert study_rows(tiny.study) == before
    check(tiny, ended=False)
    holder.kill()
    holder.join()
    assert tiny.run() == 0
    check(tiny)


def test_a_search_that_was_stopped_for_too_long_loses_the_study_to_the_next(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP within a candidate, another search takes over and ends, SIGCONT: the late outcome is refused."""
    for name, value in (("BEAT_S", 0.1), ("LEASE_S", 2.0), ("WATCH_S", 1.5)):
        monkeypatch.setattr(leases, name, value)
    expected = without_faults(tiny)
    # Its heart is silent: stopped inside a heartbeat it would hold the lock of SQLite, and nobody could take over.
    silent = lambda: setattr(leases, "BEAT_S", 600.0)  # noqa: E731
    first = tiny.start("finishing:4=stop", log="first.txt", prelude=silent)
    os.waitpid(first, os.WUNTRACED)
    time.sleep(2 * leases.LEASE_S)
    assert tiny.run(log="second.txt") == 0, Path("second.txt").read_text()
    check(tiny, expected=expected)
    os.kill(first, signal.SIGCONT)
    assert ended(first) == 4
    assert "by another process" in Path("first.txt").read_text()
    for path in tiny_spool(tiny):  # the refused outcome: the next who takes up the study drops it
        assert path.suffix == ".json"
    assert tiny.run() == 0
    check(tiny, expected=expected)


def tiny_spool(tiny: Tiny) -> list[Path]:
    from evomerge.spool import spool_folder

    folder = spool_folder(storage.sqlite_file(tiny.url), tiny.name)
    return list(folder.iterdir()) if folder.exists() else []


# -------------------------------------------------------------------- rows 10 and 11: the database and the disk


def test_a_database_that_stays_locked_ends_the_search_with_3_and_nothing_is_scored_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BUSY_S", 0.1)
    monkeypatch.setattr(storage, "PATIENCE_S", 3.0)
    tiny = Tiny()
    expected = without_faults(tiny)
    stopped = tiny.start("finishing:4=stop", log="first.txt")
    os.waitpid(stopped, os.WUNTRACED)  # it has scored candidate 3, and not recorded it
    blocker = sqlite3.connect("runs/tiny/ledger.db")
    blocker.execute("begin immediate")
    os.kill(stopped, signal.SIGCONT)
    assert ended(stopped) == 3
    blocker.rollback()
    blocker.close()
    said = Path("first.txt").read_text()
    assert "locked" in said and "continue with: evomerge search study.yaml" in said
    assert len(tiny_spool(tiny)) == 1, "what was scored is kept"
    assert tiny.run(f"merging:#3@{work}/again") == 0, "candidate 3 is not scored again"
    assert not Path("again").exists()
    check(tiny, expected=expected)


def test_a_lock_that_passes_is_waited_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BUSY_S", 0.1)
    tiny = Tiny()
    expected = without_faults(tiny)
    search = tiny.start("finishing:4=stop")
    os.waitpid(search, os.WUNTRACED)
    blocker = sqlite3.connect("runs/tiny/ledger.db")
    blocker.execute("begin immediate")
    os.kill(search, signal.SIGCONT)
    wait_for(lambda: "trying again" in Path("log.txt").read_text(), "the search says that it waits")
    blocker.rollback()
    blocker.close()
    assert ended(search) == 0 and "answers again" in Path("log.txt").read_text()
    check(tiny, expected=expected)


def _small_disk() -> None:
    """From the fourth proposal on, no file of this process can grow beyond what the database has now."""
    insert, calls = _study_writes.insert_candidate, 0

    def limited(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            grown = max(p.stat().st_size for p in Path("runs/tiny").iterdir())
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (grown, hard))
        return insert(*args)

    _study_writes.insert_candidate = limited


def test_a_full_disk_loses_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 2.0)
    tiny = Tiny()
    expected = without_faults(tiny)
    assert tiny.run(prelude=_small_disk, log="first.txt") == 3, Path("first.txt").read_text()
    assert "continue with: evomerge search study.yaml" in Path("first.txt").read_text()
    check(tiny, ended=False)
    assert tiny.run() == 0
    check(tiny, expected=expected)


# -------------------------------------------------------------------- the table


def test_the_table_names_every_row_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert rows == [str(n) for n in range(1, 27)]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"no {test} in {file}"
