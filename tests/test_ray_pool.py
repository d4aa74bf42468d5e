"""Ray's pool on a cluster of several nodes on this machine: nodes and workers come, fail and go; work goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from evomerge import _ray_cluster, ray_pool
from evomerge._ray_cluster import Need, explain, need_of, require_reachable
from evomerge.errors import EnvironmentProblem
from evomerge.pool import MAX_KILLS, MAX_LOSSES, MAX_STARTS, Deaths
from evomerge.study import Study
from evomerge.worker import Failed
from tests.path_studies import STUDY, make_family, write_study
from tests.ray_workers import Answer, LightPool, Spec, Task

ROOT = Path(__file__).parent.parent
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 3}
STORE = 80 * 2**20
PATIENCE_S = 120.0  # of these tests with a busy machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster whose head has no CPUs, so that every worker is on a node that can be killed."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE,
            "_system_config": FAST,
            "include_dashboard": False,
        },
    )
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def node(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Adds nodes with a name; they leave after the test."""
    monkeypatch.setattr(ray_pool, "REFRESH_S", 0.2)
    added = []

    def add(name: str = "", **resources: Any) -> Any:
        made = cluster.add_node(
            wait=True, object_store_memory=STORE, env_vars={"EVOMERGE_TEST_NODE": name}, **({"num_cpus": 1} | resources)
        )
        added.append(made)
        return made

    yield add
    for one in added:
        if one in cluster.list_all_nodes():
            cluster.remove_node(one, allow_graceful=False)
    wait_until(lambda: all(n["Resources"].get("CPU", 0) == 0 for n in ray.nodes() if n["Alive"]), "nodes are gone")


def wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, f"not in {PATIENCE_S:g} s: {what}"
        time.sleep(0.05)


def collect(pool: LightPool, count: int) -> dict[int, Any]:
    found: dict[int, Any] = {}

    def step() -> bool:
        for result in pool.wait(0.2):
            assert result.number not in found, "a job was answered twice"
            found[result.number] = result
        return len(found) >= count

    wait_until(step, f"{count} answers; there are {found}")
    return found


def make(spec: Any = None, size: int | None = None, **more: Any) -> tuple[LightPool, list[str]]:
    notes: list[str] = []
    return LightPool(spec or Spec(), size, on_note=notes.append, **more), notes


def test_a_poisonous_job_is_tried_twice_a_slow_one_once_and_the_others_are_answered(node: Callable[..., Any]) -> None:
    node("one", num_cpus=2)
    pool, _ = make(Spec(allowed_s=3.0))
    try:
        for task in (Task(0), Task(1, "die"), Task(2, "raise"), Task(3, seconds=1e3), Task(4), Task(5)):
            pool.submit(task)  # type: ignore[arg-type]
        found = collect(pool, 6)
        wait_until(lambda: pool.wait(0.1) == [] and pool.size == 2, "the last worker is replaced")
    finally:
        pool.close()
    assert all(isinstance(found[n], Answer) for n in (0, 4, 5))
    poison, raised, slow = found[1], found[2], found[3]
    assert isinstance(poison, Failed) and poison.reason == "poison"
    assert "killed 2 workers" in poison.message and poison.message.count("died: ") == 2
    assert isinstance(raised, Failed) and raised.reason == "error" and "not to be pickled" in raised.message
    assert isinstance(slow, Failed) and slow.reason == "timeout" and "longer than 3 s" in slow.message


def test_nodes_join_and_die_during_the_work_and_no_job_is_lost_or_blamed(
    cluster: Cluster, node: Callable[..., Any]
) -> None:
    first = node("first", num_cpus=2)
    pool, notes = make()
    try:
        for number in range(2):
            pool._deaths.add(number, "died before")  # a node that goes is not the second time
            pool.submit(Task(number, "first"))  # type: ignore[arg-type]
        wait_until(lambda: pool.wait(0.1) == [] and sum(a.job is not None for a in pool._actors) == 2, "both run")
        node("second")
        wait_until(lambda: pool.wait(0.1) == [] and pool.size == 3, "a worker on the new node")
        cluster.remove_node(first, allow_graceful=False)
        found = collect(pool, 2)
        wait_until(lambda: pool.wait(0.1) == [] and pool.size == 1 and len(notes) == 2, "one worker is left")
    finally:
        pool.close()
    assert {a.node for a in found.values()} == {"second"}
    assert "has joined, with room for 1" in notes[0] and "has left; going on with 1 worker" in notes[1]


