"""Per-worker tables: a byte budget, and no value lost to a scan that is larger than it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from evomerge.methods import Tables
from evomerge.methods._tables import _ENTRY_BYTES, n_bytes


def values(tables: Tables, keys: range, size: int = 1000) -> int:
    """Asks for one value of about `size` bytes per key; returns how many had to be made."""
    made = tables.made
    for key in keys:
        tables.get(key, lambda: np.zeros(size - 64 - _ENTRY_BYTES, np.uint8))
    return tables.made - made


def test_a_scan_larger_than_the_budget_keeps_what_fits() -> None:
    tables = Tables(budget_bytes=3000)
    for expected in (5, 2, 2):
        tables.next_candidate()
        assert values(tables, range(5)) == expected
    assert tables.n_bytes == 3000 and tables.dropped == 6


def test_what_two_candidates_did_not_use_makes_room() -> None:
    tables = Tables(budget_bytes=3000)
    tables.next_candidate()
    values(tables, range(3))
    for expected in (3, 3, 0):  # other values: not stored while the candidate before used the old ones
        tables.next_candidate()
        assert values(tables, range(10, 13)) == expected
    tables.next_candidate()
    assert values(tables, range(3)) == 3
    assert tables.n_bytes <= 3000


def test_a_value_beyond_the_budget_is_not_stored() -> None:
    tables = Tables(budget_bytes=100)
    assert values(tables, range(1)) == 1 and values(tables, range(1)) == 1
    assert tables.n_bytes == 0 and tables.dropped == 2
    tables.get("small", lambda: 1.0, keep=False)
    assert tables.n_bytes == 0


def test_sizes_count_what_is_inside() -> None:
    nested: Any = {"a": (torch.zeros(10), np.zeros(5)), "b": [1.0]}
    assert n_bytes(nested) >= 40 + 40
    assert n_bytes(torch.zeros(10, dtype=torch.bfloat16)) == 64 + 20


def test_the_report_counts_time_once() -> None:
    tables = Tables()
    tables.get("outer", lambda: tables.get("inner", lambda: 1))
    report = tables.report()
    assert report["made"] == 2 and report["reused"] == 0 and report["seconds"] >= 0.0


def test_what_only_saves_time_is_made_where_there_is_room() -> None:
    tables = Tables(budget_bytes=4000)
    assert tables.get_if_room("a", 2000, lambda: np.zeros(2000, np.uint8)) is not None
    assert tables.get_if_room("b", 2000, lambda: np.zeros(2000, np.uint8)) is None
    assert tables.get_if_room("a", 2000, lambda: np.zeros(1, np.uint8)).size == 2000  # type: ignore[union-attr]
    for budget in range(2000, 4000, 10):  # room is never promised and then not given
        tight = Tables(budget)
        if tight.get_if_room("a", 2000, lambda: np.zeros(2000, np.uint8)) is not None:
            assert tight.n_bytes > 2000
