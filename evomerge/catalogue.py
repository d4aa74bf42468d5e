"""What is known of every merge method, told from the registry alone: for `evomerge ls methods` and docs/methods.md.

    python -m evomerge.catalogue > docs/methods.md      (`make docs`)

There is no second table to edit: a new method's file is all that both read.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge import registry

if TYPE_CHECKING:
    from evomerge.methods import Method, Param

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "public" / "index.json"

EVERY = "every method with a base"
KINDS = {"float": "number", "int": "whole number", "bool": "true or false", "choice": "choice"}


def own_parameters(method: Method) -> tuple[Param, ...]:
    """The method's parameters without those of the LiNeS modifier, which all methods with a base share."""
    shared = _modifier_parameters() if method.needs_base else ()
    return tuple(p for p in method.parameters if p not in shared)  # a method may have lines of its own


def method_row(method: Method) -> dict[str, Any]:
    """One method as plain data: summary, source, what is true of it, its own parameters."""
    return {
        "kind": "method",
        "name": method.name,
        "summary": method.summary,
        "source": method.source,
        "needs_base": method.needs_base,
        "optional_base": method.optional_base,
        "experts": list(method.n_experts),
        "mergekit": method.mergekit,
        "random": method.random,
        "symmetric": method.symmetric,
        "identity": method.identity,
        "parameters": [_parameter_row(p, method.mergekit) for p in own_parameters(method)],
    }


def modifier_row() -> dict[str, Any]:
    """The LiNeS modifier in the form of a method: its parameters belong to every method with a base."""
    from evomerge.methods import _lines

    summary = (_lines.__doc__ or "").strip().split("\n", 1)[0]
    return {
        "kind": "modifier",
        "name": EVERY,
        "summary": summary,
        "source": "these parameters beside its own",
        "parameters": [_parameter_row(p, True) for p in _modifier_parameters()],
    }


def method_details(name: str) -> dict[str, Any]:
    """One method in full: `method_row`, the whole docstring and the modifier's parameters.

    Raises:
        ConfigError: there is no such method; the hint lists close names.
    """
    method: Method = registry.get("methods", name)
    row = method_row(method) | {"doc": inspect.getdoc(method.function) or ""}
    if method.needs_base:
        own = {p["name"] for p in row["parameters"]}
        modifier = modifier_row()
        row["modifier"] = modifier | {"parameters": [p for p in modifier["parameters"] if p["name"] not in own]}
    return row


def parameter_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat row per parameter of methods and modifiers, lists as words; for CSV."""
    return [
        {"method": row["name"]}
        | {key: " ".join(map(_value, v)) if isinstance(v, list) else v for key, v in parameter.items()}
        for row in rows
        for parameter in row["parameters"]
    ]


def rows_text(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of methods and modifiers for people: name, summary, source, one line per parameter."""
    return "\n\n".join(_row_text(row) for row in rows)


def details_text(row: dict[str, Any]) -> str:
    """`method_details` for people: as in the list, then the docstring, then the modifier."""
    low, high = row["experts"]
    beside = " beside the base" if row["needs_base"] else ", no base"
    beside = " beside the base, if one is named" if row["optional_base"] else beside
    facts = [
        f"merges {_count(low, high)}{beside}",
        "random: masks come from the recipe's seed and an expert's place in the recipe" if row["random"] else "",
        "" if row["symmetric"] or high == 1 else "the order of the experts counts",
        "mergekit has it too" if row["mergekit"] else "",
    ]
    body = row["doc"].partition("\n")[2].strip()  # its first line is the summary
    parts = [_row_text(row), "; ".join(fact for fact in facts if fact), body]
    parts += [_row_text(row["modifier"])] if "modifier" in row else []
    return "\n\n".join(part for part in parts if part)


def _order(method: Method) -> str:
    if method.n_experts[1] == 1:
        return "–"
    if method.random:
        return "numbers the masks"
    return "does not count" if method.symmetric else "counts"


def _row_text(row: dict[str, Any]) -> str:
    lines = [f"{row['name']}: {row['summary']}", f"    {row['source']}"]
    width = max((len(p["name"]) for p in row["parameters"]), default=0)
    lines += [f"    {p['name']:<{width}}  {p['text']}" for p in row["parameters"]]
    return "\n".join(lines)


def _modifier_parameters() -> tuple[Param, ...]:
    from evomerge.methods._lines import LINES_PARAMETERS

    method = next(m for m in map(_method, registry.names("methods")) if m.needs_base)
    return tuple(p for p in method.parameters if p.name in LINES_PARAMETERS)


def _parameter_row(param: Param, mergekit: bool) -> dict[str, Any]:
    return {
        "name": param.name,
        "kind": param.kind,
        "per_expert": param.per_expert,
        "required": param.required,
        "default": param.default,
        "search": None if param.low is None else [param.low, param.high],
        "log": param.log,
        "limits": None if param.limits is None else list(param.limits),
        "choices": _choices(param),
        "extension": param.extension,
        "text": _parameter_text(param) + ("; not in mergekit" if mergekit and param.extension else ""),
    }


