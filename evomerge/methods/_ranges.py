"""How a method's keyword parameters are annotated: search ranges and what they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """What a search uses for a parameter unless told otherwise, and what it may be at all (`limits`)."""

    low: float
    high: float
    log: bool = False
    limits: tuple[float, float] | None = None


class Marker:
    """A named annotation without a value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


PER_EXPERT = Marker("per expert")
PerExpert = Annotated[float | Sequence[float], PER_EXPERT]
"""One value per expert; inside a method read it with `x.each(value)`."""

EXTENSION = Marker("extension")
"""Annotates a parameter that mergekit does not have."""
