"""The study file that a person writes, checked completely: every problem at once, with file and line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, ValidationError

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.fidelity import Fidelity, read_fidelity
from evomerge.objectives import ObjectiveSpec
from evomerge.path_space import is_path_spec
from evomerge.strict_yaml import Document, load_yaml
from evomerge.worker_entries import Strict, Workers, check_workers

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Path_ = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Limit = Annotated[str, StringConstraints(min_length=1, max_length=200)]
DEFAULT_EVALUATIONS = 100
BASE, MERGED = "base", "merged"  # the names of the two models that `experts:` does not name


class Budget(Strict):
    """When a search ends: after so many candidates or hours, whichever is first."""

    evaluations: Annotated[int, Field(gt=0)] | None = None
    hours: Annotated[float, Field(gt=0, strict=False)] | None = None


class _StudyFile(Strict):
    """The keys of a study file. `space` and `objectives` are checked by the parts that know them."""

    name: Name
    base: Path_
    experts: Annotated[dict[Name, Path_], Field(min_length=1)]
    merged: Path_ | None = None
    space: str | dict[str, Any]
    objectives: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    optimizer: str | dict[str, Any] | None = None
    budget: Budget = Budget()
    storage: str | None = None
    workers: Annotated[int, Field(gt=0, le=1024)] | Workers = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    known_recipes: bool = True
    constraints: Annotated[list[Limit], Field(default_factory=list)]
    fidelity: Annotated[Fidelity, BeforeValidator(read_fidelity)] = Fidelity()


@dataclass(frozen=True)
class StudyConfig:
    """A study file with every name resolved to data; weights and tasks are not opened yet.

    Attributes:
        source: file name, for messages.
        text: the file's text.
        experts: name -> checkpoint folder, in order.
        merged: checkpoint folder of a further model for layer orders, as a rule the winner of another search.
        space: the space's specification, and where it came from.
        optimizer: name and options; None leaves the choice to the number of objectives.
        constraints: as the file has them; `evomerge.constraints` reads them.
        fidelity: rungs and epochs as far as the file gives them.
        notes: messages about keys that had no equivalent (mergekit-evolve files).
        document: the study file's data with their lines; `space_document` that of the space, where `space_path`
            is the space's place in it.
    """

    source: str
    text: str
    name: str
    base: str
    experts: dict[str, str]
    space: dict[str, Any]
    space_source: str
    objectives: tuple[ObjectiveSpec, ...]
    optimizer: str | None
    optimizer_options: dict[str, Any]
    budget: Budget
    storage: str
    workers: Workers
    seed: int
    known_recipes: bool = True
    merged: str | None = None
    constraints: tuple[str, ...] = ()
    fidelity: Fidelity = field(default_factory=Fidelity)
    notes: tuple[str, ...] = field(default=())
    document: Document = field(default_factory=lambda: Document({}), repr=False)
    space_document: Document = field(default_factory=lambda: Document({}), repr=False)
    space_path: tuple[str | int, ...] = ()

    @property
    def models(self) -> dict[str, str]:
        """Every checkpoint folder by its name: "base", the experts, "merged"."""
        further = {} if self.merged is None else {MERGED: self.merged}
        return {BASE: self.base, **self.experts, **further}

    def where(self, *path: str | int) -> str:
        """ "file:line" of an entry of the study file; its key alone if the file does not have it."""
        found = path in self.document.lines
        return self.document.where(path) if found else f"{self.source}: {'.'.join(map(str, path))}"

    def where_in_space(self, key: str) -> str:
        """ "file:line: key" for a key of the space with dots, such as genes.weight.low."""
        if key.split(".")[0] in ("experts", MERGED):
            document, path = self.document, follow(self.document.data, key)
        else:
            spot = follow(_at(self.space_document.data, self.space_path), key)
            document, path = self.space_document, (*self.space_path, *spot)
        return f"{document.where(path)}: {key}" if key else document.where(path)


def load_study_file(
    path: str,
    overrides: tuple[str, ...] = (),
    *,
    allow_task_code: bool = False,
    allow_benchmark_tests: bool = False,
) -> StudyConfig:
    """Read and check a study file.

    Args:
        path: a study file, or a mergekit-evolve genome file.
        overrides: "key=value" with dots for nested keys; the value is YAML.
        allow_task_code: task files and functions named by the study may run code.
        allow_benchmark_tests: objectives may search on the split that a public benchmark is reported on.

    Raises:
        ConfigError: with every problem that can be found without opening weights or tasks.
    """
    return parse_study(
        read_text(path),
        path,
        overrides,
        allow_task_code=allow_task_code,
        allow_benchmark_tests=allow_benchmark_tests,
    )


def read_text(path: str | Path) -> str:
    """A text file that a person wrote.

    Raises:
        ConfigError: it is missing, unreadable or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {str(path)[:200]}: {str(error)[:200]}") from None


