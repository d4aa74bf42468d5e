"""Which rungs and epochs a study has: what its file asks for, or what its objectives and items allow.

`fidelity.py` says what they are, `racing.py` whom they stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.config import StudyConfig
from evomerge.fidelity import FEWEST_CANDIDATES, RUNGS, WORTH_EPOCHS, WORTH_ITEMS, Epochs, additive, share_text
from evomerge.limits import KEEP
from evomerge.objectives import Objective, chance_of, whole_kind


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
    candidates = epochs.candidates or max(FEWEST_CANDIDATES, 2 * config.workers.count)
    evaluations = config.budget.evaluations
    return {"known": known, "evaluations": evaluations, "share": epochs.share, "candidates": candidates}, ""


def epochs_text(epochs: Mapping[str, Any]) -> str:
    """For people: what `choose_epochs` chose."""
    return f"{epochs['candidates']} candidates each, from {share_text(epochs['share'])} of the items" if epochs else ""


def choose_terms(config: StudyConfig, objectives: Sequence[Objective]) -> dict[str, Any]:
    """What races know beside directions, as the arguments of `limits.Terms`; empty where nothing is special.

    Objectives that are scored whole take part in their own way, and beside them some candidates are hopeless. Without
    them nearly all of these are beaten anyhow, and the rule is there only if the file has `keep:`.
    """
    whole = {o.name: kind for o in objectives if (kind := whole_kind(o))}
    asked = config.fidelity.keep
    if not whole and not asked:
        return {}
    raced = [o for o in objectives if o.name not in whole]
    terms: dict[str, Any] = {"whole": whole, "keep": KEEP if asked is None else asked}
    terms["ends"] = {o.name: list(o.bounds) for o in raced}
    if not terms["keep"]:
        return terms
    if asked is None and len(raced) > 2:
        terms["even"] = 1.0 / len(raced)
    chance = {o.name: found for o in raced if (found := chance_of(o)) is not None}
    return terms | ({"chance": chance} if chance else {})


def terms_text(config: StudyConfig, objectives: Sequence[Objective], *, raced: bool) -> dict[str, str]:
    """Rows of `evomerge check` on what `choose_terms` chose, if candidates are raced and it chose anything."""
    terms = choose_terms(config, objectives) if raced else {}
    rows = {}
    if terms.get("whole"):
        rows["scored whole"] = ", ".join(f"{name} ({kind})" for name, kind in terms["whole"].items())
    if terms.get("keep"):
        least = f" (or {share_text(terms['even'])}, while nobody keeps more of all)" if "even" in terms else ""
        guessed = ", ".join(f"{name} {value:.3g}" for name, value in terms.get("chance", {}).items())
        counted = f", counted from what guessing gives: {guessed}" if guessed else ""
        rows["hopeless"] = f"who keeps less than {share_text(terms['keep'])} of the best everywhere{least}{counted}"
    return rows


def _incomparable(objectives: Sequence[Objective]) -> str:
    """Why a part of the items does not tell who is better, or nothing."""
    raced = [o for o in objectives if not whole_kind(o)]
    for o in raced:
        if not o.partial:
            return f"{o.name} has no score for a part of its items, so nothing short of all shows who is beaten"
        if not additive(lambda items, o=o: o.aggregate(items).value):  # type: ignore[misc]
            return f"{o.name} is no mean of its items, so candidates cannot be compared item by item"
    return "" if raced else "no objective has items that could be scored in parts"


def _too_few(objectives: Sequence[Objective], least: int) -> str:
    for o in objectives:
        if not whole_kind(o) and o.size("search") < least:
            return f"{o.name} has {o.size('search')} search items, fewer than {least}"
    return ""
