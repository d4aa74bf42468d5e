"""What `front` and `export` do: a study's candidates with intervals, and the gain that survives on the test split.

A choice is settled before a test score is looked at, and each model is scored on the test split once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.card import model_card, path_line
from evomerge.commands import say
from evomerge.errors import ConfigError
from evomerge.export import export as write_export
from evomerge.export import mergekit_form, require_free
from evomerge.gains import Report, report
from evomerge.intervals import Z95, Interval, interval
from evomerge.objectives import Scores
from evomerge.picking import Pick, could_be_on_front, hypervolume_line, memberships, picked
from evomerge.rescore import (
    Scorer,
    baselines,
    broken_limits,
    eligible,
    feasible,
    front_of,
    nearest,
    none_feasible,
    remarks,
    splits_of,
    study_config,
)
from evomerge.selection import winner
from evomerge.study import Candidate, Study

LINE = 60  # characters of a path in a table, at most unless two models' names are longer


def front_rows(
    study: Study, split: str, pick: Pick | None = None, *, everything: bool, inline: bool, allow_task_code: bool
) -> list[dict[str, Any]]:
    """One row per front point (or candidate): number, label, value and interval per objective, membership.

    What was asked for with `pick` comes first. With the test split, the winner, the best expert and the best standard
    recipe are scored on it too, and what the search added is said first.
    """
    candidates = study.candidates()
    chosen = [c for c in candidates if c.values and c.state == "done"] if everything else front_of(study, candidates)
    nearest_one = nearest(study, candidates)
    if nearest_one is not None and not everything:
        chosen = [nearest_one[0]]
    wanted = picked(study, candidates, pick) if pick else None
    config = study_config(study, allow_task_code=allow_task_code)
    with Scorer(study, config, inline=inline) as scorer:
        best: Candidate | None = None
        if split == "test" and feasible(study, candidates):
            best = _winner(scorer, candidates)
        scores = scorer.score(chosen, split, on_score=_counter(split))
        if best is not None:
            gained = _compared(scorer, candidates, best, ("test",))
            _say_report(candidates, gained)
            found = scorer.score([best], split)[best.number]
            say(f"candidate {best.number} on test: " + ", ".join(f"{n} {interval(s)}" for n, s in found.items()))
    _say_remarks(study, candidates)
    shares = memberships(study, candidates)
    lines = {c.number: _path(study, c) for c in chosen}
    rows = [_row(c, scores[c.number], shares[c.fingerprint], lines[c.number]) for c in chosen]
    if everything:
        able = {c.fingerprint for c in feasible(study, candidates)}
        for c, row in zip(chosen, rows, strict=True):
            row["state"] = "done" if c.fingerprint in able else "infeasible"
        rows += _estimates(study, candidates) if split == "search" else []
    if wanted is not None:
        say(f"candidate {wanted.number}: {pick}")
        for row in rows:
            row["picked"] = str(pick) if row["candidate"] == wanted.number else ""
        rows.sort(key=lambda row: not row["picked"])
    if len({row["method"] for row in rows}) < 2:
        for row in rows:
            del row["method"]  # a column of one word
    if not any(row["path"] for row in rows):
        for row in rows:
            del row["path"]  # no layer orders here
    approximate = {n for row in rows for n, v in row.items() if isinstance(v, Interval) and v.method == "normal"}
    if approximate:
        say(f"intervals of {', '.join(sorted(approximate))} are value +- 1.96 standard errors")
    return rows


def _row(c: Candidate, scores: Mapping[str, Scores], share: float, path: str) -> dict[str, Any]:
    label = c.label or c.attrs.get("source") or ""
    row: dict[str, Any] = {"candidate": c.number, "label": label, "method": c.recipe.method, "path": path}
    row |= {name: interval(score) for name, score in scores.items()}
    return row | {"membership": round(share, 4), "recipe": c.fingerprint[:12]}


def _path(study: Study, c: Candidate) -> str:
    """The layers of a path in one line with the models' short names, the middle of a long one left out; else ""."""
    identity = study.header.identity
    named = {"base": identity.get("base", ""), **identity.get("experts", {}), "merged": identity.get("merged", "")}
    said = path_line(c.recipe, {path: name for name, path in named.items()})
    if len(said) <= LINE:
        return said
    parts = said.split(", ")
    first, last = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    while len(first) + len(last) > 2 and len(", ".join([*first, "...", *last])) > LINE:
        if len(first) > len(last):
            first.pop()
        else:
            last.pop(0)
    return ", ".join([*first, "...", *last])


