"""Scoring finished candidates on further splits, once each: the store is asked first, and written at once.

The test split never influences a choice here: `winner` looks at search and validation scores only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from evomerge import front
from evomerge.config import StudyConfig, parse_study
from evomerge.errors import ConfigError, EnvironmentProblem
from evomerge.intervals import leads
from evomerge.objectives import Scores, make_objective
from evomerge.pool import make_pool
from evomerge.prepare import worker_spec
from evomerge.search import oriented
from evomerge.study import Candidate, Study
from evomerge.weights import Checkpoint
from evomerge.worker import Failed, Job

CONTENDERS = 16  # so many, at most, are scored on validation: each costs a pass over that split
STEP = 32  # candidates compared with the best at once


def study_config(study: Study, *, allow_task_code: bool = False) -> StudyConfig:
    """The configuration that the study was started with, from its own record.

    A database says what to read, never that its code may run: that is the user's to say each time.
    """
    stored = study.header.study_file
    overrides = tuple(stored["overrides"])
    return parse_study(stored["text"], stored["source"], overrides, allow_task_code=allow_task_code)


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with whole scores; of those with equal recipes the first."""
    unique: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.values is not None and candidate.state == "done":
            unique.setdefault(candidate.fingerprint, candidate)
    return list(unique.values())


