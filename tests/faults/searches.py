"""Searches of the tiny family in forked processes, on either database, with faults given to them and their workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge import faults
from evomerge.commands import run_search
from evomerge.errors import EvomergeError
from evomerge.progress import Progress
from evomerge.search import Event
from evomerge.study import Study

FORK = multiprocessing.get_context("fork")
# Without lm-eval, whose import would be most of the time of every worker's start.
OBJECTIVES = "objectives=[{name: text, kind: perplexity, files: {search: text.search.txt}}]"


@dataclass
class Tiny:
    """The tiny study in the working directory, on a database.

    Attributes:
        url, name: of the study.
        overrides: of the study file.
    """

    url: str = "sqlite:///runs/tiny/ledger.db"
    name: str = "tiny"
    evaluations: int = 10
    more: Sequence[str] = ()
    overrides: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.overrides = (
            OBJECTIVES,
            "optimizer=map",
            "known_recipes=false",
            f"budget.evaluations={self.evaluations}",
            f"storage={self.url}",
            f"name={self.name}",
            *self.more,
        )

    @property
    def study(self) -> Study:
        return Study.load(self.url, self.name)

    def acknowledged(self) -> list[int]:
        """Numbers that were shown as done, over all runs."""
        path = Path("acks.txt")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def start(
        self, fault: str = "", *, inline: bool = True, prelude: Callable[[], None] = lambda: None, log: str = "log.txt"
    ) -> int:
        """Begin the search, or go on, in a forked process; its number. What it prints goes to a file.

        Args:
            fault: EVOMERGE_FAULT of the process and its workers.
            prelude: called in the process before the search.
        """
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            sys.stderr = sys.stdout = Path(log).open("a", buffering=1)  # noqa: SIM115
            os.environ["EVOMERGE_FAULT"] = fault
            faults._visits.clear()
            _acknowledge_to(Path("acks.txt"))
            prelude()
            code = run_search(
                "study.yaml", self.overrides, resume="auto", inline=inline, quiet=True, allow_task_code=False
            )
        except EvomergeError as error:
            print(f"error: {error}")
            code = error.exit_code
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            os._exit(code)

    def run(self, fault: str = "", **options: Any) -> int:
        """`start`, and wait for its end; the exit status, negative for a signal."""
        return ended(self.start(fault, **options))


def ended(pid: int) -> int:
    """Wait for a forked process; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    """SIGKILL, and wait."""
    os.kill(pid, signal.SIGKILL)
    ended(pid)


def _acknowledge_to(path: Path) -> None:
    """What a person sees as done is written down, in one write, where a kill cannot take it back."""
    shown = Progress.event

    def event(self: Progress, e: Event) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{e.number}\n".encode())
        os.close(handle)
        shown(self, e)

    Progress.event = event  # type: ignore[method-assign]
