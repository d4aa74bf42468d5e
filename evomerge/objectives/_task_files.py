"""lm-eval task files: found by name or path, and refused where they could run code unasked.

An lm-eval task is a YAML file that may name Python functions (`!function`), Python classes, metric
scripts and Jinja templates, all of which can run code. Tasks installed with lm-eval are trusted as
lm-eval itself is; a file anywhere else is data only, unless the user passed --allow-task-code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import ConfigError, Problem
from evomerge.objectives._task_guard import code_in


def load_local_task(path: Path, *, allow_code: bool) -> dict[str, Any]:
    """The task file's configuration with its includes resolved and data paths absolute.

    JSON data files are read by us, in memory, so that scoring writes no cache to disk.

    Raises:
        ConfigError: unreadable, or able to run code without `allow_code`.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not allow_code:
        problems = code_in(path)
        if problems:
            raise ConfigError.of(problems, str(path))
    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=allow_code)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a task file: {error}") from None
    if not isinstance(config.get("task"), str):
        raise ConfigError(f"{path}: no `task:` name")
    try:
        return _with_local_data(config, path.parent)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: `dataset_kwargs:` must be a mapping whose `data_files:` are file names") from None


def installed_config(name: str, task: str) -> dict[str, Any]:
    """The configuration of a task that lm-eval brings; its own functions are trusted as lm-eval is."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    path = installed_task_file(task)
    if path is None:
        entry = TaskManager().task_index.get(task)
        if entry is None or entry.yaml_path is None:
            raise ConfigError(
                f"objective {name}: lm-eval has no task {task!r}",
                hint="`lm-eval ls tasks` lists them; a task file of your own goes under `file:`",
            )
        path = Path(entry.yaml_path)
    if not is_installed(path):
        raise ConfigError(
            f"objective {name}: {path} is not one of lm-eval's own task files", hint="put it under `file:`"
        )
    config: dict[str, Any] = load_yaml(path, resolve_func=True)
    if not isinstance(config.get("task"), str):
        raise ConfigError(f"objective {name}: {task} is a group; name one of its tasks")
    return config


def installed_task_file(name: str) -> Path | None:
    """The file of an installed lm-eval task that is named like its file, found without an index."""
    import lm_eval.tasks

    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob(f"{name}.yaml")):
        if not is_installed(path):
            continue
        head = path.read_text(encoding="utf-8", errors="replace")
        if f"task: {name}\n" in head + "\n":
            return path
    return None


def is_installed(path: Path) -> bool:
    """Whether a file is in lm-eval's own folder, with ".." and links followed: only those are trusted."""
    import lm_eval.tasks

    return path.resolve().is_relative_to(Path(lm_eval.tasks.__file__).parent.resolve())


def _with_local_data(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Point data files at absolute paths, and read JSON lines without the datasets cache."""
    kwargs = dict(config.get("dataset_kwargs") or {})
    files = kwargs.get("data_files")
    if files is None:
        return config
    by_split = files if isinstance(files, dict) else {"train": files}
    absolute = {
        split: [str((folder / f).resolve()) for f in ([names] if isinstance(names, str) else names)]
        for split, names in by_split.items()
    }
    missing = [f for names in absolute.values() for f in names if not Path(f).is_file()]
    if missing:
        raise ConfigError.of([Problem(f"no file {f}", where=config["task"]) for f in missing])
    kwargs["data_files"] = absolute
    config = {**config, "dataset_kwargs": kwargs}
    if config.get("dataset_path") == "json" and set(kwargs) == {"data_files"}:
        config["custom_dataset"] = _read_json_lines
    return config


def _read_json_lines(*, data_files: dict[str, list[str]], **metadata: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {split: Dataset.from_list(_rows(names)) for split, names in data_files.items()}


def _rows(names: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in names:
        text = Path(name).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows += json.loads(text)
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ConfigError(f"{name}:{number}: not JSON: {error}") from None
    return rows
