"""Test sets of public benchmarks are not searched on: a score that a search has seen says nothing to others.

Public is what lm-eval installs, and any task over a data set of the hub. Files on this machine are the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import Problem
from evomerge.objectives import ObjectiveSpec
from evomerge.objectives._task_guard import DATA_BUILDERS

FLAG = "--allow-benchmark-tests"


def benchmark_problems(
    spec: ObjectiveSpec, config: Mapping[str, Any], named: Mapping[str, str] | None
) -> list[Problem]:
    """Whether the search split is the one that a public benchmark is reported on.

    That is the data set's `test` split, and the split that the task itself is evaluated on.

    Args:
        spec: its option `task` names an installed task; its flag allows all.
        config: lm-eval's configuration of the task.
        named: our split -> the data set's; None if ours are cut out of the task's evaluation split.
    """
    if spec.allow_benchmark_tests or not (spec.options.get("task") or _on_the_hub(config)):
        return []
    reported = config.get("test_split") or config.get("validation_split")
    searched = reported if named is None else named.get("search")
    if not isinstance(searched, str) or searched.partition("[")[0] not in ("test", reported):
        return []
    way = "is cut out of" if named is None else "is"
    of = config.get("dataset_path") or config.get("task")
    message = (
        f"the search split {way} the split {searched!r} of {of}, on which the benchmark is reported: "
        "scores that a search has optimised are not comparable with anyone's"
    )
    train = config.get("training_split")
    use = f"`splits: {{search: {train}}}`" if isinstance(train, str) else "a training split, under `splits:`"
    return [Problem(message, f"objective {spec.name}", f"search on {use}, or pass {FLAG}")]


def _on_the_hub(config: Mapping[str, Any]) -> bool:
    """Whether the data set has a name instead of files."""
    path = config.get("dataset_path")
    return isinstance(path, str) and path not in DATA_BUILDERS and not Path(path).exists()
