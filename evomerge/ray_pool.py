"""Workers as Ray actors on a cluster whose nodes come and go. The only file that imports ray.

Ray never restarts or retries anything by itself here: it would run a poisonous job again without a limit. The pool puts
each actor on a node of its own choice, so that it can count what goes wrong there: a node on which nothing loads gets
no more actors, and the others go on. Weights are read by path on the actor's own node; only jobs and outcomes travel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from evomerge._ray_cluster import Need, explain, need_of, require_reachable
from evomerge._ray_worker import RayWorker
from evomerge.errors import EnvironmentProblem, EvomergeError
from evomerge.pool import MAX_STARTS, PATIENCE_S, START_TIMEOUT_S, WAITING, Deaths

if TYPE_CHECKING:
    from evomerge.worker import Failed, Job, Outcome, WorkerSpec

TICK_S = 0.5  # the longest sleep between two looks at clocks and nodes
REFRESH_S = 2.0  # how often the list of nodes is read
FIRST_NODE_S = 30.0  # how long the first node with room for a worker may take to join
STORE_BYTES = 100 * 2**20  # of a local cluster's object store: outcomes are small, and weights never go there
MOVE_S = 60.0  # an actor that its node has had no room for so long goes to a node that has


@dataclass
class _Node:
    """One living node of the cluster.

    Attributes:
        fits: how many workers it has room for, whoever else uses it.
        failed_starts: workers in a row that died while they loaded.
        problem: why it gets no more workers.
    """

    name: str
    fits: int
    failed_starts: int = 0
    problem: EvomergeError | None = None


@dataclass
class _Actor:
    """One worker and what it is doing: `reference` is the one call that it has not answered."""

    handle: Any
    node: str
    doing: Literal["starting", "loading", "serving"]
    reference: Any
    job: Job | None = None
    since: float = field(default_factory=time.monotonic)
    name: str = ""  # where it runs, for people


class RayPool:
    """One Ray actor per worker, on every node that has room for one.

    Args:
        spec: what every worker loads; its paths must exist on every node.
        size: number of actors at most; None: as many as the cluster has room for.
        address: of a running cluster; None starts a local one.
        per_gpu: actors per GPU; below 1, each has several. Without GPUs an actor takes `spec.threads` CPUs.
        patience_s: how long to wait while there is no worker at all.
        on_note: told what people should know of nodes that come, go or fail.

    Raises:
        EnvironmentProblem: Ray cannot be reached, or no node has room for a worker.
    """

    worker_class: type = RayWorker

    def __init__(
        self,
        spec: WorkerSpec,
        size: int | None = None,
        address: str | None = None,
        *,
        per_gpu: float = 1.0,
        patience_s: float = PATIENCE_S,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        self._ray, self._own = _connect(address, (size or 1) * max(1, spec.threads))
        self._wanted, self._patience_s, self._note = size, patience_s, on_note
        self._jobs: deque[Job] = deque()
        self._deaths = Deaths()
        self._nodes: dict[str, _Node] = {}
        self._actors: list[_Actor] = []
        self._refreshed = self._served = time.monotonic()
        self._short = 0
        try:
            self._need = self._wait_for_room(spec, per_gpu)
            self._spec = self._settled(spec, per_gpu)
            self._actor_class = self._ray.remote(max_restarts=0, max_task_retries=0)(self.worker_class)
            self._refresh(force=True)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Workers that have a place; at least 1, so that a search waits for the first one."""
        return max(1, sum(a.doing != "starting" for a in self._actors))

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        finished: list[Outcome | Failed] = []
        deadline = time.monotonic() + timeout_s
        while not finished:
            finished += self._refresh()
            self._hand_out()
            pending = {a.reference: a for a in self._actors if a.reference is not None}
            left = 0.0 if finished else min(max(0.0, deadline - time.monotonic()), TICK_S)
            for reference in self._answered(list(pending), left):
                finished += self._collect(pending[reference])
            finished += self._expire()
            if time.monotonic() >= deadline:
                break
        self._hand_out()
        return finished

    def close(self) -> None:
        for actor in self._actors:
            self._kill(actor)
        self._actors.clear()
        if self._own:
            self._ray.shutdown()

    # ---------------------------------------------------------------- nodes

    def _wait_for_room(self, spec: WorkerSpec, per_gpu: float) -> Need:
        """What a worker takes, once some node has room for one."""
        deadline = time.monotonic() + min(FIRST_NODE_S, self._patience_s)
        while True:
            nodes = self._living()
            need = need_of(spec, [n["Resources"] for n in nodes.values()], per_gpu)
            if any(need.fits(n["Resources"]) for n in nodes.values()):
                return need
            if time.monotonic() >= deadline:
                there = "; ".join(f"{_name(n)} has {_amounts(n['Resources'])}" for n in nodes.values())
                raise EnvironmentProblem(
                    f"no node of the Ray cluster has room for a worker, which takes {need}: {there or 'no nodes'}",
                    hint="start nodes that have it (`ray status` lists them), or change `device:`, `per_gpu:` or "
                    "`threads:` under `workers:`",
                )
            time.sleep(TICK_S)

    def _living(self) -> dict[str, Any]:
        try:
            return {n["NodeID"]: n for n in self._ray.nodes() if n["Alive"]}
        except self._ray.exceptions.RayError as error:
            raise EnvironmentProblem(
                f"the head of the Ray cluster does not answer: {_last_line(error)}",
                hint="what was recorded is safe: the same command continues once the cluster is up again",
            ) from error

    def _settled(self, spec: WorkerSpec, per_gpu: float) -> WorkerSpec:
        """The spec for an actor, which sees its own GPUs alone and shares its node with the node's other workers."""
        on_host = max(self._need.fits(n["Resources"]) for n in self._living().values())
        memory = replace(spec.memory, on_device=max(1, round(per_gpu)), on_host=min(on_host, self._wanted or on_host))
        return replace(spec, device="cuda" if self._need.gpus else "cpu", memory=memory)

    def _refresh(self, *, force: bool = False) -> list[Outcome | Failed]:
        """See which nodes there are; take leave of workers on nodes that are gone, and start missing ones."""
        now = time.monotonic()
        if not force and now - self._refreshed < REFRESH_S:
            return []
        self._refreshed = now
        living, first = self._living(), not self._nodes
        failed: list[Outcome | Failed] = []
        for gone in [n for n in self._nodes if n not in living]:
            name = self._nodes.pop(gone).name
            for actor in [a for a in self._actors if a.node == gone]:
                failed += self._lose(actor, f"{name} left the cluster")
            self._note(f"Ray node {name} has left; going on with {self._count()}")
        for node_id, row in living.items():
            fits = self._need.fits(row["Resources"])
            if node_id not in self._nodes and fits:
                self._nodes[node_id] = _Node(_name(row), fits)
                if not first:
                    self._note(f"Ray node {_name(row)} has joined, with room for {fits}")
        self._fill()
        self._require_workers()
        return failed

    def _fill(self) -> None:
        """Start workers while fewer are there than asked for, first on nodes with the fewest."""
        held = {node_id: sum(a.node == node_id for a in self._actors) for node_id in self._nodes}
        able = [n for n, node in self._nodes.items() if node.problem is None]
        self._move(held, able)
        while self._wanted is None or len(self._actors) < self._wanted:
            free = [n for n in able if held[n] < self._nodes[n].fits]
            if not free:
                break
            chosen = min(free, key=lambda n: held[n])
            held[chosen] += 1
            self._start(chosen)
        short = (self._wanted or 0) - len(self._actors)
        if short > 0 and short != self._short:
            room = f"room for {len(self._actors)} of the {self._wanted} workers asked for"
            self._note(f"the Ray cluster has {room}; more are started when nodes join")
        self._short = short

    def _move(self, held: dict[str, int], able: list[str]) -> None:
        """Give up actors that their nodes have had no room for, where another node may have it."""
        for actor in list(self._actors):
            stuck = actor.doing == "starting" and time.monotonic() - actor.since > MOVE_S
            if stuck and any(n != actor.node and held[n] < self._nodes[n].fits for n in able):
                self._drop(actor)

    def _start(self, node_id: str) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": self._need.cpus, "num_gpus": self._need.gpus, "scheduling_strategy": place}
        handle = self._actor_class.options(**options).remote(dict(_environment()))
        self._actors.append(_Actor(handle, node_id, "starting", handle.where.remote()))

    def _require_workers(self) -> None:
        """Raise if there is no hope of a worker, or has been no worker for too long."""
        problems = [n.problem for n in self._nodes.values() if n.problem is not None]
        if problems and not self._actors and len(problems) == len(self._nodes):
            raise problems[-1]
        if any(a.doing != "starting" for a in self._actors):
            self._served = time.monotonic()
        elif time.monotonic() - self._served > self._patience_s:
            nodes = ", ".join(n.name for n in self._nodes.values())
            raise EnvironmentProblem(
                f"no Ray worker for {self._patience_s:g} s, each of which takes {self._need}; nodes with room for one: "
                f"{nodes or 'none'}",
                hint="what was recorded is safe: the same command continues once the cluster has room again",
            )

    def _bar(self, node_id: str, problem: EvomergeError) -> None:
        """No more workers for a node. The problem ends the search only if no node is left."""
        node = self._nodes.get(node_id)
        if node is not None and node.problem is None:
            node.problem = problem
            if any(n.problem is None for n in self._nodes.values()):
                self._note(f"no more workers on Ray node {node.name}: {problem}")

    # ---------------------------------------------------------------- workers

    def _hand_out(self) -> None:
        for actor in self._actors:
            if self._jobs and actor.doing == "serving" and actor.job is None:
                actor.job, actor.since = self._jobs.popleft(), time.monotonic()
                actor.reference = actor.handle.evaluate.remote(actor.job)

    def _answered(self, references: list[Any], timeout_s: float) -> list[Any]:
        if not references:
            time.sleep(timeout_s)
            return []
        done, _ = self._ray.wait(references, num_returns=1, timeout=timeout_s)
        if done and len(references) > 1:
            done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(done)

    def _collect(self, actor: _Actor) -> list[Outcome | Failed]:
        """Take an actor's answer, and give it what comes next."""
        reference, actor.reference = actor.reference, None
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._broken(actor, error)
        if actor.doing == "starting":
            actor.name, other = answer
            if other != version("evomerge"):
                problem = f"evomerge is {other} at {actor.name}, but {version('evomerge')} here"
                self._cannot_load(actor, EnvironmentProblem(problem, hint="install the same version on every node"))
                return []
            actor.doing, actor.since = "loading", time.monotonic()
            actor.reference = actor.handle.load.remote(self._spec, os.getcwd())
            return []
        if actor.doing == "loading":
            if answer is not None:
                self._cannot_load(actor, answer)
                return []
            actor.doing = "serving"
            if actor.node in self._nodes:
                self._nodes[actor.node].failed_starts = 0
            return []
        assert actor.job is not None
        self._deaths.forget(actor.job.number)
        actor.job = None
        return [answer]

    def _cannot_load(self, actor: _Actor, problem: EvomergeError) -> None:
        self._drop(actor)
        self._bar(actor.node, problem)
        self._fill()
        self._require_workers()

    def _broken(self, actor: _Actor, error: Exception) -> list[Outcome | Failed]:
        """An actor's call ended in an error of Ray's: its node is gone, it has died, or the job raised."""
        from evomerge.worker import Failed

        raised = isinstance(error, self._ray.exceptions.RayTaskError)
        if raised and actor.job is not None:
            number, actor.job = actor.job.number, None
            self._deaths.forget(number)
            return [Failed(number, "error", str(error))]
        where = actor.name or "a new worker"
        if not raised and self._with_its_node(actor, error):
            return self._lose(actor, f"{where} went with its node")
        how = f"{where} died: {_last_line(error)}"
        job = actor.job
        self._drop(actor)
        if job is None:
            self._count_start(actor.node, how)
            self._fill()
            self._require_workers()
            return []
        self._fill()
        return self._again(job, how)

    def _with_its_node(self, actor: _Actor, error: Exception) -> bool:
        """Whether an actor was lost for reasons of the cluster, and not of what it did."""
        errors = self._ray.exceptions
        if not isinstance(error, (errors.ActorDiedError, errors.WorkerCrashedError, errors.OutOfMemoryError)):
            return True  # unavailable, its object lost, its owner unknown
        return getattr(error, "preempted", False) or actor.node not in self._living() or "node has died" in str(error)

    def _lose(self, actor: _Actor, how: str) -> list[Outcome | Failed]:
        """Take leave of an actor whose node is gone; its job goes to another."""
        self._drop(actor)
        return self._again(actor.job, how, lost=True) if actor.job is not None else []

    def _again(self, job: Job, how: str, *, lost: bool = False) -> list[Outcome | Failed]:
        failed = self._deaths.add(job.number, how, lost=lost)
        if failed is None:
            self._jobs.appendleft(job)
            return []
        return [failed]

    def _count_start(self, node_id: str, how: str) -> None:
        node = self._nodes.get(node_id)
        if node is None:
            return
        node.failed_starts += 1
        if node.failed_starts >= MAX_STARTS:
            message = f"{MAX_STARTS} workers in a row died on {node.name} while they loaded the models; the last: {how}"
            self._bar(node_id, EnvironmentProblem(message, hint="is there enough memory on the node?"))

    def _expire(self) -> list[Outcome | Failed]:
        from evomerge.worker import Failed

        failed: list[Outcome | Failed] = []
        allowed, now = self._spec.allowed_s, time.monotonic()
        for actor in list(self._actors):
            age = now - actor.since
            if actor.doing == "loading" and age > START_TIMEOUT_S:
                message = f"a worker on {actor.name} did not load the models in {START_TIMEOUT_S:.0f} s"
                self._cannot_load(actor, EnvironmentProblem(message))
            elif actor.job is not None and allowed is not None and age > allowed:
                if actor.node not in self._living():
                    failed += self._lose(actor, f"{actor.name} went with its node")
                    continue
                self._drop(actor)
                self._deaths.forget(actor.job.number)
                message = f"took longer than {allowed:g} s; its worker was replaced"
                failed.append(Failed(actor.job.number, "timeout", message))
                self._fill()
        return failed

    def _drop(self, actor: _Actor) -> None:
        self._kill(actor)
        self._actors.remove(actor)

    def _kill(self, actor: _Actor) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor.handle)

    def _count(self) -> str:
        n = sum(a.doing != "starting" for a in self._actors)
        return "1 worker" if n == 1 else f"{n} workers"


def _connect(address: str | None, cpus: int) -> tuple[Any, bool]:
    """The ray module, connected; and whether this call did it.

    Args:
        cpus: how many a cluster that is started here has at least.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise hide the GPUs from workers that ask for none, and rename them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": max(cpus, os.cpu_count() or 1)}
        options["object_store_memory"] = STORE_BYTES
    else:
        require_reachable(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address=address or "local", **options)
        except SystemExit:
            if address is not None:
                raise
            ray.shutdown()  # on a busy machine Ray gives up on a head of its own that is slow to start
            ray.init(address="local", **options)
    except (Exception, SystemExit) as error:  # whatever it is: Ray raises everything from OSError to SystemExit
        ray.shutdown()
        raise explain(address or "local", error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray takes it for itself; a search ends politely
    return ray, True


def _environment() -> dict[str, str]:
    """What of the controller's environment a worker needs, wherever the cluster was started."""
    return {key: os.environ[key] for key in ("EVOMERGE_FAULT", *WAITING) if key in os.environ}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['NodeManagerHostname']} ({row['NodeManagerAddress']}, {row['NodeID'][:8]})"


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
