"""Data on stdout in the format that was asked for: table, json, yaml or csv.

A value with an interval is one cell of a table, and three columns elsewhere: NAME, low.NAME and high.NAME.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any


class Format(StrEnum):
    """What `-f` accepts."""

    table = "table"
    json = "json"
    yaml = "yaml"
    csv = "csv"


def emit(rows: Sequence[Mapping[str, Any]], fmt: Format) -> None:
    """Print rows that share their keys; missing values are empty."""
    rows = [_spelled(row, fmt) for row in rows]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    clean = [{k: _plain(row.get(k)) for k in columns} for row in rows]
    if fmt is Format.json:
        print(json.dumps(clean, indent=2))
    elif fmt is Format.yaml:
        from evomerge.strict_yaml import dump_yaml

        print(dump_yaml(clean), end="")
    elif fmt is Format.csv:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(clean)
    else:
        _table(clean, columns)


def emit_one(data: Mapping[str, Any], fmt: Format) -> None:
    """Print one mapping: two columns as a table, one object otherwise."""
    if fmt is Format.table:
        _table([{"": k, " ": _plain(v)} for k, v in data.items()], ["", " "])
    elif fmt is Format.json:
        print(json.dumps({k: _plain(v) for k, v in data.items()}, indent=2))
    else:
        emit([data], fmt) if fmt is Format.csv else emit_yaml(data)


def emit_yaml(data: Mapping[str, Any]) -> None:
    """Print one mapping as YAML."""
    from evomerge.strict_yaml import dump_yaml

    print(dump_yaml({k: _plain(v) for k, v in data.items()}), end="")


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Plain aligned columns: as readable in a pipe as on a terminal, and never cut."""
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    heads = [_cell(c) for c in columns]
    widths = [max(len(c), *(len(r[i]) for r in cells), 0) for i, c in enumerate(heads)]
    if any(columns[0].strip() or c.strip() for c in columns):
        print("  ".join(c.ljust(w) for c, w in zip(heads, widths, strict=True)).rstrip())
    for row in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _spelled(row: Mapping[str, Any], fmt: Format) -> dict[str, Any]:
    """A row without intervals."""
    from evomerge.intervals import Interval  # here, since the help needs no scipy

    spelled: dict[str, Any] = {}
    for key, value in row.items():
        if not isinstance(value, Interval):
            spelled[key] = value
        elif fmt is Format.table:
            spelled[key] = str(value)
        else:
            spelled |= {key: value.value, f"low.{key}": value.low, f"high.{key}": value.high}
    return spelled


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    # Labels and reasons come from a database that others may have written: no control sequence reaches the terminal.
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _plain(value: Any) -> Any:
    """numpy scalars and NaN as what JSON knows."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
