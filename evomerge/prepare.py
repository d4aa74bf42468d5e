"""From a study file to everything that a search needs, with all that can be wrong found first.

Nothing is created on disk here. `prepare` opens weights, tasks and the space; `open_study` opens or makes the
record; `make_search` puts the parts together.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from evomerge.config import StudyConfig
from evomerge.errors import ConfigError, EnvironmentProblem, Problem, StorageError, StudyConflict
from evomerge.model import check_architecture, check_siblings
from evomerge.objectives import Objective, make_objective
from evomerge.optimizers import Goal, Optimizer, make
from evomerge.recipe import Recipe
from evomerge.space import SearchSpace, known_recipes
from evomerge.storage import hide_passwords, mask, sqlite_file
from evomerge.study import Header, Study
from evomerge.weights import Checkpoint, check_family, has_chat_template, open_all
from evomerge.worker import WorkerSpec

LIBRARIES = ("evomerge", "torch", "transformers", "lm_eval", "optuna", "cma", "ray", "numpy")


@dataclass(frozen=True)
class Prepared:
    """A checked study: every part exists and fits the others.

    Attributes:
        known: (label, recipe) of the candidates 0..k of the study.
        summary: what `evomerge check` prints.
    """

    config: StudyConfig
    space: SearchSpace
    objectives: tuple[Objective, ...]
    header: Header
    known: tuple[tuple[str, Recipe], ...]
    worker: WorkerSpec
    summary: dict[str, Any]

    def make_optimizer(self, header: Header) -> Optimizer:
        """A fresh optimizer, ready to be told the history of the study with this header."""
        return _optimizer(self.config, self.space, self.objectives, header.workers)


def prepare(config: StudyConfig, overrides: tuple[str, ...] = ()) -> Prepared:
    """Check everything that can be known before any candidate is evaluated.

    Raises:
        ConfigError: with all problems of files, objectives and space at once (exit code 2).
        EnvironmentProblem: weights are missing or broken, or the study's folder cannot be written (3).
    """
    opened, broken = open_all({"base": config.base, **config.experts})
    broken += _storage_problems(config)
    problems: list[Problem] = []
    space: SearchSpace | None = None
    objectives = _objectives(config, problems)
    if "base" in opened:
        base = opened["base"]
        experts = {n: c for n, c in opened.items() if n != "base"}
        problems += [*check_architecture(base), *check_siblings(base, experts), *check_family(base, experts)]
        space = _space(config, base, problems)
        if space is not None and not problems:
            problems += _try_optimizer(config, space, objectives)
    if problems:
        raise ConfigError.of([*broken, *problems], config.source)
    if broken or space is None:
        lines = "".join(f"\n  - {p}" for p in broken)
        raise EnvironmentProblem(f"{len(broken)} problems with files of {config.source}:{lines}")
    worker = worker_spec(config)
    fine_tunes = {n: p for n, p in config.experts.items() if p != config.base}  # `linear` takes the base as an input
    known = known_recipes(config.base, fine_tunes, config.seed) if config.known_recipes else []
    return Prepared(
        config=config,
        space=space,
        objectives=tuple(objectives),
        header=_header(config, overrides, opened, objectives, worker),
        known=tuple(known),
        worker=worker,
        summary=_summary(config, opened, objectives, space, worker.device, len(known)),
    )


def open_study(prepared: Prepared, resume: str = "auto") -> tuple[Study, bool]:
    """The study's record, and whether it existed already.

    Args:
        resume: "auto" continues or starts, "must" only continues, "never" only starts.

    Raises:
        StudyConflict: it exists with other settings, or exists (does not exist) against `resume`.
    """
    config = prepared.config
    exists = Study.exists(config.storage, config.name)
    if exists and resume == "never":
        raise StudyConflict(f"the study {config.name!r} exists already", hint="choose another `name:`")
    if not exists and resume == "must":
        raise StudyConflict(f"there is no study {config.name!r} to continue")
    if not exists:
        return Study.create(config.storage, config.name, prepared.header), False
    study = Study.load(config.storage, config.name)
    study.require_identity(prepared.header.identity)
    return study, True


def worker_spec(config: StudyConfig, threads: int = 0) -> WorkerSpec:
    """What each worker loads; the device and the threads are settled here, once."""
    import torch

    workers = config.workers
    device = workers.device
    if device == "auto" and workers.ray is None:  # on a cluster, each worker's own node settles it
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available() and workers.ray is None:
        raise EnvironmentProblem("`workers.device` is cuda, but torch finds no CUDA device here")
    count = workers.local or workers.ray or 1
    return WorkerSpec(
        base=config.base,
        models=(config.base, *config.experts.values()),
        objectives=config.objectives,
        device=device,
        threads=threads or workers.threads or max(1, (os.cpu_count() or 1) // count),
        allowed_s=workers.timeout_s,
    )


def _objectives(config: StudyConfig, problems: list[Problem]) -> list[Objective]:
    made: list[Objective] = []
    for spec in config.objectives:
        try:
            objective = make_objective(spec)
            found = objective.check()
        except ConfigError as error:
            found = list(error.problems)
        if spec.options.get("apply_chat_template") and not has_chat_template(config.base):
            hint = "leave out `apply_chat_template:`"
            found = [*found, Problem("the base's tokenizer has no chat template", f"objective {spec.name}", hint)]
        problems += [Problem(p.message, ": ".join(w for w in (spec.where, p.where) if w), p.hint) for p in found]
        if not found:
            made.append(objective)
    return made


def _space(config: StudyConfig, base: Checkpoint, problems: list[Problem]) -> SearchSpace | None:
    try:
        return SearchSpace.from_dict(config.space, config.base, config.experts, base.n_layers, config.seed)
    except ConfigError as error:
        where = config.space_source
        problems += [Problem(p.message, f"{where}: {p.where}" if p.where else where, p.hint) for p in error.problems]
        return None


def _optimizer_name(config: StudyConfig) -> str:
    """The study's own choice, or the quadratic surrogate for several objectives and CMA-ES for one."""
    return config.optimizer or ("map" if len(config.objectives) > 1 else "cma_es")


