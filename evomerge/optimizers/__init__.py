"""Optimizers: ask for points, tell results; one file each, found through the registry."""

from evomerge.optimizers._contract import check_optimizer
from evomerge.optimizers._core import Goal, Optimizer, Result, make

__all__ = ["Goal", "Optimizer", "Result", "check_optimizer", "make"]
