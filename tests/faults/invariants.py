"""What must hold after every fault, checked by one function over the study, what was shown, and what is left behind."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy

from evomerge.config import load_study_file
from evomerge.history import oriented
from evomerge.optimizers import Exhausted, Optimizer, Result
from evomerge.prepare import Prepared, prepare
from evomerge.rescore import front_of
from evomerge.spool import spool_folder
from evomerge.storage import sqlite_file
from evomerge.study import Candidate, Study
from tests.conftest import study_rows

MARK = "EVOMERGE_TEST_RUN"  # in the environment of a search and, so, of all processes that it starts
LEAVE_S = 30.0  # how long workers have for noticing that their search is gone


@dataclass
class Run:
    """What was seen of a search from outside, over all its processes.

    Attributes:
        acknowledged: numbers of candidates, in the order in which a person saw them as done.
        ended: the search came to its end: no candidate runs, and nobody holds the study.
        budget: candidates that it may have at most.
        mark: value of EVOMERGE_TEST_RUN in the environment of its processes.
        pids: further processes that must be gone.
        expected: rows and front of the same search without faults; only for a serial one.
        replay: how the optimizer is asked again: "serial" (its proposals are the recorded ones), "parallel" (two
            replays agree about the next proposal), or "" for not at all.
        overrides: of the study file, for `replay` and `rescore`.
        rescore: numbers of candidates that are scored again from their stored recipes.
        took_s, limit_s: wall-clock time, and how long it may take at most.
        canaries: files that code in a hostile file would have made.
    """

    acknowledged: Sequence[int] = ()
    ended: bool = True
    budget: int | None = None
    mark: str = ""
    pids: Sequence[int] = ()
    expected: tuple[list[Any], list[int]] | None = None
    replay: str = ""
    overrides: tuple[str, ...] = ()
    rescore: Sequence[int] = ()
    took_s: float = 0.0
    limit_s: float = float("inf")
    canaries: Sequence[Path] = field(default_factory=lambda: (Path("canary"),))


def check_invariants(url: str, name: str, run: Run | None = None) -> list[Candidate]:
    """Assert the invariants; the candidates, for what else a test wants to know. Call it in the study's folder.

    I1: every acknowledged candidate has ended in the database, and none was acknowledged twice.
    I2: by SQL of our own, one row per number, one value per objective of a complete row, none of others; SQLite's own
        check of the file.
    I3: every row ended with what its state needs, or runs and a living controller has it; counts add up; arrivals
        have no gap; the budget is kept.
    I4: if `expected`: rows and front are those of a run without faults.
    I5: if `replay`: an optimizer that is told the study's results proposes what it proposed.
    I6: the front is that of a double loop over all pairs.
    I7: no canary file exists.
    I8: no process of the search, temporary file, spooled outcome, or lease is left.
    I9: if `rescore`: the stored recipe gives the stored scores and items, bit for bit.
    I10: `took_s` is at most `limit_s`.
    """
    run = run or Run()
    study = Study.load(url, name)
    candidates = study.candidates()
    _acknowledged(candidates, run)
    _rows(study)
    _states(study, candidates, run)
    if run.expected is not None:
        assert study_rows(study) == run.expected[0], "I4: not the candidates of a run without faults"
        assert [c.number for c in front_of(study, candidates)] == run.expected[1], "I4: another front"
    _front(study, candidates)
    for canary in run.canaries:
        assert not canary.exists(), f"I7: {canary} was made: code in a file was run"
    _leftovers(study, run)
    if run.replay or run.rescore:
        prepared = prepare(load_study_file("study.yaml", run.overrides), run.overrides)
        if run.replay:
            _replay(study, candidates, prepared, serial=run.replay == "serial")
        for number in run.rescore:
            _rescore(study, candidates[number], prepared)
    assert run.took_s <= run.limit_s, f"I10: {run.took_s:.1f} s, more than {run.limit_s:g} s"
    return candidates


def _acknowledged(candidates: Sequence[Candidate], run: Run) -> None:
    ended = {c.number for c in candidates if c.state != "running"}
    assert len(run.acknowledged) == len(set(run.acknowledged)), "I1: a candidate was shown as done twice"
    lost = set(run.acknowledged) - ended
    assert not lost, f"I1: shown as done, and lost: {sorted(lost)}"


def _rows(study: Study) -> None:
    query = (
        "select t.number, t.state, count(v.trial_value_id) from trials t"
        " left join trial_values v on v.trial_id = t.trial_id where t.study_id = :study group by t.trial_id order by 1"
    )
    with study._session() as session:
        rows = [(n, str(s), c) for n, s, c in session.execute(sqlalchemy.text(query), {"study": study._id})]
    assert [n for n, _, _ in rows] == list(range(len(rows))), "I2: numbers are missing, or there twice"
    wanted = len(study.header.objectives)
    wrong = [r for r in rows if r[2] != (wanted if r[1] == "COMPLETE" else 0)]
    assert not wrong, f"I2: rows with too many or too few values: {wrong}"
    file = sqlite_file(study._storage.url)
    if file is not None:
        with sqlite3.connect(file) as connection:
            assert connection.execute("pragma integrity_check").fetchone() == ("ok",), "I2: the file is damaged"
        connection.close()


def _states(study: Study, candidates: Sequence[Candidate], run: Run) -> None:
    for c in candidates:
        assert (c.values is not None) == (c.state == "done"), f"I3: #{c.number} is {c.state} with values {c.values}"
        assert (c.reason is not None) == (c.state == "failed"), f"I3: #{c.number} is {c.state}, reason {c.reason}"
        assert (c.arrival is None) == (c.state == "running"), f"I3: #{c.number} is {c.state}, arrival {c.arrival}"
        assert c.values is None or np.isfinite(c.values).all(), f"I3: #{c.number} has values {c.values}"
    arrivals = sorted(c.arrival for c in candidates if c.arrival is not None)
    assert arrivals == list(range(len(arrivals))), f"I3: arrivals have gaps or repeats: {arrivals}"
    counts = study.counts()
    states = [c.state for c in candidates]
    assert {s: counts.get(s, 0) for s in set(states)} == {s: states.count(s) for s in set(states)}, "I3: counts"
    assert run.budget is None or len(candidates) <= run.budget, f"I3: {len(candidates)} candidates of {run.budget}"
    running = [c for c in candidates if c.state == "running"]
    if run.ended:
        assert not running, f"I3: still running: {[c.number for c in running]}"
        return
    living = {c.fence for c, _ in study.lease.controllers() if not c.is_gone}
    orphans = [c.number for c in running if c.owner not in living]
    assert not living or not orphans, f"I3: run by nobody, beside a living controller: {orphans}"


def _front(study: Study, candidates: Sequence[Candidate]) -> None:
    """Candidates beaten by none, compared pair by pair; equal recipes count once, the first."""
    if study.header.identity.get("constraints"):
        return  # what is feasible has tests of its own
    ups = list(study.header.objectives.values())
    first: dict[str, tuple[int, list[float]]] = {}
    for c in candidates:
        if c.values is not None:
            signed = [v if up else -v for v, up in zip(c.values, ups, strict=True)]
            first.setdefault(c.fingerprint, (c.number, signed))
    beaten = {
        n
        for n, mine in first.values()
        for _, other in first.values()
        if all(o >= m for o, m in zip(other, mine, strict=True)) and other != mine
    }
    expected = {n for n, _ in first.values()} - beaten
    assert {c.number for c in front_of(study, candidates)} == expected, "I6: not the front of a double loop"


def processes(mark: str) -> list[int]:
    """Living processes that were started with that value of EVOMERGE_TEST_RUN, but for this one."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # another's process, or one that has just ended
            continue
    return found


