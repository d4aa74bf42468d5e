"""What the commands do, apart from parsing their arguments."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge import registry
from evomerge.catalogue import (
    details_text,
    method_details,
    method_row,
    modifier_row,
    parameter_rows,
    rows_text,
)
from evomerge.config import StudyConfig, load_study_file, read_text, shipped_file, shipped_names
from evomerge.errors import ConfigError, Problem, StorageError, StudyConflict
from evomerge.export import check_recipe_models, merged_dtype
from evomerge.export import merge as write_merge
from evomerge.history import event_of
from evomerge.intervals import interval
from evomerge.optimizers import Describes, Optimizer
from evomerge.output import Format, emit, emit_one
from evomerge.pool import evaluate_safely, make_pool
from evomerge.prepare import Prepared, open_study, prepare, worker_spec
from evomerge.progress import Progress
from evomerge.racing import Race
from evomerge.recipe import Recipe
from evomerge.rescore import front_of, none_feasible, remarks
from evomerge.rungs import choose_rungs
from evomerge.search import Budget, Search
from evomerge.status import Teller, status_of
from evomerge.storage import connect, hide_passwords, mask, sqlite_file
from evomerge.strict_yaml import Document, load_yaml
from evomerge.study import Study, study_names
from evomerge.worker import Failed, Job, Worker

__all__ = [
    "KINDS", "catalogue", "copy_shipped", "evaluate", "find_study", "list_methods", "merge", "read_recipe",
    "run_search", "say", "show_method", "status_of",
]  # fmt: skip

KINDS = ("methods", "optimizers", "objectives", "spaces")


def run_search(
    path: str,
    overrides: tuple[str, ...],
    *,
    resume: str,
    inline: bool,
    quiet: bool,
    allow_task_code: bool,
    allow_benchmark_tests: bool = False,
    join: bool = False,
    hours: float | None = None,
) -> int:
    """Check, open or make the study, search, and return the exit code.

    Args:
        join: search beside other processes that search it.
        hours: of this run alone; the study file's budget counts all runs.
    """
    config = load_study_file(
        path, overrides, allow_task_code=allow_task_code, allow_benchmark_tests=allow_benchmark_tests
    )
    prepared = _prepared(config, overrides)
    study, existed = open_study(prepared, resume, inline=inline, on_note=_note)
    study.transactions.on_note = _note
    study.acquire(join=join)
    budget = _budget(config, hours)
    ended = sum(n for state, n in study.counts().items() if state != "running")
    say(f"{'continuing' if existed else 'starting'} {config.name} ({ended} candidates done)")
    if inline:
        say("--inline: candidates run in this process; a crash in one ends the search (it can be continued)")
    command = _resume_command(
        path,
        overrides,
        inline=inline,
        allow_task_code=allow_task_code,
        allow_benchmark_tests=allow_benchmark_tests,
        join=join,
        hours=hours,
    )
    stop = threading.Event()
    try:
        with (
            _stop_on_signals(stop, command) as received,
            Progress(study.header.objectives, budget, [], len(prepared.known), quiet, prepared.floors) as progress,
        ):
            teller = Teller(study, progress)
            optimizer = prepared.make_optimizer(study.header)
            ending = Search(
                study=study,
                space=prepared.space_of(study.header),
                optimizer=optimizer,
                start_pool=lambda: make_pool(
                    prepared.worker, inline=inline, on_note=_note, **config.workers.pool_options()
                ),
                budget=budget,
                known=prepared.known,
                on_begin=lambda ended: progress.begin(event_of(c, c.attrs.get("elapsed_s", 0.0)) for c in ended),
                on_event=progress.event,
                on_turn=teller.turn,
                on_note=_note,
                stop=stop,
                floors=prepared.floors,
            ).run()
    except StorageError as error:
        raise StorageError(error.message, hint=f"what was recorded is safe; continue with: {command}") from error
    finally:
        _release(study)
    _say_end(study, optimizer, ending.why)
    if ending.stopped:
        say(f"continue with: {command}")
        return 128 + (received[0] if received else signal.SIGINT)
    say(f"next: evomerge front {shlex.quote(path)} --split test")
    return 0


def _prepared(config: StudyConfig, overrides: tuple[str, ...]) -> Prepared:
    """The checked study, and what is worth knowing of it said."""
    for note in config.notes:
        _note(note)
    prepared = prepare(config, overrides)
    for warning in prepared.warnings:
        _warn(warning)
    return prepared


def _note(text: str) -> None:
    say(f"note: {text}")


def _budget(config: StudyConfig, run_hours: float | None) -> Budget:
    """What the study file allows all runs, and the command line this one."""
    hours = config.budget.hours
    return Budget(
        config.budget.evaluations, hours * 3600 if hours else None, None if run_hours is None else run_hours * 3600
    )


def _release(study: Study) -> None:
    """Give the study back, whatever happened; where that is impossible it is found to be free later."""
    try:
        study.release()
    except (StorageError, StudyConflict) as error:
        say(f"note: the study was not given back: {error.message}")


def _say_end(study: Study, optimizer: Optimizer, why: str) -> None:
    """What a search came to, and why it ended."""
    finished = [c for c in study.candidates() if c.state != "running"]
    say(f"{len(finished)} candidates, {len(front_of(study, finished))} on the front")
    for remark in filter(None, [none_feasible(study, finished), *remarks(study, finished)]):
        say(f"note: {remark}")
    if isinstance(optimizer, Describes):
        say(optimizer.describe())
    say(f"ended: {why}")


def evaluate(
    recipe: str,
    study: str,
    split: str,
    overrides: tuple[str, ...],
    *,
    allow_task_code: bool,
    allow_benchmark_tests: bool = False,
) -> list[dict[str, Any]]:
    """Score a recipe, or the checkpoint in a folder, in this process."""
    config = load_study_file(
        study, overrides, allow_task_code=allow_task_code, allow_benchmark_tests=allow_benchmark_tests
    )
    spec = worker_spec(config)
    if Path(recipe).is_dir():
        read = Recipe.build("passthrough", None, {recipe: {}})
        spec = replace(spec, base=recipe, models=(recipe,))
    else:
        read, document = read_recipe(recipe)
        donor = check_recipe_models(read, document, _warn)
        dtype = str(merged_dtype(read)).removeprefix("torch.")
        spec = replace(spec, base=donor.path, models=read.models, dtype=dtype)
    worker = Worker(spec)
    for objective in worker.objectives:
        problems = objective.check()
        if problems:
            raise ConfigError.of(problems, study)
        if split not in objective.splits:
            raise ConfigError(f"the objective {objective.name} has no {split} split")
    rungs, _ = choose_rungs(config, worker.objectives)
    # In the same parts as a search scores it: what else is in a batch can matter in the last bit.
    race = Race(config.seed, rungs) if rungs else None
    result = evaluate_safely(worker, Job(0, read, (split,), race))
    if isinstance(result, Failed):
        raise ConfigError(f"the model cannot be scored ({result.reason}): {result.message}")
    rows = []
    for name, score in result.scores[split].items():
        found = interval(score)
        row = {"objective": name, "split": split, "value": score.value, "low": found.low, "high": found.high}
        row |= {"stderr": score.stderr, "items": len(score.items), "method": found.method, "shown": str(found)}
        rows.append(row)
    return rows


def catalogue(kind: str | None) -> list[dict[str, str]]:
    """One row per thing that a study file can name."""
    rows = []
    for each in KINDS if kind is None else (kind,):
        if each == "methods":
            for name in registry.names("methods"):
                method = registry.get("methods", name)
                rows.append({"kind": "method", "name": name, "summary": method.summary, "source": method.source})
        elif each == "spaces":
            rows += [_shipped_row("space", "search_spaces", n) for n in shipped_names("search_spaces")]
        else:
            for name in registry.names(each):
                made = registry.get(each, name)
                summary = (made.__doc__ or "").strip().splitlines()[0] if made.__doc__ else ""
                rows.append({"kind": each.removesuffix("s"), "name": name, "summary": summary, "source": ""})
            if each == "objectives":
                rows += [_shipped_row("objective file", each, n) for n in shipped_names(each)]
    return rows


def list_methods(fmt: Format) -> None:
    """Print every method with its parameters; those that all methods with a base share come once, at the end."""
    rows = [method_row(registry.get("methods", name)) for name in registry.names("methods")] + [modifier_row()]
    if fmt is Format.table:
        print(rows_text(rows))
    elif fmt is Format.csv:  # one line per parameter: cells hold no lists
        emit(parameter_rows(rows), fmt)
    else:
        emit(rows, fmt)


def show_method(name: str, fmt: Format) -> None:
    """Print one method in full, with its docstring.

    Raises:
        ConfigError: there is no such method.
    """
    row = method_details(name)
    if fmt is Format.table:
        print(details_text(row))
    elif fmt is Format.csv:
        emit(parameter_rows([row, *([row["modifier"]] if "modifier" in row else [])]), fmt)
    else:
        emit_one(row, fmt)


def copy_shipped(name: str, dest: str) -> Path:
    """Copy a shipped search space or objective to a new file."""
    for kind in ("search_spaces", "objectives"):
        source = shipped_file(kind, name)
        if source is not None:
            target = Path(dest)
            if target.is_dir():
                target = target / source.name
            try:
                with target.open("x", encoding="utf-8") as stream:
                    stream.write(source.read_text(encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"cannot write {target}: {error.strerror}") from None
            return target
    known = [*shipped_names("search_spaces"), *shipped_names("objectives")]
    raise ConfigError(f"no shipped file {name!r}", hint=f"there are {', '.join(known)}")


def merge(recipe: str, out: str, *, device: str, shard_bytes: int) -> Path:
    """Write the merged model of a recipe file."""
    read, document = read_recipe(recipe)
    return write_merge(read, out, device=device, shard_bytes=shard_bytes, document=document, warn=_warn)


def read_recipe(path: str) -> tuple[Recipe, Document]:
    """A recipe file, and its data with their lines.

    Raises:
        RecipeError: with every problem in it.
    """
    text = read_text(path)
    return Recipe.from_yaml(text, path), load_yaml(text, path)


def find_study(where: str, storage: str | None, name: str | None) -> Study:
    """Open the study of a study file, of a folder with ledger.db, or of a database URL."""
    path = Path(where)
    if "://" in where:
        storage = where
    elif storage is None and path.is_dir():
        storage = f"sqlite:///{path / 'ledger.db'}"
    elif storage is None or name is None:
        config = load_study_file(where)
        storage, name = storage or config.storage, name or config.name
    if name is None:
        file = sqlite_file(storage)
        names = study_names(connect(storage, create=False))
        if len(names) != 1:
            raise ConfigError(f"{file or mask(storage)} holds {len(names)} studies", hint="give --study-name")
        name = names[0]
    return Study.load(storage, name)


def say(text: str) -> None:
    """A message for people."""
    print(text, file=sys.stderr, flush=True)


def _warn(problem: Problem) -> None:
    say(f"warning: {problem}")


def _resume_command(
    path: str,
    overrides: tuple[str, ...],
    *,
    inline: bool,
    allow_task_code: bool,
    allow_benchmark_tests: bool = False,
    join: bool = False,
    hours: float | None = None,
) -> str:
    """The command that continues, as a shell takes it; passwords in it are masked."""
    words = ["evomerge", "search", path]
    for override in overrides:
        words += ["-o", hide_passwords(override)]
    words += ["--inline"] * inline + ["--allow-task-code"] * allow_task_code
    words += ["--allow-benchmark-tests"] * allow_benchmark_tests + ["--join"] * join
    words += [] if hours is None else ["--hours", f"{hours:g}"]
    return shlex.join(words)


def _shipped_row(kind: str, folder: str, name: str) -> dict[str, str]:
    from evomerge.strict_yaml import load_yaml

    path = shipped_file(folder, name)
    assert path is not None
    data = load_yaml(path.read_text(encoding="utf-8"), str(path)).data
    summary = str(data.get("description", "")).strip().splitlines()
    return {"kind": kind, "name": name, "summary": summary[0] if summary else "", "source": str(path)}


@contextmanager
def _stop_on_signals(stop: threading.Event, command: str) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM asks for a clean end, the second ends at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            say(f"stopped at once; continue with: {command}")
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        say("stopping: waiting for the candidates in flight (again: stop at once)")
        stop.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
