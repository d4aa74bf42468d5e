"""Outcomes on disk before they are in the database: what a worker found is not lost when the database is.

One file per outcome: written, fsynced, renamed, and the folder fsynced, before the database is asked; deleted when it
has answered. What a killed search left here is recorded when the study is taken up again. Files hold JSON only; one
that is torn, or that is not of this study, is set aside and never recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

FORMAT = "evomerge-spool 1"
STATES = ("COMPLETE", "PRUNED", "FAIL")


class Torn(Exception):
    """A file that does not hold an outcome of this study; the reason is its text."""


class Spool:
    """The outcomes of one study that are not in the database yet.

    Args:
        folder: made with the first outcome.
        uid: of the study; a folder may hold files of several.
    """

    def __init__(self, folder: Path, uid: str) -> None:
        self.folder = folder
        self._uid = uid

    def put(self, record: Mapping[str, Any]) -> Path:
        """Keep an outcome; it is on the disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        path = self.folder / f"{self._uid[:12]}-{record['number']:08d}.json"
        body = json.dumps({"study": self._uid, "record": record}).encode()
        partial = path.with_suffix(".tmp")
        made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(f"{FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode() + body)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync_folder(self.folder)
        if made:
            _sync_folder(self.folder.parent)
        return path

    def drop(self, path: Path) -> None:
        """Forget an outcome that the database holds. A file that stays behind is dropped at the next start."""
        with contextlib.suppress(OSError):
            path.unlink()

    def numbers(self) -> list[int]:
        """The candidates that have an outcome here."""
        return sorted(number for number, _ in self._files(".json"))

    def read(self, number: int) -> dict[str, Any]:
        """The outcome of a candidate.

        Raises:
            Torn: the file holds no outcome of this study.
        """
        path = next(path for found, path in self._files(".json") if found == number)
        head, _, body = path.read_bytes().partition(b"\n")
        if head != f"{FORMAT} {hashlib.sha256(body).hexdigest()}".encode():
            raise Torn("its checksum is wrong: it was cut off or changed")
        try:
            held = json.loads(body)
            study, record = held["study"], held["record"]
            _require_form(record, number)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Torn(f"it holds no outcome ({error})") from error
        if study != self._uid:
            raise Torn("it is of another study")
        return dict(record)

    def replay(
        self,
        mine: Collection[int],
        running: Collection[int],
        close: Callable[[dict[str, Any]], bool],
        on_note: Callable[[str], None],
    ) -> None:
        """Record the outcomes that a controller before this one could not, and forget those that are recorded.

        Args:
            mine: the candidates that this controller has taken up; `running`: those of all controllers.
            close: records an outcome; False if its candidate has ended already.
        """
        count = 0
        for record in self.records(on_note):
            number = record["number"]
            if number in mine:
                record["user"]["arrival"] = None  # others may have ended since it was written: the database counts
                count += close(record)
            if number in mine or number not in running:
                self.drop_number(number)
        if count:
            on_note(f"{count} outcomes that had not reached the database are recorded now")

    def records(self, on_note: Callable[[str], None]) -> list[dict[str, Any]]:
        """All outcomes, in the order in which they were found; what is none is set aside, and told."""
        records = []
        for number in self.numbers():
            try:
                records.append(self.read(number))
            except Torn as reason:
                on_note(f"the spooled outcome {self.set_aside(number)} is not recorded: {reason}")
        return sorted(records, key=lambda record: (record["ended"], record["number"]))

    def drop_number(self, number: int) -> None:
        """Forget a candidate's outcome, and what was being written of it."""
        for suffix in (".json", ".tmp"):
            for found, path in list(self._files(suffix)):
                if found == number:
                    self.drop(path)

    def set_aside(self, number: int) -> Path:
        """Move a file out of the way, under a name that nothing reads; the new name."""
        path = next(path for found, path in self._files(".json") if found == number)
        aside = path.with_suffix(".bad")
        path.replace(aside)
        return aside

    def _files(self, suffix: str) -> Iterator[tuple[int, Path]]:
        """(number, file) of this study's files."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            found = re.fullmatch(rf"{re.escape(self._uid[:12])}-(\d+){re.escape(suffix)}", path.name)
            if found and path.is_file() and not path.is_symlink():
                yield int(found[1]), path


def spool_folder(file: Path | None, name: str) -> Path:
    """Where a study's outcomes wait for its database: beside a SQLite file, in runs/NAME/ for a server's."""
    if file is not None:
        return file.parent / "spool"
    return Path("runs") / (re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_") / "spool"


def _require_form(record: Any, number: int) -> None:
    """Raise ValueError unless a record has the parts of an outcome."""
    if record["number"] != number or record["state"] not in STATES:
        raise ValueError("another candidate or state")
    datetime.fromisoformat(record["ended"])
    if not all(isinstance(value, float) and math.isfinite(value) for value in record["values"]):
        raise ValueError("values that are no numbers")
    texts = record["system"].values()
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(key, str) for key in record["user"]):
        raise ValueError("attributes that are no attributes")
    if record["user"].get("arrival") is not None and not isinstance(record["user"]["arrival"], int):
        raise ValueError("an arrival that is no number")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
