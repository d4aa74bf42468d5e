"""Objectives: what a merged model is scored by. One file per kind; see `Objective`.

An objective scores the live model on one split of its items and keeps every item's result, so that
comparisons can be paired and intervals are honest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from evomerge import registry
from evomerge.errors import Problem

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline

SPLITS = ("search", "validation", "test")


@dataclass(frozen=True)
class ObjectiveSpec:
    """One objective as plain data: what the study file says, with paths resolved.

    Attributes:
        name: column in the study; unique there.
        kind: file in evomerge/objectives.
        options: the kind's own keys; objectives under `of:` are specs themselves.
        folder: relative paths in `options` start here.
        where: file and line that named it, for messages.
        allow_code: the user passed the flag that lets task files run code of their own.
        allow_benchmark_tests: the user passed the flag that lets a benchmark's test set be searched on.
        models: label ("base" or an expert's) -> checkpoint folder, for objectives that look at single models.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    folder: str = "."
    allow_code: bool = False
    where: str = ""
    allow_benchmark_tests: bool = False
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """One model's result on one split of one objective.

    Attributes:
        value: the aggregate, in the objective's own unit and direction.
        stderr: standard error of `value` over items.
        items: (N,) each item's contribution, in the split's fixed order.
    """

    value: float
    stderr: float
    items: np.ndarray


class Objective(Protocol):
    """One way to score a model.

    Attributes:
        name: as in the study.
        maximize: whether larger is better.
        bounds: smallest and largest possible value, None where there is none.
        splits: those that exist, search first.
        partial: whether a part of the items has a score of its own, so that a candidate can be scored in rungs.
        exact, measured: may be set to True where `partial` is False; see `whole_kind`.
        chance: may be set to the value that guessing gives on the search split; see `chance_of`.
    """

    name: str
    maximize: bool
    bounds: tuple[float | None, float | None]
    splits: tuple[str, ...]
    partial: bool

    def check(self) -> list[Problem]:
        """What is wrong with the objective before any model is scored; empty when all is well."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the items, the prompts or the metric do."""
        ...

    def size(self, split: str) -> int:
        """The number of items of a split, which is the length of `Scores.items`."""
        ...

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """Score the live model on a split. Does not change the model.

        Args:
            positions: which items, ascending; None is all. Only all where the objective is not `partial`.

        Raises:
            CandidateFailure: this model cannot be scored (never for a bad objective).
        """
        ...

    def aggregate(self, items: np.ndarray) -> Scores:
        """The score of items that `score` returned, from one call or joined from several; only where `partial`."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """What an objective has too whose items go through a tokenizer and a context of limited length."""

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """What of the items cannot be fed to this model, and what people should know of how they are scored."""
        ...


def make_objective(spec: ObjectiveSpec) -> Objective:
    """Build an objective from its description.

    Raises:
        ConfigError: unknown kind, or options that the kind refuses.
    """
    maker = registry.get("objectives", spec.kind)
    objective: Objective = maker(spec)
    return objective


def mean_scores(items: np.ndarray) -> Scores:
    """Scores whose value is the plain mean of the items. items: (N,)."""
    n = items.size
    stderr = float(items.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return Scores(float(items.mean()), stderr, items)


def whole_kind(objective: Objective) -> str:
    """How an objective without parts is scored in rungs: "exact", "measured", or "" for all others.

    One with `exact = True` is read from the model without a forward pass and has no error, such as a depth: it is
    scored before all else. One with `measured = True` is measured anew at each score and takes no longer than a part of
    the others' items, such as a latency: it is scored once, beside the first part.
    """
    kinds = [kind for kind in ("exact", "measured") if getattr(objective, kind, False)]
    return kinds[0] if kinds and not objective.partial else ""


def chance_of(objective: Objective) -> float | None:
    """What a model that knows nothing scores on the search split by guessing; None where that is the worst value.

    A broken model of four choices has a quarter right. Races count from there how much of the best score is left.
    """
    found: float | None = getattr(objective, "chance", None)
    return found


def resolve_path(spec: ObjectiveSpec, path: str) -> Path:
    """A path in an objective's options, relative to the file that holds them."""
    return Path(spec.folder, path).resolve()
