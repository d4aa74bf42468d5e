"""Searches side by side at equal numbers of scored items: how good is what each of them hands over?

    python benchmarks/search_efficiency.py --small                      # about a minute: does it run?
    python benchmarks/search_efficiency.py --out runs/search.json       # everything; goes on where it was interrupted
    python benchmarks/search_efficiency.py --landscape toy --arms evomerge mergekit-evolve

One evaluation is the whole search split of a landscape, of all its tasks: arms that score parts of it get more
candidates for the same budget. What is printed is the *true* score of what the arm would hand over at that budget: of
one objective (the mean of the tasks) its recommendation, of several (one per task) its front.

Landscapes: see _analytic_landscape.py, _toy_worlds.py, _zoo_landscape.py. Arms: _search_arms.py, _evomerge_arm.py.
The gap is between the best task arithmetic with one scale and an oracle, both by their true scores. Intervals are
paired bootstraps over seeds. Arms that are slow in themselves end earlier and have fewer seeds; differences compare the
seeds in common.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from _evomerge_arm import EVOMERGE, Evomerge, run_evomerge  # noqa: E402
from _landscapes import Array, Landscape, Meter, Truth  # noqa: E402
from _search_arms import PEERS, Peer, Trial, run_peer  # noqa: E402
from _search_report import CHECKPOINTS, FRONT_CHECKPOINTS, print_report  # noqa: E402

ARMS: dict[str, Evomerge | Peer] = {**EVOMERGE, **PEERS}
MODES = ("one", "front")
SAVE_EVERY_S = 20.0

Row = dict[str, Any]


def main() -> None:
    options = read_options()
    store = Store(options.out)
    for landscape in options.landscapes:
        for seed in range(options.seeds):
            place: Place | None = None
            for mode in options.modes:
                for arm in options.arms:
                    key = f"{landscape}|{mode}|{arm}|{seed}"
                    if not wanted(ARMS[arm], mode, seed):
                        continue
                    if not options.again and store.has(key, options.evaluations, options.items):
                        continue
                    place = place or Place.of(landscape, seed, options.items)
                    say(f"{key} ...")
                    row = one_run(arm, place, mode, seed, options.evaluations)
                    store.add(key, row | {"items": options.items})
    store.save()
    print_report(store.rows, options.landscapes, options.arms, options.modes, options.seeds, options.evaluations)


def wanted(arm: Evomerge | Peer, mode: str, seed: int) -> bool:
    """Whether an arm takes part in a mode with a seed."""
    return mode in arm.modes and (arm.seeds is None or seed < arm.seeds)


@dataclass
class Place:
    """A landscape with its truth, shared by the arms."""

    landscape: Landscape
    truth: Truth

    @classmethod
    def of(cls, name: str, seed: int, n_items: int) -> Place:
        """The landscape called "family kind" with the items of a seed."""
        family, _, kind = name.partition(" ")
        made: Any
        if family == "analytic":
            from _analytic_landscape import AnalyticLandscape

            made = AnalyticLandscape(kind, seed, n_items)
        elif family == "toy":
            from _toy_worlds import ToyLandscape

            made = ToyLandscape(kind, seed, n_items)
        else:
            from _zoo_landscape import ZooLandscape

            made = ZooLandscape(kind, seed, ROOT / "runs" / "fidelity-zoo")
        return cls(made, Truth(made))


# ---------------------------------------------------------------- one run


def one_run(arm_name: str, place: Place, mode: str, seed: int, evaluations: float) -> Row:
    """An arm's results at the checkpoints, with the landscape's own figures and times."""
    arm, landscape = ARMS[arm_name], place.landscape
    tasks = range(landscape.n_tasks)
    meter = Meter(landscape, [list(tasks)] if mode == "one" else [[t] for t in tasks])
    began = time.perf_counter()
    if isinstance(arm, Peer):
        points = list(_peer_points(arm, place, meter, mode, seed, evaluations))
    else:
        points = list(_evomerge_points(arm, place, meter, mode, seed, evaluations))
    return {
        "points": points,
        "evaluations": evaluations,
        "wall_s": round(time.perf_counter() - began, 3),
        "uniform": place.truth.uniform,
        "oracle": place.truth.oracle,
        "plateau": landscape.plateau,
    }


def looks(mode: str) -> tuple[int, ...]:
    """The evaluations at which a mode's results are looked at."""
    return CHECKPOINTS if mode == "one" else FRONT_CHECKPOINTS


