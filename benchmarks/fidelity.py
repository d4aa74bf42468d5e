"""Rungs and epochs: is the best candidate ever discarded, and what is saved?

    python benchmarks/fidelity.py                # on the demo zoo; the first run scores some hundred merges (minutes)
    python benchmarks/fidelity.py --part safety
    python benchmarks/fidelity.py --simulated    # on made-up items, another landscape for each seed
    python benchmarks/fidelity.py --small        # seconds, few made-up items: does it run?

Scores are real ones of the demo zoo (see _zoo_landscape.py) or made up, with the engine's own rules, order of items,
rivals and estimates; only the database and the merging of a candidate are left out.

* safety: full per-item scores of merges drawn from a grid of weights. Each replayed study resamples the items of every
  task (with replacement), draws candidates, puts them in random order, and runs them through the rungs; none is a
  known recipe, so all but the first can be stopped. The true winner is the one that is best when all candidates
  are scored in full. The bound is the exact (Clopper-Pearson) upper end of the one-sided 95 % interval.
* saving: whole searches with the same seeds and numbers of candidates: all items for all, rungs, and rungs with epochs.
  A proposal has the scores of the nearest merge in the table; two that share one are scored twice, as two recipes would
  be. The winner (best mean over objectives, each scaled to its range over the front, on the search split) is scored
  on the test split; differences are paired by seed, with Student's 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from _zoo_landscape import LEVELS, STEP, Landscape, Point, grid_point  # noqa: E402

TARGET_DISCARDED, TARGET_BOUND, TARGET_SAVING = 0.01, 0.02, 3.0
# The known recipes that are task arithmetic: base, experts, uniform soup, three common scales.
KNOWN = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 / 3,) * 3, (0.5,) * 3, (0.75,) * 3, (1.0,) * 3)
HIGHEST = 1.2  # weight in the search space
TASKS = ("math", "cipher", "latin", "cross")
# Name: the tasks of each objective.
SETTINGS = {
    "one objective, all items": ((0, 1, 2, 3),),
    "one objective, latin": ((2,),),
    "four objectives": ((0,), (1,), (2,), (3,)),
}

Objectives = tuple[tuple[int, ...], ...]


class TableObjective:
    """The mean of some tasks' items; its "live model" is a point of the table, where the items are looked up."""

    maximize, partial, bounds, splits = True, True, (0.0, 1.0), ("search",)

    def __init__(self, tasks: Sequence[int], table: Any) -> None:
        self.name, self._tasks, self._table = "+".join(TASKS[k] for k in tasks), list(tasks), table
        self.used = 0

    def size(self, split: str) -> int:
        return int(self._table.items((0, 0, 0))[self._tasks].size)

    def score(self, live: Any, split: str, positions: Sequence[int] | None = None) -> Any:
        items = self._table.items(live)[self._tasks].astype(np.float64).ravel()
        chosen = items if positions is None else items[list(positions)]
        self.used += len(chosen)
        return self.aggregate(chosen)

    def aggregate(self, items: np.ndarray) -> Any:
        from evomerge.objectives import mean_scores

        return mean_scores(items)


class MadeUp:
    """A stand-in for the zoo's table: an item is right near its own point of the weights, which is near its task's.

    Args:
        n: items per task.
        seed: of the tasks.
        split: another split has other items of the same tasks.
    """

    def __init__(self, n: int, seed: int = 0, split: int = 0) -> None:
        peaks = np.random.default_rng([seed, 5]).uniform(0.2, 1.0, (4, 1, 3))
        rng = np.random.default_rng([seed, 6, split])
        self._peaks = peaks + rng.normal(0.0, 0.25, (4, n, 3))
        self._narrow, self._ease = rng.uniform(0.5, 2.5, (4, n, 3)), rng.normal(0.6, 0.6, (4, n))

    def items(self, point: Point) -> np.ndarray:
        weights = np.array(point) * STEP
        return (((weights - self._peaks) ** 2 * self._narrow).sum(axis=2) < self._ease).astype(np.uint8)

    def nearest(self, weights: np.ndarray) -> Point:
        return grid_point(weights)

    def fill(self, count: int, say: Any) -> np.ndarray:
        return np.random.default_rng(0).integers(0, LEVELS, (count, 3))


