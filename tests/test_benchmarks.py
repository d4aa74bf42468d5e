"""The benchmarks run; what they measure is judged where they are run in earnest."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "merge_speed.py"
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "python"


def merge_speed(*args: str) -> str:
    command = [sys.executable, str(SCRIPT), "--small", "--repeats", "3", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rows_of(text: str) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads(text)["methods"]}


def test_merge_speed_measures_every_figure() -> None:
    text = merge_speed("--methods", "linear,ties,slerp", "--no-mergekit", "--json")
    run, rows = json.loads(text)["run"], rows_of(text)
    assert list(rows) == ["linear", "ties", "slerp"] and run["threads"] == 1
    for row, models in ((rows["linear"], 4), (rows["ties"], 5), (rows["slerp"], 3)):  # read and written
        assert row["notes"] == [] and row["moved_bytes"] == models * run["model_bytes"], row
        assert row["over_floor"] == pytest.approx(row["candidate_s"] / row["floor_s"])
        assert all(row[key] > 0 for key in ("first_s", "candidate_s", "floor_s"))
        assert row["peak_bytes"] is not None and row["mergekit_s"] is None
        assert row["factorisations"] == [0, 0] and "mergekit" not in row["met"] and "floor" in row["met"]
    densities = [tuple(candidate["density"]) for candidate in rows["ties"]["candidates"]]
    assert len(set(densities)) == len(densities) == 3 and all(len(set(d)) == 3 for d in densities)


def test_merge_speed_prints_its_tables() -> None:
    text = merge_speed("--methods", "task_arithmetic", "--no-mergekit")
    assert text.count("\n| task_arithmetic | ") == 2
    assert "times floor (at most)" in text and "(3)" in text and "the figures and the last column mean nothing" in text


@pytest.mark.skipif(not MERGEKIT.exists(), reason="mergekit is not installed (make bench-setup)")
def test_mergekit_merges_the_same_recipes() -> None:
    rows = rows_of(merge_speed("--methods", "linear,ties,dare_ties,slerp", "--json", "--mergekit-dtype", "float32"))
    for row in rows.values():
        assert row["notes"] == [] and row["over_mergekit"] > 0, row


def test_every_factorisation_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import merge_speed

    a = torch.eye(5)
    with merge_speed.Factorisations() as found:
        torch.linalg.svd(a)
        torch.linalg.svdvals(a)
        torch.linalg.eigh(a)
        np.linalg.svd(np.eye(3))
        a @ a
    np.linalg.svd(np.eye(3))
    assert found.count == 4


def test_a_missed_target_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from _merge_report import Result

    good = Result(
        "ties", candidate_s=0.7, floor_s=0.1, mergekit_s=35.0, table_s=7.0, peak_bytes=5, allowed_bytes=5,
        factorisations=(3, 0),
    )  # fmt: skip
    assert set(good.verdicts()) == {"floor", "mergekit", "tables", "memory", "svd"} and all(good.verdicts().values())
    for name, worse in {
        "floor": {"floor_s": 0.09},
        "mergekit": {"mergekit_s": 34.0},
        "tables": {"table_s": 7.1},
        "memory": {"peak_bytes": 6},
        "svd": {"factorisations": (3, 1)},
    }.items():
        assert [n for n, met in replace(good, **worse).verdicts().items() if not met] == [name]
    assert Result("ties").verdicts() == {}  # it failed: nothing is claimed


def test_the_benchmark_of_rungs_runs() -> None:
    command = [sys.executable, str(SCRIPT.parent / "fidelity.py"), "--small", "--json"]
    command += ["--studies", "4", "--seeds", "2", "--candidates", "14"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    safe, saved = found["safety"], found["saving"]
    assert len(saved) == 4 * len(safe), "two optimizers for each setting, with and without epochs"
    assert all(row["studies"] == 4 and 0 <= row["share"] <= row["bound"] <= 1 for row in safe)
    assert safe[0]["stopped"] > 0 and safe[0]["items_used"] < 1
    single = saved[0]
    assert single["items_whole"] == 14 * 256 > single["items_rungs"] and single["stopped"] > 0
