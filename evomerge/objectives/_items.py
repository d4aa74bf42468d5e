"""Items in JSON lines files: read once, divided into splits that share nothing, every mistake named by file and line.

`files` names one file per split. One `file` is divided 60/20/20 by the hash of each item's content, as tasks without
named splits are. Only the columns that an objective uses count: two lines with equal ones are the same item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, resolve_path
from evomerge.objectives._fewshot import content_hash

SHARES = (("search", 0.6), ("validation", 0.8), ("test", 1.0))  # upper ends
SHOWN = 10  # problems of one file
HINT = "one JSON object per line"


@dataclass(frozen=True)
class Item:
    """One line: its columns, its place ("file:line"), and the hash of the columns that are used."""

    doc: dict[str, Any]
    where: str
    digest: str


class Items:
    """The items of an objective, by split.

    Args:
        spec: relative paths start at its folder.
        source: one file, or split -> file.
        columns: those that every line must have, with a text in each; () takes all, whatever they hold.
        limit: items per split; the first ones of the files.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        source: str | Mapping[Any, str],
        columns: tuple[str, ...] = (),
        limit: int | None = None,
    ) -> None:
        self.subject = f"objective {spec.name}"
        self.columns = columns
        self.limit = limit
        named = {"": source} if isinstance(source, str) else source
        self._files: dict[str, Path] = {str(split): resolve_path(spec, file) for split, file in named.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Items:
        return self  # nobody changes items, and lm-eval copies what a task's configuration holds

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are."""
        return SPLITS if "" in self._files else tuple(s for s in SPLITS if s in self._files)

    def check(self) -> list[Problem]:
        """Everything that is wrong with the files, and splits that are empty or share items."""
        by_split, problems = self._read
        if problems:
            return list(problems)
        problems = []
        seen: dict[str, tuple[str, Item]] = {}
        for split in self.splits:
            if not by_split[split]:
                problems.append(self._empty(split))
            shared: dict[str, list[tuple[Item, Item]]] = {}
            for item in by_split[split]:
                other, first = seen.setdefault(item.digest, (split, item))
                if other != split:
                    shared.setdefault(other, []).append((first, item))
            for other, pairs in shared.items():
                first, item = pairs[0]
                message = f"the {other} and {split} splits share {len(pairs)} items, as {first.where} and {item.where}"
                hint = "scores on shared items are not honest: take them out of one of the two"
                problems.append(Problem(message, self.subject, hint))
        return problems

    def _empty(self, split: str) -> Problem:
        if split in self._files:
            return Problem(f"the {split} split is empty: {self._files[split]} holds no items", self.subject)
        hint = "one file is divided 60/20/20 by content: add items, or name three files under `files:`"
        return Problem(f"the {split} split is empty: {self._files['']} holds too few items", self.subject, hint)

    def of(self, split: str) -> list[Item]:
        """A split's items.

        Raises:
            ConfigError: there is no such split, or the files are wrong.
        """
        if split not in self.splits:
            raise ConfigError(f"{self.subject} has no {split} split", hint=f"it has {', '.join(self.splits)}")
        by_split, problems = self._read
        if problems:
            raise ConfigError.of(problems, self.subject)
        return by_split[split]

    def fingerprint(self) -> str:
        """Hash of the items that are used, split by split."""
        whole = hashlib.sha256()
        for split in self.splits:
            for item in self.of(split):
                whole.update(item.digest.encode())
            whole.update(split.encode())
        return whole.hexdigest()

    @cached_property
    def _read(self) -> tuple[dict[str, list[Item]], list[Problem]]:
        """Split -> items, and the problems of all files; shared by every call: a file is read once."""
        by_split: dict[str, list[Item]] = {split: [] for split in self.splits}
        problems: list[Problem] = []
        for split, path in self._files.items():
            items, found = _lines(path, self.columns)
            problems += found[:SHOWN]
            if len(found) > SHOWN:
                problems.append(Problem(f"{len(found) - SHOWN} more problems in this file", str(path)))
            for item in items:
                by_split[split or split_of(item.digest)].append(item)
        return {split: items[: self.limit] for split, items in by_split.items()}, problems


def _lines(path: Path, columns: tuple[str, ...]) -> tuple[list[Item], list[Problem]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        hint = "paths start at the working directory; in an objective's own file, at its folder"
        return [], [Problem(f"cannot read the items: {reason}", str(path), hint)]
    items: list[Item] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            doc = json.loads(line)
        except ValueError as error:
            problems.append(Problem(f"not JSON: {error}", where, HINT))
            continue
        if not isinstance(doc, dict):
            problems.append(Problem(f"an item is a JSON object, not {line.strip()[:60]}", where, HINT))
            continue
        wrong = [p for column in columns if (p := _column_problem(doc, column, where)) is not None]
        problems += wrong
        if not wrong:
            used = {column: doc[column] for column in columns} if columns else doc
            items.append(Item(used, where, content_hash(used)))
    return items, problems


def _column_problem(doc: dict[str, Any], column: str, where: str) -> Problem | None:
    if column not in doc:
        return Problem(f"no column {column!r}", where, f"it has {', '.join(map(repr, doc)) or 'none'}")
    if not isinstance(doc[column], str) or not doc[column]:
        return Problem(f"the column {column!r} must hold a text, not {doc[column]!r:.80}", where)
    return None


def split_of(digest: str) -> str:
    """The split of an item with this content hash, 60/20/20."""
    place = int(digest[:15], 16) / 16**15
    return next(split for split, end in SHARES if place < end)
