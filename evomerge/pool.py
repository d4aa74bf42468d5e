"""Where workers run: in this process, in spawned processes, or as Ray actors; one small interface.

A pool takes jobs and gives back outcomes. A worker that dies or takes too long is killed and replaced; its
job is tried once more after a crash, and never after a timeout. The only file that imports ray.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import CandidateFailure, EnvironmentProblem, EvomergeError

if TYPE_CHECKING:
    from evomerge.worker import Failed, Job, Outcome, Worker, WorkerSpec

MAX_STARTS = 3  # so many workers in a row that die while they load end the search
MAX_ATTEMPTS = 2  # a job whose worker died is tried once elsewhere; a second death is the job's fault
START_TIMEOUT_S = 1800.0  # loading base and experts of the largest models from a cold disk


class Pool(Protocol):
    """Evaluates jobs somewhere else.

    Attributes:
        size: how many jobs run at once.
    """

    size: int

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


@dataclass
class _Slot:
    """One local worker process and what it is doing."""

    process: Any
    connection: Connection
    ready: bool = False
    job: Job | None = None
    since: float = field(default_factory=time.monotonic)


class LocalPool:
    """One spawned process per worker on this machine.

    Args:
        spec: what every worker loads.
        size: number of processes.
    """

    def __init__(self, spec: WorkerSpec, size: int) -> None:
        self.size = size
        self._spec = spec
        self._context = multiprocessing.get_context("spawn")
        self._jobs: deque[Job] = deque()
        self._attempts: dict[int, int] = {}
        self._failed_starts = 0
        self._slots = [self._start(index) for index in range(size)]

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        finished: list[Outcome | Failed] = []
        deadline = time.monotonic() + timeout_s
        while not finished:
            self._hand_out()
            limit = min(max(0.0, deadline - time.monotonic()), 0.5)
            handles = [h for s in self._slots for h in (s.connection, s.process.sentinel)]
            ready = wait(handles, limit)
            for index, slot in enumerate(self._slots):
                if slot.connection in ready or slot.process.sentinel in ready:
                    finished += self._read(index, slot)
                elif self._overdue(slot):
                    finished += self._expire(index, slot)
            if time.monotonic() >= deadline:
                break
        self._hand_out()
        return finished

    def close(self) -> None:
        for slot in self._slots:
            slot.connection.close()  # an idle worker sees the end of its pipe and leaves by itself
        for slot in self._slots:
            if slot.ready and slot.job is None:
                slot.process.join(timeout=5.0)
            slot.process.kill()
            slot.process.join()
        self._slots = []

    def _start(self, index: int) -> _Slot:
        ours, theirs = self._context.Pipe()
        spec = replace(self._spec, device=_spread(self._spec.device, index))
        process = self._context.Process(target=_worker_main, args=(theirs, spec, os.getcwd()), daemon=True)
        process.start()
        theirs.close()
        return _Slot(process, ours)

    def _hand_out(self) -> None:
        for slot in self._slots:
            if slot.ready and slot.job is None and self._jobs:
                slot.job, slot.since = self._jobs.popleft(), time.monotonic()
                with contextlib.suppress(OSError):  # it has died: the next wait sees it, and tries again
                    slot.connection.send(slot.job)

    def _read(self, index: int, slot: _Slot) -> list[Outcome | Failed]:
        try:
            message = slot.connection.recv() if slot.connection.poll() else None
        except (EOFError, OSError):
            message = None
        if message is None:
            return [] if slot.process.is_alive() else self._bury(index, slot)
        if isinstance(message, EvomergeError):
            raise message
        if message == "ready":
            slot.ready, self._failed_starts = True, 0
            return []
        job, slot.job = slot.job, None
        self._attempts.pop(job.number if job else -1, None)
        return [message]

    def _bury(self, index: int, slot: _Slot) -> list[Outcome | Failed]:
        """Replace a dead worker; its job is tried again once."""
        from evomerge.worker import Failed

        code = slot.process.exitcode
        self._failed_starts += not slot.ready
        if self._failed_starts >= MAX_STARTS:
            raise EnvironmentProblem(
                f"{MAX_STARTS} workers in a row died while they loaded the models (exit code {code})",
                hint="is there enough memory? `--inline` shows what it prints",
            )
        self._replace(index, slot)
        job = slot.job
        if job is None:
            return []
        self._attempts[job.number] = self._attempts.get(job.number, 0) + 1
        if self._attempts[job.number] < MAX_ATTEMPTS:
            self._jobs.appendleft(job)
            return []
        message = f"its worker died {MAX_ATTEMPTS} times (last exit code {code})"
        return [Failed(job.number, "crash", message)]

    def _overdue(self, slot: _Slot) -> bool:
        age = time.monotonic() - slot.since
        if not slot.ready:
            return age > START_TIMEOUT_S
        allowed = self._spec.allowed_s
        return slot.job is not None and allowed is not None and age > allowed

    def _expire(self, index: int, slot: _Slot) -> list[Outcome | Failed]:
        from evomerge.worker import Failed

        self._replace(index, slot)
        if slot.job is None:
            raise EnvironmentProblem(f"a worker did not load the models in {START_TIMEOUT_S:.0f} s")
        message = f"took longer than {self._spec.allowed_s:g} s; its worker was replaced"
        return [Failed(slot.job.number, "timeout", message)]

    def _replace(self, index: int, slot: _Slot) -> None:
        slot.process.kill()
        slot.process.join()
        slot.connection.close()
        self._slots[index] = self._start(index)


def _spread(device: str, index: int) -> str:
    """The device of the index-th worker: workers on "cuda" take the machine's GPUs in turn."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{index % max(1, torch.cuda.device_count())}"