# ---------------------------------------------------------------- safety


@dataclass
class Safety:
    """What happened in the replayed studies."""

    setting: str
    studies: int
    candidates: int
    discarded: int = 0
    stopped: int = 0
    front: int = 0
    front_stopped: int = 0
    used: float = 0.0

    def row(self) -> dict[str, Any]:
        from scipy.stats import beta

        share = self.discarded / self.studies
        bound = float(beta.ppf(0.95, self.discarded + 1, self.studies - self.discarded))
        return vars(self) | {"share": share, "bound": bound, "items_used": self.used / self.studies}


def safety(setting: str, full: np.ndarray, studies: int, candidates: int) -> Safety:
    """Replay studies on full scores. full: (merges, objectives, items)."""
    from evomerge.fidelity import RUNGS, Part, count_at, item_order
    from evomerge.rivals import Rivals

    n_objectives, n = full.shape[1:]
    found = Safety(setting, studies, candidates)
    ups = {str(j): True for j in range(n_objectives)}
    for study in range(studies):
        rng = np.random.default_rng([7, study])
        chosen = full[rng.choice(len(full), candidates, replace=False)]
        data = np.stack([chosen[:, j, rng.integers(0, n, n)] for j in range(n_objectives)], axis=1).astype(np.float64)
        orders = [item_order(study, name, n) for name in ups]
        rivals = Rivals(ups, lambda number, data=data: list(data[number]))  # type: ignore[misc]
        part = Part(study, RUNGS)
        stopped = np.zeros(candidates, dtype=bool)
        for number in range(candidates):
            race = rivals.race(part)
            used = 1.0
            for share in RUNGS[:-1]:
                count = count_at(n, share)
                seen = [data[number, j, order[:count]] for j, order in enumerate(orders)]
                if race.verdict(seen, [n] * n_objectives) is not None:
                    stopped[number], used = True, count / n
                    break
            if not stopped[number]:
                rivals.add(number, data[number].mean(axis=1).tolist())
            found.used += used / candidates
        _judge(found, data.mean(axis=2), stopped)
    return found


def _judge(found: Safety, values: np.ndarray, stopped: np.ndarray) -> None:
    """Count a study: is its true winner lost, and how much of its true front?"""
    from evomerge.front import non_dominated

    front = np.flatnonzero(non_dominated(values))
    merit = _merit(values[front])
    best = front[np.isclose(merit, merit.max())]  # candidates with equal scores are as good as each other
    found.discarded += bool(stopped[best].all())
    found.stopped += int(stopped.sum())
    found.front += len(front)
    found.front_stopped += int(stopped[front].sum())


def _merit(values: np.ndarray) -> np.ndarray:
    """Mean over objectives, each scaled to its range over these rows."""
    spread = np.ptp(values, axis=0)
    return np.asarray(((values - values.min(axis=0)) / np.where(spread > 0, spread, 1.0)).mean(axis=1))


# ---------------------------------------------------------------- saving


@dataclass
class Run:
    """One search: items used, the winner's grid point, and how many candidates were stopped."""

    used: int
    winner: Point
    stopped: int


