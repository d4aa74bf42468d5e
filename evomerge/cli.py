"""The command line: thin commands over the package. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.output import Format, emit, emit_one

if TYPE_CHECKING:
    from evomerge.study import Study

app = typer.Typer(
    name="evomerge",
    help="A search engine for model merges: one YAML file in, a Pareto front of merged models out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    epilog="Examples:\n\n  evomerge search zoo/demo.yaml\n\n  evomerge front runs/demo --split test",
    pretty_exceptions_enable=False,
)


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)


StudyArg = Annotated[str, typer.Argument(help="A study file, or a mergekit-evolve genome file.")]
Where = Annotated[str, typer.Argument(help="A study file, a study's folder such as runs/demo, or a database URL.")]
Fmt = Annotated[Format, typer.Option("-f", "--format", help="How to print data.")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", help="key=value, as in -o budget.evaluations=20.")
]
TaskCode = Annotated[
    bool,
    typer.Option(
        "--allow-task-code",
        help="Let local lm-eval task files and the functions of `python` objectives run their own code.",
    ),
]
BenchmarkTests = Annotated[
    bool,
    typer.Option(
        "--allow-benchmark-tests", help="Let objectives search on the split that a public benchmark is reported on."
    ),
]
Storage = Annotated[str | None, typer.Option(help="Database URL, instead of the study's own.")]
StudyName = Annotated[str | None, typer.Option(help="The study's name in that database.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Use the Ray cluster at HOST:PORT, or `auto` for this machine's; workers: address in the study."),
]
Inline = Annotated[bool, typer.Option("--inline", help="Evaluate in this process (debugging).")]
Prefer = Annotated[str, typer.Option("--prefer", help="Weights of objectives, as in math=0.7,code=0.3.")]
AtLeast = Annotated[
    str, typer.Option("--at-least", help="The worst values that will do, in the objectives' own units: qa=0.6.")
]
Verbose = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.callback()
def _top(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ["EVOMERGE_DEBUG"] = "1"


@app.command(epilog=_examples("evomerge check zoo/demo.yaml", "evomerge check study.yaml -o budget.hours=8 -f json"))
def check(
    study: StudyArg,
    override: Overrides = None,
    allow_task_code: TaskCode = False,
    allow_benchmark_tests: BenchmarkTests = False,
    fmt: Fmt = Format.table,
) -> None:
    """Find everything that is wrong with a study before it costs anything."""
    from evomerge.config import load_study_file
    from evomerge.prepare import prepare
    from evomerge.study import Study

    overrides = tuple(override or ())
    config = load_study_file(
        study, overrides, allow_task_code=allow_task_code, allow_benchmark_tests=allow_benchmark_tests
    )
    prepared = prepare(config, overrides)
    if Study.exists(config.storage, config.name):
        Study.load(config.storage, config.name).require_identity(prepared.header.identity)
    _notes(config.notes)
    for warning in prepared.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    emit_one(prepared.summary, fmt)


@app.command(
    epilog=_examples(
        "evomerge search zoo/demo.yaml",
        "evomerge search study.yaml -o workers=4 --resume must",
        "evomerge search study.yaml --hours 9",
        "evomerge search study.yaml --join",
    )
)
def search(
    study: StudyArg,
    override: Overrides = None,
    storage: Storage = None,
    study_name: StudyName = None,
    resume: Annotated[str, typer.Option(help="auto, must (only continue) or never (only start).")] = "auto",
    join: Annotated[bool, typer.Option("--join", help="Search beside other processes that search the study.")] = False,
    hours: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Time for this run; no candidate starts that would take longer. budget: counts all."
        ),
    ] = None,
    ray_address: RayAddress = None,
    inline: Inline = False,
    quiet: Verbose = False,
    allow_task_code: TaskCode = False,
    allow_benchmark_tests: BenchmarkTests = False,
) -> None:
    """Search, or continue a search that was interrupted: the same command does both."""
    from evomerge.commands import run_search

    if resume not in ("auto", "must", "never"):
        raise typer.BadParameter(f"{resume!r} is not auto, must or never", param_hint="--resume")
    extra = [f"storage={storage}"] if storage else []
    extra += [f"name={study_name}"] if study_name else []
    if ray_address:
        extra += [f"workers.address={json.dumps(ray_address)}", "workers.local=null"]
    overrides = (*(override or ()), *extra)
    code = run_search(
        study,
        overrides,
        resume=resume,
        inline=inline,
        quiet=quiet,
        allow_task_code=allow_task_code,
        allow_benchmark_tests=allow_benchmark_tests,
        join=join,
        hours=hours,
    )
    raise typer.Exit(code)


@app.command(
    epilog=_examples(
        "evomerge status runs/demo", "evomerge status study.yaml -f json", "evomerge status study.yaml --watch"
    )
)
def status(
    study: Where,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show how running searches go, every few seconds, until Ctrl-C.")
    ] = False,
    storage: Storage = None,
    study_name: StudyName = None,
    fmt: Fmt = Format.table,
) -> None:
    """How far a study is; safe while it runs, and from any machine that reaches the database."""
    from evomerge.status import status_of, watch_study

    record = open_record(study, storage, study_name)
    if watch:
        watch_study(record, lambda shown: emit_one(shown, fmt))
    else:
        emit_one(status_of(record), fmt)


@app.command(
    epilog=_examples(
        "evomerge front runs/demo",
        "evomerge front runs/demo --prefer math=0.7,latin=0.3 --at-least cross=0.2",
        "evomerge front runs/demo --split test -f csv > front.csv",
    )
)
def front(
    study: Where,
    split: Annotated[str, typer.Option(help="search, validation or test; what is not stored is scored.")] = "search",
    all_: Annotated[
        bool, typer.Option("--all", help="All candidates, and those stopped early that could be on the front.")
    ] = False,
    prefer: Prefer = "",
    at_least: AtLeast = "",
    knee: Annotated[bool, typer.Option("--knee", help="Pick the point furthest beyond the front's ends.")] = False,
    weakest_link: Annotated[
        bool, typer.Option("--weakest-link", help="Pick the point whose least gain over the base is the largest.")
    ] = False,
    storage: Storage = None,
    study_name: StudyName = None,
    inline: Inline = False,
    allow_task_code: TaskCode = False,
    fmt: Fmt = Format.table,
) -> None:
    """The non-dominated candidates with their scores and 95 % intervals.

    The front, and what is picked of it, are always those of the search split. `membership` is how sure it is that a
    candidate is on the front. What is picked comes first. A score on the test split is computed once and stored.
    """
    from evomerge.picking import read_pick
    from evomerge.results import front_rows

    if split not in ("search", "validation", "test"):
        raise typer.BadParameter(f"{split!r} is not search, validation or test", param_hint="--split")
    record = open_record(study, storage, study_name)
    pick = read_pick(record, prefer, at_least, knee=knee, weakest_link=weakest_link)
    emit(front_rows(record, split, pick, everything=all_, inline=inline, allow_task_code=allow_task_code), fmt)


@app.command(
    epilog=_examples(
        "evomerge propose runs/demo --prefer math=0.7,latin=0.3",
        "evomerge propose runs/demo --prefer math=1 --at-least latin=0.4",
    )
)
def propose(
    study: Where,
    prefer: Prefer = "",
    at_least: AtLeast = "",
    storage: Storage = None,
    study_name: StudyName = None,
    inline: Inline = False,
    allow_task_code: TaskCode = False,
    fmt: Fmt = Format.table,
) -> None:
    """Find the recipe that the study's results predict to be best for your preferences, and score it once.

    It becomes a candidate of the study; prediction and measurement are shown side by side. Without --prefer it is the
    recipe whose weakest objective is predicted to be the best.
    """
    from evomerge.picking import read_pick
    from evomerge.proposing import propose as run

    record = open_record(study, storage, study_name)
    pick = read_pick(record, prefer, at_least, weakest_link=not prefer)
    emit(run(record, pick, inline=inline, allow_task_code=allow_task_code), fmt)


@app.command(
    name="eval",
    epilog=_examples(
        "evomerge eval recipe.yaml zoo/demo.yaml", "evomerge eval merged/ zoo/demo.yaml --split validation -f json"
    ),
)
def eval_(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a checkpoint folder.")],
    study: Annotated[str, typer.Argument(help="A study file: its objectives are used.")],
    split: Annotated[str, typer.Option(help="search, validation or test.")] = "search",
    override: Overrides = None,
    allow_task_code: TaskCode = False,
    allow_benchmark_tests: BenchmarkTests = False,
    fmt: Fmt = Format.table,
) -> None:
    """Score one recipe or checkpoint on a study's objectives; nothing is recorded."""
    from evomerge.commands import evaluate

    overrides = tuple(override or ())
    rows = evaluate(
        recipe,
        study,
        split,
        overrides,
        allow_task_code=allow_task_code,
        allow_benchmark_tests=allow_benchmark_tests,
    )
    emit(rows, fmt)


