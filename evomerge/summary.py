"""What `evomerge check` prints of a study that is in order."""

from __future__ import annotations

from typing import Any

from evomerge.config import StudyConfig
from evomerge.family import Change
from evomerge.objectives import Objective
from evomerge.residency import settle, show_bytes
from evomerge.spaces import Space
from evomerge.storage import mask
from evomerge.weights import Checkpoint
from evomerge.worker import WorkerSpec


def summary_of(
    config: StudyConfig,
    opened: dict[str, Checkpoint],
    objectives: list[Objective],
    space: Space,
    worker: WorkerSpec,
    known: int,
    changes: dict[str, Change],
    optimizer: str,
) -> dict[str, Any]:
    """What is known of a checked study, one line for each thing."""
    base = opened["base"]
    live, tables = show_bytes(base.bytes_as(None)), show_bytes(worker.memory.tables_bytes)
    return {
        "study": config.name,
        "base": f"{config.base} ({base.n_layers} layers, {base.n_bytes / 1e6:.1f} MB)",
        "experts": ", ".join(config.experts),
        **{f"expert {name}": str(change) for name, change in changes.items()},
        "resident": _resident(config, opened, worker),
        "memory": f"each worker: {live} live model on {worker.device}, tables up to {tables}",
        "space": f"{', '.join(space.methods)}, {_dimensions(space)}",
        "objectives": ", ".join(
            f"{o.name} ({'max' if o.maximize else 'min'}; {', '.join(o.splits)})" for o in objectives
        ),
        "constraints": "; ".join(config.constraints) or "none",
        "optimizer": optimizer,
        "known recipes": known,
        "budget": ", ".join(f"{v:g} {k}" for k, v in config.budget.model_dump().items() if v is not None),
        "storage": mask(config.storage),
    }


def _dimensions(space: Space) -> str:
    """ "24 dimensions (model 3, groups 24)": those of the nested spaces too, if there are any."""
    levels = space.facts().levels
    nested = f" ({', '.join(f'{level.name} {level.dim}' for level in levels)})" if len(levels) > 1 else ""
    return f"{space.dim} dimension{'s' * (space.dim != 1)}{nested}"


def _resident(config: StudyConfig, opened: dict[str, Checkpoint], worker: WorkerSpec) -> str:
    """Where each worker's weights are expected to live."""
    if worker.device == "auto":
        size = show_bytes(sum(c.n_bytes for c in opened.values()))
        return f"{size} of weights; each worker's own node settles where"
    models = {c.path: c for c in opened.values()}
    return str(settle(worker.memory, worker.device, models, opened["base"].bytes_as(None), measured=False))
