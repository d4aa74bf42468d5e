"""How many workers one controller keeps busy, and how many candidates a minute they finish.

    python benchmarks/scaling.py                                   # simulated, 1 to 256 workers, SQLite
    python benchmarks/scaling.py --storage postgresql+psycopg://me@host/db
    python benchmarks/scaling.py --recorded sqlite:///runs/demo/ledger.db demo    # durations of a real study
    python benchmarks/scaling.py --real 1,2                        # for real: worker processes on the demo zoo
    python benchmarks/scaling.py --profile --workers 64            # what the controller's time goes into

In the simulation the loop (`Search`), the optimizer and the database are the real ones; only evaluations take no time.
A clock runs while the controller works and jumps to the next finished evaluation while it waits, so that an hour of 64
workers takes minutes. A worker is idle from its result until its next job: what the controller costs, and nothing else.
Durations are log-normal (`--sigma` of the logarithm) around `--mean-s`, or those of a study, scaled to that mean.

Utilisation is the share of the time from a worker's first job to its last result in which it evaluates. What the
controller costs per candidate is its CPU time and its waits for the database; `--clock cpu` leaves out the waits, for a
machine on which other programs run.
"""

from __future__ import annotations

import argparse
import cProfile
import heapq
import itertools
import json
import os
import pstats
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import optuna  # noqa: E402

from benchmarks.search_overhead import facts  # noqa: E402
from evomerge.events import Budget  # noqa: E402
from evomerge.objectives import mean_scores  # noqa: E402
from evomerge.optimizers import Goal, make  # noqa: E402
from evomerge.search import Search  # noqa: E402
from evomerge.space import SearchSpace  # noqa: E402
from evomerge.study import Header, Study  # noqa: E402
from evomerge.worker import Failed, Job, Outcome  # noqa: E402

GENES = 16
ITEMS = 200
TARGET, AT_WORKERS, FROM_S = 0.95, 64, 5.0
GOALS = (Goal("acc", 0.0, 1.0), Goal("chat", 0.0, 1.0))
SPACE = {"method": "task_arithmetic", "genes": {"weight": {"low": 0.0, "high": 1.2, "per_expert": True}}}
_count = itertools.count()


class SimulatedPool:
    """Workers whose evaluations take durations of a clock that jumps."""

    def __init__(self, size: int, durations: Iterator[float], clock: str) -> None:
        self.size = size
        self._durations = durations
        self._real = time.process_time if clock == "cpu" else time.perf_counter
        self._offset = 0.0
        self._free: deque[int] = deque(range(size))
        self._queue: deque[Job] = deque()
        self._running: list[tuple[float, int, Job]] = []
        self.busy, self.first, self.last = np.zeros(size), np.full(size, np.nan), np.zeros(size)
        rng = np.random.default_rng(0)
        self._items = {goal.name: rng.normal(0.3 + 0.4 * j, 0.3, (ITEMS, GENES)) for j, goal in enumerate(GOALS)}

    def now(self) -> float:
        """The clock, in seconds."""
        return self._real() + self._offset

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        if not self._running:
            return []
        self._offset += max(0.0, self._running[0][0] - self.now())
        now, done = self.now(), []
        while self._running and self._running[0][0] <= now:
            ended, worker, job = heapq.heappop(self._running)
            self._free.append(worker)
            self.last[worker] = ended
            done.append(job)
        stopped = self._real()
        answers: list[Outcome | Failed] = [self._score(job) for job in done]
        self._offset -= self._real() - stopped  # scoring is no work of the controller
        return answers

    def close(self) -> None:
        self._queue.clear()

    def _hand_out(self) -> None:
        while self._queue and self._free:
            job, worker, now = self._queue.popleft(), self._free.popleft(), self.now()
            duration = next(self._durations)
            self.busy[worker] += duration
            if np.isnan(self.first[worker]):
                self.first[worker] = now
            heapq.heappush(self._running, (now + duration, worker, job))

    def _score(self, job: Job) -> Outcome:
        plans = job.recipe.plan(["model.layers.0.mlp.up_proj.weight"], 1)
        weights = np.array([values["weight"] for values in plans[0].per_input], dtype=np.float64)
        scores = {
            n: mean_scores((((i - weights) ** 2).mean(axis=1) < 0.2).astype(float)) for n, i in self._items.items()
        }
        return Outcome(job.number, {"search": scores}, 0.1, 1.0, 0, "simulated")

    def utilisation(self) -> float:
        """Time spent evaluating as a share of the time from each worker's first job to its last result."""
        used = self.last > 0
        return float(self.busy[used].sum() / (self.last[used] - self.first[used]).sum())


def durations_of(args: argparse.Namespace) -> Iterator[float]:
    """Endless seconds of evaluations with the mean that was asked for."""
    rng = np.random.default_rng(args.seed)
    if args.recorded:
        candidates = Study.load(*args.recorded).candidates()
        found = np.array([c.attrs["t_merge_s"] + c.attrs["t_eval_s"] for c in candidates if "t_merge_s" in c.attrs])
        while True:
            yield from rng.permutation(found * args.mean_s / found.mean())
    while True:
        yield float(args.mean_s * rng.lognormal(-(args.sigma**2) / 2, args.sigma))