def search(tasks: Objectives, optimizer_name: str, table: Any, seed: int, candidates: int, arm: str) -> Run:
    """The engine's loop without its database: ask, score in parts, estimate, tell."""
    from evomerge.estimator import ItemMatrix
    from evomerge.fidelity import RUNGS, SHARE, Schedule
    from evomerge.front import non_dominated
    from evomerge.optimizers import Goal, Result, make
    from evomerge.rivals import Rivals
    from evomerge.worker import score_in_rungs

    objectives = [TableObjective(own, table) for own in tasks]
    goals = [Goal(o.name, 0.0, 1.0) for o in objectives]
    optimizer = make(optimizer_name, 3, goals, seed, np.full(3, 0.25))
    items: dict[int, list[np.ndarray]] = {}
    rivals, matrix = Rivals({o.name: True for o in objectives}, items.__getitem__), ItemMatrix(items.__getitem__)
    epochs = {"known": len(KNOWN), "evaluations": candidates, "share": SHARE, "candidates": 16}
    schedule = Schedule(seed, (1.0,) if arm == "all" else RUNGS, epochs if arm == "epochs" else {})
    full: list[tuple[Point, np.ndarray]] = []
    sizes: dict[tuple[str, str], int] = {}
    for number in range(candidates):
        x = np.array(KNOWN[number]) / HIGHEST if number < len(KNOWN) else optimizer.ask(number)
        point = grid_point(x * HIGHEST) if number < len(KNOWN) else table.nearest(x * HIGHEST)
        part = schedule.part(number)
        assert part is not None
        race = rivals.race(part, to_the_end=number < len(KNOWN))
        scores, stopped = score_in_rungs(objectives, point, "search", race, sizes)  # type: ignore[arg-type]
        found = [(scores[o.name].value, scores[o.name].stderr) for o in objectives]
        for j, o in enumerate(objectives):
            better = None if stopped is None else matrix.estimate(j, scores[o.name].items, stopped.positions[o.name])
            if better is not None and better.stderr < found[j][1]:
                found[j] = better.value, better.stderr
        values, stderr = np.array(found).T
        if stopped is None:
            full.append((point, values))
            items[number] = [scores[o.name].items for o in objectives]
            rivals.add(number, values.tolist())
            matrix.add(number)
        optimizer.tell(Result(number, x, values, stderr))
    values = np.array([v for _, v in full])
    front = np.flatnonzero(non_dominated(values))
    winner = full[front[int(np.argmax(_merit(values[front])))]][0]
    return Run(sum(o.used for o in objectives), winner, candidates - len(full))


ARMS = ("all", "rungs", "epochs")
Worlds = Callable[[int], tuple[Any, Any]]  # seed -> tables of the search split and of the test split


def saving(setting: str, optimizer: str, worlds: Worlds, seeds: int, candidates: int) -> list[dict[str, Any]]:
    """Searches with rungs, and with rungs and epochs, beside those that score everything; over the seeds."""
    from scipy.stats import t

    tasks = SETTINGS[setting]
    every = [k for own in tasks for k in own]
    runs, tested = [], []
    for seed in range(seeds):
        say(f"{setting}, {optimizer}: seed {seed} of {seeds}")
        table, test = worlds(seed)
        runs.append([search(tasks, optimizer, table, seed, candidates, arm) for arm in ARMS])
        tested.append([test.items(run.winner)[every].mean() for run in runs[-1]])
    used = np.array([[run.used for run in row] for row in runs])
    scores = np.array(tested)
    rows = []
    for k, arm in enumerate(ARMS[1:], start=1):
        change = scores[:, k] - scores[:, 0]
        half = float(t.ppf(0.975, seeds - 1) * change.std(ddof=1) / np.sqrt(seeds))
        rows.append(
            {
                "setting": f"{setting}, {optimizer}, {arm}",
                "seeds": seeds,
                "candidates": candidates,
                "items_whole": float(used[:, 0].mean()),
                "items_rungs": float(used[:, k].mean()),
                "saving": float(used[:, 0].sum() / used[:, k].sum()),
                "saving_range": [float(x) for x in np.percentile(used[:, 0] / used[:, k], [0, 100])],
                "test_whole": float(scores[:, 0].mean()),
                "test_rungs": float(scores[:, k].mean()),
                "change": float(change.mean()),
                "change_low": float(change.mean()) - half,
                "change_high": float(change.mean()) + half,
                "stopped": float(np.mean([row[k].stopped for row in runs])),
            }
        )
    return rows


# ---------------------------------------------------------------- report


def print_report(about: dict[str, Any], safe: list[Safety], saved: list[dict[str, Any]]) -> None:
    """The tables in Markdown, and which targets are met."""
    print(
        f"{about['cpu']}, {about['cores']} cores; numpy {about['numpy']}, scipy {about['scipy']}. Items: "
        f"{about['items']}. Rungs {about['rungs']}, risk {about['risk']:g}.\n"
    )
    if safe:
        _table(SAFETY, [_safety_cells(s.row()) for s in safe])
    if saved:
        _table(SAVING, [_saving_cells(row) for row in saved])
    if about["small"]:
        print("\nA few made-up items: the figures and the last column mean nothing.")


SAFETY = ("safety", "studies x candidates", "true winner discarded", "upper 95 % bound", "stopped",
          "front members stopped", "items used", "met")  # fmt: skip
