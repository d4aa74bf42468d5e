"""A search on a Ray cluster of two nodes goes on when a worker is killed, and when a node is."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from evomerge import ray_pool
from evomerge.commands import run_search
from evomerge.ray_pool import RayPool
from evomerge.study import Study

URL = "sqlite:///runs/tiny/ledger.db"
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
STORE = 80 * 2**20
EVALUATIONS = 14
# Without lm-eval, whose import would be most of the time of every worker's start.
OBJECTIVES = "objectives=[{name: text, kind: perplexity, files: {search: text.search.txt}}]"


@pytest.fixture
def cluster(work: Path) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes of one CPU."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE,
            "_system_config": FAST,
            "include_dashboard": False,
        },
    )
    for _ in range(2):
        made.add_node(wait=True, num_cpus=1, object_store_memory=STORE)
    yield made
    ray.shutdown()
    made.shutdown()


def search(cluster: Cluster, strike: Callable[[RayPool], None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Search while `strike` does harm, once, as soon as both workers have something to do. The candidates."""
    done = threading.Event()

    class Watched(RayPool):
        def wait(self, timeout_s: float) -> list[Any]:
            if not done.is_set() and sum(a.job is not None for a in self._actors) == 2:
                strike(self)
                done.set()
            return super().wait(timeout_s)

    monkeypatch.setattr(ray_pool, "RayPool", Watched)
    overrides = (
        OBJECTIVES,
        f"budget.evaluations={EVALUATIONS}",
        f"workers={{address: '{cluster.address}', threads: 1}}",
    )
    code = run_search("study.yaml", overrides, resume="never", inline=False, quiet=True, allow_task_code=False)
    assert code == 0 and done.is_set()
    candidates = Study.load(URL, "tiny").candidates()
    assert [c.number for c in candidates] == list(range(EVALUATIONS))
    assert {c.state for c in candidates} == {"done"}, [(c.number, c.reason) for c in candidates]
    arrivals = [c.arrival for c in candidates]
    assert sorted(arrivals) == list(range(EVALUATIONS))  # type: ignore[type-var]
    return candidates


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_candidate_scored_elsewhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, str]] = []

    def strike(pool: RayPool) -> None:
        actor = pool._actors[0]
        assert actor.job is not None
        killed.append((actor.job.number, actor.name))
        os.kill(int(actor.name.split(":")[1]), signal.SIGKILL)

    candidates = search(cluster, strike, monkeypatch)
    number, name = killed[0]
    assert candidates[number].attrs["worker"] != name
    workers = {int(c.attrs["worker"].split(":")[1]) for c in candidates if "worker" in c.attrs}
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its search"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_node_that_is_killed_takes_no_candidate_with_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(pool: RayPool) -> None:
        gone = pool._actors[0].node
        cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == gone), allow_graceful=False)

    candidates = search(cluster, strike, monkeypatch)
    # That a node has left is said when Ray lists it as dead, which may be after the last candidate.
    assert len({c.attrs["worker"] for c in candidates if "worker" in c.attrs}) <= 2