@app.command(epilog=_examples("evomerge merge recipe.yaml merged/", "evomerge merge mergekit.yml merged/ --shard-gb 2"))
def merge(
    recipe: Annotated[str, typer.Argument(help="A recipe, in evomerge's or mergekit's form.")],
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    shard_gb: Annotated[float, typer.Option(min=0.000001, help="Largest weight file, in GB.")] = 5.0,
) -> None:
    """Write a recipe's merged model as a Hugging Face checkpoint."""
    from evomerge.commands import merge as write

    print(write(recipe, out, device=device, shard_bytes=max(1, int(shard_gb * 1e9))))


@app.command(
    epilog=_examples(
        "evomerge export runs/demo best/", "evomerge export runs/demo point-42/ --candidate 42 --no-weights"
    )
)
def export(
    study: Where,
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    candidate: Annotated[int | None, typer.Option(help="Its number; default: the winner.")] = None,
    weights: Annotated[bool, typer.Option(help="Write the checkpoint too.")] = True,
    storage: Storage = None,
    study_name: StudyName = None,
    inline: Inline = False,
    allow_task_code: TaskCode = False,
) -> None:
    """Write a candidate for others: checkpoint, recipe in both forms, model card with scores per split.

    Without --candidate it is the winner: of the candidates that may be the best on the search split, the simplest
    within one standard error of the best on validation, by the mean over objectives after each is scaled to its range
    over the front.
    """
    from evomerge.results import export_candidate

    record = open_record(study, storage, study_name)
    print(export_candidate(record, out, candidate, weights=weights, inline=inline, allow_task_code=allow_task_code))


