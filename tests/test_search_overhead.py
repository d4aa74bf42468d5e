"""The benchmark of the optimizers' own work runs on every optimizer."""

from __future__ import annotations

import json
import subprocess
import sys

from evomerge import registry
from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "search_overhead.py"


def overhead(*args: str) -> str:
    command = [sys.executable, str(SCRIPT), "--results", "30", "--rounds", "2", "--pending", "4", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_optimizer_is_measured() -> None:
    rows = json.loads(overhead("--dims", "6", "--goals", "2", "--gp-results", "0", "--floors", "--json"))["rows"]
    assert [row["optimizer"] for row in rows] == list(registry.names("optimizers"))
    for row in rows:
        assert row["exhausted"] or row["ask_tell_ms"] > 0, row
        assert row["held_bytes"] > 0, row
    assert not any(row["exhausted"] for row in rows if row["optimizer"] != "grid")


def test_the_table_says_what_misses_the_limit() -> None:
    text = overhead("--optimizers", "random,grid", "--dims", "1,2", "--goals", "1,3")
    assert text.count("| random | ") == 4 and text.endswith("Limit 50 ms: kept by every row\n")