def parse_study(
    text: str,
    source: str,
    overrides: tuple[str, ...] = (),
    *,
    allow_task_code: bool = False,
    allow_benchmark_tests: bool = False,
) -> StudyConfig:
    """Like `load_study_file`, for text. `source` names it in messages."""
    from evomerge.objective_entries import models_of, objective_specs

    document = load_yaml(text, source)
    data = document.data
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a study file is a mapping of keys, not {type(data).__name__}")
    notes: list[str] = []
    if "genome" in data:
        from evomerge.evolve_file import translate

        data, notes = translate(data, source)
        document = Document(data=data, name=source, lines={})
    data = _override(data, overrides)
    problems: list[Problem] = []
    parsed: _StudyFile | None = None
    try:
        parsed = _StudyFile.model_validate(data)
    except ValidationError as error:
        problems += _problems(error, document)
    shared = ObjectiveSpec("", "", {}, ".", allow_task_code, "", allow_benchmark_tests, models_of(data))
    objectives = objective_specs(data.get("objectives"), document, shared, problems)
    space, space_source, space_document, space_path = _space(data.get("space"), document, problems)
    optimizer, options = _optimizer(data.get("optimizer"), document, problems)
    storage = _storage(data, document, problems)
    if problems or parsed is None:
        raise ConfigError.of(problems, source)
    check_workers(parsed.workers, document)
    _check_names(parsed, document, space)
    workers = parsed.workers if isinstance(parsed.workers, Workers) else Workers(local=parsed.workers)
    workers = workers.settled()
    budget = parsed.budget
    if budget.evaluations is None and budget.hours is None:
        budget = Budget(evaluations=DEFAULT_EVALUATIONS)
    return StudyConfig(
        source=source,
        text=text,
        name=parsed.name,
        base=parsed.base,
        experts=dict(parsed.experts),
        space=space,
        space_source=space_source,
        objectives=tuple(objectives),
        optimizer=optimizer,
        optimizer_options=options,
        budget=budget,
        storage=storage,
        workers=workers,
        seed=parsed.seed,
        known_recipes=parsed.known_recipes,
        merged=parsed.merged,
        constraints=tuple(parsed.constraints),
        fidelity=parsed.fidelity,
        notes=tuple(notes),
        document=document,
        space_document=space_document,
        space_path=space_path,
    )


def shipped_file(kind: str, name: str) -> Path | None:
    """A ready-made `search_spaces` or `objectives` file by name: yours in ./kind/ first, then ours."""
    package = Path(__file__).parent
    for folder in (Path(kind), package / "data" / kind, package.parent / kind):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def shipped_names(kind: str) -> list[str]:
    """Names of all ready-made files of a kind."""
    package = Path(__file__).parent
    folders = (Path(kind), package / "data" / kind, package.parent / kind)
    return sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})