@app.command(epilog=_examples("evomerge ls", "evomerge ls methods", "evomerge ls methods ties", "evomerge ls -f json"))
def ls(
    kind: Annotated[str | None, typer.Argument(help="methods, optimizers, objectives or spaces; default: all.")] = None,
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    fmt: Fmt = Format.table,
) -> None:
    """What there is: merge methods and their parameters, optimizers, kinds and files of objectives, search spaces."""
    from evomerge.commands import KINDS, catalogue, list_methods, show_method

    if kind is not None and kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is not one of {', '.join(KINDS)}", param_hint="KIND")
    if name is not None and kind != "methods":
        raise typer.BadParameter(f"{kind} are shown as a list only; a name follows `methods`", param_hint="NAME")
    if name is not None:
        show_method(name, fmt)
    elif kind == "methods":
        list_methods(fmt)
    else:
        emit(catalogue(kind), fmt)


@app.command(epilog=_examples("evomerge cp task_arithmetic my_space.yaml", "evomerge cp zoo_math my_objective.yaml"))
def cp(
    name: Annotated[str, typer.Argument(help="A shipped search space or objective (see `evomerge ls`).")],
    dest: Annotated[str, typer.Argument(help="File to write; must not exist.")],
) -> None:
    """Copy a shipped file to start from."""
    from evomerge.commands import copy_shipped

    print(copy_shipped(name, dest))


def open_record(where: str, storage: str | None, name: str | None) -> Study:
    """The study at a study file, a folder, or a database URL."""
    from evomerge.commands import find_study

    return find_study(where, storage, name)


def _notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def main(args: list[str] | None = None) -> None:
    """Entry point: runs a command and turns errors into one message and an exit code."""
    from evomerge.errors import EvomergeError

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # evomerge reads local files only
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours says what matters
    try:
        app(args, standalone_mode=True)
    except EvomergeError as error:
        if os.environ.get("EVOMERGE_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
