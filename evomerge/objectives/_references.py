"""Objectives that compare the merged model with single models: each of these is shown to them once per worker.

Such an objective has, beside what `Objective` asks for, what `Referring` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import CandidateFailure, ConfigError, EvomergeError, Problem
from evomerge.objectives import Objective, ObjectiveSpec
from evomerge.recipe import Recipe
from evomerge.weights import Checkpoint, Weights

if TYPE_CHECKING:
    from evomerge.model import LiveModel


class Referring(Protocol):
    """What an objective with references has too.

    Attributes:
        references: the checkpoint folders that it wants to see, each once.
    """

    references: tuple[str, ...]

    def observe(self, reference: str, live: LiveModel, split: str) -> None:
        """Remember what is needed of a reference, which the live model is now, on a split.

        Raises:
            CandidateFailure: the reference cannot be scored.
            ConfigError: what was found cannot be used or kept.
        """
        ...


def folder_of(spec: ObjectiveSpec, reference: str) -> str:
    """The checkpoint folder of "base", of an expert's name, or the folder itself."""
    return spec.models.get(reference, reference)


def reference_problems(spec: ObjectiveSpec, references: Iterable[str]) -> list[Problem]:
    """Whether each named model of an objective exists and has the base's tensors."""
    where = f"objective {spec.name}"
    problems: list[Problem] = []
    for reference in references:
        folder = folder_of(spec, reference)
        try:
            found = Checkpoint(folder)
            base = Checkpoint(spec.models["base"]) if "base" in spec.models else found
        except EvomergeError as error:
            known = ", ".join(spec.models) or "none"
            hint = f"a reference is a model of the study ({known}) or the path of a checkpoint"
            problems.append(Problem(f"the reference {reference!r}: {error.message}", where, hint))
            continue
        differing = [n for n in base.names if n not in found.info or found.info[n].shape != base.info[n].shape]
        if differing:
            lacking = f"{len(differing)} tensors are missing or have another shape, such as {differing[0]}"
            problems.append(Problem(f"the reference {reference!r} does not fit the base: {lacking}", where))
    return problems


def reference_identity(spec: ObjectiveSpec, reference: str) -> str:
    """What a fingerprint holds of a reference: the study's own models are told apart by the study itself."""
    return reference if reference in spec.models else Checkpoint(reference).digest()


def observe_references(
    objectives: Sequence[Objective], live: LiveModel, weights: Weights, splits: Sequence[str], seen: set[str]
) -> None:
    """Install each reference into the live model and show it to the objectives that want to see it.

    Args:
        splits: those that are about to be scored.
        seen: splits of which this has been done; those of `splits` are added.

    Raises:
        ConfigError: a reference cannot be scored.
    """
    new = [split for split in splits if split not in seen]
    seen.update(new)
    referring: list[Any] = [o for o in objectives if getattr(o, "references", ())] if new else []
    resident = set(weights.checkpoints)
    for reference in dict.fromkeys(r for o in referring for r in o.references):
        try:
            live.install(Recipe.build("passthrough", None, {reference: {}}), weights)
            for objective in (o for o in referring if reference in o.references):
                for split in new:
                    objective.observe(reference, live, split)
        except CandidateFailure as error:
            raise ConfigError(f"the reference model {reference} cannot be scored: {error.message}") from error
        if reference not in resident:
            weights.forget((reference, name) for name in live.checkpoint.names)
