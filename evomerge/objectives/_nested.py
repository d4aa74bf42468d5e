"""Objectives that are made of other objectives, which stand under `of:` as they would in a study file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, Problem
from evomerge.objectives import SPLITS, Objective, ObjectiveSpec, make_objective
from evomerge.weights import has_chat_template

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


def inner_specs(spec: ObjectiveSpec) -> tuple[ObjectiveSpec, ...]:
    """The objectives under `of:`; entries that are still mappings get the folder, flags and models of the outer one.

    Raises:
        ConfigError: an entry is neither.
    """
    given = spec.options.get("of")
    entries = given if isinstance(given, list | tuple) else [given]
    found = []
    for entry in entries:
        if isinstance(entry, Mapping) and "kind" in entry:
            kind = str(entry["kind"])
            options: dict[str, Any] = {k: v for k, v in entry.items() if k not in ("name", "kind", "description")}
            entry = replace(spec, name=str(entry.get("name", kind)), kind=kind, options=options)
        if not isinstance(entry, ObjectiveSpec):
            raise ConfigError.of([Problem("`of:` must hold objectives", f"objective {spec.name}")])
        found.append(entry)
    return tuple(found)


def make_inner(spec: ObjectiveSpec) -> list[Objective]:
    """The objects of `inner_specs`.

    Raises:
        ConfigError: with the problems of all of them.
    """
    made: list[Objective] = []
    problems: list[Problem] = []
    for inner in inner_specs(spec):
        try:
            made.append(make_objective(inner))
        except ConfigError as error:
            problems += [_placed(spec, p) for p in error.problems]
    if problems:
        raise ConfigError.of(problems, f"objective {spec.name}")
    return made


def inner_problems(spec: ObjectiveSpec, objectives: Sequence[Objective]) -> list[Problem]:
    """What is wrong with the inner objectives, and whether they share a search split."""
    problems = [_placed(spec, p) for objective in objectives for p in objective.check()]
    if problems:
        return problems
    base = spec.models.get("base")
    for inner in inner_specs(spec):
        if inner.options.get("apply_chat_template") and base is not None and not has_chat_template(base):
            message = f"{inner.name}: the base's tokenizer has no chat template"
            problems.append(Problem(message, f"objective {spec.name}", "leave out `apply_chat_template:`"))
    if "search" not in common_splits(objectives):
        problems.append(Problem("not all of its objectives have a search split", f"objective {spec.name}"))
    return problems


def common_splits(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The splits that all objectives have."""
    return tuple(s for s in SPLITS if all(s in o.splits for o in objectives))


def references_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The checkpoint folders that any of the objectives wants to see."""
    return tuple(dict.fromkeys(r for o in objectives for r in getattr(o, "references", ())))


def observe_inner(objectives: Sequence[Any], reference: str, live: LiveModel, split: str) -> None:
    """Show a reference to those of the objectives that want to see it."""
    for objective in objectives:
        if reference in getattr(objective, "references", ()):
            objective.observe(reference, live, split)


def fit_inner(objectives: Sequence[Any], outline: Outline) -> tuple[list[Problem], list[str]]:
    """What those of the objectives that look at a tokenizer say of it."""
    found = [objective.fit(outline) for objective in objectives if hasattr(objective, "fit")]
    return [p for problems, _ in found for p in problems], [note for _, notes in found for note in notes]


def _placed(spec: ObjectiveSpec, problem: Problem) -> Problem:
    return Problem(problem.message, ": ".join(w for w in (f"objective {spec.name}", problem.where) if w), problem.hint)
