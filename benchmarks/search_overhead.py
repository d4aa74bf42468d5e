"""What an optimizer itself costs a search: time per candidate and memory, at 1,000 results and 64 pending points.

    python benchmarks/search_overhead.py --optimizers random,sobol,tpe
    python benchmarks/search_overhead.py                                # every optimizer; gp takes the longest
    python benchmarks/search_overhead.py --results 40 --rounds 2        # seconds: does it run?

Each row is one optimizer with one number of dimensions d and of objectives m. It is told `results` results, most of
them random points (half of those in a coarse level) and some of its own, then asked and told `rounds` times in the
steady state of a busy search: a tell of the oldest pending point, then an ask with the others. The time is CPU time of
the controller, and a candidate's is that of both together; the table has the median and the slowest tenth. Values are
noisy peaks that conflict with each other, with a floor under the first where `--floors` is given. Memory is what Python
and numpy hold for the optimizer (tracemalloc) after the results, and how much more after as many again: an optimizer
that keeps windows stops growing.
In the spaces here every fourth coordinate weighs the same expert, and all coordinates of an expert together are a
coarser level.

gp has two rows: above 300 results, where it has to keep the limit, and (--gp-results) below, where nothing has to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import tracemalloc
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from evomerge import registry  # noqa: E402
from evomerge.optimizers import Exhausted, Facts, Goal, Level, Optimizer, Result, make  # noqa: E402

LIMIT_MS = 50.0
OWN_SHARE = 20  # every so many results before the measurement is a point that the optimizer proposed
OPTIONS: dict[str, dict[str, Any]] = {"grid": {"points": 500}}  # enough to be asked at all
EXPERTS = 4


def main() -> None:
    args = arguments()
    names = args.optimizers.split(",") if args.optimizers else list(registry.names("optimizers"))
    rows = []
    for name in names:
        for dim in args.dims:
            for m in args.goals:
                if name == "nsga3" and m == 1:
                    continue  # refused
                for results in [args.results] + [args.gp_results] * (name == "gp" and args.gp_results > 0):
                    rows.append(measure(name, dim, m, results, args))
                    if not args.json:
                        print(line(rows[-1], header=len(rows) == 1), flush=True)
    if args.json:
        print(json.dumps({"limit_ms": LIMIT_MS, "rows": rows}, indent=1))
        return
    over = [row for row in rows if row["bounded"] and row["ask_tell_ms"] > LIMIT_MS]
    print(
        f"\nLimit {LIMIT_MS:g} ms: " + (f"missed by {len(over)} of {len(rows)} rows" if over else "kept by every row")
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--optimizers", default="", help="names with commas; default: all")
    parser.add_argument("--dims", default=[4, 12, 24, 100], **numbers)
    parser.add_argument("--goals", default=[1, 2, 3, 5], **numbers)
    parser.add_argument("--results", type=int, default=1000)
    parser.add_argument("--gp-results", type=int, default=100, help="0: only the bounded part of gp")
    parser.add_argument("--pending", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--floors", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Problem:
    """Noisy values in (0, 1) of m conflicting peaks along the diagonal of the cube."""

    def __init__(self, dim: int, m: int, floors: bool) -> None:
        self.dim, self.m, self.count = dim, m, 0
        self.coarse = facts(dim, 1, 1).levels[0]
        self.rng = np.random.default_rng([dim, m])
        self.peaks = np.linspace(0.2, 0.8, m) if m > 1 else np.array([0.35])
        self.floors = np.r_[0.5, np.full(m - 1, -np.inf)] if floors else None

    def point(self) -> np.ndarray:
        """A random point; every second one lies in the coarse level."""
        self.count += 1
        level = self.coarse.dim if self.count % 2 else self.dim
        z = self.rng.random(level) * self.rng.random()
        return self.coarse.embed(z) if self.count % 2 else z

    def result(self, number: int, x: np.ndarray) -> Result:
        true = np.array([np.exp(-((x - peak) ** 2).mean() * 4) for peak in self.peaks])
        values = np.clip(true + 0.02 * self.rng.standard_normal(self.m), 0.001, 0.999)
        # Most optimizers want no items; those that do get 20 per objective.
        items = [(self.rng.random(20) < value).astype(float) for value in values]
        return Result(number, x, values, np.full(self.m, 0.02), self.floors, items)


def facts(dim: int, workers: int, evaluations: int) -> Facts:
    """A continuous cube in which coordinate i weighs expert i modulo 4, with the experts as its coarse level."""
    experts = np.arange(dim, dtype=np.intp) % EXPERTS
    matrix = (experts[:, None] == np.arange(min(EXPERTS, dim))).astype(float)
    coarse, whole = Level("model", matrix, np.zeros(dim)), Level("whole", np.eye(dim), np.zeros(dim))
    levels = (whole,) if dim <= EXPERTS else (coarse, whole)
    cells, categorical = np.zeros(dim, dtype=np.intp), np.zeros(dim, dtype=np.bool_)
    return Facts(cells, categorical, np.zeros(dim), experts, levels, workers, evaluations)


def optimizer_for(name: str, dim: int, m: int, results: int, pending: int) -> Optimizer:
    goals = [Goal(f"goal{j}", 0.0, 1.0) for j in range(m)]
    known = facts(dim, pending, 4 * results)
    return make(name, dim, goals, 0, np.full(dim, 0.3), OPTIONS.get(name), known)


def fill(optimizer: Optimizer, problem: Problem, first: int, count: int) -> None:
    for number in range(first, first + count):
        x = optimizer.ask(number) if number % OWN_SHARE == 0 and number < 200 else problem.point()
        optimizer.tell(problem.result(number, x))


def measure(name: str, dim: int, m: int, results: int, args: argparse.Namespace) -> dict[str, Any]:
    problem = Problem(dim, m, args.floors)
    optimizer = optimizer_for(name, dim, m, results, args.pending)
    fill(optimizer, problem, 0, results)
    times, exhausted = steady_state(optimizer, problem, results, args)
    held, growth = memory(name, dim, m, results, args)
    return {
        "optimizer": name,
        "d": dim,
        "m": m,
        "results": results,
        "ask_tell_ms": float(np.median(times)) if times else None,
        "slow_ms": float(np.quantile(times, 0.9)) if times else None,
        "held_bytes": held,
        "growth_bytes": growth,
        "bounded": name != "gp" or results > 300,
        "exhausted": exhausted,
    }


def steady_state(
    optimizer: Optimizer, problem: Problem, first: int, args: argparse.Namespace
) -> tuple[list[float], bool]:
    """Return the milliseconds of each round, and whether the optimizer ended before them."""
    flying = deque((first + i, problem.point()) for i in range(args.pending))
    times = []
    for number in range(first + args.pending, first + args.pending + args.rounds):
        done, oldest = flying.popleft()
        result = problem.result(done, oldest)
        begin = time.process_time()
        optimizer.tell(result)
        try:
            x = optimizer.ask(number, [point for _, point in flying])
        except Exhausted:
            return times, True
        times.append(1e3 * (time.process_time() - begin))
        flying.append((number, x))
    return times, False


def memory(name: str, dim: int, m: int, results: int, args: argparse.Namespace) -> tuple[int, int]:
    """Return the bytes held after the results, and how many more after as many again."""
    problem = Problem(dim, m, args.floors)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        optimizer = optimizer_for(name, dim, m, results, args.pending)
        held = []
        for part in range(2):
            for number in range(part * results, (part + 1) * results):
                optimizer.tell(problem.result(number, problem.point()))
            held.append(tracemalloc.get_traced_memory()[0] - before)
        return held[0], held[1] - held[0]
    finally:
        tracemalloc.stop()


def line(row: dict[str, Any], *, header: bool) -> str:
    head = ""
    if header:
        columns = ["optimizer", "d", "m", "results", "median ms", "slowest tenth ms", "held kB", "growth kB", ""]
        head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    if row["ask_tell_ms"] is None:
        times, verdict = "- | -", "exhausted"
    else:
        times = f"{row['ask_tell_ms']:.1f} | {row['slow_ms']:.1f}"
        late = row["ask_tell_ms"] > LIMIT_MS
        verdict = "over the limit" if late and row["bounded"] else "no limit" if not row["bounded"] else ""
    sizes = f"{row['held_bytes'] / 1e3:.0f} | {row['growth_bytes'] / 1e3:.0f}"
    return f"{head}| {row['optimizer']} | {row['d']} | {row['m']} | {row['results']} | {times} | {sizes} | {verdict} |"


if __name__ == "__main__":
    main()
