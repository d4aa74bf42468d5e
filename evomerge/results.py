"""What `front` and `export` do: a study's candidates with intervals, and the gain that survives on the test split.

A choice is settled before a test score is looked at, and each model is scored on the test split once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evomerge.card import model_card
from evomerge.commands import say
from evomerge.config import StudyConfig
from evomerge.errors import ConfigError
from evomerge.export import export as write_export
from evomerge.export import require_free
from evomerge.gains import Report, best_known, report
from evomerge.intervals import interval
from evomerge.rescore import eligible, front_of, score_split, splits_of, study_config, winner
from evomerge.study import Candidate, Study


def front_rows(
    study: Study, split: str, *, everything: bool, inline: bool, allow_task_code: bool
) -> list[dict[str, Any]]:
    """One row per front point (or candidate): number, label, value and interval per objective.

    With the test split, the winner and the best known recipe are scored on it too, and the gain between them is said.
    """
    candidates = study.candidates()
    chosen = [c for c in candidates if c.values and c.state == "done"] if everything else front_of(study, candidates)
    config = study_config(study, allow_task_code=allow_task_code)
    best: Candidate | None = None
    if split == "test" and eligible(candidates):
        best = _winner(study, config, candidates, inline=inline)
    scores = score_split(study, config, chosen, split, inline=inline, on_score=_counter(split))
    if best is not None:
        gained = _compared(study, config, candidates, best, ("test",), inline=inline)
        found = score_split(study, config, [best], split, inline=inline)[best.number]
        say(f"candidate {best.number} on test: " + ", ".join(f"{n} {interval(s)}" for n, s in found.items()))
        _say_report(gained)
    rows = []
    approximate = set()
    for c in chosen:
        row: dict[str, Any] = {"candidate": c.number, "label": c.label or "", "method": c.recipe.method}
        for name, score in scores[c.number].items():
            row[name] = interval(score)
            approximate |= {name} if row[name].method == "normal" else set()
        row["recipe"] = c.fingerprint[:12]
        rows.append(row)
    if approximate:
        say(f"intervals of {', '.join(sorted(approximate))} are value +- 1.96 standard errors")
    return rows


def export_candidate(
    study: Study, out: str, number: int | None, *, weights: bool, inline: bool, allow_task_code: bool
) -> Path:
    """Export one candidate; its choice is settled before its test score is looked at."""
    require_free(out)
    config = study_config(study, allow_task_code=allow_task_code)
    candidates = study.candidates()
    if number is None:
        chosen = _winner(study, config, candidates, inline=inline)
    else:
        chosen = _numbered(study, candidates, number)
    splits = splits_of(config)
    scores = {split: score_split(study, config, [chosen], split, inline=inline)[chosen.number] for split in splits}
    gained = _compared(study, config, candidates, chosen, splits, inline=inline)
    _say_report(gained)
    lost = chosen.recipe.to_mergekit()[1]
    card = model_card(study, chosen, scores, lost, gained, by_hand=number is not None)
    return write_export(out, chosen.recipe, card, weights=weights)


def _winner(study: Study, config: StudyConfig, candidates: list[Candidate], *, inline: bool) -> Candidate:
    chosen, notes = winner(study, config, candidates, inline=inline)
    for note in notes:
        say(f"note: {note}")
    validated = study.scores(chosen.number, "validation") is not None
    say(f"candidate {chosen.number}: the winner, best of them on the {'validation' if validated else 'search'} split")
    return chosen


def _compared(
    study: Study,
    config: StudyConfig,
    candidates: list[Candidate],
    chosen: Candidate,
    splits: Sequence[str],
    *,
    inline: bool,
) -> Report | None:
    """The chosen candidate against the best known recipe, both scored on these splits."""
    baseline = best_known(study, candidates)
    if baseline is None:
        return None
    failures: dict[int, str] = {}
    for split in splits:
        score_split(study, config, [chosen, baseline], split, inline=inline, failures=failures)
    for message in failures.values():
        say(f"note: {message}")
    return report(study, candidates, chosen)


def _say_report(found: Report | None) -> None:
    if found is None:
        say("no known recipe has scores: there is no gain to tell")
        return
    for line in found.lines():
        say(line)


def _counter(split: str) -> Callable[[int, int], None]:
    """Says how far scoring is: on one line of a terminal, at every tenth model elsewhere."""

    def count(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r{split}: {done} of {total} scored", end="\n" if done == total else "", file=sys.stderr, flush=True
            )
        elif done % 10 == 0 or done == total:
            say(f"{split}: {done} of {total} scored")

    return count


def _numbered(study: Study, candidates: list[Candidate], number: int) -> Candidate:
    if not 0 <= number < len(candidates):
        raise ConfigError(f"the study {study.name!r} has no candidate {number}")
    chosen = candidates[number]
    if chosen.values is None or chosen.state != "done":
        why = chosen.stopped or chosen.reason or chosen.state
        raise ConfigError(f"candidate {number} has no scores: {why}")
    return chosen
