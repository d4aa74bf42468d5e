"""Scoring finished candidates on further splits, once each: the store is asked first, and written at once.

The test split never influences a choice here: `winner` looks at validation scores only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def study_config(study: Study) -> StudyConfig:
    """The configuration that the study was started with, from its own record."""
    stored = study.header.study_file
    return parse_study(
        stored["text"],
        stored["source"],
        tuple(stored["overrides"]),
        allow_task_code=stored["allow_task_code"],
    )


def front_of(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The non-dominated candidates on the search split, best first in the first objective.

    Of candidates with equal recipes only the first counts.
    """
    unique: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.values is not None:
            unique.setdefault(candidate.recipe.fingerprint, candidate)
    done = list(unique.values())
    if not done:
        return []
    values = oriented([list(c.values or ()) for c in done], list(study.header.objectives.values()))
    mask = front.non_dominated(values)
    order = sorted(np.flatnonzero(mask), key=lambda i: (-values[i][0], done[i].number))
    return [done[i] for i in order]


def splits_of(study: Study) -> tuple[str, ...]:
    """The splits that every objective of the study has."""
    per_objective = [set(make_objective(o).splits) for o in study_config(study).objectives]
    return tuple(s for s in ("search", "validation", "test") if all(s in p for p in per_objective))


def score_split(
    study: Study,
    candidates: Sequence[Candidate],
    split: str,
    *,
    inline: bool = False,
    on_score: Callable[[int], None] = lambda number: None,
) -> dict[int, dict[str, Scores]]:
    """Scores of candidates on a split, by number; only what is not stored is computed.

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
    if split not in splits_of(study):
        raise ConfigError(f"the study's objectives have no {split} split")
    config = study_config(study)
    require_same_inputs(study, config)
    spec = worker_spec(config, threads=study.header.threads)
    workers = config.workers
    size = min(workers.local or workers.ray or 1, len(missing))
    pool = make_pool(
        spec,
        local=size,
        ray=size if workers.ray else None,
        address=workers.address,
        inline=inline,
    )
    try:
        for candidate in missing:
            pool.submit(Job(candidate.number, candidate.recipe, (split,)))
        while len(found) < len(candidates):
            for result in pool.wait(timeout_s=1.0):
                if isinstance(result, Failed):
                    raise EnvironmentProblem(
                        f"candidate {result.number} could not be scored on {split} ({result.reason}): {result.message}"
                    )
                scores = result.scores[split]
                study.add_scores(result.number, split, scores)
                found[result.number] = scores
                on_score(result.number)
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


def winner(study: Study, candidates: Sequence[Candidate], *, inline: bool = False) -> Candidate:
    """The front's candidate with the best mean over objectives on the validation split.

    Objectives are scaled to their range over the front, so that none outweighs the others by its unit.
    Without validation splits the search scores decide.
    """
    found = front_of(study, candidates)
    if not found:
        raise ConfigError(f"the study {study.name!r} has no finished candidate yet")
    ups = list(study.header.objectives.values())
    if "validation" in splits_of(study):
        scores = score_split(study, found, "validation", inline=inline)
        values = [[scores[c.number][n].value for n in study.header.objectives] for c in found]
    else:
        values = [list(c.values or ()) for c in found]
    array = oriented(values, ups)
    spread = np.ptp(array, axis=0)
    scaled = (array - array.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    return found[int(np.argmax(scaled.mean(axis=1)))]
