"""Which rungs and epochs a study has: what its file asks for, or what its objectives and items allow.

`fidelity.py` says what they are, `racing.py` whom they stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.config import StudyConfig
from evomerge.fidelity import FEWEST_CANDIDATES, RUNGS, WORTH_EPOCHS, WORTH_ITEMS, Epochs, additive, share_text
from evomerge.objectives import Objective


def choose_rungs(config: StudyConfig, objectives: Sequence[Objective]) -> tuple[tuple[float, ...], str]:
    """The study's rungs, empty for none; and if the file did not say so, why there are none."""
    asked = config.fidelity.rungs
    if asked is not None and len(asked) < 2:
        return (), ""
    why = _incomparable(objectives) or ("" if asked else _too_few(objectives, WORTH_ITEMS))
    return ((), why) if why else (asked or RUNGS, "")


def choose_epochs(config: StudyConfig, objectives: Sequence[Objective], known: int) -> tuple[dict[str, Any], str]:
    """The study's epochs as its header holds them, empty for none; and if the file did not say so, why there are none.

    Args:
        known: number of known recipes, which come first.
    """
    asked = config.fidelity.epochs
    if asked is False:
        return {}, ""
    if config.budget.evaluations is None:
        return {}, "their share of the items grows with the evaluations, and the budget limits hours alone"
    why = _incomparable(objectives) or ("" if asked else _too_few(objectives, WORTH_EPOCHS))
    if why:
        return {}, why
    epochs = asked or Epochs()
    candidates = epochs.candidates or max(FEWEST_CANDIDATES, 2 * (config.workers.local or config.workers.ray or 1))
    evaluations = config.budget.evaluations
    return {"known": known, "evaluations": evaluations, "share": epochs.share, "candidates": candidates}, ""


def epochs_text(epochs: Mapping[str, Any]) -> str:
    """For people: what `choose_epochs` chose."""
    return f"{epochs['candidates']} candidates each, from {share_text(epochs['share'])} of the items" if epochs else ""


def _incomparable(objectives: Sequence[Objective]) -> str:
    """Why a part of the items does not tell who is better, or nothing."""
    for o in objectives:
        if not o.partial:
            return f"{o.name} has no score for a part of its items, so nothing short of all shows who is beaten"
        if not additive(lambda items, o=o: o.aggregate(items).value):  # type: ignore[misc]
            return f"{o.name} is no mean of its items, so candidates cannot be compared item by item"
    return ""


def _too_few(objectives: Sequence[Objective], least: int) -> str:
    for o in objectives:
        if o.size("search") < least:
            return f"{o.name} has {o.size('search')} search items, fewer than {least}"
    return ""