def _leftovers(study: Study, run: Run) -> None:
    deadline = time.monotonic() + LEAVE_S
    while True:
        left = [p for p in run.pids if Path(f"/proc/{p}").exists()]
        left += processes(run.mark) if run.mark and run.ended else []
        if not left:
            break
        assert time.monotonic() < deadline, f"I8: processes {left} are still there"
        time.sleep(0.1)
    if not run.ended:
        return
    assert study.lease.controllers() == [], "I8: the study is still held"
    file = sqlite_file(study._storage.url)
    spool = spool_folder(file, study.name)
    held = [p.name for p in spool.iterdir()] if spool.exists() else []
    assert not held, f"I8: outcomes are left in the spool: {held}"
    folder = spool.parent
    temporary = [str(p) for p in folder.rglob("*") if p.name.endswith((".tmp", ".partial")) or ".partial" in p.name]
    assert not temporary, f"I8: temporary files are left: {temporary}"


def _told(study: Study, prepared: Prepared, candidates: Sequence[Candidate], optimizer: Optimizer) -> None:
    """Tell ended candidates in the order in which they ended."""
    space = prepared.space_of(study.header)
    ups = list(study.header.objectives.values())
    for c in sorted((c for c in candidates if c.arrival is not None), key=lambda c: c.arrival or 0):
        values, stderr = c.values or c.estimate, c.stderr or c.estimate_stderr
        optimizer.tell(
            Result(
                number=c.number,
                x=space.encode(c.params) if c.params else None,
                values=oriented(values, ups) if values is not None else None,
                stderr=np.array(stderr) if stderr is not None else None,
            )
        )


def _replay(study: Study, candidates: Sequence[Candidate], prepared: Prepared, *, serial: bool) -> None:
    space = prepared.space_of(study.header)
    if not serial:
        asked = []
        for _ in range(2):
            optimizer = prepared.make_optimizer(study.header)
            _told(study, prepared, Study.load(study._storage.url, study.name).candidates(), optimizer)
            try:
                asked.append(space.decode(optimizer.ask(len(candidates), [])))
            except Exhausted as error:
                asked.append({"exhausted": str(error)})
        assert asked[0] == asked[1], "I5: two replays of one study propose different points"
        return
    optimizer = prepared.make_optimizer(study.header)
    for c in candidates:
        if c.number >= len(prepared.known) and c.source is None:
            assert space.decode(optimizer.ask(c.number, [])) == c.params, f"I5: the replay proposes another #{c.number}"
        _told(study, prepared, [c], optimizer)


def _rescore(study: Study, candidate: Candidate, prepared: Prepared) -> None:
    from evomerge.worker import Job, Outcome, Worker

    found = Worker(prepared.worker).evaluate(
        Job(candidate.number, candidate.recipe, batch_tokens=candidate.attrs.get("batch_tokens"))
    )
    assert isinstance(found, Outcome)
    stored = study.scores(candidate.number, "search")
    assert stored is not None
    for name, score in found.scores["search"].items():
        assert score.value == stored[name].value, f"I9: #{candidate.number} scores {score.value}, {name} is stored"
        assert np.array_equal(score.items, stored[name].items), f"I9: items of #{candidate.number}, {name}"