def test_a_node_on_which_nothing_loads_is_left_alone_and_the_others_go_on(node: Callable[..., Any]) -> None:
    node("without-files")
    node("deadly")
    node("good")
    pool, notes = make()
    try:
        for number in range(4):
            pool.submit(Task(number))  # type: ignore[arg-type]
        found = collect(pool, 4)
        wait_until(lambda: pool.wait(0.1) == [] and len(notes) == 2, "both nodes are given up")
        assert pool.size == 1
    finally:
        pool.close()
    assert {a.node for a in found.values()} == {"good"}
    assert any("no checkpoint folder on without-files" in n for n in notes)
    assert any(f"{MAX_STARTS} workers in a row died" in n for n in notes)


def test_where_nothing_loads_anywhere_the_reason_ends_the_search(node: Callable[..., Any]) -> None:
    node("without-files", num_cpus=2)
    pool, _ = make()
    with pytest.raises(EnvironmentProblem, match="no checkpoint folder on without-files"):
        try:
            pool.submit(Task(0))  # type: ignore[arg-type]
            collect(pool, 1)
        finally:
            pool.close()


def test_a_cluster_that_lost_all_its_nodes_is_waited_for_and_then_given_up(
    cluster: Cluster, node: Callable[..., Any]
) -> None:
    only = node("only")
    pool, notes = make(size=2, patience_s=PATIENCE_S)
    try:
        pool.submit(Task(0))  # type: ignore[arg-type]
        collect(pool, 1)
        assert "room for 1 of the 2 workers" in notes[0]
        pool.submit(Task(1, "only"))  # type: ignore[arg-type]
        cluster.remove_node(only, allow_graceful=False)
        pool._patience_s = 2.0  # now that the first worker has had its time to start
        pool.submit(Task(2))  # type: ignore[arg-type]
        with pytest.raises(EnvironmentProblem, match=r"no Ray worker for 2 s.*\n.*same command continues"):
            collect(pool, 1)
    finally:
        pool.close()


def test_workers_take_gpus_or_cpus_and_a_cluster_without_room_is_refused(
    node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "FIRST_NODE_S", 0.0)
    with pytest.raises(EnvironmentProblem, match="no node of the Ray cluster has room for a worker, which takes 1 CPU"):
        make()
    node("gpus", num_cpus=1, num_gpus=4)
    with pytest.raises(EnvironmentProblem, match=r"takes 3 CPUs: .* has 1 CPUs and 4 GPUs"):
        make(Spec(threads=3))
    for per_gpu, size in ((2.0, 8), (0.5, 2)):
        pool, _ = make(Spec("auto"), per_gpu=per_gpu)
        assert len(pool._actors) == size
        pool.close()
    pool, _ = make(Spec("cuda:3"), size=1, per_gpu=2.0)
    try:
        pool.submit(Task(0))  # type: ignore[arg-type]
        told = collect(pool, 1)[0].spec
    finally:
        pool.close()
    assert told.device == "cuda" and told.memory.on_device == 2 and told.memory.on_host == 1


def test_what_a_worker_takes_and_how_often_it_fits() -> None:
    assert need_of(Spec("auto", 4), [{"CPU": 8.0}], 1.0) == Need(4.0, 0.0)  # type: ignore[arg-type]
    assert need_of(Spec("auto", 4), [{"CPU": 8.0}, {"GPU": 1.0}], 1.0) == Need(0.0, 1.0)  # type: ignore[arg-type]
    third = need_of(Spec("cuda"), [], 3.0)  # type: ignore[arg-type]
    assert third.fits({"GPU": 2.0}) == 6 and 3 * third.gpus <= 1
    assert need_of(Spec("cuda"), [], 64.0).fits({"GPU": 16.0}) == 1024  # type: ignore[arg-type]
    assert Need(0.0, 2.0).fits({"GPU": 5.0}) == 2
    assert Need(4.0, 0.0).fits({"CPU": 7.0, "GPU": 9.0}) == 1
    assert Need(1.0, 0.0).fits({}) == 0
    assert (str(Need(0.0, 0.5)), str(Need(2.0, 0.0))) == ("0.5 GPU", "2 CPUs")


def test_kills_and_losses_are_counted_apart() -> None:
    deaths = Deaths()
    for _ in range(MAX_LOSSES - 1):
        assert deaths.add(7, "its node left", lost=True) is None
    for _ in range(MAX_KILLS - 1):
        assert deaths.add(7, "SIGKILL") is None
    assert deaths.add(8, "SIGKILL") is None
    failed = deaths.add(7, "SIGSEGV")
    assert failed == Failed(7, "poison", "it killed 2 workers: SIGKILL; SIGSEGV")
    assert deaths.add(7, "its node left", lost=True) is None, "counts begin anew"
    deaths.forget(8)
    assert deaths.add(8, "SIGKILL") is None
    for _ in range(MAX_LOSSES - 2):
        deaths.add(7, "gone", lost=True)
    failed = deaths.add(7, "gone", lost=True)
    assert failed is not None and "5 nodes vanished" in failed.message


