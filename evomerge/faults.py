"""Named points at which the fault tests kill or stop a process, as EVOMERGE_FAULT says; without it, nothing happens.

Its value is a list of faults with commas between them: `scoring:3` strikes at the third visit of a process to that
stage, `scoring:#3` at every visit of candidate 3. A fault is SIGKILL; with `=hang` it waits for ever instead, with
`=stop` it stops itself (SIGSTOP). With `@FILE` at the end it strikes one process only: the first, which makes the file.

Stages of the controller, in the order of one candidate: proposing, recording, finishing, telling. Of the worker:
opening, merging, scoring, reporting.
"""

from __future__ import annotations

import os
import signal
import time

_visits: dict[str, int] = {}


def point(stage: str, number: int | None = None) -> None:
    """Strike here if the environment asks for it; otherwise do nothing.

    Args:
        number: of the candidate, where it is known.
    """
    wanted = os.environ.get("EVOMERGE_FAULT")
    if not wanted:
        return
    _visits[stage] = _visits.get(stage, 0) + 1
    here = (f"{stage}:{_visits[stage]}", f"{stage}:#{number}")
    for fault in wanted.split(","):
        rest, _, once = fault.partition("@")
        where, _, what = rest.partition("=")
        if where in here and (not once or _first(once)):
            _strike(what)


def _first(path: str) -> bool:
    """Whether this process is the first to come here: who makes the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _strike(what: str) -> None:
    if what == "hang":
        while True:
            time.sleep(3600.0)
    os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
