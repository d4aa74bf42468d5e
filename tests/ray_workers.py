"""Ray workers without models: what a pool does with processes and nodes, without the seconds that loading takes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from evomerge._ray_worker import RayWorker
from evomerge.errors import EnvironmentProblem, EvomergeError
from evomerge.ray_pool import RayPool


@dataclass(frozen=True)
class Room:
    """In place of `residency.Memory`, whose module imports torch."""

    on_device: int = 1
    on_host: int = 1


@dataclass(frozen=True)
class Spec:
    """In place of `worker.WorkerSpec`."""

    device: str = "cpu"
    threads: int = 1
    allowed_s: float | None = None
    memory: Room = field(default_factory=Room)


@dataclass(frozen=True)
class Task:
    """In place of `worker.Job`: what to do, and for how long."""

    number: int
    do: str = "answer"
    seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    """In place of `worker.Outcome`: who answered, and what it was told when it loaded."""

    number: int
    pid: int
    node: str
    spec: Any


class Unpicklable(Exception):
    """An error that cannot travel."""

    def __init__(self) -> None:
        super().__init__("not to be pickled")
        self.held = (i for i in ())


class LightWorker(RayWorker):
    """Does what a task says. EVOMERGE_TEST_NODE, set per node, names the node and what is wrong with it."""

    def load(self, spec: Any, folder: str) -> EvomergeError | None:
        node = os.environ.get("EVOMERGE_TEST_NODE", "")
        if "without-files" in node:
            return EnvironmentProblem(f"no checkpoint folder on {node}")
        if "deadly" in node:
            os.kill(os.getpid(), signal.SIGKILL)
        self.spec, self.node = spec, node
        return None

    def evaluate(self, job: Any) -> Any:
        time.sleep(job.seconds)
        if job.do == self.node:
            time.sleep(1e3)
        if job.do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.do == "raise":
            raise Unpicklable()
        return Answer(job.number, os.getpid(), self.node, self.spec)


class LightPool(RayPool):
    """A pool of light workers."""

    worker_class = LightWorker
