"""Optimizers: ask for points, tell results; one file each, found through the registry."""

from evomerge.optimizers._contract import check_optimizer
from evomerge.optimizers._core import (
    Describes,
    Exhausted,
    Facts,
    Goal,
    Level,
    Optimizer,
    Recommendation,
    Recommends,
    Result,
    make,
    violation,
)

__all__ = [
    "Describes",
    "Exhausted",
    "Facts",
    "Goal",
    "Level",
    "Optimizer",
    "Recommendation",
    "Recommends",
    "Result",
    "check_optimizer",
    "make",
    "violation",
]
