"""The other side of merge_speed.py: times mergekit's merges of resident tensors, in mergekit's own environment.

    .venv-mergekit/bin/python benchmarks/_mergekit_side.py FOLDER THREADS

Reads one job per line from stdin (JSON: method, base, experts, parameters, dtype) and answers each with one line.

What is timed is mergekit's own work on a weight and no more: its public merge methods, called weight by weight as its
graph executor does, on tensors in memory. Planning, reading, writing and copying the result into a model are left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _merge_inputs import Peak, checked, distance, load_models
from mergekit import merge_methods
from mergekit.merge_methods.base import ParameterScope, TensorGroup


def parameters_of(method: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The job's parameters that mergekit has; lists count experts, and mergekit may count the base too."""
    found = {}
    for spec in method.spec.parameters:
        if spec.name not in job["parameters"]:
            continue
        value = job["parameters"][spec.name]
        if isinstance(value, list) and spec.scope is ParameterScope.SHARED:
            value = value[0]
        if isinstance(value, list) and spec.scope is ParameterScope.INPUT and job["base"]:
            value = [1.0, *value]
        found[spec.name] = value
    return found


def merge(models: dict[str, dict[str, torch.Tensor]], job: dict[str, Any], names: list[str]) -> Iterator[torch.Tensor]:
    """Merge these weights, one after the other; nothing keeps a result."""
    method = merge_methods.get(job["method"])
    parameters = parameters_of(method, job)
    members = [*([job["base"]] if job["base"] else []), *job["experts"]]
    dtype = getattr(torch, job["dtype"]) if job["dtype"] else None
    for name in names:
        group = TensorGroup.from_tensors(
            [models[member][name] for member in members],
            ids=members,
            base_index=0 if job["base"] else None,
            name=name,
        )
        (result,) = method((group,), parameters=parameters, dtype=dtype, out_dtype=torch.bfloat16)
        yield result
        del result


@torch.no_grad()
def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    models = load_models(folder)
    names = list(next(iter(models.values())))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            torch.manual_seed(job["seed"])
            first = checked(names)  # also makes whatever is made at a first call
            off = distance(zip(merge(models, job, first), (models[job["experts"][0]][n] for n in first), strict=True))
            with Peak() as peak:
                started = time.perf_counter()
                for _ in merge(models, job, names):
                    pass
                seconds = time.perf_counter() - started
            answer: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak.n_bytes, "distance": off}
        except Exception as error:  # one method's failure is a cell of the table
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
