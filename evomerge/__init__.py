"""evomerge: a search engine for model merges.

Public names are loaded on first use, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "evomerge.recipe",
    "SearchSpace": "evomerge.space",
    "Study": "evomerge.study",
    "Worker": "evomerge.worker",
    "Weights": "evomerge.weights",
    "LiveModel": "evomerge.model",
    "EvomergeError": "evomerge.errors",
    "load_study_file": "evomerge.config",
    "merge": "evomerge.export",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evomerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
