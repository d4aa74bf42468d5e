"""What a study makes of its `space:` key: the space itself, its known recipes, and an optimizer for it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evomerge import registry
from evomerge.config import BASE, MERGED, StudyConfig
from evomerge.constraints import Constraint
from evomerge.errors import ConfigError, Problem
from evomerge.moments import RMS, whole_model
from evomerge.objectives import Objective
from evomerge.optimizers import Goal, Optimizer, make
from evomerge.path_space import PathSpace, is_path_spec
from evomerge.recipe import Recipe
from evomerge.space import SearchSpace, known_recipes
from evomerge.spaces import Space
from evomerge.study import Header
from evomerge.weights import Checkpoint

MADE_FOR_PATHS = ("evolution", "catcma", "random")


def make_space(
    config: StudyConfig, base: Checkpoint, others: Mapping[str, Checkpoint], problems: list[Problem]
) -> Space | None:
    """The study's space, or None with what is wrong with it added to `problems`, each at its line.

    `others` are the models beside the base that could be opened.
    """
    try:
        if is_path_spec(config.space):
            problems += _folders_named_twice(config)
            space = PathSpace.from_dict(
                config.space,
                config.base,
                config.experts,
                base.n_layers,
                model_type=str(base.config.get("model_type", "")),
                merged=config.merged,
                seed=config.seed,
            )
            return replace(space, out_dtype=_common_dtype(base, others))
        experts = config.experts
        return SearchSpace.from_dict(config.space, config.base, experts, base.n_layers, config.seed, base.names)
    except ConfigError as error:
        found = [Problem(p.message, config.where_in_space(p.where), p.hint) for p in error.problems]
        problems += sorted(found, key=_line_of)
        return None


def _line_of(problem: Problem) -> tuple[str, int]:
    """The file and the line of a problem at "file:line" or "file:line: key", for sorting."""
    found = re.match(r"(.*?):(\d+)(?:: |$)", problem.where)
    return (found[1], int(found[2])) if found else (problem.where, 0)


def _common_dtype(base: Checkpoint, others: Mapping[str, Checkpoint]) -> str | None:
    """The dtype that paths are scored in, the base's, where a layer of another model would be written in its own."""
    alike = all(other.dtype == base.dtype for other in others.values())
    return None if alike else str(base.dtype).removeprefix("torch.")


def _folders_named_twice(config: StudyConfig) -> list[Problem]:
    """Folders with two spellings, such as red and ./red: a path would have the same layers under two names."""
    first: dict[str, str] = {}
    found = []
    for name, path in config.models.items():
        other = first.setdefault(os.path.realpath(path), name)
        if config.models[other] != path:  # equal spellings are found by the space itself
            found.append(placed(config, Problem(f"{path!r} is the folder of `{other}` too", name, "leave one out")))
    return found


def measured(space: Space, header: Header) -> Space:
    """The space of a study with this header: one of layer orders knows the moments of its models."""
    if not isinstance(space, PathSpace) or not header.moments:
        return space
    return space.with_moments({name: moments[RMS] for name, moments in header.moments.items()})


def known_of(config: StudyConfig, space: Space, n_layers: int) -> list[tuple[str, Recipe]]:
    """The (label, recipe) pairs that the study evaluates first; none if it wants none."""
    if not config.known_recipes:
        return []
    fine_tunes = {n: p for n, p in config.experts.items() if p != config.base}  # `linear` takes the base as an input
    found = known_recipes(config.base, fine_tunes, config.seed)
    if config.merged is not None:
        whole = whole_model(config.merged, n_layers)
        point = space.point_of(whole)
        # In the space's own words, so that a search which comes back to it finds it scored.
        found.append((MERGED, whole if point is None else space.recipe(point)))
    return found


def merged_problem(config: StudyConfig, problem: Problem) -> Problem | None:
    """What to say where there is no checkpoint at `merged:`, nothing at all or the folder of a study; else None."""
    folder = Path(config.merged or "")
    if problem.where != MERGED or config.merged is None or (folder / "config.json").exists():
        return None
    if not folder.exists():
        hint = f"`evomerge export STUDY.yaml {config.merged}` writes the winner of a search of coefficients there"
        return Problem(f"no checkpoint folder at {config.merged}", f"{config.where(MERGED)}: {MERGED}", hint)
    if not any(folder.glob("*.db")):
        return None
    out = folder / MERGED
    hint = f"`evomerge export {config.merged} {out}` writes its winner: then `merged: {out}`"
    return Problem(f"{config.merged} is the folder of a study, not a checkpoint", config.where(MERGED), hint)


