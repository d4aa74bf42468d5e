"""The progress lines: best values in their own direction, hypervolume above the known recipes, time left."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from evomerge.progress import Progress
from evomerge.search import Budget, Event


def event(number: int, values: tuple[float, ...] | None, elapsed_s: float = 0.0) -> Event:
    return Event(number, "base" if number == 0 else None, values, None, None if values else "oom", None, elapsed_s)


def test_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress({"acc": True, "bits": False}, Budget(10), [event(0, (0.5, 3.0))], known=2)
    with progress:
        progress.event(event(1, (0.4, 2.0), 10.0))
        progress.event(event(2, None, 20.0))
        progress.event(event(3, (0.8, 1.0), 40.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2/10 | #1: acc=0.4000 bits=2.0000 | best 0.5000 2.0000")
    assert "#2: failed (oom)" in lines[1]
    assert "hv" not in lines[0] + lines[1], "nobody is above the worst of the known recipes in both"
    assert "best 0.8000 1.0000" in lines[2] and "4.0/min" in lines[2] and "0:01:30 left" in lines[2]
    # Reference: the worst of the known recipes, (0.4, 3.0); the new point dominates 0.4 x 2.
    assert re.search(r"hv 0\.8 ", lines[2])


def test_stopped_candidates_are_said_and_counted_and_never_best(capsys: pytest.CaptureFixture[str]) -> None:
    before = Event(1, None, None, None, None, None, 0.0, "stopped at 1/4, beaten by #0")
    with Progress({"acc": True}, Budget(10), [event(0, (0.5,)), before], known=1) as progress:
        progress.event(Event(2, None, None, None, None, 1, 5.0, "stopped at 1/8, beaten by #0"))
    line = capsys.readouterr().err
    assert "3/10 | #2: stopped at 1/8, beaten by #0 (as #1) | 2 stopped | best 0.5000" in line


def test_recommended_candidates_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({"acc": True}, Budget(10), [], known=1) as progress:
        progress.event(Event(7, None, (0.5,), None, None, None, 1.0, source="mean of CMA-ES"))
    assert "#7 mean of CMA-ES: acc=0.5000" in capsys.readouterr().err


def test_many_objectives_have_a_hypervolume_too() -> None:
    names = {f"o{j}": True for j in range(6)}
    before = [event(n, tuple(0.5 + 0.4 * (n % 6 == j) for j in range(6))) for n in range(1, 60)]
    progress = Progress(names, Budget(100), [event(0, (0.5,) * 6), *before], known=1)
    assert progress.hypervolume() == 0.0  # nobody is above the base in every objective
    whole = Progress(names, Budget(100), [event(0, (0.4,) * 6), *before], known=1).hypervolume()
    assert whole == pytest.approx(0.1**6 + 6 * 0.1**5 * 0.4, rel=0.1)


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({"acc": True}, Budget(10), [], known=1, quiet=True) as progress:
        progress.event(event(0, (0.4,)))
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_candidates_that_miss_a_constraint_are_marked_and_count_neither_as_best_nor_in_the_volume() -> None:
    def floors(labelled: Mapping[str, Sequence[float]]) -> np.ndarray | None:
        return np.array([-np.inf, -labelled["base"][1]]) if "base" in labelled else None

    base = Event(0, "base", (0.5, 3.0), None, None, None, 1.0)
    progress = Progress({"acc": True, "bits": False}, Budget(10), [base, event(1, (0.6, 2.0))], known=1, floors=floors)
    before = progress.hypervolume()
    worse = event(2, (0.9, 3.5))
    progress._take(worse)
    line = progress._line(worse)
    assert "acc=0.9000 bits=3.5000 (misses a constraint)" in line and "best 0.6000 2.0000" in line
    assert progress.hypervolume() == before