def _optimizer(config: StudyConfig, space: SearchSpace, objectives: Sequence[Objective], workers: int) -> Optimizer:
    name = _optimizer_name(config)
    options = dict(config.optimizer_options)
    if name == "cma_es":
        options.setdefault("workers", workers)
    goals = []
    for objective in objectives:
        lower, upper = objective.bounds
        if not objective.maximize:
            lower, upper = (None if upper is None else -upper), (None if lower is None else -lower)
        goals.append(Goal(objective.name, lower, upper))
    start = space.encode(space.start())
    return make(name, space.dim, goals, config.seed, start, options)


def _try_optimizer(config: StudyConfig, space: SearchSpace, objectives: list[Objective]) -> list[Problem]:
    try:
        _optimizer(config, space, objectives, workers=1)
    except ConfigError as error:
        return list(error.problems)
    return []


def _storage_problems(config: StudyConfig) -> list[Problem]:
    """A SQLite file must be in a folder that can be made and written."""
    try:
        file = sqlite_file(config.storage)
    except StorageError as error:
        return [Problem(error.message, where="storage")]
    if file is None:
        return []
    folder = file.parent.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return [Problem(f"cannot write to {folder}", where="storage", hint="choose another `storage:`")]
    if file.is_dir():
        return [Problem(f"{file} is a folder, not a database file", where="storage")]
    return []


def _header(
    config: StudyConfig,
    overrides: tuple[str, ...],
    opened: dict[str, Checkpoint],
    objectives: list[Objective],
    worker: WorkerSpec,
) -> Header:
    identity = {
        "base": config.base,
        "experts": config.experts,
        "weights": {label: c.digest() for label, c in opened.items()},
        "space": {k: v for k, v in config.space.items() if k != "description"},
        "objectives": {o.name: o.fingerprint() for o in objectives},
        "optimizer": {"name": _optimizer_name(config), **config.optimizer_options},
        "seed": config.seed,
        "known_recipes": config.known_recipes,
    }
    versions = {name: version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    study_file = {
        "text": hide_passwords(config.text),
        "source": config.source,
        # Where the database is, is known to whoever opens it.
        "overrides": [o for o in overrides if not o.startswith("storage=")],
    }
    directions = {o.name: o.maximize for o in objectives}
    count = config.workers.local or config.workers.ray or 1
    return Header(identity, directions, study_file, versions, worker.threads, count)


def _summary(
    config: StudyConfig,
    opened: dict[str, Checkpoint],
    objectives: list[Objective],
    space: SearchSpace,
    device: str,
    known: int,
) -> dict[str, Any]:
    base = opened["base"]
    return {
        "study": config.name,
        "base": f"{config.base} ({base.n_layers} layers, {base.n_bytes / 1e6:.1f} MB)",
        "experts": ", ".join(config.experts),
        "resident": f"{sum(c.n_bytes for c in opened.values()) / 1e6:.1f} MB of weights on {device}",
        "space": f"{config.space.get('method')}, {space.dim} dimensions",
        "objectives": ", ".join(
            f"{o.name} ({'max' if o.maximize else 'min'}; {', '.join(o.splits)})" for o in objectives
        ),
        "optimizer": _optimizer_name(config),
        "known recipes": known,
        "budget": ", ".join(f"{v:g} {k}" for k, v in config.budget.model_dump().items() if v is not None),
        "storage": mask(config.storage),
    }
