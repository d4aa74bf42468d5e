"""Pools: the same outcomes everywhere; dead, slow and broken workers are replaced and their jobs accounted for."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge._ray_worker import RayWorker
from evomerge.errors import EvomergeError
from evomerge.local_pool import LocalPool, how_it_ended
from evomerge.objectives import ObjectiveSpec
from evomerge.pool import WAITING, InlinePool, Pool
from evomerge.prepare import _default_threads
from evomerge.ray_pool import RayPool, _environment
from evomerge.recipe import Recipe
from evomerge.worker import Failed, Job, Outcome, WorkerSpec
from evomerge.worker_entries import Workers

EXPERTS = ("red", "green", "blue")
# Without lm-eval, whose import would be most of the time of every worker's start.
OBJECTIVES = (ObjectiveSpec("text", "perplexity", {"files": {"search": "text.search.txt"}}),)
INLINE_BYTES = 100_000  # what is smaller, Ray sends along; the rest would go through its object store
SPEC = WorkerSpec("base", ("base", *EXPERTS), OBJECTIVES, threads=1, allowed_s=120)


def job(number: int, weight: float, **parameters: float) -> Job:
    experts = {e: {"weight": weight} for e in EXPERTS}
    return Job(number, Recipe.build("task_arithmetic", "base", experts, parameters=parameters))


def collect(pool: Pool, count: int, limit_s: float = 240) -> dict[int, Outcome | Failed]:
    found: dict[int, Outcome | Failed] = {}
    started = time.monotonic()
    while len(found) < count:
        assert time.monotonic() - started < limit_s, f"only {sorted(found)} of {count} after {limit_s} s"
        for result in pool.wait(0.5):
            assert result.number not in found, "a job was answered twice"
            found[result.number] = result
    return found


def test_a_candidate_that_always_kills_its_worker_is_tried_twice_and_no_more(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_FAULT", "merging:2")  # in every worker, the second job it gets
    made = LocalPool(SPEC, 1)
    try:
        made.submit(job(0, 0.1))
        assert isinstance(collect(made, 1)[0], Outcome)
        monkeypatch.setenv("EVOMERGE_FAULT", "merging:1")  # in workers that start now
        made.submit(job(1, 0.2))
        result = collect(made, 1)[1]
        assert isinstance(result, Failed) and result.reason == "poison"
        assert "killed 2 workers" in result.message and result.message.count("was killed by SIGKILL") == 2
        monkeypatch.delenv("EVOMERGE_FAULT")
        made._replace(0, made._slots[0])  # a worker that does not die at its first job
        made.submit(job(2, 0.1))
        assert isinstance(collect(made, 1)[2], Outcome)
    finally:
        made.close()


def test_a_weight_file_that_is_cut_short_under_a_worker_ends_the_search_with_its_name(work: Path) -> None:
    made = LocalPool(SPEC, 1)
    try:
        made.submit(job(0, 0.1))
        assert isinstance(collect(made, 1)[0], Outcome)
        os.truncate(work / "green" / "model.safetensors", 4096)
        made.submit(job(1, 0.2))  # its worker dies of SIGBUS; the next one sees the file
        with pytest.raises(EvomergeError, match=r"green/model\.safetensors: not a complete safetensors file"):
            collect(made, 1)
    finally:
        made.close()


@pytest.mark.parametrize("own", [None, *WAITING])
def test_threads_of_workers_sleep_while_they_wait_unless_the_user_says_otherwise(
    own: str | None, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in WAITING:
        monkeypatch.delenv(key, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "0")
    expected = {"OMP_WAIT_POLICY": "PASSIVE"} if own is None else {own: "0"}
    before = dict(os.environ)
    made = LocalPool(SPEC, 1)
    try:
        process = Path(f"/proc/{made._slots[0].process.pid}")
        while "spawn_main" not in (process / "cmdline").read_text():
            time.sleep(0.01)  # it is still a copy of this one
        lines = (process / "environ").read_text().split("\0")
    finally:
        made.close()
    inherited = dict(line.split("=", 1) for line in lines if "=" in line)
    assert {key: inherited[key] for key in WAITING if key in inherited} == expected
    assert dict(os.environ) == before
    assert {key: _environment().get(key) for key in WAITING} == {key: os.environ.get(key) for key in WAITING}
    for key in ("TQDM_DISABLE", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY"):  # an actor sets them in its own process
        monkeypatch.setenv(key, os.environ.get(key, ""))
    if "OMP_WAIT_POLICY" not in before:
        del os.environ["OMP_WAIT_POLICY"]
    RayWorker({})
    assert {key: os.environ[key] for key in WAITING if key in os.environ} == expected


def test_threads_of_a_worker_are_what_openmp_is_told_or_its_share_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for told, threads in ((None, 4), ("", 4), ("3", 3), ("1,2", 1), ("0", 4), ("many", 4)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if told is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert _default_threads(Workers(local=2)) == threads
        assert _default_threads(Workers(ray=2)) == threads
        assert _default_threads(Workers(ray="auto", address="auto")) == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGBUS, "killed by SIGBUS (a weight file became shorter"),
        (-signal.SIGKILL, "killed by SIGKILL (the kernel does so when memory runs out)"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
        (-63, "was killed by signal 63"),
        (3, "ended with exit code 3"),
    ],
)
def test_how_a_worker_ended_is_said_in_words(code: int, words: str) -> None:
    assert words in how_it_ended(code)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray cluster for all tests that do not need one of their own."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(params=["inline", "local", "ray"])
def pool(request: pytest.FixtureRequest, work: Path) -> Iterator[Pool]:
    made: Pool
    if request.param == "inline":
        made = InlinePool(SPEC)
    elif request.param == "local":
        made = LocalPool(SPEC, 2)
    else:
        request.getfixturevalue("cluster")
        made = RayPool(SPEC, 2)
    yield made
    made.close()


def test_outcomes_do_not_depend_on_where_they_are_computed(pool: Pool, work: Path) -> None:
    for number in range(4):
        pool.submit(job(number, 0.2 * number))
    found = collect(pool, 4)
    for thing in (SPEC, job(0, 0.0), *found.values()):
        assert len(pickle.dumps(thing)) < INLINE_BYTES
    here = InlinePool(SPEC)
    for number in range(4):
        here.submit(job(number, 0.2 * number))
        expected, got = here.wait(1)[0], found[number]
        assert isinstance(expected, Outcome) and isinstance(got, Outcome)
        for name, score in expected.scores["search"].items():
            assert np.array_equal(got.scores["search"][name].items, score.items)
        assert got.peak_bytes > 0 and got.merge_s > 0 and got.eval_s > 0


def test_a_candidate_without_finite_weights_is_a_failure_and_the_next_one_is_fine(work: Path) -> None:
    pool = InlinePool(SPEC)
    pool.submit(job(0, 1e38, **{"lambda": 1e38}))
    pool.submit(job(1, 0.5))
    found = collect(pool, 2)
    bad = found[0]
    assert isinstance(bad, Failed) and bad.reason == "weights" and "embed_tokens" in bad.message
    assert isinstance(found[1], Outcome)


def test_an_objective_that_raises_is_a_failure_with_its_traceback(work: Path) -> None:
    here = InlinePool(replace(SPEC, objectives=(ObjectiveSpec("t", "perplexity", {"files": {"search": "gone"}}),)))
    here.submit(job(0, 0.5))
    result = here.wait(1)[0]
    assert isinstance(result, Failed) and result.reason == "error" and "FileNotFoundError" in result.message


def test_a_slow_candidate_is_a_timeout_and_its_worker_is_replaced(work: Path) -> None:
    long = "\n\n".join(f"A document of its own, number {i}, {i * i} words long." for i in range(4000))
    (work / "text.search.txt").write_text(long)
    made = LocalPool(replace(SPEC, allowed_s=0.001), 1)
    try:
        for number in range(2):
            made.submit(job(number, 0.1))
            result = collect(made, 1)[number]
            assert isinstance(result, Failed) and result.reason == "timeout"
    finally:
        made.close()


@pytest.mark.parametrize("kind", ["inline", "local", "ray"])
def test_workers_that_cannot_start_say_why(kind: str, work: Path, cluster: None) -> None:
    broken = replace(SPEC, base="nowhere", models=("nowhere",))
    with pytest.raises(EvomergeError, match="no checkpoint folder at nowhere"):
        made: Pool = (
            InlinePool(broken)
            if kind == "inline"
            else (LocalPool(broken, 1) if kind == "local" else RayPool(broken, 1))
        )
        try:
            made.submit(job(0, 0.1))
            collect(made, 1)
        finally:
            made.close()


def test_no_worker_outlives_a_controller_that_was_killed(work: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from tests.test_pool import SPEC, LocalPool, collect, job\n"
        "if __name__ == '__main__':\n"
        "    pool = LocalPool(SPEC, 2)\n"
        "    pool.submit(job(0, 0.1))\n"
        "    collect(pool, 1)\n"
        "    print(*[s.process.pid for s in pool._slots], flush=True)\n"
        "    time.sleep(60)\n"
    )
    (work / "hold.py").write_text(script)
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "hold.py"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.stdout is not None
    workers = [int(p) for p in process.stdout.readline().split()]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{p}").exists() for p in workers):
        assert time.monotonic() < deadline, "workers are still alive"
        time.sleep(0.1)
