"""The `workers:` of a study file: where candidates are evaluated, and with how much memory."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from evomerge.errors import ConfigError, Problem
from evomerge.pool import PATIENCE_S
from evomerge.strict_yaml import Document

_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(|k|M|G|T|Ki|Mi|Gi|Ti)B")
_UNITS = (
    {"": 1}
    | {u: 1000 ** (i + 1) for i, u in enumerate("kMGT")}
    | {f"{u}i": 1024 ** (i + 1) for i, u in enumerate("KMGT")}
)


def read_size(value: Any) -> int:
    """Bytes of a size such as 40GB, 1.5 GiB or 512MB; 0 needs no unit.

    Raises:
        ValueError: it is anything else.
    """
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        return int(float(match[1]) * _UNITS[match[2]])
    if type(value) is int and value == 0:
        return 0
    raise ValueError("a size is a number with its unit, as in 40GB, 1.5GiB or 512MB")


Size = Annotated[int, BeforeValidator(read_size)]


class Strict(BaseModel):
    """A mapping of a study file, in which no key is unknown and no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Workers(Strict):
    """Where candidates are evaluated.

    `local` processes on this machine (one if nothing else is asked for), or Ray actors: `ray` of them at most, or
    `auto` for as many as the cluster has room for. They run on the cluster at `address` (`auto`: the one that this
    machine is part of), or without it on this machine. An actor has one GPU: `per_gpu` actors share one, or below 1
    each has several; without GPUs it has `threads` CPUs. `address` or `per_gpu` alone mean `ray: auto`. A search whose
    cluster has no worker for `patience_s` ends, and can be continued.

    `gpu_memory`, `host_memory` and `tables` are budgets of each worker: device memory for resident weights (the live
    model comes on top), host memory for copies of weights (page-locked beside a GPU), and memory for what merges
    compute from the models alone. What fits neither of the first two stays memory-mapped on disk.
    """

    local: Annotated[int, Field(gt=0, le=1024)] | None = None
    ray: Annotated[int, Field(gt=0, le=4096)] | Literal["auto"] | None = None
    address: Annotated[str, StringConstraints(min_length=1, max_length=300)] | None = None
    per_gpu: Annotated[float, Field(ge=1 / 64, le=64, strict=False)] | None = None
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    timeout_s: Annotated[float, Field(gt=0, strict=False)] = 3600.0
    patience_s: Annotated[float, Field(gt=0, strict=False)] = PATIENCE_S
    gpu_memory: Size | None = None
    host_memory: Size | None = None
    tables: Size | None = None

    @property
    def count(self) -> int:
        """How many workers were asked for; 1 where the cluster's size decides."""
        return self.local or (self.ray if isinstance(self.ray, int) else 1)

    def settled(self) -> Workers:
        """The same with `local` or `ray` filled in where the file gave neither."""
        if self.local is not None or self.ray is not None:
            return self
        on_cluster = self.address is not None or self.per_gpu is not None
        return self.model_copy(update={"ray": "auto"} if on_cluster else {"local": 1})

    def pool_options(self, jobs: int | None = None) -> dict[str, Any]:
        """What `pool.make_pool` has to know of these workers.

        Args:
            jobs: how many there will be, if that is known: more workers are not started.
        """
        size: int | Literal["auto"] | None = self.ray
        if jobs is not None and size is not None:
            size = jobs if size == "auto" else min(size, jobs)
        local = self.local if jobs is None or self.local is None else min(self.local, jobs)
        more = {"address": self.address, "per_gpu": self.per_gpu or 1.0, "patience_s": self.patience_s}
        return {"local": local, "ray": size, **more}


def check_workers(workers: int | Workers, document: Document) -> None:
    """Raise ConfigError for keys that do not go together."""
    if not isinstance(workers, Workers):
        return
    of_ray = [key for key in ("ray", "address", "per_gpu") if getattr(workers, key) is not None]
    problems = []
    if workers.local is not None and of_ray:
        message = f"`workers:` has `local:` and `{of_ray[0]}:`, which is for Ray"
        problems.append(Problem(message, document.where(("workers",)), "give one of them"))
    share = workers.per_gpu
    if share is not None and min(abs(n - round(n)) for n in (share, 1 / share)) > 1e-6:
        message = (
            f"`per_gpu: {share:g}` is neither a number of workers for each GPU nor 1 / a number of GPUs for each worker"
        )
        problems.append(Problem(message, document.where(("workers", "per_gpu")), "for example 1, 2 or 0.5"))
    if problems:
        raise ConfigError.of(problems)
