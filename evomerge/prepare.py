"""From a study file to everything that a search needs, with all that can be wrong found first.

Nothing is created on disk here. `prepare` opens weights, tasks and the space; `open_study` opens or makes the
record; `make_search` puts the parts together.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from evomerge.config import BASE, StudyConfig
from evomerge.constraints import Constraint, floors, read_constraints
from evomerge.errors import ConfigError, EnvironmentProblem, Interrupted, Problem, StorageError, StudyConflict
from evomerge.family import Change, check_family, measure, suspicious, unrelated
from evomerge.feasible import drops_at_random, infeasible_share
from evomerge.fidelity import share_text
from evomerge.model import Outline, check_architecture, check_siblings
from evomerge.moments import Moments
from evomerge.moments import measure as measure_moments
from evomerge.objectives import Fitted, Objective, make_objective
from evomerge.optimizers import Optimizer
from evomerge.path_space import PathSpace
from evomerge.pool import Pool, make_pool
from evomerge.recipe import Recipe
from evomerge.residency import TABLES_BYTES, Memory, device_bytes, host_bytes, show_bytes
from evomerge.rungs import choose_epochs, choose_rungs, choose_terms, epochs_text, terms_text
from evomerge.spaces import Space
from evomerge.storage import hide_passwords, sqlite_file
from evomerge.study import Header, Study
from evomerge.study_space import (
    coarse_of,
    known_of,
    make_optimizer,
    make_space,
    measured,
    merged_problem,
    optimizer_name,
    path_doubts,
    placed,
    try_optimizer,
)
from evomerge.summary import summary_of
from evomerge.weights import Checkpoint, has_chat_template, open_all
from evomerge.worker import WorkerSpec
from evomerge.worker_entries import Workers

MUCH = 0.5  # of a budget: worth a warning if known recipes take so much
OFTEN = 0.2  # of a space's points: worth a warning if so many can never be merged
LIBRARIES = ("evomerge", "torch", "transformers", "lm_eval", "optuna", "cma", "ray", "numpy")


@dataclass(frozen=True)
class Prepared:
    """A checked study: every part exists and fits the others.

    Attributes:
        space: as it is before anything is measured; `space_of` a study's record gives the one that it is searched in.
        known: (label, recipe) of the candidates 0..k of the study.
        summary: what `evomerge check` prints.
        warnings: what is worth knowing and stops nothing.
    """

    config: StudyConfig
    space: Space
    objectives: tuple[Objective, ...]
    header: Header
    known: tuple[tuple[str, Recipe], ...]
    worker: WorkerSpec
    summary: dict[str, Any]
    constraints: tuple[Constraint, ...] = ()
    warnings: tuple[Problem, ...] = ()

    def space_of(self, header: Header) -> Space:
        """The space of the study with this header: moments are measured once, and kept there."""
        return measured(self.space, header)

    def make_optimizer(self, header: Header) -> Optimizer:
        """A fresh optimizer, ready to be told the history of the study with this header."""
        return make_optimizer(self.config, self.space_of(header), self.objectives, header.workers)

    def floors(self, labelled: Mapping[str, Sequence[float]]) -> np.ndarray | None:
        """The least (M,) that the constraints allow, larger is better, from the values of known recipes; None: any."""
        return floors(self.constraints, self.header.objectives, labelled) if self.constraints else None


def prepare(config: StudyConfig, overrides: tuple[str, ...] = ()) -> Prepared:
    """Check everything that can be known before any candidate is evaluated.

    Raises:
        ConfigError: with all problems of files, objectives and space at once (exit code 2).
        EnvironmentProblem: weights are missing or broken, or the study's folder cannot be written (3).
    """
    problems: list[Problem] = []
    space: Space | None = None
    doubts: list[Problem] = []
    changes: dict[str, Change] = {}
    objectives = _objectives(config, problems)
    constraints = _constraints(config, objectives, problems)
    opened, broken = open_all(config.models)
    broken = [merged_problem(config, p) or placed(config, p) for p in broken] + _storage_problems(config)
    if BASE in opened:
        base = opened[BASE]
        experts = {n: c for n, c in opened.items() if n != BASE}
        found = [*check_architecture(base), *check_siblings(base, experts), *check_family(base, experts)]
        changes = {n: measure(base, c) for n, c in experts.items() if c.path != base.path}
        problems += [placed(config, p) for p in (*found, *unrelated(changes))]
        space = make_space(config, base, experts, problems)
        if space is not None and not problems:
            problems += try_optimizer(config, space, objectives)
            misfits, notes = _fit(base, objectives)
            problems += misfits
            doubts += notes
            share, said = infeasible_share(space, base.names)
            if share == 1.0:
                problems.append(Problem(f"no point of the space can be merged: {said}", config.space_source))
            elif share >= OFTEN:
                message = f"{share:.0%} of the space's points cannot be merged, and would be failed candidates: {said}"
                doubts.append(Problem(message, config.space_source))
    if problems:
        raise ConfigError.of([*broken, *problems], config.source)
    if broken or space is None:
        lines = "".join(f"\n  - {p}" for p in broken)
        count = f"{len(broken)} problem{'s' * (len(broken) != 1)}"
        raise EnvironmentProblem(f"{count} with files of {config.source}:{lines}")
    worker = worker_spec(config)
    starts = [space.recipe(start) for start in space.starts()]
    plans = [plan for recipe in starts for plan in recipe.plan(opened[BASE].names, opened[BASE].n_layers)]
    warnings = suspicious(changes, drops=drops_at_random(plans, config.space.get("genes") or {}))
    known = known_of(config, space, opened[BASE].n_layers)
    doubts += [*_spent_on_known(config, len(known)), *path_doubts(config, space, constraints)]
    rungs, why_none = choose_rungs(config, objectives)
    epochs, why_no_epochs = choose_epochs(config, objectives, len(known))
    if why_none and config.fidelity.rungs:
        hint = "set `fidelity: off`, or leave that objective out"
        doubts.append(Problem(f"no candidate is stopped early: {why_none}", config.where("fidelity"), hint))
    if why_no_epochs and config.fidelity.epochs:
        doubts.append(Problem(f"there are no epochs: {why_no_epochs}", config.where("fidelity"), "leave out `epochs:`"))
    optimizer = optimizer_name(config, space)
    return Prepared(
        config=config,
        space=space,
        objectives=tuple(objectives),
        header=_header(config, overrides, opened, objectives, worker, rungs, epochs, optimizer, coarse_of(space)),
        known=tuple(known),
        worker=worker,
        constraints=constraints,
        summary=summary_of(config, opened, objectives, space, worker, len(known), changes, optimizer)
        | {"rungs": ", ".join(map(share_text, rungs)) or f"off{': ' if why_none else ''}{why_none}"}
        | {"epochs": epochs_text(epochs) or f"off{': ' if why_no_epochs else ''}{why_no_epochs}"}
        | terms_text(config, objectives, raced=bool(rungs or epochs)),
        warnings=(*doubts, *(placed(config, p) for p in warnings)),
    )


def _spent_on_known(config: StudyConfig, known: int) -> list[Problem]:
    """What to say of a budget of which known recipes take half or more."""
    most = config.budget.evaluations
    if not known or most is None or known < MUCH * most:
        return []
    message = f"{known} of the {most} evaluations are known recipes: {most - known} are left to search with"
    if most <= known:
        message = f"the budget of {most} evaluations is spent on the {known} known recipes: nothing is searched"
    return [Problem(message, config.where("budget"), "raise it, or set `known_recipes: false`")]


def open_study(
    prepared: Prepared,
    resume: str = "auto",
    *,
    inline: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> tuple[Study, bool]:
    """The study's record, and whether it existed already.

    Args:
        resume: "auto" continues or starts, "must" only continues, "never" only starts.
        inline: what a new study has to measure of its models is measured in this process.
        on_note: told what people should know of that.

    Raises:
        StudyConflict: it exists with other settings, or exists (does not exist) against `resume`.
        EnvironmentProblem: a model of a new study cannot be measured; there is no study then.
        Interrupted: somebody stopped the measurement; neither is there a study.
    """
    config = prepared.config
    exists = Study.exists(config.storage, config.name)
    if exists and resume == "never":
        raise StudyConflict(f"the study {config.name!r} exists already", hint="choose another `name:`")
    if not exists and resume == "must":
        raise StudyConflict(f"there is no study {config.name!r} to continue")
    if not exists:
        header = replace(prepared.header, moments=_moments(prepared, inline, on_note))
        try:
            return Study.create(config.storage, config.name, header), False
        except StudyConflict:  # another search of the same file made it while the models were measured
            if resume != "auto":
                raise
    study = Study.load(config.storage, config.name)
    study.require_identity(prepared.header.identity)
    return study, True


def _moments(prepared: Prepared, inline: bool, on_note: Callable[[str], None]) -> Moments:
    """What a new study has to know of its models: their moments where a space matches scales, else nothing."""
    space, workers = prepared.space, prepared.config.workers
    if not isinstance(space, PathSpace) or not space.wants_moments:
        return {}
    on_note(f"measuring the hidden states of {len(space.sources)} models, once for this study")

    def start_pool(spec: WorkerSpec) -> Pool:
        return make_pool(spec, inline=inline, **workers.pool_options(1))

    n_layers = Checkpoint(prepared.config.base).n_layers
    try:
        return measure_moments(prepared.worker, space.sources, n_layers, start_pool, on_note)
    except KeyboardInterrupt:
        said = "stopped while the hidden states were measured; nothing is stored yet"
        raise Interrupted(said, "run the same command again") from None


def worker_spec(config: StudyConfig, threads: int = 0) -> WorkerSpec:
    """What each worker loads; the device and the threads are settled here, once."""
    import torch

    workers = config.workers
    device = workers.device
    if device == "auto" and workers.ray is None:  # on a cluster, each worker's own node settles it
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available() and workers.ray is None:
        raise EnvironmentProblem("`workers.device` is cuda, but torch finds no CUDA device here")
    count = workers.count
    # A Ray actor has a GPU of its own; local workers on "cuda" take the machine's GPUs in turn.
    gpus = torch.cuda.device_count() if device == "cuda" and workers.local else 1
    memory = Memory(
        gpu_bytes=workers.gpu_memory,
        host_bytes=workers.host_memory,
        tables_bytes=TABLES_BYTES if workers.tables is None else workers.tables,
        on_device=-(-workers.local // max(1, gpus)) if workers.local else 1,
        on_host=count,
    )
    if workers.local:
        _require_memory(memory, device)
    return WorkerSpec(
        base=config.base,
        models=tuple(config.models.values()),
        objectives=config.objectives,
        device=device,
        threads=threads or workers.threads or _default_threads(workers),
        allowed_s=workers.timeout_s,
        memory=memory,
    )


def _default_threads(workers: Workers) -> int:
    """Threads of a worker where nobody says how many: its share of this machine's CPUs, or what OpenMP is told."""
    if workers.address:
        return 1  # a cluster's nodes may have any number
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if told.isdecimal() and int(told):
        return int(told)
    return max(1, (os.cpu_count() or 1) // workers.count)


def _require_memory(memory: Memory, device: str) -> None:
    """Raise EnvironmentProblem if the budgets that were asked for are more than this machine has."""
    asked = [("host_memory", memory.host_bytes, memory.on_host, "machine", host_bytes())]
    if device.startswith("cuda") and memory.gpu_bytes is not None:
        asked.append(("gpu_memory", memory.gpu_bytes, memory.on_device, "GPU", device_bytes(device, measured=False)[1]))
    for key, each, count, place, there in asked:
        if each is not None and each * count > there:
            raise EnvironmentProblem(
                f"`workers.{key}`: {count} workers with {show_bytes(each)} each, but the {place} has "
                f"{show_bytes(there)}"
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


def _constraints(
    config: StudyConfig, objectives: Sequence[Objective], problems: list[Problem]
) -> tuple[Constraint, ...]:
    senses = {o.name: o.maximize for o in objectives}
    # An objective that could not be made has its own problem: its constraints are not unknown.
    missing = [spec.name for spec in config.objectives if spec.name not in senses]
    texts = {i: t for i, t in enumerate(config.constraints) if not any(t.strip().startswith(m) for m in missing)}
    try:
        return read_constraints(
            list(texts.values()),
            senses,
            config.experts,
            merged=config.merged is not None,
            known_recipes=config.known_recipes,
            bounds={o.name: o.bounds for o in objectives},
        )
    except ConfigError as error:
        for p in error.problems:
            index = list(texts)[int(p.where.removeprefix("constraints[").removesuffix("]"))]
            problems.append(Problem(p.message, config.where("constraints", index), p.hint))
        return ()


def _fit(base: Checkpoint, objectives: Sequence[Objective]) -> tuple[list[Problem], list[Problem]]:
    """Items that the base cannot be fed, and notes on how others are: found from its tokenizer and configuration."""
    outline = Outline(base.path)
    problems: list[Problem] = []
    notes: list[Problem] = []
    for objective in objectives:
        if isinstance(objective, Fitted):
            found, said = objective.fit(outline)
            problems += found
            notes += [Problem(line) for line in said]
    return problems, notes


def _storage_problems(config: StudyConfig) -> list[Problem]:
    """A SQLite file must be in a folder that can be made and written."""
    try:
        file = sqlite_file(config.storage)
    except StorageError as error:
        return [Problem(error.message, where=config.where("storage"))]
    if file is None:
        return []
    folder = file.parent.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return [Problem(f"cannot write to {folder}", where=config.where("storage"), hint="choose another `storage:`")]
    if file.is_dir():
        return [Problem(f"{file} is a folder, not a database file", where=config.where("storage"))]
    return []


def _header(
    config: StudyConfig,
    overrides: tuple[str, ...],
    opened: dict[str, Checkpoint],
    objectives: list[Objective],
    worker: WorkerSpec,
    rungs: tuple[float, ...],
    epochs: dict[str, Any],
    optimizer: str,
    coarse: dict[str, int],
) -> Header:
    identity = {
        "base": config.base,
        "experts": config.experts,
        "weights": {label: c.digest() for label, c in opened.items()},
        "space": {k: v for k, v in config.space.items() if k != "description"},
        "objectives": {o.name: o.fingerprint() for o in objectives},
        "optimizer": {"name": optimizer, **config.optimizer_options},
        "seed": config.seed,
        "known_recipes": config.known_recipes,
    }
    if config.merged is not None:
        identity["merged"] = config.merged
    if config.constraints:
        identity["constraints"] = list(config.constraints)
    if config.fidelity.keep is not None:
        identity["keep"] = config.fidelity.keep
    # What evomerge chose by itself is kept in the header, not compared: studies from before rungs open too.
    if config.fidelity.rungs is not None:
        identity["fidelity"] = list(config.fidelity.rungs)
    if config.fidelity.epochs is not None and config.fidelity.rungs != ():
        identity["epochs"] = vars(config.fidelity.epochs) if config.fidelity.epochs else "off"
    versions = {name: version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    study_file = {
        "text": hide_passwords(config.text),
        "source": config.source,
        # Where the database is, is known to whoever opens it.
        "overrides": [o for o in overrides if not o.startswith("storage=")],
    }
    directions = {o.name: o.maximize for o in objectives}
    count = config.workers.count
    terms = choose_terms(config, objectives) if rungs or epochs else {}
    return Header(
        identity, directions, study_file, versions, worker.threads, count, list(rungs), epochs, coarse, terms=terms
    )
