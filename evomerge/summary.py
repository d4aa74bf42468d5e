"""What `evomerge check` prints of a study that is in order."""

from __future__ import annotations

from typing import Any

from evomerge.config import MERGED, StudyConfig
from evomerge.family import Change
from evomerge.objectives import Objective
from evomerge.path_space import PathSpace
from evomerge.residency import settle, show_bytes
from evomerge.scale_folding import foldable
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
        **({"merged model": config.merged} if config.merged is not None else {}),
        **{name if name == MERGED else f"expert {name}": str(change) for name, change in changes.items()},
        "resident": _resident(config, opened, worker),
        "memory": f"each worker: {live} live model on {worker.device}, tables up to {tables}",
        **(_paths(space) if isinstance(space, PathSpace) else _coefficients(space)),
        "objectives": ", ".join(
            f"{o.name} ({'max' if o.maximize else 'min'}; {', '.join(o.splits)})" for o in objectives
        ),
        "constraints": "; ".join(config.constraints) or "none",
        "optimizer": optimizer,
        "known recipes": known,
        "budget": ", ".join(f"{v:g} {k}" for k, v in config.budget.model_dump().items() if v is not None),
        "storage": mask(config.storage),
    }


def _coefficients(space: Space) -> dict[str, str]:
    """ "ties, 24 dimensions (model 3, groups 24)": those of the nested spaces too, if there are any."""
    levels = space.facts().levels
    nested = f" ({', '.join(f'{level.name} {level.dim}' for level in levels)})" if len(levels) > 1 else ""
    return {"space": f"{', '.join(space.methods)}, {_count(space.dim, 'dimension')}{nested}"}


def _paths(space: PathSpace) -> dict[str, str]:
    """What is worth knowing of a space of layer orders, one line for each thing."""
    ground = space.ground
    return {
        "space": f"layer orders ({space.encoding.name}), {_count(space.dim, 'dimension')}",
        "sources": ", ".join(ground.sources),
        "backbone": f"searched among {', '.join(ground.backbones)}" if ground.searched else ground.backbones[0],
        "frozen layers": f"the first {ground.head} and the last {ground.tail} of {ground.n_layers}",
        "longest path": _count(ground.longest, "layer"),
        "scales": _scales(space),
    }


def _scales(space: PathSpace) -> str:
    if space.ground.scales is None:
        unfit = f": those of a {space.model_type} model cannot be folded into its weights"
        return "off" if foldable(space.model_type) else f"off{unfit}"
    low, high = space.ground.scales
    said = f"{low:g} to {high:g}"
    return f"{said} times the matched scale, which a new study measures" if space.wants_moments else said


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _resident(config: StudyConfig, opened: dict[str, Checkpoint], worker: WorkerSpec) -> str:
    """Where each worker's weights are expected to live."""
    if worker.device == "auto":
        size = show_bytes(sum(c.n_bytes for c in opened.values()))
        return f"{size} of weights; each worker's own node settles where"
    models = {c.path: c for c in opened.values()}
    return str(settle(worker.memory, worker.device, models, opened["base"].bytes_as(None), measured=False))
