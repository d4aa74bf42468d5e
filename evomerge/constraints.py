"""Constraints of a study: the worst value that an objective may have, as a number or relative to a known recipe.

A line of the study file's `constraints:` is `OBJECTIVE >= LIMIT` where larger is better, and `OBJECTIVE <= LIMIT` where
smaller is. LIMIT is a number, or `[FACTOR *] RECIPE [+ or - NUMBER]`, with RECIPE one of the recipes that every study
evaluates first: base, an expert's name, merged (of a study with `merged:`), uniform soup, task arithmetic 0.3, ..., or
`best expert`: the best value that any expert has on this objective. Limits hold for the scores of the search split.
Pure numpy; no study is known here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge.errors import ConfigError, Problem

Array = NDArray[np.float64]
Bounds = Mapping[str, tuple[float | None, float | None]]

BEST_EXPERT = "best expert"
STANDARD = ("uniform soup", "task arithmetic 0.3", "task arithmetic 0.5", "task arithmetic 1", "ties 0.2", "ties 0.5")
EXAMPLE = "as in `qa >= base - 0.01`, `qa >= 0.6` or `perplexity <= 1.05 * base`"

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_LINE = re.compile(r"\s*(?P<name>.+?)\s*(?P<sign>>=|<=)\s*(?P<limit>.+?)\s*", re.DOTALL)
_FACTOR = re.compile(rf"({_NUMBER})\s*\*\s*(.+)")
_OFFSET = re.compile(rf"(.+?)\s*([+-])\s*({_NUMBER})")


@dataclass(frozen=True)
class Constraint:
    """A limit on the bad side of one objective: factor * (value of a known recipe) + offset.

    Attributes:
        text: as the study file has it.
        maximize: whether larger values of the objective are better, so that the limit is a lower one.
        labels: known recipes, of whose values the best counts; none for a plain number, which is the offset.
    """

    text: str
    objective: str
    maximize: bool
    labels: tuple[str, ...] = ()
    factor: float = 1.0
    offset: float = 0.0

    def limit(self, values: Mapping[str, float]) -> float | None:
        """Return the limit in the objective's unit; None while no reference is known.

        `values` are those of known recipes on this objective, by label.
        """
        if not self.labels:
            return self.offset
        found = [values[label] for label in self.labels if label in values]
        return self.factor * (max if self.maximize else min)(found) + self.offset if found else None


def read_constraints(
    texts: Sequence[str],
    objectives: Mapping[str, bool],
    experts: Collection[str],
    *,
    merged: bool = False,
    known_recipes: bool = True,
    bounds: Bounds | None = None,
) -> tuple[Constraint, ...]:
    """Read the lines of `constraints:`.

    `objectives` are name -> whether larger is better; `merged` says whether the study has a merged model;
    `known_recipes` says whether the study evaluates them; `bounds` are each objective's smallest and largest possible
    value, None where there is none.

    Raises:
        ConfigError: with every problem; each is at `constraints[i]`.
    """
    problems: list[Problem] = []
    read: list[tuple[int, str, Constraint]] = []
    for index, text in enumerate(texts):
        where = f"constraints[{index}]"
        match = _LINE.fullmatch(text)
        if match is None:
            problems.append(Problem(f"{text!r} is no constraint", where, EXAMPLE))
            continue
        name = match["name"]
        if name not in objectives:
            problems.append(Problem(f"{text!r}: there is no objective {name!r}", where, _close(name, objectives)))
            continue
        limit = _read_limit(match["limit"], experts, merged)
        if isinstance(limit, str):
            problems.append(Problem(f"{text!r}: {limit}", where, _close(match["limit"], _labels(experts, merged))))
            continue
        labels, factor, offset = limit
        if labels and not known_recipes:
            hint = "give a number, or leave out `known_recipes: false`"
            problems.append(Problem(f"{text!r} refers to a known recipe, and the study evaluates none", where, hint))
            continue
        made = Constraint(" ".join(text.split()), name, objectives[name], labels, factor, offset)
        read.append((index, match["sign"], made))
    problems += _contradictions(read) or _wrong_sides(read)
    problems += _out_of_bounds(read, bounds or {})
    if problems:
        raise ConfigError.of(problems, "the constraints")
    return tuple(made for _, _, made in read)


def floors(
    constraints: Sequence[Constraint], objectives: Mapping[str, bool], known: Mapping[str, Sequence[float]]
) -> Array:
    """Return the smallest allowed values `(m,)`, larger-is-better; -inf where there is no limit, or none yet.

    `known` are the values of the known recipes that have scores, by label, in the objectives' order and own units.
    """
    found = np.full(len(objectives), -np.inf)
    for constraint in constraints:
        j = list(objectives).index(constraint.objective)
        limit = constraint.limit({label: values[j] for label, values in known.items()})
        if limit is not None:
            found[j] = max(found[j], limit if constraint.maximize else -limit)
    return found


def shortfalls(values: ArrayLike, floors: ArrayLike) -> Array:
    """Return by how much values `(n, m)` miss their floors `(m,)`, larger-is-better: `(n, m)`, 0 where they do not."""
    low = np.asarray(floors, dtype=np.float64)
    missing = np.where(np.isfinite(low), low - np.asarray(values, dtype=np.float64), 0.0)
    return np.maximum(missing, 0.0)


def _labels(experts: Collection[str], merged: bool) -> list[str]:
    return ["base", *experts, *["merged"] * merged, *STANDARD, BEST_EXPERT]


def _close(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _read_limit(text: str, experts: Collection[str], merged: bool) -> tuple[tuple[str, ...], float, float] | str:
    """Labels, factor and offset of a limit, or what is wrong with it. Names come first: an expert may be called a-1."""
    if re.fullmatch(_NUMBER, text):
        value = float(text)
        return ((), 1.0, value) if math.isfinite(value) else f"{text} is no finite number"
    factor, offset = 1.0, 0.0
    if text not in _labels(experts, merged):
        scaled = _FACTOR.fullmatch(text)
        if scaled is not None:
            factor, text = float(scaled[1]), scaled[2]
    if text not in _labels(experts, merged):
        moved = _OFFSET.fullmatch(text)
        if moved is not None:
            text, offset = moved[1], float(f"{moved[2]}1") * float(moved[3])
    if text not in _labels(experts, merged):
        return f"{text!r} is neither a number nor a known recipe"
    if not (0.0 < factor < math.inf and math.isfinite(offset)):
        return f"the factor {factor:g} is not above 0, or a number is not finite"
    if text == BEST_EXPERT:
        return tuple(experts), factor, offset
    if text == "uniform soup" and len(experts) == 1:  # the soup of one expert is the expert, listed once
        return tuple(experts), factor, offset
    return (text,), factor, offset


def _contradictions(read: Sequence[tuple[int, str, Constraint]]) -> list[Problem]:
    """Pairs of limits between which no value lies."""
    found = []
    for i, below, low in read:
        for k, above, high in read:
            same = low.objective == high.objective and (low.labels, low.factor) == (high.labels, high.factor)
            if below == ">=" and above == "<=" and same and low.offset > high.offset:
                message = f"{low.text!r} and {high.text!r} contradict each other: no value of {low.objective} is both"
                found.append(Problem(message, f"constraints[{max(i, k)}]", "leave one of them out"))
    return found


def _wrong_sides(read: Sequence[tuple[int, str, Constraint]]) -> list[Problem]:
    """Limits on the good side: a search that looks for good values can do nothing with them."""
    found = []
    for index, sign, made in read:
        if (sign == ">=") != made.maximize:
            better, right = ("larger", ">=") if made.maximize else ("smaller", "<=")
            message = f"{made.text!r} would forbid good values: {better} values of {made.objective} are better"
            found.append(Problem(message, f"constraints[{index}]", f"only limits on the bad side: use {right}"))
    return found


def _out_of_bounds(read: Sequence[tuple[int, str, Constraint]], bounds: Bounds) -> list[Problem]:
    """Plain numbers that no value can reach."""
    found = []
    for index, _, made in read:
        best = bounds.get(made.objective, (None, None))[1 if made.maximize else 0]
        beyond = best is not None and (made.offset > best if made.maximize else made.offset < best)
        if not made.labels and best is not None and beyond:
            message = f"no value can meet {made.text!r}: the best possible {made.objective} is {best:g}"
            found.append(Problem(message, f"constraints[{index}]", "set a limit that can be reached"))
    return found