def front_of(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The non-dominated candidates on the search split, best first in the first objective.

    Of candidates with equal recipes only the first counts.
    """
    done = eligible(candidates)
    if not done:
        return []
    values = oriented([list(c.values or ()) for c in done], list(study.header.objectives.values()))
    mask = front.non_dominated(values)
    order = sorted(np.flatnonzero(mask), key=lambda i: (-values[i][0], done[i].number))
    return [done[i] for i in order]


def splits_of(config: StudyConfig) -> tuple[str, ...]:
    """The splits that every objective of the study has."""
    per_objective = [set(make_objective(o).splits) for o in config.objectives]
    return tuple(s for s in ("search", "validation", "test") if all(s in p for p in per_objective))


def score_split(
    study: Study,
    config: StudyConfig,
    candidates: Sequence[Candidate],
    split: str,
    *,
    inline: bool = False,
    failures: dict[int, str] | None = None,
    on_score: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, Scores]]:
    """Scores of candidates on a split, by number; only what is not stored is computed.

    Args:
        config: from `study_config`.
        on_score: told how many of how many models are scored, after each.
        failures: where to put the reasons of candidates that cannot be scored; absent: they raise.

    Raises:
        ConfigError: an objective has no such split.
        EnvironmentProblem: the weights have changed since, or a model could not be scored.
    """
    found: dict[int, dict[str, Scores]] = {}
    missing: list[Candidate] = []
    for candidate in candidates:
        stored = study.scores(candidate.number, split)
        if stored is None:
            missing.append(candidate)
        else:
            found[candidate.number] = stored
    if not missing:
        return found
    if split not in splits_of(config):
        raise ConfigError(f"the study's objectives have no {split} split")
    require_same_inputs(study, config)
    # The time allowed was meant for a candidate on the search split; other splits are larger.
    spec = replace(worker_spec(config, threads=study.header.threads), allowed_s=None)
    workers = config.workers
    size = min(workers.local or workers.ray or 1, len(missing))
    pool = make_pool(spec, local=size, ray=size if workers.ray else None, address=workers.address, inline=inline)
    try:
        for candidate in missing:
            size_then = candidate.attrs.get("batch_tokens")  # the last bits of a score depend on it
            pool.submit(Job(candidate.number, candidate.recipe, (split,), batch_tokens=size_then))
        waiting = len(missing)
        while waiting:
            for result in pool.wait(timeout_s=1.0):
                waiting -= 1
                on_score(len(missing) - waiting, len(missing))
                if isinstance(result, Failed):
                    message = f"candidate {result.number} has no {split} score ({result.reason}): {result.message}"
                    if failures is None:
                        raise EnvironmentProblem(message)
                    failures[result.number] = message
                elif study.add_scores(result.number, split, result.scores[split]):
                    found[result.number] = result.scores[split]
                else:  # another process was faster: its scores are the ones that count
                    found[result.number] = study.scores(result.number, split) or result.scores[split]
    finally:
        pool.close()
    return found


def require_same_inputs(study: Study, config: StudyConfig) -> None:
    """Raise unless weights and objectives are those that the study was searched with."""
    identity = study.header.identity
    for label, path in {"base": config.base, **config.experts}.items():
        if Checkpoint(path).digest() != identity["weights"][label]:
            raise EnvironmentProblem(
                f"the checkpoint {path} ({label}) has changed since the study was searched",
                hint="scores of other weights do not belong in this study",
            )
    for spec in config.objectives:
        if make_objective(spec).fingerprint() != identity["objectives"].get(spec.name):
            raise EnvironmentProblem(f"the objective {spec.name} has changed since the study was searched")


def weights_of(study: Study, candidates: Sequence[Candidate]) -> np.ndarray:
    """(M,) by which values are multiplied and summed to one merit, larger is better.

    It is the mean over objectives, each scaled to its range over the front of the search split, so that none
    outweighs the others by its unit. An objective without a range there has the range over all candidates.
    """
    ups = list(study.header.objectives.values())
    ranges = []
    for group in (front_of(study, candidates), eligible(candidates)):
        ranges.append(np.ptp(np.array([c.values for c in group], dtype=np.float64), axis=0))
    spread = np.where(ranges[0] > 0, ranges[0], ranges[1])
    return oriented(1.0 / np.where(spread > 0, spread, 1.0) / len(ups), ups)


def contenders(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that are statistically tied at the top of the search split, best first; all of them.

    A candidate is tied with the best one if the 95 % paired bootstrap interval of their difference in merit
    (`weights_of`) holds zero. Points off the front count too: what dominates them by less than the noise may be worse.
    """
    done = eligible(candidates)
    if not done:
        return []
    weights = weights_of(study, candidates)
    merit = {c.number: float(np.dot(c.values or (), weights)) for c in done}
    best, *rest = sorted(done, key=lambda c: (-merit[c.number], c.number))
    reference = _search_items(study, best)
    tied = [best]
    for start in range(0, len(rest), STEP):
        group = rest[start : start + STEP]
        found = leads([_search_items(study, c) for c in group], reference, weights)
        near = [c for c, lead in zip(group, found, strict=True) if not lead.separated and lead.method != "none"]
        near += [c for c, lead in zip(group, found, strict=True) if lead.method == "none" and lead.value == 0]
        if not near:  # merits only fall from here
            break
        tied += near
    return tied


def winner(
    study: Study, config: StudyConfig, candidates: Sequence[Candidate], *, inline: bool = False
) -> tuple[Candidate, list[str]]:
    """The best on the validation split of the candidates that are tied at the top of the search split, and notes.

    Of more than CONTENDERS tied candidates, those that are best on search are scored on validation. A candidate
    that cannot be scored there is left out, with a note. Of equal ones the first wins: known recipes come first.
    Without validation splits the search scores decide.

    Raises:
        ConfigError: there is no candidate to choose from.
    """
    tied = contenders(study, candidates)
    if not tied:
        raise ConfigError(f"the study {study.name!r} has no candidate to choose from yet")
    notes = [_tied_note(len(tied))]
    tied = tied[:CONTENDERS]
    if not _all_stored(study, tied) and "validation" not in splits_of(config):
        return tied[0], [*notes, "there is no validation split: the search scores, which are optimistic, decide"]
    failures: dict[int, str] = {}
    scores = score_split(study, config, tied, "validation", inline=inline, failures=failures)
    notes += failures.values()
    if not scores:
        raise ConfigError(f"none of the {len(tied)} best candidates has validation scores: {notes[-1]}")
    return _best(tied, scores, weights_of(study, candidates)), notes


def stored_winner(study: Study, candidates: Sequence[Candidate]) -> tuple[Candidate, str] | None:
    """What `winner` would answer from stored scores alone, and how it was chosen; None if more has to be scored.

    If nothing was ever scored on validation, it is the best on search.
    """
    tied = contenders(study, candidates)
    if not tied:
        return None
    note, tied = _tied_note(len(tied)), tied[:CONTENDERS]
    scores = {c.number: stored for c in tied if (stored := study.scores(c.number, "validation")) is not None}
    if len(scores) == len(tied):
        return _best(tied, scores, weights_of(study, candidates)), f"the best on validation; {note}"
    return None if scores else (tied[0], f"the best on search: nothing is scored on validation; {note}")


def _best(tied: Sequence[Candidate], scores: dict[int, dict[str, Scores]], weights: np.ndarray) -> Candidate:
    merit = {n: float(np.dot([s.value for s in by_name.values()], weights)) for n, by_name in scores.items()}
    return max((c for c in tied if c.number in merit), key=lambda c: (merit[c.number], -c.number))


def _all_stored(study: Study, candidates: Sequence[Candidate]) -> bool:
    return all(study.scores(c.number, "validation") is not None for c in candidates)


def _tied_note(count: int) -> str:
    if count == 1:
        return "no other candidate is statistically tied with the best on search"
    scored = f"; the {CONTENDERS} best of them went on to validation" if count > CONTENDERS else ""
    return f"{count} candidates are statistically tied at the top on search{scored}"


def _search_items(study: Study, candidate: Candidate) -> list[Scores]:
    """One score per objective, in the study's order."""
    scores = study.scores(candidate.number, "search")
    if scores is None:
        raise EnvironmentProblem(f"the study {study.name!r} holds no items of candidate {candidate.number}")
    return [scores[name] for name in study.header.objectives]