def placed(config: StudyConfig, problem: Problem) -> Problem:
    """A problem of "base", "merged" or an expert, at the line of the study file that names the checkpoint."""
    label = problem.where
    own = label == BASE or (label == MERGED and config.merged is not None)
    line = config.where(label) if own else config.where("experts", label)
    return Problem(problem.message, f"{line}: {label}", problem.hint)


def optimizer_name(config: StudyConfig, space: Space) -> str:
    """The study's own choice; else what suits the space.

    `evolution` for layer orders; the portfolio for nested spaces and single objectives; `map` for what is left.
    """
    if config.optimizer is not None:
        return config.optimizer
    if isinstance(space, PathSpace):
        return "evolution"
    nested = len(space.facts().levels) > 1
    return "coarse_to_fine" if nested or len(config.objectives) == 1 else "map"


def make_optimizer(config: StudyConfig, space: Space, objectives: Sequence[Objective], workers: int) -> Optimizer:
    """The study's optimizer, told nothing yet.

    Raises:
        ConfigError: an option is wrong.
    """
    goals = []
    for objective in objectives:
        lower, upper = objective.bounds
        if not objective.maximize:
            lower, upper = (None if upper is None else -upper), (None if lower is None else -lower)
        goals.append(Goal(objective.name, lower, upper))
    start = space.encode(space.start())
    facts = space.facts(workers, config.budget.evaluations)
    return make(optimizer_name(config, space), space.dim, goals, config.seed, start, config.optimizer_options, facts)


def try_optimizer(config: StudyConfig, space: Space, objectives: Sequence[Objective]) -> list[Problem]:
    """What is wrong with the optimizer or its options."""
    if isinstance(space, PathSpace) and optimizer_name(config, space) == "coarse_to_fine":
        message = "coarse_to_fine goes through levels of coefficients, and layer orders have none"
        return [Problem(message, config.where("optimizer"), "evolution, which is the default there, or catcma")]
    found: list[Problem] = []
    left = config
    while True:
        try:
            make_optimizer(left, space, objectives, workers=1)
        except ConfigError as error:
            found += [Problem(p.message, p.where or config.where("optimizer"), p.hint) for p in error.problems]
            # Optimizers stop at the first option that is wrong: the others are tried without it.
            wrong = {p.where.rpartition(".")[2] for p in error.problems}.intersection(left.optimizer_options)
            if not wrong:
                return found
            options = {k: v for k, v in left.optimizer_options.items() if k not in wrong}
            left = replace(left, optimizer_options=options)
        else:
            return found


def path_doubts(config: StudyConfig, space: Space, constraints: Sequence[Constraint]) -> list[Problem]:
    """What is worth knowing of a study of layer orders: an optimizer for coefficients, a depth that no path has."""
    if not isinstance(space, PathSpace):
        return []
    found = []
    name, shortest = optimizer_name(config, space), space.encoding.shortest
    if name not in MADE_FOR_PATHS and name in registry.names("optimizers"):
        message = f"{name} is not made for layer orders, whose genes are choices"
        found.append(Problem(message, config.where("optimizer"), f"made for them: {' and '.join(MADE_FOR_PATHS[:2])}"))
    counted = {o.name for o in config.objectives if o.kind == "size" and o.options.get("count") == "layers"}
    for index, limit in enumerate(constraints):
        if limit.objective in counted and not limit.labels and limit.offset < shortest:
            message = f"no path of this space meets `{limit.text}`: the shortest one has {shortest} layers"
            hint = "relax it, or let the space skip more (`frozen`, and of edits `kinds`, `edits` and `block`)"
            found.append(Problem(message, config.where("constraints", index), hint))
    return found


def coarse_of(space: Space) -> dict[str, int]:
    """The coordinate of the coarsest level that each gene is tied to, for those that are tied to one alone."""
    matrix = space.facts().levels[0].matrix
    tied = [(gene.name, np.flatnonzero(row)) for gene, row in zip(space.genes, matrix, strict=True)]
    return {name: int(at[0]) for name, at in tied if len(at) == 1}
