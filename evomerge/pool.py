"""What a pool of workers is, which one a study gets, and the rules that all of them keep.

A pool takes jobs and gives back outcomes: in this process (`InlinePool`), in spawned processes (`local_pool.py`) or
as Ray actors (`ray_pool.py`). A worker that dies or takes too long is killed and replaced. Its job is tried once more
after a death and never after a timeout; a job that has killed two workers is poison.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from evomerge.errors import CandidateFailure

if TYPE_CHECKING:
    from evomerge.worker import Failed, Job, Outcome, Worker, WorkerSpec

MAX_STARTS = 3  # so many workers in a row that die while they load (on one node) are not the last one's bad luck
MAX_KILLS = 2  # a job whose worker died is tried once elsewhere; a second death is the job's fault
MAX_LOSSES = 5  # nodes that may vanish under one job before it is held to bring them down
START_TIMEOUT_S = 1800.0  # loading base and experts of the largest models from a cold disk
PATIENCE_S = 600.0  # how long a search without any worker waits for one
# Any of these says how OpenMP's threads wait for each other; all are read when torch is loaded.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class Pool(Protocol):
    """Evaluates jobs somewhere else."""

    @property
    def size(self) -> int:
        """How many jobs run at once, at least 1; it may change when machines come and go."""
        ...

    def submit(self, job: Job) -> None:
        """Queue a job. Numbers of jobs in flight must differ."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        """Whatever has finished since the last call; waits up to `timeout_s` for something.

        Raises:
            EvomergeError: workers cannot be started at all.
        """
        ...

    def close(self) -> None:
        """Stop all workers now."""
        ...


class Deaths:
    """How the workers of each job died, and when a job has killed enough of them to be poison.

    A worker that is lost with its node is no fault of its job. Such losses are counted apart, with a higher limit,
    which ends a job that takes whole machines down.
    """

    def __init__(self) -> None:
        self._kills: dict[int, list[str]] = {}
        self._losses: dict[int, list[str]] = {}

    def add(self, number: int, how: str, *, lost: bool = False) -> Failed | None:
        """Count a death. The job's failure if it is not to be tried again, else None.

        Args:
            how: how the worker died, for people: the failure's message has it.
            lost: the worker went with its node.
        """
        from evomerge.worker import Failed

        said = (self._losses if lost else self._kills).setdefault(number, [])
        said.append(how)
        if len(said) < (MAX_LOSSES if lost else MAX_KILLS):
            return None
        self.forget(number)
        what = f"{len(said)} nodes vanished under it" if lost else f"it killed {len(said)} workers"
        return Failed(number, "poison", f"{what}: {'; '.join(said)}")

    def forget(self, number: int) -> None:
        """The job has ended."""
        self._kills.pop(number, None)
        self._losses.pop(number, None)


def patient_threads(environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker's environment lacks for threads that sleep while they wait; nothing if it says how they wait.

    By default they spin. Where other programs want the CPU, a thread that spins keeps away the one that it waits for.
    """
    return {} if any(key in environment for key in WAITING) else {"OMP_WAIT_POLICY": "PASSIVE"}


def evaluate_safely(worker: Worker, job: Job) -> Outcome | Failed:
    """Evaluate, turning everything that one candidate can do wrong into a Failed."""
    import torch

    from evomerge.worker import Failed

    try:
        return worker.evaluate(job)
    except CandidateFailure as error:
        return Failed(job.number, error.reason, error.message)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failed(job.number, "oom", str(error))
    except Exception:
        return Failed(job.number, "error", traceback.format_exc())


class InlinePool:
    """One worker in this process: for debugging. It cannot survive a crash, nor enforce a timeout."""

    def __init__(self, spec: WorkerSpec) -> None:
        from evomerge.worker import Worker

        self.size = 1
        self._worker = Worker(spec)
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        return [evaluate_safely(self._worker, self._jobs.popleft())] if self._jobs else []

    def close(self) -> None:
        self._jobs.clear()


def make_pool(
    spec: WorkerSpec,
    *,
    local: int | None,
    ray: int | Literal["auto"] | None,
    address: str | None,
    inline: bool,
    per_gpu: float = 1.0,
    patience_s: float = PATIENCE_S,
    on_note: Callable[[str], None] = lambda note: None,
) -> Pool:
    """The pool that a study file asks for; `inline` overrides it.

    Args:
        local: number of processes on this machine; one if `ray` is None too.
        ray: number of Ray actors at most, or "auto" for as many as the cluster has room for.
        address: of the Ray cluster; None starts one on this machine.
        per_gpu: Ray actors per GPU; below 1, each has several.
        patience_s: how long to wait while the Ray cluster has no worker at all.
        on_note: told what people should know of workers that come and go.
    """
    if inline:
        return InlinePool(spec)
    if ray is None:
        from evomerge.local_pool import LocalPool

        return LocalPool(spec, local or 1)
    from evomerge.ray_pool import RayPool

    size = None if ray == "auto" else ray
    return RayPool(spec, size, address, per_gpu=per_gpu, patience_s=patience_s, on_note=on_note)
