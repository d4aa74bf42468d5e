"""What a search is given and what it says: its budget, an event per candidate, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """When to stop asking: candidates in the study, or seconds of searching; None is no limit.

    Attributes:
        seconds: of all runs of the study together.
        run_seconds: of this run alone.
    """

    evaluations: int | None = None
    seconds: float | None = None
    run_seconds: float | None = None


@dataclass(frozen=True)
class Event:
    """One candidate is recorded as finished: what a progress display needs."""

    number: int
    label: str | None
    values: tuple[float, ...] | None
    stderr: tuple[float, ...] | None
    reason: str | None
    same_as: int | None
    elapsed_s: float
    stopped: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Ending:
    """Why a search came to its end, in words; `stopped` if somebody asked it to."""

    why: str
    stopped: bool = False