def simulate(workers: int, optimizer: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One search with so many simulated workers."""
    experts = {f"e{i}": f"models/e{i}" for i in range(GENES)}
    space = SearchSpace.from_dict(SPACE, "models/base", experts, 1)
    url = args.storage or f"sqlite:///{folder}/scaling.db"
    study = Study.create(url, f"scaling-{os.getpid()}-{next(_count)}", Header({"seed": 0}, {"acc": True, "chat": True}))
    evaluations = max(args.evaluations, args.per_worker * workers)
    start = space.encode(space.start())
    made = make(optimizer, space.dim, GOALS, 0, start, None, facts(space.dim, workers, evaluations))
    pool = SimulatedPool(workers, durations_of(args), args.clock)
    search = Search(study, space, made, lambda: pool, Budget(evaluations))
    profile = cProfile.Profile() if args.profile else None
    begun, cpu = time.perf_counter(), time.process_time()
    try:
        if profile:
            profile.runcall(search.run)
        else:
            search.run()
        real_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    finally:
        if args.storage:  # a server is left as it was found
            optuna.delete_study(study_name=study.name, storage=args.storage)
    if profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    span_s = float(np.nanmax(pool.last) - np.nanmin(pool.first))
    return {
        "optimizer": optimizer,
        "workers": workers,
        "evaluations": evaluations,
        "per_minute": 60 * evaluations / span_s,
        "ideal": 60 * workers / args.mean_s,
        "utilisation": pool.utilisation(),
        "cpu_ms": 1e3 * cpu_s / evaluations,
        "real_ms": 1e3 * real_s / evaluations,
    }


def for_real(workers: int, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Worker processes on the demo zoo: candidates per minute from the first result to the last."""
    from evomerge.commands import run_search

    name = f"real{workers}"
    evaluations = args.real_evaluations
    overrides = (
        f"name={name}",
        f"storage=sqlite:///{folder}/{name}.db",
        f"workers={{local: {workers}, threads: 1}}",
        f"budget.evaluations={evaluations}",
        "optimizer=random",
        "fidelity=off",
    )
    options = {"resume": "never", "inline": False, "quiet": True, "allow_task_code": True}
    run_search(str(ROOT / "zoo" / "demo.yaml"), overrides, **options)
    ended = [c.attrs["elapsed_s"] for c in Study.load(f"sqlite:///{folder}/{name}.db", name).candidates()]
    span_s = max(ended) - min(ended)
    return {"workers": workers, "evaluations": evaluations, "per_minute": 60 * (len(ended) - 1) / span_s}


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.real:
            rows = [for_real(workers, args, folder) for workers in args.real]
            for row in rows:
                print(f"{row['workers']} workers: {row['per_minute']:.1f} candidates a minute ({row['evaluations']})")
            print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
            return
        rows = []
        for optimizer in args.optimizers.split(","):
            for workers in args.workers:
                rows.append(simulate(workers, optimizer, args, folder))
                if not args.json:
                    print(line(rows[-1], header=len(rows) == 1), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    judged = [r for r in rows if r["workers"] == AT_WORKERS and args.mean_s >= FROM_S]
    missed = [r["optimizer"] for r in judged if r["utilisation"] < TARGET]
    if judged:
        print(
            f"\nTarget {TARGET:.0%} at {AT_WORKERS} workers: "
            + (f"missed by {', '.join(missed)}" if missed else "kept")
        )
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")


def line(row: dict[str, Any], *, header: bool) -> str:
    text = (
        f"| {row['optimizer']} | {row['workers']} | {row['evaluations']} | {row['per_minute']:.0f} "
        f"| {row['ideal']:.0f} | {row['utilisation']:.1%} | {row['cpu_ms']:.1f} | {row['real_ms']:.1f} |"
    )
    top = "| optimizer | workers | evaluations | per minute | ideal | utilisation | CPU ms each | wall ms each |"
    return f"{top}\n|---|---|---|---|---|---|---|---|\n{text}" if header else text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--workers", default=[1, 4, 16, 64, 256], **numbers)
    parser.add_argument("--optimizers", default="map,cma_es,nsga2,random", help="names with commas")
    parser.add_argument("--evaluations", type=int, default=300, help="at least so many candidates in each search")
    parser.add_argument("--per-worker", type=int, default=6, help="... and so many for each worker")
    parser.add_argument("--mean-s", type=float, default=5.0, help="of an evaluation")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--recorded", nargs=2, metavar=("URL", "STUDY"), help="durations of a study")
    parser.add_argument("--storage", help="database URL; default: SQLite in a temporary folder")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the controller's work costs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--real", default=[], help="numbers of worker processes on the demo zoo, instead", **numbers)
    parser.add_argument("--real-evaluations", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
