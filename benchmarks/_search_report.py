"""Tables and verdicts of the search benchmark, from the kept results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = dict[str, dict[str, Any]]

CHECKPOINTS = (10, 15, 20, 25, 30, 40, 50, 60, 75, 100, 120, 150, 200, 240, 300, 400, 500, 600, 800)
# Whole fronts are judged less often: each of their points costs a true score.
FRONT_CHECKPOINTS = (25, 30, 60, 120, 240, 400, 800)
SHOWN = {"one": (25, 50, 100, 200, 400, 800), "front": (25, 60, 120, 240, 400, 800)}
SHARES = (0.5, 0.8, 0.9, 0.95)
DEFAULT, MERGEKIT = "evomerge", "mergekit-evolve"
NSGA = ("nsga2, model", "nsga2, layers", "mergenetic")
# Stated before anything was run.
TIMES_FEWER, SHARE_TARGET = 4.0, 0.8
HV_AT, HV_NSGA_AT = 60, 240
PLATEAU_LOSS = 0.005
RESAMPLES = 4000


@dataclass(frozen=True, eq=False)
class Curves:
    """One arm on one landscape.

    Attributes:
        seeds: those that were run.
        true, claimed: (seeds, checkpoints); NaN where the arm had ended.
        uniform, oracle: (seeds,) true scores.
    """

    seeds: tuple[int, ...]
    true: Array
    claimed: Array
    uniform: Array
    oracle: Array
    wall_s: float

    @classmethod
    def of(cls, rows: Rows, landscape: str, mode: str, arm: str, seeds: int, evaluations: float) -> Curves | None:
        """The kept results of an arm, or None."""
        found = {s: rows[key] for s in range(seeds) if (key := f"{landscape}|{mode}|{arm}|{s}") in rows}
        if not found:
            return None
        true, claimed = np.full((2, len(found), len(CHECKPOINTS)), np.nan)
        for i, row in enumerate(found.values()):
            for point in row["points"]:
                if point["at"] <= evaluations:
                    k = CHECKPOINTS.index(point["at"])
                    true[i, k], claimed[i, k] = point["true"], point["claimed"]
        uniform, oracle = (np.array([row[name] for row in found.values()]) for name in ("uniform", "oracle"))
        wall = float(np.mean([row["wall_s"] for row in found.values()]))
        return cls(tuple(found), true, claimed, uniform, oracle, wall)

    def at(self, checkpoint: float) -> Array:
        """True values of the seeds at a checkpoint."""
        column: Array = self.true[:, CHECKPOINTS.index(int(checkpoint))]
        return column

    def rows_of(self, seeds: Sequence[int]) -> Curves:
        """The same for some of the seeds."""
        i = [self.seeds.index(s) for s in seeds]
        return Curves(tuple(seeds), self.true[i], self.claimed[i], self.uniform[i], self.oracle[i], self.wall_s)

    def needed(self, share: float, chosen: NDArray[np.intp] | None = None) -> float:
        """Evaluations until the mean over seeds has closed a share of the mean gap; infinite if it never has."""
        i = np.arange(len(self.seeds)) if chosen is None else chosen
        goal = self.uniform[i].mean() + share * (self.oracle[i] - self.uniform[i]).mean()
        reached = np.flatnonzero(self.true[i].mean(axis=0) >= goal)
        return float(CHECKPOINTS[reached[0]]) if len(reached) else np.inf


def common(a: Curves, b: Curves) -> tuple[Curves, Curves]:
    """Both for the seeds that they share."""
    seeds = [s for s in a.seeds if s in b.seeds]
    return a.rows_of(seeds), b.rows_of(seeds)


def interval(values: Array) -> tuple[float, float, float]:
    """Mean over seeds with its bootstrap interval of 95 %."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    means = values[_resampled(len(values))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def _resampled(n: int) -> NDArray[np.intp]:
    return np.random.default_rng([8, n]).integers(0, n, (RESAMPLES, n))


def print_report(
    rows: Rows, landscapes: Sequence[str], arms: Sequence[str], modes: Sequence[str], seeds: int, evaluations: float
) -> None:
    """All tables, then the verdicts."""
    verdicts: list[str] = []
    for landscape in landscapes:
        for mode in modes:
            curves = {
                arm: found for arm in arms if (found := Curves.of(rows, landscape, mode, arm, seeds, evaluations))
            }
            if not curves:
                continue
            _print_table(landscape, mode, curves, evaluations)
            if mode == "front":
                verdicts += _front_verdict(landscape, curves)
            elif any(rows[key]["plateau"] for key in rows if key.startswith(f"{landscape}|")):
                verdicts += _plateau_verdict(landscape, curves)
            elif "heterogeneous" in landscape:
                verdicts += _speed_verdict(landscape, curves, evaluations)
    print("Stated in advance:\n")
    for line in verdicts:
        print(f"- {line}")


def _print_table(landscape: str, mode: str, curves: dict[str, Curves], evaluations: float) -> None:
    some = max(curves.values(), key=lambda c: len(c.seeds))
    shown = [c for c in SHOWN[mode] if c <= evaluations]
    if mode == "one":
        print(
            f"**{landscape}, one objective**: true score of what is handed over. Best uniform recipe "
            f"{some.uniform.mean():.4f}, oracle {some.oracle.mean():.4f}.\n"
        )
    else:
        print(f"**{landscape}, front**: true hypervolume (x 1000) of what is handed over.\n")
    head = ["arm", "seeds", *map(str, shown)]
    head += [f"to {share:.0%}" for share in SHARES] if mode == "one" else []
    head += ["optimism", *(f"minus default at {c}" for c in _compared(shown)), "s per run"]
    _table(head, [_cells(arm, curve, curves.get(DEFAULT), mode, shown) for arm, curve in curves.items()])