def _override(data: Mapping[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    result = dict(data)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override is key=value, not {text!r}")
        *parents, last = key.split(".")
        at = result
        for parent in parents:
            child = at.get(parent)
            at[parent] = dict(child) if isinstance(child, dict) else {}
            at = at[parent]
        at[last] = load_yaml(value, f"-o {key}").data
    return result


def _problems(error: ValidationError, document: Document) -> Iterator[Problem]:
    """pydantic's findings in our words, one per place."""
    seen: set[tuple[Any, ...]] = set()
    # Branches of a union add their own names to the location: keep what is a key of the file.
    items = [
        (tuple(p for p in item["loc"] if not (isinstance(p, str) and _BRANCH.match(p))), item)
        for item in error.errors()
    ]
    for location, item in items:
        # The branches that a mapping was not meant for complain too: what lies deeper says more.
        if location in seen or any(len(o) > len(location) and o[: len(location)] == location for o, _ in items):
            continue
        seen.add(location)
        key = ".".join(str(p) for p in location)
        if item["type"] == "extra_forbidden":
            message, hint = f"unknown key `{key}`", _close_keys(location)
        elif item["type"] == "missing":
            message, hint = f"the key `{key}` is missing", ""
        else:
            text = item["msg"].removeprefix("Value error, ")
            message, hint = f"`{key}`: {text}, not {item['input']!r}"[:300], ""
        yield Problem(message, where=document.where(location), hint=hint)


_BRANCH = re.compile(r"^(str|int|float|Workers|dict\[.*|constrained-.*|function-.*|literal\[.*)$")


def _close_keys(location: tuple[Any, ...]) -> str:
    owners: dict[str, type[BaseModel]] = {"budget": Budget, "workers": Workers}
    owner = owners.get(str(location[0]), _StudyFile) if len(location) > 1 else _StudyFile
    return f"known: {', '.join(owner.model_fields)}"


def _space(
    entry: Any, document: Document, problems: list[Problem]
) -> tuple[dict[str, Any], str, Document, tuple[str | int, ...]]:
    """The space's data, where it came from, and the document and place that hold it."""
    where = document.where(("space",))
    if isinstance(entry, dict):
        return entry, where, document, ("space",)
    nothing: tuple[dict[str, Any], str, Document, tuple[str | int, ...]] = ({}, where, document, ("space",))
    if not isinstance(entry, str):
        return nothing  # pydantic has said so
    path = Path(entry) if entry.endswith((".yaml", ".yml")) else shipped_file("search_spaces", entry)
    if path is None or not path.is_file():
        names = shipped_names("search_spaces")
        near = difflib.get_close_matches(entry, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        problems.append(Problem(f"no search space {entry!r}", where, hint))
        return nothing
    try:
        found = load_yaml(read_text(path), str(path))
    except ConfigError as error:
        problems += error.problems
        return nothing
    if not isinstance(found.data, dict):
        problems.append(Problem("a search space is a mapping", str(path)))
        return nothing
    return found.data, str(path), found, ()


def follow(data: Any, key: str) -> tuple[str | int, ...]:
    """The path of a key with dots in nested mappings, as far as it leads; names may hold dots themselves."""
    path: list[str | int] = []
    rest = key
    while isinstance(data, Mapping) and rest:
        found = [k for k in data if rest == k or rest.startswith(f"{k}.")]
        if not found:
            break
        longest = max(found, key=len)
        path.append(longest)
        data, rest = data[longest], rest[len(longest) + 1 :]
    return tuple(path)


def _at(data: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _optimizer(entry: Any, document: Document, problems: list[Problem]) -> tuple[str | None, dict[str, Any]]:
    if entry is None:
        return None, {}
    options = dict(entry) if isinstance(entry, dict) else {"name": entry}
    name = options.pop("name", None)
    if name not in registry.names("optimizers"):
        known = ", ".join(registry.names("optimizers"))
        where = document.where(("optimizer",))
        problems.append(Problem(f"unknown optimizer {name!r}", where, hint=f"known: {known}"))
    return name, options


def _storage(data: Mapping[str, Any], document: Document, problems: list[Problem]) -> str:
    from evomerge.storage import storage_problem

    default = f"sqlite:///runs/{data.get('name')}/ledger.db"
    environment = os.environ.get("EVOMERGE_STORAGE") or os.environ.get("OPTUNA_STORAGE")
    url = data.get("storage") or environment or default
    problem = storage_problem(str(url))
    if problem:
        problems.append(Problem(problem, where=document.where(("storage",))))
    return str(url)


def _check_names(parsed: _StudyFile, document: Document, space: Mapping[str, Any]) -> None:
    """Messages call the base "base": only a method that takes it as an input may list it, by that name."""
    problems = []
    if parsed.experts.get(BASE, parsed.base) != parsed.base:
        where = document.where(("experts", BASE))
        problems.append(Problem("an expert cannot be named `base`", where, "rename it"))
    if parsed.merged is not None:
        where = document.where((MERGED,))
        if MERGED in parsed.experts:
            message = "an expert cannot be named `merged` beside the key `merged:`, whose model has that name"
            problems.append(Problem(message, document.where(("experts", MERGED)), "rename it"))
        if not is_path_spec(space):
            message = "`merged:` is for spaces of layer orders, and this space has coefficients"
            problems.append(Problem(message, where, "leave it out, list it under `experts:`, or choose such a space"))
    if problems:
        raise ConfigError.of(problems, document.name)
