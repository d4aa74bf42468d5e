"""The objectives that a study file names: from an entry, a ready-made file or a path to what a worker is told.

An entry is a name of a shipped file, a path of a YAML file, or the objective written out; `of:` holds entries again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge import registry
from evomerge.config import read_text, shipped_file, shipped_names
from evomerge.errors import ConfigError, Problem
from evomerge.objectives import ObjectiveSpec
from evomerge.strict_yaml import Document, load_yaml

MAX_DEPTH = 4  # of objectives that are made of objectives
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Place = tuple[str | int, ...]


def models_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Label -> checkpoint folder of a study file's base and experts, as far as they are well-formed."""
    experts = data.get("experts")
    named = {"base": data.get("base"), **(experts if isinstance(experts, dict) else {})}
    return {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, str)}


def objective_specs(
    entries: Any, document: Document, shared: ObjectiveSpec, problems: list[Problem]
) -> list[ObjectiveSpec]:
    """The objectives under `objectives:`; what is wrong with them is added to `problems`.

    Args:
        entries: the key's value; anything but a list is no objective (the study file's own check says so).
        shared: gives what all of them share: folder, flags and models.
    """
    if not isinstance(entries, list):
        return []
    return list(_specs(entries, document, ("objectives",), shared, problems))


def _specs(
    entries: Any, document: Document, at: Place, shared: ObjectiveSpec, problems: list[Problem], depth: int = 0
) -> Iterator[ObjectiveSpec]:
    """The objectives at a place of a document: a list of entries, or one entry."""
    if depth > MAX_DEPTH:
        problems.append(Problem("objectives lie inside each other too deeply", shared.where, "a file names itself?"))
        return
    used: set[str] = set()
    for index, entry in enumerate(entries) if isinstance(entries, list) else [(None, entries)]:
        spec = _spec(entry, document, at if index is None else (*at, index), shared, problems, depth)
        if spec is None:
            continue
        if spec.name in used:
            problems.append(Problem(f"two objectives are called {spec.name!r}", spec.where, hint="set `name:`"))
        used.add(spec.name)
        yield spec


def _spec(
    entry: Any, document: Document, place: Place, shared: ObjectiveSpec, problems: list[Problem], depth: int
) -> ObjectiveSpec | None:
    where, folder, default = document.where(place), shared.folder, ""
    if isinstance(entry, str):
        path = Path(entry) if entry.endswith((".yaml", ".yml")) else shipped_file("objectives", entry)
        if path is None or not path.is_file():
            names = ", ".join(shipped_names("objectives"))
            problems.append(Problem(f"no objective {entry!r}", where, hint=f"there are {names}"))
            return None
        try:
            document, place = load_yaml(read_text(path), str(path)), ()
        except ConfigError as error:
            problems += error.problems
            return None
        entry, where, folder, default = document.data, str(path), str(path.parent), path.stem
    if not isinstance(entry, dict):
        problems.append(Problem("an objective is a name or a mapping", where))
        return None
    options = {k: v for k, v in entry.items() if k not in ("name", "kind", "description")}
    name = entry.get("name", default or entry.get("task") or entry.get("kind"))
    kind = entry.get("kind")
    if kind not in registry.names("objectives"):
        known = ", ".join(registry.names("objectives"))
        problems.append(Problem(f"unknown objective kind {kind!r}", where, hint=f"known: {known}"))
        return None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.append(Problem(f"an objective's name must be a word, not {name!r}", where))
        return None
    spec = replace(shared, name=name, kind=str(kind), options=options, folder=folder, where=where)
    if options.get("of") is not None:
        options["of"] = tuple(_specs(options["of"], document, (*place, "of"), spec, problems, depth + 1))
    return spec