def test_addresses_at_which_nothing_answers_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    started = time.monotonic()
    for address in (f"127.0.0.1:{port}", "auto", "no-such-host.invalid:6379", "127.0.0.1:99999"):
        with pytest.raises(EnvironmentProblem, match=r"cannot reach Ray at .*\n.*is the head node up"):
            require_reachable(address)
    with pytest.raises(EnvironmentProblem, match="Ray client"):
        require_reachable("ray://head:10001")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("answer", [None, b"", b"220 mail ESMTP", b"\0\0\0\x04"])
def test_a_server_that_is_not_ray_is_refused_before_ray_waits_for_it(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ray_cluster, "GREET_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            if answer is not None:
                connection.recv(100)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        if answer is not None:
            thread.start()
        with pytest.raises(EnvironmentProblem, match="not as the head of a Ray cluster"):
            require_reachable(f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_reachable(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("\n", "is empty")])
def test_a_token_file_that_is_missing_or_empty_is_refused(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(EnvironmentProblem, match=said):
        require_reachable("127.0.0.1:1")


def test_the_head_of_a_cluster_is_reachable(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    require_reachable(cluster.address)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    require_reachable("auto")


def test_refusals_in_words() -> None:
    assert "another version" in explain("h:1", RuntimeError("Version mismatch: 2.1 and 2.2")).message
    assert "token" in explain("h:1", RuntimeError("Unauthenticated: InvalidAuthToken")).message
    told = ConnectionError("Failed to connect to Ray cluster")
    told.__cause__ = RuntimeError("Unauthenticated: InvalidAuthToken")
    assert "token" in explain("h:1", told).message
    assert "ray start --head" in explain("auto", ConnectionError("Could not find any running Ray instance.")).hint
    assert "no head that works" in explain("h:1", SystemExit(15)).message
    assert "did not come up in time" in explain("local", SystemExit(15)).message
    assert explain("h:1", ValueError("Invalid address\n format: h")).message.endswith("Invalid address format: h")


CONNECT = """
import ray, sys
sys.path.insert(0, {root!r})
from evomerge.errors import EvomergeError
from tests.ray_workers import LightPool, Spec
{before}
try:
    LightPool(Spec(), 1, {address!r})
except EvomergeError as error:
    print(error.exit_code, error)
"""


def connect(address: str, before: str = "", **environment: str) -> str:
    """What a process of its own is told when it joins a cluster."""
    script = CONNECT.format(root=str(ROOT), before=before, address=address)
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_another_version_of_ray_is_refused_in_one_message(cluster: Cluster) -> None:
    said = connect(cluster.address, "ray.__version__ = '1.2.3'")
    assert said.startswith("3 Ray at ") and "another version" in said and "1.2.3" in said
    assert "hint: install the same Ray" in said


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path: the names of Ray's sockets, which lie in it, have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as made:
        yield Path(made)


@pytest.mark.slow
def test_a_wrong_token_is_refused_in_one_message(tmp_path: Path, short: Path) -> None:
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "HOME": str(tmp_path)}
    head = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=1", "--include-dashboard=false"]
    head += [f"--temp-dir={short}", "--port=0", "--block", f"--object-store-memory={STORE}", "--disable-usage-stats"]
    process = subprocess.Popen(head, env={**os.environ, **auth}, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        address = next(line for line in process.stdout if "--address=" in line).split("--address='")[1].split("'")[0]
        said = connect(address, **{**auth, "RAY_AUTH_TOKEN": "b" * 64})
        assert said.startswith("3 ") and "token" in said and "RAY_AUTH_TOKEN" in said
        said = connect(address, HOME=str(tmp_path))
        assert said.startswith("3 ") and "token" in said
        assert connect(address, **auth) == ""
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_layer_order_study_measures_its_models_and_searches_with_ray_on_this_machine(
    tmp_path: Path, evomerge: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Two pools in one process, each with a cluster of its own: one for the moments, one for the search."""
    make_family(tmp_path)
    text = next(o for o in STUDY["objectives"] if o["name"] == "text")
    write_study(tmp_path, workers={"ray": 1, "threads": 1}, objectives=[text], budget={"evaluations": 8})
    done = evomerge("search", "study.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = Study.load(f"sqlite:///{tmp_path}/runs/tiny/ledger.db", "tiny")
    states = [c.state for c in found.candidates()]
    assert len(states) == 8 and states.count("done") >= 4, done.stderr
    assert any(c.attrs.get("worker") for c in found.candidates())
