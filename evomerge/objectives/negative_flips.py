"""Objective kind `negative_flips`: what a reference model has right and the merged model has wrong, smaller is better.

The negative flip rate of "MUSCLE" (arXiv 2407.09435), for models that replace another one: users notice what stops
working.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.errors import CandidateFailure, ConfigError, Problem
from evomerge.objectives import ObjectiveSpec, Scores, mean_scores
from evomerge.objectives._nested import (
    fit_inner,
    inner_problems,
    inner_specs,
    make_inner,
    observe_inner,
    references_of,
)
from evomerge.objectives._options import NegativeFlipsOptions, read_options
from evomerge.objectives._references import folder_of, reference_identity, reference_problems

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


class NegativeFlipsObjective:
    """Share of all items that a reference model has right and the merged model has wrong.

    Options: `of` (one objective whose items are 0 or 1, as in the study file: accuracy, exact match), `reference`
    (`base`, an expert's name, or the path of another checkpoint of the family). It is scored once per worker.

    Raises:
        ConfigError: an unknown or ill-typed option, of this objective or of the inner one.
    """

    maximize = False
    bounds: tuple[float | None, float | None] = (0.0, 1.0)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        options = {**spec.options, "of": inner_specs(spec)}
        self.options = read_options(NegativeFlipsOptions, options, f"objective {spec.name}")
        (self.inner,) = make_inner(spec)
        self.reference = folder_of(spec, self.options.reference)
        self._right: dict[str, np.ndarray] = {}

    @property
    def references(self) -> tuple[str, ...]:
        """The reference, and what the inner objective wants to see."""
        return tuple(dict.fromkeys([*references_of([self.inner]), self.reference]))

    @property
    def splits(self) -> tuple[str, ...]:
        """The inner objective's."""
        return self.inner.splits

    @property
    def partial(self) -> bool:
        """Whether the inner objective is."""
        return self.inner.partial

    def check(self) -> list[Problem]:
        """The inner objective, whether its items can be right or wrong, and the reference."""
        problems = inner_problems(self.spec, [self.inner])
        if not problems and (not self.inner.maximize or self.inner.bounds != (0.0, 1.0)):
            message = f"{self.inner.name} has no right and wrong items"
            hint = "name an objective with a metric such as acc or exact_match"
            problems.append(Problem(message, f"objective {self.name}", hint))
        return problems + reference_problems(self.spec, [self.options.reference])

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """What the inner objective says of the base's tokenizer."""
        return fit_inner([self.inner], outline)

    def fingerprint(self) -> str:
        """Hash of the inner objective and the reference."""
        identity = reference_identity(self.spec, self.options.reference)
        return hashlib.sha256(f"{identity} {self.inner.fingerprint()}".encode()).hexdigest()

    def size(self, split: str) -> int:
        """The inner objective's number of items."""
        return self.inner.size(split)

    def observe(self, reference: str, live: LiveModel, split: str) -> None:
        """Keep which items the reference has right."""
        observe_inner([self.inner], reference, live, split)
        if reference == self.reference:
            items = self.inner.score(live, split).items
            if not _zero_or_one(items):
                raise ConfigError(
                    f"objective {self.name}: the items of {self.inner.name} are not 0 or 1 on the {split} split",
                    hint="name an objective with a metric such as acc or exact_match",
                )
            self._right[split] = items

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N,) 1 where the reference is right and the model is not."""
        if split not in self._right:
            raise ConfigError(
                f"objective {self.name}: the reference was not observed on the {split} split",
                hint="a worker does that when it starts; without one, call observe() with the reference installed",
            )
        items = self.inner.score(live, split, positions).items
        if not _zero_or_one(items):
            raise CandidateFailure(f"{self.name}: items of {self.inner.name} are not 0 or 1", reason="scores")
        before = self._right[split] if positions is None else self._right[split][list(positions)]
        return self.aggregate(np.where((before == 1) & (items == 0), 1.0, 0.0))

    def aggregate(self, items: np.ndarray) -> Scores:
        """The share of items."""
        return mean_scores(items)


def _zero_or_one(items: np.ndarray) -> bool:
    return items.ndim == 1 and bool(np.isin(items, (0.0, 1.0)).all())


registry.register("objectives", "negative_flips", NegativeFlipsObjective)