def _compared(shown: Sequence[int]) -> list[int]:
    return [c for c in shown if c in (50, 60, 100, 120, 400)][:3]


def _cells(arm: str, curve: Curves, default: Curves | None, mode: str, shown: Sequence[int]) -> list[str]:
    scale, digits = (1.0, 4) if mode == "one" else (1000.0, 2)
    cells = [arm, str(len(curve.seeds))]
    cells += [_number(scale * _mean(curve.at(c)), digits) for c in shown]
    if mode == "one":
        cells += [_number(curve.needed(share), 0) for share in SHARES]
    ended = np.flatnonzero(np.isfinite(curve.true).all(axis=0))
    last = int(ended[-1]) if len(ended) else 0
    optimism = (curve.claimed - curve.true)[:, last]  # a recommendation may have no score of its own
    cells.append(_number(scale * _mean(optimism[np.isfinite(optimism)]), digits, "+"))
    for c in _compared(shown):
        if default is None or arm == DEFAULT:
            cells.append("")
            continue
        mine, theirs = common(curve, default)
        mean, low, high = interval(scale * (mine.at(c) - theirs.at(c)))
        cells.append("" if np.isnan(mean) else f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
    return [*cells, f"{curve.wall_s:.1f}"]


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else np.nan


def _number(value: float, digits: int, sign: str = "") -> str:
    if np.isnan(value):
        return ""
    return "–" if np.isinf(value) else f"{value:{sign}.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    print()


# ---------------------------------------------------------------- verdicts


def _met(good: bool) -> str:
    return "met" if good else "MISSED"


def _speed_verdict(landscape: str, curves: dict[str, Curves], evaluations: float) -> list[str]:
    if DEFAULT not in curves or MERGEKIT not in curves:
        return []
    mine, theirs = common(curves[DEFAULT], curves[MERGEKIT])

    def ratio(chosen: NDArray[np.intp]) -> float:
        own = mine.needed(SHARE_TARGET, chosen)
        # Who never gets there within the budget needs more than all of it.
        return min(theirs.needed(SHARE_TARGET, chosen), evaluations) / own if np.isfinite(own) else 0.0

    found = ratio(np.arange(len(mine.seeds)))
    low, high = np.percentile([ratio(i) for i in _resampled(len(mine.seeds))[:1000]], [2.5, 97.5])
    own, other = mine.needed(SHARE_TARGET), theirs.needed(SHARE_TARGET)
    last = int(np.flatnonzero(np.isfinite(theirs.true).all(axis=0))[-1])
    reached = np.flatnonzero(mine.true.mean(axis=0) >= theirs.true[:, last].mean())
    passed = f"{CHECKPOINTS[reached[0]]}" if len(reached) else "–"
    more = "at least " if np.isinf(other) and np.isfinite(own) else ""
    return [
        f"{landscape}: evaluations to {SHARE_TARGET:.0%} of the gap: {_number(own, 0)}, mergekit-evolve's settings "
        f"{_number(other, 0)} (– is never within {evaluations:g}): {more}{found:.1f} times fewer "
        f"[{low:.1f}, {high:.1f}], target {TIMES_FEWER:g}: {_met(found >= TIMES_FEWER)}. "
        f"What they reach at {CHECKPOINTS[last]} takes {passed}"
    ]


def _front_verdict(landscape: str, curves: dict[str, Curves]) -> list[str]:
    if DEFAULT not in curves:
        return []
    lines = []
    for arm in NSGA:
        if arm not in curves:
            continue
        mine, theirs = common(curves[DEFAULT], curves[arm])
        mean, low, high = interval(1000.0 * (mine.at(HV_AT) - theirs.at(HV_NSGA_AT)))
        if np.isnan(mean):
            continue
        lines.append(
            f"{landscape}: true hypervolume (x 1000) at {HV_AT} minus that of {arm} at {HV_NSGA_AT}: "
            f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], target at least 0: {_met(mean >= 0.0)}"
        )
    return lines


def _plateau_verdict(landscape: str, curves: dict[str, Curves]) -> list[str]:
    if DEFAULT not in curves:
        return []
    mine = curves[DEFAULT]
    difference = mine.true - mine.uniform[:, None]
    seen = [k for k, c in enumerate(CHECKPOINTS) if c >= SHOWN["one"][0] and np.isfinite(difference[:, k]).all()]
    if not seen:
        return []
    means = difference[:, seen].mean(axis=0)
    worst = int(np.argmin(means))
    return [
        f"{landscape}: the recommendation minus the best uniform recipe, worst checkpoint "
        f"({CHECKPOINTS[seen[worst]]} evaluations): {means[worst]:+.4f} in the mean, "
        f"{difference[:, seen].min():+.4f} for the worst seed, target at least {-PLATEAU_LOSS:g} in the mean: "
        f"{_met(means[worst] >= -PLATEAU_LOSS)}"
    ]
