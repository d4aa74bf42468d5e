"""What `propose` does: the recipe that a study's results predict to be best for given preferences, and its real score.

One surrogate per objective answers for any preferences without new evaluations (the amortisation of MAP; Li et al.,
arXiv 2406.07529); one evaluation tells whether the answer is right. It becomes a candidate of the study like any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evomerge.commands import say
from evomerge.errors import ConfigError, EnvironmentProblem
from evomerge.history import History
from evomerge.intervals import Z95, Interval, interval
from evomerge.objectives import make_objective
from evomerge.optimum import optimum
from evomerge.path_space import is_path_spec
from evomerge.picking import Pick, floors_of_pick
from evomerge.recipe import Recipe
from evomerge.rescore import Scorer, floors_of, study_config
from evomerge.search import oriented
from evomerge.space import Natural, SearchSpace, known_recipes
from evomerge.study import Candidate, Study
from evomerge.surrogate import fit, nearness
from evomerge.weights import Checkpoint
from evomerge.worker import Job, Outcome


def propose(study: Study, pick: Pick, *, inline: bool, allow_task_code: bool) -> list[dict[str, Any]]:
    """Find the recipe for preferences, score it once on the search split, and put prediction beside measurement.

    Returns:
        One row per objective.

    Raises:
        ConfigError: there are too few results to predict from, or the study searches layer orders.
        EnvironmentProblem: the recipe could not be scored; it is recorded as failed.
    """
    config = study_config(study, allow_task_code=allow_task_code)
    if is_path_spec(config.space):
        raise ConfigError(
            f"the study {study.name!r} searches layer orders, and scores of new ones cannot be predicted",
            hint="a surrogate knows coefficients, not which layers stand where: `evomerge front` picks what was scored",
        )
    with Scorer(study, config, inline=inline) as scorer:
        base = Checkpoint(config.base)
        space = SearchSpace.from_dict(config.space, config.base, config.experts, base.n_layers, config.seed, base.names)
        study.acquire()
        try:
            candidates = study.candidates()
            _require_known(study, space, candidates)
            params, means, errors = _predict(study, space, candidates, pick, scorer)
            number = _number(study, space, params, candidates, str(pick))
            candidate = study.candidate(number)
            if candidate.state != "done":
                _evaluate(scorer, space, candidate)
        finally:
            study.release()
    scores = study.scores(number, "search")
    assert scores is not None
    rows = []
    for j, name in enumerate(study.header.objectives):
        predicted = Interval(means[j], means[j] - Z95 * errors[j], means[j] + Z95 * errors[j], "normal")
        measured = interval(scores[name])
        row: dict[str, Any] = {"objective": name, "preference": pick.prefer.get(name, 0.0)}
        row |= {"predicted": predicted, "measured": measured, "candidate": number}
        rows.append(row)
    return rows


def _require_known(study: Study, space: SearchSpace, candidates: list[Candidate]) -> None:
    """The first numbers of a study belong to the known recipes."""
    identity = study.header.identity
    if not identity["known_recipes"]:
        return
    experts = {n: p for n, p in identity["experts"].items() if p != identity["base"]}
    count = len(known_recipes(identity["base"], experts, identity["seed"]))
    if len(candidates) < count:
        raise ConfigError(
            f"the study has {len(candidates)} candidates, fewer than its {count} known recipes",
            hint="continue the search first",
        )


def _predict(
    study: Study, space: SearchSpace, candidates: list[Candidate], pick: Pick, scorer: Scorer
) -> tuple[dict[str, Natural], np.ndarray, np.ndarray]:
    """The recipe's genes, and predicted values with their errors, in the objectives' own directions.

    Of nested spaces the coarsest is asked: its few coordinates are what a quadratic knows well.
    """
    level = space.facts().levels[0]
    points = [(c, level.project(space.encode(c.params))) for c in candidates if c.params and (c.values or c.estimate)]
    inside = [(c, z) for c, z in points if z is not None]
    told = [c for c, _ in inside]
    ups = list(study.header.objectives.values())
    if len(told) < level.dim + 2:
        raise ConfigError(
            f"the study has {len(told)} results inside its space, and a prediction in {level.dim} dimensions needs "
            f"{level.dim + 2}",
            hint="search on, with a larger budget",
        )
    x = np.array([z for _, z in inside])
    values = oriented([list(c.values or c.estimate or ()) for c in told], ups)
    stderr = np.array([c.stderr or c.estimate_stderr for c in told], dtype=np.float64)
    models = []
    for j, (spec, up) in enumerate(zip(scorer.config.objectives, ups, strict=True)):
        low, high = make_objective(spec).bounds
        if not up:
            low, high = (None if high is None else -high), (None if low is None else -low)
        models.append(fit(x, values[:, j], stderr[:, j], lower=low, upper=high, focus=nearness(values)))
    floors = np.maximum(floors_of(study, candidates), floors_of_pick(study, pick))
    wanted = [pick.prefer.get(name, 0.0) for name in study.header.objectives] if pick.prefer else None
    point, means, errors = optimum(models, wanted, x.min(axis=0), x.max(axis=0), scorer.config.seed, floors)
    close = 1e-4 * np.ptp(values, axis=0)  # a climb ends on a floor up to its tolerance
    missed = [name for name, short in zip(study.header.objectives, means < floors - close, strict=True) if short]
    if missed:
        say(f"note: no point is predicted to be good enough in {', '.join(missed)}: this one misses it least")
    return space.decode(level.embed(point)), oriented(means, ups), errors


def _number(
    study: Study, space: SearchSpace, params: dict[str, Natural], candidates: list[Candidate], source: str
) -> int:
    """The candidate with this recipe: one that exists already, or a new one."""
    recipe: Recipe = space.recipe(params)
    same = [c for c in candidates if c.fingerprint == recipe.fingerprint and c.state in ("done", "running")]
    if same:
        chosen = min(same, key=lambda c: (c.state != "done", c.number))
        say(f"candidate {chosen.number} has this recipe already")
        return chosen.number
    domains = {g.name: g.domain for g in space.genes}
    number = study.propose(recipe, params, domains, None, source)
    say(f"candidate {number}: {source}")
    return number


def _evaluate(scorer: Scorer, space: SearchSpace, candidate: Candidate) -> None:
    """Score a candidate on the whole search split, in the same parts as a search would, and record it."""
    study, number = scorer.study, candidate.number
    ended = [c for c in study.candidates() if c.state != "running"]
    history = History(study, space, lambda labelled: None, wants_items=False)
    race = history.race(number, to_the_end=True)
    size = min((c.attrs["batch_tokens"] for c in ended if "batch_tokens" in c.attrs), default=None)
    elapsed = {"elapsed_s": max((c.attrs.get("elapsed_s", 0.0) for c in ended), default=0.0)}
    for result in scorer.run([Job(number, candidate.recipe, ("search",), race, size)]):
        if isinstance(result, Outcome):
            attrs = history.attrs(result, to_the_end=True)
            study.finish(number, result.scores, len(ended), {**attrs, **elapsed})
        else:
            study.fail(number, result.reason, result.message, len(ended), elapsed)
            raise EnvironmentProblem(f"candidate {number} has no score ({result.reason}): {result.message}")
