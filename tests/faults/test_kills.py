"""A search that is killed at any moment continues with the same command, and ends as if nothing had happened.

Each search runs in a forked process, so that a kill costs no import; the killed process is really gone
(SIGKILL), and the next one knows only what the database knows.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from evomerge import faults
from evomerge.commands import run_search
from evomerge.progress import Progress
from evomerge.rescore import front_of
from evomerge.search import Event
from evomerge.study import Study
from tests.conftest import study_rows
from tests.faults.invariants import MARK, Run, check_invariants

URL = "sqlite:///runs/tiny/ledger.db"
STAGES = ("proposing", "recording", "merging", "scoring", "finishing", "telling")
OVERRIDES = ("optimizer=map", "budget.evaluations=16")
# Replay is proven for every optimizer by the contract (tests/test_optimizers.py); whole searches take longer.
OTHERS = (
    "coarse_to_fine",
    "cma_es",
    "nsga2",
    "random",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("crossover", "gp", "tpe")),
)


def run_forked(overrides: tuple[str, ...], fault: str = "", kill_after_s: float | None = None) -> int:
    """Search inline in a forked process; acknowledged numbers go to acks.txt. Returns the exit status."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.environ["EVOMERGE_FAULT"] = fault
            faults._visits.clear()
            _acknowledge_to(Path("acks.txt"))
            code = run_search("study.yaml", overrides, resume="auto", inline=True, quiet=True, allow_task_code=False)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def _acknowledge_to(path: Path) -> None:
    """What a person sees as done is written down, in one write, where a kill cannot take it back."""
    shown = Progress.event

    def event(self: Progress, e: Event) -> None:
        with path.open("a") as stream:
            stream.write(f"{e.number}\n")
        shown(self, e)

    Progress.event = event  # type: ignore[method-assign]


def result() -> tuple[list[Any], list[int]]:
    study = Study.load(URL, "tiny")
    candidates = study.candidates()
    return study_rows(study), [c.number for c in front_of(study, candidates)]


def check_record(expected: tuple[list[Any], list[int]], overrides: tuple[str, ...] = OVERRIDES, mark: str = "") -> None:
    """Every acknowledged candidate is done, none is there twice, and all is as without kills."""
    acknowledged = [int(n) for n in Path("acks.txt").read_text().split()]
    run = Run(acknowledged, expected=expected, budget=16, replay="serial", overrides=overrides, mark=mark)
    check_invariants(URL, "tiny", run)


@pytest.fixture(scope="module", autouse=True)
def _imported_before_forking(family: Path) -> None:
    """What a search imports, imported once: the forked searches then start at once."""
    import cma  # noqa: F401
    import optuna.samplers  # noqa: F401

    from evomerge.model import LiveModel

    LiveModel(str(family / "base"))


@pytest.fixture(scope="module")
def uninterrupted(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each optimizer's search gives when nothing happens to it."""
    import shutil

    class Searched(dict[str, Any]):
        """Searches when an optimizer is first asked for."""

        def __missing__(self, optimizer: str) -> Any:
            before, folder = Path.cwd(), tmp_path_factory.mktemp(optimizer) / "work"
            shutil.copytree(family, folder)
            os.chdir(folder)
            assert run_forked((f"optimizer={optimizer}", OVERRIDES[1])) == 0
            self[optimizer] = result()
            os.chdir(before)
            return self[optimizer]

    return Searched()


@pytest.mark.parametrize("visit", [1, 12])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_each_stage(work: Path, uninterrupted: dict[str, Any], stage: str, visit: int) -> None:
    assert run_forked(OVERRIDES, fault=f"{stage}:{visit}") == -signal.SIGKILL
    assert run_forked(OVERRIDES) == 0
    check_record(uninterrupted["map"])


@pytest.mark.parametrize("optimizer", OTHERS)
def test_every_optimizer_continues_exactly(work: Path, uninterrupted: dict[str, Any], optimizer: str) -> None:
    overrides = (f"optimizer={optimizer}", OVERRIDES[1])
    assert run_forked(overrides, fault="telling:12") == -signal.SIGKILL
    assert run_forked(overrides, fault="proposing:2") == -signal.SIGKILL
    assert run_forked(overrides) == 0
    check_record(uninterrupted[optimizer], overrides)


def test_ten_kills_at_random_moments_of_one_search(work: Path, uninterrupted: dict[str, Any]) -> None:
    seed = int(os.environ.get("EVOMERGE_TEST_SEED", "20261121"))
    rng = random.Random(seed)
    started = time.monotonic()
    killed = 0
    while killed < 10:
        # Most kills strike during candidates; when the search was too fast, it has ended: begin anew.
        code = run_forked(OVERRIDES, kill_after_s=rng.uniform(0.3, 1.6))
        killed += 1
        if code == 0:
            check_record(uninterrupted["map"])
            shutil.rmtree("runs/tiny")
            Path("acks.txt").unlink()
    assert run_forked(OVERRIDES) == 0, f"seed {seed}"
    check_record(uninterrupted["map"])
    assert time.monotonic() - started < 200


def test_a_kill_of_a_search_with_worker_processes(
    work: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(work))
    command = [sys.executable, "-m", "evomerge", "search", "study.yaml", "-o", OVERRIDES[0], "-o", OVERRIDES[1]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    shown = []
    for line in process.stderr:
        if "/16 | #" in line:
            shown.append(int(line.split("#")[1].split()[0].rstrip(":")))
        if len(shown) == 5:
            break
    process.kill()
    process.wait()
    Path("acks.txt").write_text("".join(f"{n}\n" for n in shown))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in again.stderr.splitlines() if "/16 | #" in line]
    with Path("acks.txt").open("a") as stream:
        for line in lines:
            number = int(line.split("#")[1].split()[0].rstrip(":"))
            stream.write(f"{number}\n")
    check_record(uninterrupted["map"], mark=str(work))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_finishes_cleanly_and_says_how_to_go_on(
    work: Path, uninterrupted: dict[str, Any], number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "evomerge", "search", "study.yaml", "-o", OVERRIDES[0], "-o", OVERRIDES[1]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("3/16"):
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == 128 + number
    assert "continue with: evomerge search study.yaml -o optimizer=map" in rest
    assert not [r for r in result()[0] if r[1] == "running"], "nothing is left half done"
    Path("acks.txt").touch()
    assert run_forked(OVERRIDES) == 0
    check_record(uninterrupted["map"])


@pytest.mark.slow
def test_a_night_of_kills_with_two_workers(work: Path) -> None:
    """Thirty kills of a parallel search at random moments: nothing shown is lost, nothing is there twice."""
    rng = random.Random(int(os.environ.get("EVOMERGE_TEST_SEED", "7")))
    command = [sys.executable, "-m", "evomerge", "search", "study.yaml", "-o", "optimizer=map"]
    command += ["-o", "budget.evaluations=400", "-o", "workers={local: 2, threads: 1}"]
    shown: list[int] = []
    for _ in range(30):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(process.stderr,))
        reader.start()
        time.sleep(rng.uniform(0.5, 25.0))
        process.kill()
        process.wait()
        reader.join()
        shown += [int(line.split("#")[1].split()[0].rstrip(":")) for line in lines if "/400 | #" in line]
        if not Study.exists(URL, "tiny"):
            continue
        check_invariants(URL, "tiny", Run(shown, ended=False, budget=400))
    assert len(shown) > 20, "the kills left no time for any work: nothing was tested"