def _parameter_text(param: Param) -> str:
    """A parameter in one line: kind, default, search range, limits."""
    parts = [_kind(param) + (", one per expert" if param.per_expert else "")]
    parts.append("required" if param.required else f"default {_value(param.default)}")
    if param.low is not None:
        parts.append(f"searched {_span((param.low, param.high))}" + (" on a log scale" if param.log else ""))
    if param.limits is not None:
        parts.append(f"allowed {_span(param.limits)}")
    return "; ".join(parts)


def _kind(param: Param) -> str:
    if not param.choices:
        return KINDS[param.kind]
    *first, last = _choices(param)
    return f"{', '.join(first)} or {last}" if first else last


def _choices(param: Param) -> list[str]:
    return (["true", "false"] if param.accepts_bool else []) + list(param.choices)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _span(pair: Sequence[float | None]) -> str:
    return " to ".join(_value(None if bound is None else float(bound)) for bound in pair)


def _count(low: int, high: int | None) -> str:
    if low == high:
        return f"exactly {low}"
    return f"{low} or more" if high is None else f"{low} to {high}"


def _method(name: str) -> Method:
    found: Method = registry.get("methods", name)
    return found


# ---- docs/methods.md -----------------------------------------------------------------------------------------------

HEAD = """\
# Merge methods

Generated by `make docs` from the methods' own files; edits here are lost. `evomerge ls methods` prints the parameters,
`evomerge ls methods NAME` one method with its formula and its edge cases.

"Task vector" is expert minus base. The last two columns of the first table are about mergekit 0.1.5: whether it has a
method of this name, and how many recorded results of it `tests/golden/` holds for the method; `compat: mergekit` in a
recipe reproduces them number by number (`tests/test_golden.py`).
"""

CONTRACT = """\
## Contract

`tests/test_methods.py` finds every method through the registry and requires these checks of `evomerge.testing`; other
processes with other hash seeds and thread counts must compute the same bits too. A dash: the check says nothing about
this method.
"""


def coverage_page() -> str:
    """The text of docs/methods.md: coverage, parameters, contract, from the methods that this package ships."""
    methods = [m for m in map(_method, registry.names("methods")) if _is_shipped(m)]
    recorded = _recorded_results()
    parts = [HEAD, _coverage(methods, recorded)]
    absent = sorted(recorded.keys() - {m.name for m in methods})
    if absent:
        parts.append(f"Methods with recorded results that evomerge does not have: {', '.join(absent)}.\n")
    parts += ["## Parameters\n", _parameters(methods)]
    shared = ", ".join(f"`{p.name}` ({_parameter_text(p)})" for p in _modifier_parameters())
    parts.append(f"Every method with a base takes {shared} as well. {modifier_row()['summary']}\n")
    parts += [CONTRACT, _contract(methods)]
    return "\n".join(parts)


def _is_shipped(method: Method) -> bool:
    return method.function.__module__ == f"evomerge.methods.{method.name}"


def _recorded_results() -> Counter[str]:
    index = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return Counter(entry["method"] for part in ("cases", "statistics") for entry in index[part])


def _coverage(methods: Sequence[Method], recorded: Counter[str]) -> str:
    heads = ("method", "base", "experts", "random", "order of experts", "source", "in mergekit", "recorded results")
    return _table(
        heads,
        [
            (
                f"`{m.name}`",
                "yes" if m.needs_base else ("optional" if m.optional_base else "–"),
                _count(*m.n_experts),
                "yes" if m.random else "–",
                _order(m),
                m.source,
                "yes" if m.mergekit else "–",
                str(recorded[m.name] or "–"),
            )
            for m in methods
        ],
    )


def _parameters(methods: Sequence[Method]) -> str:
    heads = ("method", "parameter", "kind", "per expert", "default", "search range", "allowed", "not in mergekit")
    rows = []
    for m in methods:
        for p in own_parameters(m):
            rows.append(
                (
                    f"`{m.name}`",
                    f"`{p.name}`",
                    _kind(p),
                    "yes" if p.per_expert else "–",
                    "required" if p.required else _value(p.default),
                    "–" if p.low is None else _span((p.low, p.high)) + (", log" if p.log else ""),
                    "–" if p.limits is None else _span(p.limits),
                    "extension" if m.mergekit and p.extension else "–",
                )
            )
    return _table(heads, rows)


class _Called(Exception):
    """Raised by the stand-in of a method's function."""


def concerns(check: Callable[[Method], None], method: Method) -> bool:
    """Whether a contract check says anything about this method: whether it would run it at all.

    `check_description`, which looks at the registry entry, concerns every method.
    """
    from evomerge.testing import check_description

    def stand_in(*_: Any, **__: Any) -> Any:
        raise _Called

    if check is check_description:
        return True
    try:
        check(replace(method, function=stand_in))
    except _Called:
        return True
    return False


def _contract(methods: Sequence[Method]) -> str:
    from evomerge.testing import METHOD_CHECKS

    names = [check.__name__.removeprefix("check_") for check in METHOD_CHECKS]
    rows = [(f"`{m.name}`", *("yes" if concerns(check, m) else "–" for check in METHOD_CHECKS)) for m in methods]
    meaning = "".join(
        f"- {name}: {(inspect.getdoc(check) or '').splitlines()[0]}\n"
        for name, check in zip(names, METHOD_CHECKS, strict=True)
    )
    return f"{meaning}\n{_table(('method', *names), rows)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    print(coverage_page(), end="")
