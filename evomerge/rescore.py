"""Scoring finished candidates on further splits, once each: the store is asked first, and written at once.

The test split never influences a choice here: `winner` looks at validation scores only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from evomerge import front
from evomerge.config import StudyConfig, parse_study
from evomerge.errors import ConfigError, EnvironmentProblem
from evomerge.objectives import Scores, make_objective
from evomerge.pool import make_pool
from evomerge.prepare import worker_spec
from evomerge.search import oriented
from evomerge.study import Candidate, Study
from evomerge.weights import Checkpoint
from evomerge.worker import Failed, Job


def study_config(study: Study, *, allow_task_code: bool = False) -> StudyConfig:
    """The configuration that the study was started with, from its own record.

    A database says what to read, never that its code may run: that is the user's to say each time.
    """
    stored = study.header.study_file
    overrides = tuple(stored["overrides"])
    return parse_study(stored["text"], stored["source"], overrides, allow_task_code=allow_task_code)


def front_of(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The non-dominated candidates on the search split, best first in the first objective.

    Of candidates with equal recipes only the first counts.
    """
    unique: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.values is not None:
            unique.setdefault(candidate.fingerprint, candidate)
    done = list(unique.values())
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
            pool.submit(Job(candidate.number, candidate.recipe, (split,)))
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


def winner(
    study: Study, config: StudyConfig, candidates: Sequence[Candidate], *, inline: bool = False
) -> tuple[Candidate, list[str]]:
    """The front's candidate with the best mean over objectives on the validation split, and notes.

    Objectives are scaled to their range over the front, so that none outweighs the others by its unit.
    A point that cannot be scored on validation is left out, with a note. Without validation splits the
    search scores decide.
    """
    found = front_of(study, candidates)
    failures: dict[int, str] = {}
    values = {c.number: list(c.values or ()) for c in found}
    if "validation" in splits_of(config):
        scores = score_split(study, config, found, "validation", inline=inline, failures=failures)
        values = {n: [by_name[o].value for o in study.header.objectives] for n, by_name in scores.items()}
    found = [c for c in found if c.number in values]
    if not found:
        raise ConfigError(f"the study {study.name!r} has no candidate to choose from yet")
    array = oriented([values[c.number] for c in found], list(study.header.objectives.values()))
    spread = np.ptp(array, axis=0)
    scaled = (array - array.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    return found[int(np.argmax(scaled.mean(axis=1)))], list(failures.values())