def _worker_main(connection: Connection, spec: WorkerSpec, folder: str) -> None:
    """A worker process: load, say so, then answer jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    _die_with_parent()
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    from evomerge.worker import Worker

    try:
        worker = Worker(spec)
    except EvomergeError as error:
        connection.send(error)
        return
    except Exception:
        connection.send(EnvironmentProblem(f"a worker could not start:\n{traceback.format_exc()}"))
        return
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(evaluate_safely(worker, job))


def _die_with_parent() -> None:
    """End this process when the controller dies, however it dies: no worker outlives its search."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class RayPool:
    """One Ray actor per worker; weights are read by path on the actor's own node.

    Ray never restarts or retries anything by itself here: an actor that dies is replaced by the pool, and
    its job is tried once more (Ray alone would run a poisonous job again without a limit).

    Args:
        spec: what every worker loads; its paths must exist on every node.
        size: number of actors.
        address: of a running cluster; None starts a local one.
    """

    def __init__(self, spec: WorkerSpec, size: int, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would otherwise hide the GPUs from workers that ask for none, and rename them.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self.size = size
        self._spec = spec
        self._own_cluster = not ray.is_initialized()
        if self._own_cluster:
            self._connect(address)
        self._jobs: deque[Job] = deque()
        self._attempts: dict[int, int] = {}
        self._actor_class = ray.remote(max_restarts=0, max_task_retries=0)(_RayWorker)
        self._actors: dict[Any, Job | None] = {}
        self._tasks: dict[Any, tuple[Any, float]] = {}
        self._starting: dict[Any, Any] = {}
        for _ in range(size):
            self._start()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        self._hand_out()
        pending = [*self._tasks, *self._starting]
        finished: list[Outcome | Failed] = []
        if pending:
            done, _ = self._ray.wait(pending, num_returns=1, timeout=min(timeout_s, 0.5))
            for reference in done:
                finished += self._collect(reference)
        finished += self._expire()
        self._hand_out()
        return finished

    def close(self) -> None:
        for actor in list(self._actors):
            self._ray.kill(actor)
        self._actors.clear()
        if self._own_cluster:
            self._ray.shutdown()

    def _connect(self, address: str | None) -> None:
        try:
            self._ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level="ERROR",
                **({"num_cpus": max(self.size, os.cpu_count() or 1)} if address is None else {}),
            )
        except Exception as error:
            hint = "is the cluster up, and does `ray status` work from here?"
            if "uthentication" in type(error).__name__ + str(error):
                hint = "the cluster asks for a token: see Ray's documentation of token authentication"
            raise EnvironmentProblem(f"cannot reach Ray at {address or 'local'}: {error}", hint) from error

    def _start(self) -> None:
        has_gpus = self._ray.cluster_resources().get("GPU", 0) >= 1
        gpu = 1 if self._spec.device.startswith("cuda") or (self._spec.device == "auto" and has_gpus) else 0
        actor = self._actor_class.options(num_cpus=1, num_gpus=gpu).remote(self._spec, os.getcwd())
        self._actors[actor] = None
        self._starting[actor.ready.remote()] = actor

    def _hand_out(self) -> None:
        busy = {actor for actor, _ in self._tasks.values()} | set(self._starting.values())
        for actor in list(self._actors):
            if self._jobs and actor not in busy:
                job = self._jobs.popleft()
                self._actors[actor] = job
                self._tasks[actor.evaluate.remote(job)] = (actor, time.monotonic())

    def _collect(self, reference: Any) -> list[Outcome | Failed]:
        if reference in self._starting:
            actor = self._starting.pop(reference)
            try:
                problem = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                raise EnvironmentProblem(f"a Ray worker could not start: {error}") from error
            if problem is not None:
                raise problem
            return []
        actor, _ = self._tasks.pop(reference)
        job, self._actors[actor] = self._actors[actor], None
        assert job is not None
        try:
            result: Outcome | Failed = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._bury(actor, job, error)
        self._attempts.pop(job.number, None)
        return [result]

    def _bury(self, actor: Any, job: Job, error: Exception) -> list[Outcome | Failed]:
        from evomerge.worker import Failed

        self._replace(actor)
        self._attempts[job.number] = self._attempts.get(job.number, 0) + 1
        if self._attempts[job.number] < MAX_ATTEMPTS:
            self._jobs.appendleft(job)
            return []
        return [Failed(job.number, "crash", f"its worker died {MAX_ATTEMPTS} times: {error}")]

    def _expire(self) -> list[Outcome | Failed]:
        from evomerge.worker import Failed

        allowed = self._spec.allowed_s
        if allowed is None:
            return []
        failed: list[Outcome | Failed] = []
        for reference, (actor, since) in list(self._tasks.items()):
            if time.monotonic() - since > allowed:
                del self._tasks[reference]
                job = self._actors[actor]
                assert job is not None
                self._replace(actor)
                message = f"took longer than {allowed:g} s; its worker was replaced"
                failed.append(Failed(job.number, "timeout", message))
        return failed

    def _replace(self, actor: Any) -> None:
        self._ray.kill(actor)
        self._actors.pop(actor, None)
        self._start()


class _RayWorker:
    """A worker as a Ray actor. Errors of loading are kept until asked for, so that they arrive whole."""

    def __init__(self, spec: WorkerSpec, folder: str) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._problem: EvomergeError | None = None
        try:
            os.chdir(folder)
            from evomerge.worker import Worker

            self._worker = Worker(spec)
        except EvomergeError as error:
            self._problem = error
        except Exception:
            self._problem = EnvironmentProblem(f"a worker could not start:\n{traceback.format_exc()}")

    def ready(self) -> EvomergeError | None:
        return self._problem

    def evaluate(self, job: Job) -> Outcome | Failed:
        return evaluate_safely(self._worker, job)


def make_pool(spec: WorkerSpec, *, local: int | None, ray: int | None, address: str | None, inline: bool) -> Pool:
    """The pool that a study file asks for; `inline` overrides it."""
    if inline:
        return InlinePool(spec)
    if ray is not None:
        return RayPool(spec, ray, address)
    return LocalPool(spec, local or 1)
