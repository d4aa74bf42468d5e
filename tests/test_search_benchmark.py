"""The benchmark of searches: its landscapes are what they say, its peers search, its tables can say no."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _search_report as report  # noqa: E402
from _analytic_landscape import KINDS, AnalyticLandscape  # noqa: E402
from _evomerge_arm import Evomerge, run_evomerge  # noqa: E402
from _landscapes import HIGHEST, Meter, Shape, Truth, known_recipes  # noqa: E402
from _search_arms import PEERS, ranks, run_peer  # noqa: E402


@pytest.fixture(scope="module")
def land() -> AnalyticLandscape:
    return AnalyticLandscape("heterogeneous", 0)


def test_items_have_the_true_score_on_average(land: AnalyticLandscape) -> None:
    big = AnalyticLandscape("heterogeneous", 0, n_items=20_000)
    for scale in (0.0, 0.3, 0.9):
        weights = big.shape.weights(np.full(big.shape.dim, scale))
        found = big.outcomes(weights, "search").reshape(3, -1).mean(axis=1)
        assert np.abs(found - big.truth(weights)).max() < 4 * 0.5 / np.sqrt(20_000)


def test_near_merges_agree_on_most_items_and_far_ones_on_fewer(land: AnalyticLandscape) -> None:
    def agreement(step: float) -> float:
        at = land.shape.weights(np.full(land.shape.dim, 0.3))
        moved = at + step * np.random.default_rng(0).standard_normal(at.shape)
        return float((land.outcomes(at, "search") == land.outcomes(moved, "search")).mean())

    near, far = agreement(0.02), agreement(1.0)
    assert near > 0.97 and far < near - 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_beats_every_uniform_recipe(kind: str) -> None:
    place = AnalyticLandscape(kind, 3)
    truth = Truth(place)
    assert truth.oracle > truth.uniform > truth.uniform_of(0.0)
    gap = truth.oracle - truth.uniform
    assert gap < 0.02 if place.plateau else gap > 0.015
    # Its gradient vanishes there, or the box is in the way: no step of any coordinate is uphill.
    best = place.optimum().ravel()
    for i in range(0, len(best), 7):
        for step in (-0.05, 0.05):
            moved = best.copy()
            moved[i] = np.clip(moved[i] + step, 0.0, HIGHEST)
            assert place.scores(moved).mean() <= place.scores(best).mean() + 1e-9


def test_levels_are_nested() -> None:
    shape = Shape(3, 12, 2)
    levels = shape.levels()
    assert [level.name for level in levels] == ["model", "groups", "layers"]
    assert [level.dim for level in levels] == [3, 3 * 4 * 2, shape.dim]
    for coarse, fine in itertools.pairwise(levels):
        x = coarse.embed(np.linspace(0.1, 0.9, coarse.dim))
        z = fine.project(x)
        assert z is not None and np.allclose(fine.embed(z), x)
    assert [level.name for level in Shape(3, 1).levels()] == ["model"]


def test_positions_are_the_same_items(land: AnalyticLandscape) -> None:
    weights = land.shape.weights(np.full(land.shape.dim, 0.4))
    chosen = np.array([3, 500, 1199])
    whole = land.outcomes(weights, "search")
    assert (land.outcomes(weights, "search", chosen) == whole[chosen]).all()
    meter = Meter(land, [[0, 1, 2]])
    assert meter.values(weights, 0.25).shape == (1,) and meter.spent == 0.25


def test_ranks_are_those_of_the_definition() -> None:
    values = np.random.default_rng(5).integers(0, 6, (30, 2)).astype(float)
    rank, crowding = ranks(values)
    for i in range(30):
        above = [j for j in range(30) if (values[j] >= values[i]).all() and (values[j] > values[i]).any()]
        assert rank[i] == (1 + max(rank[j] for j in above) if above else 0)
    assert np.isinf(crowding[values[:, 0].argmax()])


@pytest.mark.parametrize("name", [n for n in PEERS if "gp" not in n])
def test_every_peer_searches_and_stays_in_its_budget(name: str, land: AnalyticLandscape) -> None:
    for mode in PEERS[name].modes:
        meter = Meter(land, [[0, 1, 2]] if mode == "one" else [[0], [1], [2]])
        trials = list(run_peer(PEERS[name], land, meter, 0, 30))
        assert len(trials) == (12 if name == "uniform grid" else round(30 / PEERS[name].share))
        assert trials[-1].spent == pytest.approx(meter.spent) and meter.spent <= 30.0
        assert len({t.weights.tobytes() for t in trials}) > 10
        again = list(run_peer(PEERS[name], land, Meter(land, meter.objectives), 0, 5))
        assert np.array_equal(again[3].weights, trials[3].weights)


def test_mergekit_starts_at_the_soup_and_folds(land: AnalyticLandscape) -> None:
    trials = list(run_peer(PEERS["mergekit-evolve"], land, Meter(land, [[0, 1, 2]]), 0, 200))
    first = np.array([t.weights for t in trials[:17]])
    assert abs(np.abs(first).mean() - 0.26) < 0.05  # |N(1/4, 1/6)| over 1/4
    assert min(t.weights.min() for t in trials) >= 0.0
    scores = [t.values[0] for t in trials]
    assert np.mean(scores[-30:]) > np.mean(scores[:30]) + 0.02


def test_evomerge_pays_for_its_choice_and_stays_in_its_budget(land: AnalyticLandscape) -> None:
    meter = Meter(land, [[0, 1, 2]])
    arm = Evomerge("map", level="model")
    points = []
    for checkpoint, run, allowance in run_evomerge(arm, land, meter, 0, 40, (20, 40), "one"):
        before = meter.spent
        weights = run.best(allowance)
        paid = meter.spent - before
        assert 0 < paid <= allowance + 0.1
        points.append((checkpoint, len(run.candidates), float(land.truth(weights).mean())))
    assert [p[0] for p in points] == [20, 40] and points[0][1] < points[1][1]
    assert meter.spent <= 40 + 4 + 1  # the choice at 20 comes on top, since only its look at the results is for us
    assert points[-1][2] > max(float(land.truth(land.shape.weights(x)).mean()) for _, x in known_recipes(land.shape))


def made_up(arm: str, seed: int, values: list[float], plateau: bool = False) -> dict[str, Any]:
    points = [
        {"at": c, "true": v, "claimed": v + 0.01, "candidates": c}
        for c, v in zip(report.CHECKPOINTS, values, strict=False)
    ]
    return {"points": points, "evaluations": 800, "wall_s": 1.0, "uniform": 0.6, "oracle": 0.7, "plateau": plateau}


def printed(rows: dict[str, Any], landscape: str, mode: str, capsys: pytest.CaptureFixture[str]) -> str:
    report.print_report(rows, [landscape], list({k.split("|")[2]: 0 for k in rows}), [mode], 3, 800)
    return capsys.readouterr().out


@pytest.mark.parametrize(("slow", "verdict"), [(8, "MISSED"), (14, "met")])
def test_the_verdict_on_speed(slow: int, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    n = len(report.CHECKPOINTS)
    rows = {}
    for seed in range(3):
        fast = [0.6] * 5 + [0.69] * (n - 5)  # 80 % at 40 evaluations
        late = [0.6] * slow + [0.69] * (n - slow)  # at 75 or at 300
        rows[f"toy heterogeneous|one|evomerge|{seed}"] = made_up("evomerge", seed, fast)
        rows[f"toy heterogeneous|one|mergekit-evolve|{seed}"] = made_up("mergekit-evolve", seed, late)
    text = printed(rows, "toy heterogeneous", "one", capsys)
    assert f"target 4: {verdict}. What they reach at 800 takes 40\n" in text and "| evomerge | 3 |" in text


@pytest.mark.parametrize(("value", "verdict"), [(0.5945, "MISSED"), (0.5955, "met")])
def test_the_verdict_on_plateaus(value: float, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    n = len(report.CHECKPOINTS)
    values = [0.5] * 3 + [0.62] * 7 + [value] + [0.62] * (n - 11)  # what comes before 25 evaluations does not count
    rows = {f"toy balanced|one|evomerge|{s}": made_up("evomerge", s, values, plateau=True) for s in range(3)}
    assert printed(rows, "toy balanced", "one", capsys).rstrip().endswith(verdict)


@pytest.mark.parametrize(("value", "verdict"), [(0.011, "MISSED"), (0.013, "met")])
def test_the_verdict_on_fronts(value: float, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    n = len(report.CHECKPOINTS)
    rows = {f"toy conflicting|front|evomerge|{s}": made_up("evomerge", s, [value] * n) for s in range(3)}
    rows |= {f"toy conflicting|front|nsga2, model|{s}": made_up("nsga2, model", s, [0.012] * n) for s in range(3)}
    assert printed(rows, "toy conflicting", "front", capsys).rstrip().endswith(verdict)


def test_the_script_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "search_efficiency.py"), "--small", "--landscape", "analytic",
        "--kinds", "heterogeneous", "--arms", "nsga2, model", "mergekit-evolve", "uniform grid",
        "--evaluations", "25", "--out", str(out),
    ]  # fmt: skip
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 4 and "| mergekit-evolve | 2 |" in first.stdout
    second = subprocess.run(command, check=True, capture_output=True, text=True)
    assert second.stdout == first.stdout and "..." not in second.stderr
