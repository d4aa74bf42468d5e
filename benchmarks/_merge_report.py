"""What merge_speed.py measured for a method, what it should be, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Method: at most so many times the floor, at least so many times faster than mergekit.
TARGETS = {
    **dict.fromkeys(("linear", "task_arithmetic", "slerp"), (3.0, 6.0)),
    **dict.fromkeys(("dare_linear", "dare_ties"), (7.0, 25.0)),
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"), (7.0, 50.0)),
    "sce": (7.0, 30.0),
}
TABLES_IN_CANDIDATES = 10.0  # what filling the tables may cost, in candidates


@dataclass
class Result:
    """What was measured for one method; None where it was not."""

    method: str
    moved_bytes: int = 0
    first_s: float | None = None
    candidate_s: float | None = None
    floor_s: float | None = None
    mergekit_s: float | None = None
    table_s: float | None = None  # the part of the first candidate that filled tables
    table_bytes: int = 0
    late_table_s: float = 0.0  # spent on tables by later candidates, all together
    peak_bytes: int | None = None
    allowed_bytes: int = 0
    mergekit_peak_bytes: int | None = None
    factorisations: tuple[int, int] = (0, 0)  # SVDs and eigendecompositions: of the first candidate, of a later one
    candidates: list[dict[str, Any]] = field(default_factory=list)  # the parameters of those that were timed
    notes: list[str] = field(default_factory=list)

    @property
    def over_floor(self) -> float | None:
        return _ratio(self.candidate_s, self.floor_s)

    @property
    def over_mergekit(self) -> float | None:
        return _ratio(self.mergekit_s, self.candidate_s)

    @property
    def tables_in_candidates(self) -> float | None:
        return _ratio(self.table_s, self.candidate_s)

    def verdicts(self) -> dict[str, bool]:
        """Each target that there is a figure for, and whether it is met."""
        if self.candidate_s is None:
            return {}
        most, least = TARGETS.get(self.method, (None, None))
        found = {"tables": (self.tables_in_candidates or 0.0) <= TABLES_IN_CANDIDATES}
        if most is not None and self.over_floor is not None:
            found["floor"] = self.over_floor <= most
        if least is not None and self.over_mergekit is not None:
            found["mergekit"] = self.over_mergekit >= least
        if self.peak_bytes is not None:
            found["memory"] = self.peak_bytes <= self.allowed_bytes
        if self.factorisations[0]:
            found["svd"] = self.factorisations[1] == 0
        return found

    def row(self) -> dict[str, Any]:
        derived = ("over_floor", "over_mergekit", "tables_in_candidates")
        return vars(self) | {name: getattr(self, name) for name in derived} | {"met": self.verdicts()}


def print_report(run: dict[str, Any], results: Sequence[Result]) -> None:
    """Print the run's circumstances, one table in markdown, and how many targets are met."""
    arithmetic = "the tensors' own dtype" if run["mergekit_dtype"] == "stored" else run["mergekit_dtype"]
    print(
        f"{run['cpu']}, {run['cores']} cores, load {run['load']} at the end; torch {run['torch']}, "
        f"{run['threads']} thread(s).\nOne model is {run['model_bytes'] / 1e6:.0f} MB in bf16. "
        f"Medians of {run['repeats']} candidates; mergekit computes in {arithmetic}.\n"
    )
    _table(SPEED, [_speed(r) for r in results])
    print(f"\nTables have {run['table_budget_bytes'] / 1e6:.0f} MB.\n")
    _table(MEMORY, [_memory(r) for r in results])
    for result in results:
        for note in result.notes:
            print(f"{result.method}: {note}")
    if run["small"]:
        print("\nTiny models: the figures and the last column mean nothing.")
        return
    missed = [f"{r.method} ({name})" for r in results for name, met in r.verdicts().items() if not met]
    total = sum(len(r.verdicts()) for r in results)
    print(f"\n{total - len(missed)} of {total} targets met." + (f" Missed: {', '.join(missed)}." if missed else ""))


SPEED = (
    "method", "candidate s", "GB/s", "floor s", "times floor (at most)", "mergekit s", "times faster (at least)",
    "targets",
)  # fmt: skip
MEMORY = (
    "method", "peak MB (at most)", "mergekit peak MB", "first candidate s", "tables s", "in candidates (at most)",
    "tables MB", "later tables s", "SVDs first, later (0)", "targets",
)  # fmt: skip


def _speed(r: Result) -> list[str]:
    most, least = TARGETS.get(r.method, (None, None))
    speed = None if r.candidate_s is None else r.moved_bytes / r.candidate_s / 1e9
    return [
        r.method,
        _number(r.candidate_s, 3),
        _number(speed, 2),
        _number(r.floor_s, 3),
        _number(r.over_floor, 1) + _target(most),
        _number(r.mergekit_s, 2),
        _number(r.over_mergekit, 1) + _target(least if r.mergekit_s is not None else None),
        _verdict(r, ("floor", "mergekit")),
    ]


def _memory(r: Result) -> list[str]:
    return [
        r.method,
        _megabytes(r.peak_bytes) + ("" if r.peak_bytes is None else f" ({r.allowed_bytes / 1e6:.0f})"),
        _megabytes(r.mergekit_peak_bytes),
        _number(r.first_s, 2),
        _number(r.table_s, 2),
        _number(r.tables_in_candidates, 1) + _target(TABLES_IN_CANDIDATES if r.table_s else None),
        _megabytes(r.table_bytes),
        _number(r.late_table_s, 2),
        f"{r.factorisations[0]}, {r.factorisations[1]}" if r.factorisations[0] else "–",
        _verdict(r, ("memory", "tables", "svd")),
    ]


def _verdict(r: Result, names: tuple[str, ...]) -> str:
    found = {name: met for name, met in r.verdicts().items() if name in names}
    missed = [name for name, met in found.items() if not met]
    if r.candidate_s is None:
        return "failed"
    return f"missed: {', '.join(missed)}" if missed else ("met" if found else "–")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f}"


def _target(value: float | None) -> str:
    return "" if value is None else f" ({value:g})"