SAVING = ("saving", "seeds x candidates", "items, all scored", "items, stopping", "times fewer (range)", "stopped",
          "test, all scored", "test, stopping", "paired difference", "met")  # fmt: skip


def _safety_cells(row: dict[str, Any]) -> list[str]:
    met = row["share"] <= TARGET_DISCARDED and row["bound"] < TARGET_BOUND
    return [
        row["setting"],
        f"{row['studies']} x {row['candidates']}",
        f"{row['discarded']} ({row['share']:.2%})",
        f"{row['bound']:.2%}",
        f"{row['stopped'] / row['studies'] / row['candidates']:.0%}",
        f"{row['front_stopped']} of {row['front']}",
        f"{row['items_used']:.0%}",
        "yes" if met else "no",
    ]


def _saving_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["saving_range"]
    same = row["change_low"] <= 0.0 <= row["change_high"]
    return [
        row["setting"],
        f"{row['seeds']} x {row['candidates']}",
        f"{row['items_whole']:.0f}",
        f"{row['items_rungs']:.0f}",
        f"{row['saving']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['stopped']:.1f}",
        f"{row['test_whole']:.4f}",
        f"{row['test_rungs']:.4f}",
        f"{row['change']:+.4f} [{row['change_low']:+.4f}, {row['change_high']:+.4f}]",
        "yes" if same and row["saving"] >= TARGET_SAVING else "no",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    print()


def main() -> None:
    options = read_options()
    from evomerge.fidelity import RUNGS, share_text
    from evomerge.racing import RISK

    made_up = options.small or options.simulated
    n = 64 if options.small else 300
    table: Any = MadeUp(n) if made_up else Landscape(options.table, "search")
    test: Any = None if made_up else Landscape(options.table, "test", options.test_items)

    def worlds(seed: int) -> tuple[Any, Any]:
        return (MadeUp(n, seed), MadeUp(2000, seed, 1)) if made_up else (table, test)

    safe: list[Safety] = []
    saved: list[dict[str, Any]] = []
    if "safety" in options.part:
        points = table.fill(max(options.merges, options.candidates), say)
        by_task = np.stack([table.items(tuple(p)) for p in points.tolist()])
        for setting, tasks in SETTINGS.items():
            say(f"safety, {setting} ...")
            full = np.stack([by_task[:, list(own)].reshape(len(by_task), -1) for own in tasks], axis=1)
            safe.append(safety(setting, full, options.studies, options.candidates))
    if "saving" in options.part:
        table.fill(options.merges, say)
        for setting, tasks in SETTINGS.items():
            for optimizer in ("map" if len(tasks) > 1 else "cma_es", "random"):  # the engine's default, and none
                saved += saving(setting, optimizer, worlds, options.seeds, options.candidates)
        if not made_up:
            table.save()
            test.save()
    import scipy

    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "items": " x ".join(map(str, table.items((0, 0, 0)).shape)),
        "rungs": ", ".join(map(share_text, RUNGS)),
        "risk": RISK,
        "small": options.small,
    }
    if options.json:
        print(json.dumps({"run": about, "safety": [s.row() for s in safe], "saving": saved}, indent=2))
    else:
        print_report(about, safe, saved)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("safety", "saving"), default=["safety", "saving"])
    parser.add_argument("--studies", type=int, help="to replay; default 1000, or 10 with --small")
    parser.add_argument("--merges", type=int, help="in the table; default 225, or 60 with --small")
    parser.add_argument("--candidates", type=int, help="default 60, or 24 with --small")
    parser.add_argument("--seeds", type=int, help="default 20, or 2 with --small")
    parser.add_argument("--test-items", type=int, default=500, help="per task")
    parser.add_argument("--table", type=Path, default=ROOT / "runs" / "fidelity-zoo", help="where scores are kept")
    parser.add_argument("--small", action="store_true", help="few made-up items: only shows that everything runs")
    parser.add_argument("--simulated", action="store_true", help="made-up items, as many as the zoo has")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    options = parser.parse_args()
    for name, usual, small in (("studies", 1000, 10), ("merges", 225, 60), ("candidates", 60, 24), ("seeds", 20, 2)):
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else usual)
    return options


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
