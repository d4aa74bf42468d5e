"""The merge methods that a space chooses among, and the union of their parameters.

A parameter belongs to every listed method that has it; the others ignore it. Its default range, its start and the
order of its choices are those of the first method that has it; what it may be at all, all of them must allow.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge import registry
from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.methods import Method, Param

Bad = Callable[..., None]  # (where, message, hint="")


def method_named(name: str) -> Method:
    """Return a registered method.

    Raises:
        ConfigError: there is none of this name.
    """
    found: Method = registry.get("methods", name)
    return found


def read_methods(given: Any, bad: Bad) -> tuple[Method, ...]:
    """Return the methods of `method: ties` or `method: [task_arithmetic, ties]`, without those complained about."""
    if given is None:
        bad("method", "method is missing")
        return ()
    listed = given if isinstance(given, list) else [given]
    if isinstance(given, list) and len(given) < 2:
        bad("method", f"{given!r}: a choice is among two methods or more", "for one method, write its name alone")
    found: list[Method] = []
    for i, name in enumerate(listed):
        where = f"method[{i}]" if isinstance(given, list) else "method"
        if not isinstance(name, str):
            bad(where, f"{name!r} is not a name")
        elif name in listed[:i]:
            bad(where, f"{name!r} is listed twice")
        else:
            try:
                found.append(method_named(name))
            except ConfigError as error:
                bad(where, error.message, error.hint)
    return tuple(found)


def union_parameter(methods: Sequence[Method], name: Any, where: str, bad: Bad) -> Param | None:
    """Return a parameter as all the methods that have it take it, or None after complaining."""
    owners = [(method.name, param) for method in methods if (param := method.parameter(name)) is not None]
    if not owners:
        known = list(dict.fromkeys(p.name for method in methods for p in method.parameters))
        bad(where, f"{' or '.join(m.name for m in methods)} has no parameter {name!r}", suggestion(str(name), known))
        return None
    first_name, first = owners[0]
    for other_name, other in owners[1:]:
        for one, another in zip(_nature(first), _nature(other), strict=True):
            if one != another:
                message = f"{name} is {one} in {first_name} but {another} in {other_name}: no gene can be both"
                bad(where, message, "leave it at its defaults, or list other methods")
                return None
    params = [param for _, param in owners]
    limits = [param.limits or (-math.inf, math.inf) for param in params]
    bounds = (max(low for low, _ in limits), min(high for _, high in limits))
    choices = tuple(c for c in first.choices if all(c in p.choices for p in params))
    # A default of true stands for the first named choice, which another method may not know.
    nameless = first.default is True and choices[:1] != first.choices[:1]
    return replace(
        first,
        default=None if nameless else first.default,
        low=None if first.low is None else max(first.low, bounds[0]),
        high=None if first.high is None else min(first.high, bounds[1]),
        limits=None if bounds == (-math.inf, math.inf) else bounds,
        choices=choices,
        accepts_bool=all(param.accepts_bool for param in params),
    )


def _nature(param: Param) -> tuple[str, str]:
    """What two methods must agree on for one gene to set a parameter in both, in words."""
    kinds = {"float": "a number", "int": "a whole number", "bool": "true or false", "choice": "a named choice"}
    return kinds[param.kind], "given per expert" if param.per_expert else "shared by all experts"


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return a hint for a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