def _peer_points(arm: Peer, place: Place, meter: Meter, mode: str, seed: int, evaluations: float) -> Iterator[Row]:
    trials: list[Trial] = []
    left = [c for c in looks(mode) if c <= min(evaluations, arm.most)]
    for trial in run_peer(arm, place.landscape, meter, seed, evaluations):
        while left and trial.spent > left[0] + 1e-9:
            yield _judged(left.pop(0), _handed_over(trials, mode), len(trials), place, mode)
        trials.append(trial)
    for checkpoint in left:
        yield _judged(checkpoint, _handed_over(trials, mode), len(trials), place, mode)


def _handed_over(trials: Sequence[Trial], mode: str) -> list[tuple[Array, Array]]:
    """The best trial by its own score, or the trials that no other one dominates."""
    from evomerge.front import non_dominated

    if mode == "one":
        best = max(trials, key=lambda t: float(t.values[0]))
        return [(best.weights, best.values)]
    mask = non_dominated(np.array([t.values for t in trials]))
    return [(t.weights, t.values) for t, good in zip(trials, mask, strict=True) if good]


def _evomerge_points(
    arm: Evomerge, place: Place, meter: Meter, mode: str, seed: int, evaluations: float
) -> Iterator[Row]:
    budget = min(evaluations, arm.most)
    steps = run_evomerge(arm, place.landscape, meter, seed, budget, looks(mode), mode)
    for checkpoint, run, allowance in steps:
        if mode == "front":
            handed = run.front(allowance)
        else:
            weights = run.best(allowance)
            same = [c.values for c in run.candidates if np.array_equal(c.weights, weights)]
            handed = [(weights, same[0] if same else np.full(1, np.nan))]
        yield _judged(checkpoint, handed, len(run.candidates), place, mode)


def _judged(checkpoint: float, handed: Sequence[tuple[Array, Array]], asked: int, place: Place, mode: str) -> Row:
    """The truth of what is handed over, beside what its own scores claim."""
    from evomerge.front import hypervolume

    true = np.array([place.truth(weights) for weights, _ in handed])
    row: Row = {"at": checkpoint, "candidates": asked}
    if mode == "one":
        return row | {"true": float(true[0].mean()), "claimed": float(handed[0][1][0])}
    claimed = np.array([values for _, values in handed])
    reference = place.truth.reference
    return row | {
        "true": hypervolume(true, reference),
        "claimed": hypervolume(claimed, reference),
        "size": len(handed),
    }


# ---------------------------------------------------------------- kept results


class Store:
    """Results by key, kept in a file so that an interrupted run goes on."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._saved_at = file, time.monotonic()
        self.rows: dict[str, Row] = json.loads(file.read_text()) if file is not None and file.exists() else {}

    def has(self, key: str, evaluations: float, items: int) -> bool:
        """Whether a run is known that went as far, on as many items."""
        row = self.rows.get(key)
        return row is not None and row["evaluations"] >= evaluations and row["items"] == items

    def add(self, key: str, row: Row) -> None:
        """Keep a run."""
        self.rows[key] = row
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write everything, or nothing; what another run of this script has added meanwhile stays."""
        if self._file is None:
            return
        if self._file.exists():
            self.rows = {**json.loads(self._file.read_text()), **self.rows}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.rows))
        scratch.replace(self._file)
        self._saved_at = time.monotonic()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscape", nargs="+", choices=("analytic", "toy", "zoo"), default=["analytic", "toy"])
    parser.add_argument("--kinds", nargs="+", help="balanced, heterogeneous, conflicting; of the zoo model, layers")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=f"of {list(ARMS)}"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="one objective, a front")
    parser.add_argument("--seeds", type=int, help="default 10")
    parser.add_argument("--evaluations", type=float, help="of the whole search split (default 800)")
    parser.add_argument("--items", type=int, default=400, help="per task, of the search split")
    parser.add_argument("--small", action="store_true", help="few seeds and evaluations: about a minute")
    parser.add_argument("--again", action="store_true", help="run the arms even where their results are kept")
    parser.add_argument("--out", type=Path, help="where results are kept")
    options = parser.parse_args()
    options.seeds = options.seeds or (2 if options.small else 10)
    options.evaluations = options.evaluations or (50 if options.small else 800)
    from _analytic_landscape import KINDS

    kinds = {"analytic": KINDS, "toy": KINDS, "zoo": ("model", "layers")}
    options.landscapes = [
        f"{family} {kind}"
        for family in options.landscape
        for kind in kinds[family]
        if options.kinds is None or kind in options.kinds
    ]
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
