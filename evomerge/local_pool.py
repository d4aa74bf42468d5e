"""Workers as spawned processes on this machine: one each, replaced when they die or take too long."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from evomerge.errors import EnvironmentProblem, EvomergeError
from evomerge.pool import MAX_STARTS, START_TIMEOUT_S, Deaths, evaluate_safely, patient_threads

if TYPE_CHECKING:
    from evomerge.worker import Failed, Job, Outcome, WorkerSpec

# What people should know of a signal that ended a worker.
CAUSES = {
    signal.SIGKILL: "the kernel does so when memory runs out",
    signal.SIGBUS: "a weight file became shorter or unreadable while it was memory-mapped",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGABRT: "native code gave up",
}


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
        self._deaths = Deaths()
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
        with _worker_environment():
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
        self._deaths.forget(job.number if job else -1)
        return [message]

    def _bury(self, index: int, slot: _Slot) -> list[Outcome | Failed]:
        """Replace a dead worker; its job is tried again once."""
        how = f"worker process {slot.process.pid} {how_it_ended(slot.process.exitcode)}"
        self._failed_starts += not slot.ready
        if self._failed_starts >= MAX_STARTS:
            raise EnvironmentProblem(
                f"{MAX_STARTS} workers in a row died while they loaded the models; the last: {how}",
                hint="is there enough memory? `--inline` shows what it prints",
            )
        # A worker that a damaged weight file has killed finds the damage when it loads again, and says so.
        self._replace(index, slot)
        if slot.job is None:
            return []
        failed = self._deaths.add(slot.job.number, how)
        if failed is None:
            self._jobs.appendleft(slot.job)
        return [failed] if failed else []

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
        self._deaths.forget(slot.job.number)
        message = f"took longer than {self._spec.allowed_s:g} s; its worker was replaced"
        return [Failed(slot.job.number, "timeout", message)]

    def _replace(self, index: int, slot: _Slot) -> None:
        slot.process.kill()
        slot.process.join()
        slot.connection.close()
        self._slots[index] = self._start(index)


def how_it_ended(code: int | None) -> str:
    """An exit code of `multiprocessing` in words."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        known = signal.Signals(-code)
    except ValueError:
        return f"was killed by signal {-code}"
    cause = CAUSES.get(known)
    return f"was killed by {known.name}" + (f" ({cause})" if cause else "")


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """This process's environment as workers inherit it: a worker loads torch before it runs any line of ours."""
    added = patient_threads(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


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