def _estimates(study: Study, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Rows of the candidates that were stopped early and may be on the front for all that is known."""
    rows = []
    for c in could_be_on_front(study, candidates):
        row: dict[str, Any] = {"candidate": c.number, "label": c.label or "", "method": c.recipe.method}
        row["path"] = _path(study, c)
        for name, value, error in zip(study.header.objectives, c.estimate or (), c.estimate_stderr or (), strict=True):
            row[name] = Interval(value, value - Z95 * error, value + Z95 * error, "normal")
        rows.append(row | {"membership": None, "recipe": c.fingerprint[:12], "state": f"estimate: {c.stopped}"})
    return rows


def export_candidate(
    study: Study, out: str, number: int | None, *, weights: bool, inline: bool, allow_task_code: bool
) -> Path:
    """Export one candidate; its choice is settled before its test score is looked at."""
    require_free(out)
    config = study_config(study, allow_task_code=allow_task_code)
    candidates = study.candidates()
    chosen = None if number is None else _numbered(study, candidates, number)
    with Scorer(study, config, inline=inline) as scorer:
        if chosen is None:
            chosen = _winner(scorer, candidates)
        splits = splits_of(config)
        scores = {split: scorer.score([chosen], split)[chosen.number] for split in splits}
        gained = _compared(scorer, candidates, chosen, splits)
    _say_report(candidates, gained)
    lost = mergekit_form(chosen.recipe)[1]
    card = model_card(study, chosen, scores, lost, gained, by_hand=number is not None)
    return write_export(out, chosen.recipe, card, weights=weights)


def _winner(scorer: Scorer, candidates: list[Candidate]) -> Candidate:
    chosen, notes = winner(scorer.study, scorer.config, candidates, scorer=scorer)
    for note in notes:
        say(f"note: {note}")
    validated = scorer.study.scores(chosen.number, "validation") is not None
    say(f"candidate {chosen.number}: the winner, best of them on the {'validation' if validated else 'search'} split")
    return chosen


def _compared(scorer: Scorer, candidates: list[Candidate], chosen: Candidate, splits: Sequence[str]) -> Report | None:
    """The chosen candidate against the recipes that need no search, all scored on these splits."""
    study = scorer.study
    against = {c.number: c for c in baselines(study, candidates).values()}
    if not against:
        return None
    failures: dict[int, str] = {}
    for split in splits:
        scorer.score([chosen, *against.values()], split, failures=failures)
    broken = [said for split in splits if split != "search" for said in broken_limits(study, candidates, chosen, split)]
    for message in (*failures.values(), *broken):
        say(f"note: {message}")
    return report(study, candidates, chosen)


def _say_remarks(study: Study, candidates: Sequence[Candidate]) -> None:
    none = none_feasible(study, candidates)
    for remark in [*([none] if none else []), *remarks(study, candidates)]:
        say(f"note: {remark}")
    volume = hypervolume_line(study, candidates)
    if volume:
        say(volume)


def _say_report(candidates: Sequence[Candidate], found: Report | None) -> None:
    if found is None:
        known = any(c.label is not None for c in eligible(candidates))
        why = "meets the constraints" if known else "has scores"
        say(f"no known recipe {why}: there is none to compare with, so no gain to tell")
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
