"""Named points at which the fault tests kill a process: EVOMERGE_FAULT=stage:n kills at the n-th visit.

Stages, in the order of one candidate: proposing, recording, merging, scoring, finishing, telling.
"""

from __future__ import annotations

import os
import signal

_visits: dict[str, int] = {}


def point(stage: str) -> None:
    """Kill this process with SIGKILL if the environment asks for it here; otherwise do nothing."""
    wanted = os.environ.get("EVOMERGE_FAULT")
    if not wanted:
        return
    _visits[stage] = _visits.get(stage, 0) + 1
    if wanted == f"{stage}:{_visits[stage]}":
        os.kill(os.getpid(), signal.SIGKILL)
