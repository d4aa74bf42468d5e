"""Scores of partly scored candidates from the matrix of items by candidates: precise, unbiased and honest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.estimator import (
    FEWEST_CANDIDATES,
    FEWEST_ITEMS,
    MOST_CANDIDATES,
    PENALTIES,
    Estimate,
    ItemMatrix,
    regress,
)
from evomerge.fidelity import Stopped
from evomerge.history import History
from evomerge.objectives import Scores, mean_scores
from evomerge.recipe import Recipe
from evomerge.study import Header, Study
from evomerge.worker import Outcome

N = 1000


def world(rng: np.random.Generator, candidates: int, noise: float = 0.1, n: int = N) -> np.ndarray:
    """Right answers (candidates, n): an item is right near its own point of a space of four weights."""
    x = rng.uniform(0.0, 1.2, (candidates, 4))
    peaks = 0.5 * rng.uniform(0.2, 1.0, (n, 4)) + 0.5 * rng.uniform(0.2, 1.0, 4)
    width = rng.uniform(0.3, 2.0, (n, 4))
    margin = rng.normal(0.8, 0.8, n) - (((x[:, None] - peaks) ** 2) * width).sum(axis=2)
    return np.asarray(margin + noise * rng.normal(size=margin.shape) > 0.0, dtype=np.float64)


def trials(seen: int, noise: float) -> np.ndarray:
    """Per trial (4, 200): errors of the plain mean and the estimate; standard errors of what is unseen and of all."""
    rows = []
    for seed in range(4):
        rng = np.random.default_rng([seed, seen])
        answers = world(rng, 110, noise)
        for mine in answers[60:]:
            positions = np.sort(rng.choice(N, seen, replace=False))
            plain = mine[positions].mean() - mine.mean()
            found = regress(answers[:60].T.astype(np.float32), mine[positions], positions)
            if found is None:
                rows.append((plain, plain, np.nan, np.nan))
                continue
            unseen = np.sqrt(found.stderr**2 - mine[positions].var(ddof=1) / N)
            rows.append((plain, found.value - mine.mean(), unseen, found.stderr))
    return np.array(rows).T


@pytest.mark.parametrize(("seen", "noise", "less"), [(100, 0.1, 0.6), (100, 0.35, 0.8), (250, 0.1, 0.6)])
def test_the_error_is_well_below_the_random_subsets(seen: int, noise: float, less: float) -> None:
    plain, found, unseen, stderr = trials(seen, noise)
    assert np.sqrt(np.mean(found**2)) < less * np.sqrt(np.mean(plain**2))
    assert abs(found.mean()) < 3.0 * found.std() / np.sqrt(len(found)), "no bias beyond noise"
    known = np.isfinite(unseen)
    assert known.mean() > 0.95
    assert 0.90 <= np.mean(np.abs(found[known]) < 1.96 * unseen[known]) <= 0.98, "intervals hold what they say"
    assert (stderr[known] > unseen[known]).all(), "the split is itself a sample"


def test_the_correction_makes_a_bad_regression_harmless() -> None:
    """Unseen items follow the earlier candidates no more: no prediction, but seen items are random, so no bias."""
    errors = []
    for k in range(200):
        rng = np.random.default_rng([9, k])
        answers = world(rng, 21)
        mine = np.where(np.arange(N) < N // 2, answers[-1], rng.random(N) < 0.1)
        positions = np.sort(rng.choice(N, 100, replace=False))
        found = regress(answers[:-1].T, mine[positions], positions)
        if found is not None:
            errors.append((found.value - mine.mean()) / found.stderr)
    assert len(errors) > 150 and abs(np.mean(errors)) < 3.0 / np.sqrt(len(errors)) and 0.8 < np.std(errors) < 1.2


def test_the_correction_is_the_mean_error_of_fits_without_each_item() -> None:
    """The closed form against the definition: a ridge with a free intercept, fitted again for every left-out item."""
    rng = np.random.default_rng(8)
    answers, positions = world(rng, 7, n=120), np.arange(0, 120, 3)
    seen, features = answers[-1][positions], answers[:-1].T
    x = features[positions]
    unit = ((x - x.mean(axis=0)) ** 2).sum() / x.shape[1]

    def fit(rows: np.ndarray, penalty: float) -> np.ndarray:
        design = np.column_stack([np.ones(len(rows)), x[rows]])
        return np.linalg.solve(
            design.T @ design + np.diag([0.0, *[penalty * unit] * x.shape[1]]), design.T @ seen[rows]
        )

    every = np.arange(len(seen))
    found = []
    for penalty in PENALTIES:
        left_out = np.array([seen[i] - np.r_[1.0, x[i]] @ fit(np.delete(every, i), penalty) for i in every])
        predicted = np.column_stack([np.ones(120), features]) @ fit(every, penalty)
        found.append(((left_out**2).mean(), predicted.mean() + left_out.mean(), left_out.var(ddof=1)))
    _, value, variance = min(found)
    estimate = regress(features, seen, positions)
    assert estimate is not None and estimate.value == pytest.approx(value, rel=1e-9)
    expected = variance * (1 / 40 - 1 / 120) + seen.var(ddof=1) / 120
    assert estimate.stderr == pytest.approx(np.sqrt(expected), rel=1e-9)


def test_what_predicts_nothing_gives_no_estimate() -> None:
    rng = np.random.default_rng(0)
    features, positions = rng.random((N, 20)), np.arange(100)
    gains = []
    for _ in range(40):
        found = regress(features, rng.random(100), positions)
        gains.append(0.0 if found is None else found.gain)
    assert np.mean(np.array(gains) == 0.0) > 0.3 and max(gains) < 0.2
    assert regress(features, np.ones(100), positions) is None, "no spread"
    assert regress(np.ones((N, 20)), rng.random(100), positions) is None, "features without spread"
    assert regress(features, rng.random(FEWEST_ITEMS - 1), positions[: FEWEST_ITEMS - 1]) is None
    assert regress(features, np.r_[rng.random(99), np.nan], positions) is None
    assert regress(np.where(features > 0.999, np.inf, features), rng.random(100), positions) is None


def test_a_copy_of_an_earlier_candidate_is_known_at_once() -> None:
    answers = world(np.random.default_rng(4), 30)
    positions = np.random.default_rng(5).choice(N, 120, replace=False)
    found = regress(answers.T, answers[11][positions], positions)
    assert found is not None and found.gain > 0.9
    assert abs(found.value - answers[11].mean()) < 0.01
    assert found.stderr == pytest.approx(answers[11].std() / np.sqrt(N), rel=0.5), "what is left is the split itself"


def test_all_items_seen_leave_only_the_split_as_a_sample() -> None:
    answers = world(np.random.default_rng(6), 30)
    found = regress(answers[:-1].T, answers[-1], np.arange(N))
    assert found is not None and found.stderr == pytest.approx(answers[-1].std(ddof=1) / np.sqrt(N))
    assert found.value == pytest.approx(answers[-1].mean(), abs=2e-3)


def test_the_matrix_holds_the_newest_candidates_and_reads_each_once() -> None:
    rng = np.random.default_rng(1)
    answers = world(rng, 90, n=300)
    loaded: list[int] = []

    def load(number: int) -> Sequence[np.ndarray]:
        loaded.append(number)
        return [answers[number], np.stack([answers[number], np.ones(300)], axis=1)]

    matrix, positions = ItemMatrix(load), np.arange(0, 300, 3)
    seen = answers[-1][positions]
    for number in range(FEWEST_CANDIDATES - 1):
        matrix.add(number)
    assert matrix.estimate(0, seen, positions) is None and not loaded, "too few candidates"
    for number in range(FEWEST_CANDIDATES - 1, 80):
        matrix.add(number)
    newest = list(range(80 - MOST_CANDIDATES, 80))
    expected = regress(answers[newest].T.astype(np.float32), seen, positions)
    found = matrix.estimate(0, seen, positions)
    assert isinstance(found, Estimate) and found == pytest.approx(expected, rel=1e-9)
    assert loaded == newest
    assert matrix.estimate(0, seen, positions) == found and loaded == newest, "read once, and the same to the bit"
    assert matrix.estimate(1, np.stack([seen, seen], axis=1), positions) is None, "ratios have no regression"


def test_an_estimate_stays_inside_the_range_of_the_items() -> None:
    """Either of two kinds of candidates is enough on the seen items; on the unseen ones both are right."""
    first, second = np.ones(300), np.ones(300)
    first[:60], second[30:90] = 0.0, 0.0
    mine = np.maximum(first, second)[:90]
    matrix = ItemMatrix(lambda number: [(first, second)[number % 2]])
    for number in range(FEWEST_CANDIDATES):
        matrix.add(number)
    raw = regress(np.stack([first, second], axis=1), mine, np.arange(90))
    found = matrix.estimate(0, mine, np.arange(90))
    assert raw is not None and raw.value > 1.05
    assert found is not None and found.value == 1.0


def test_it_takes_little_time() -> None:
    answers = world(np.random.default_rng(3), MOST_CANDIDATES + 1)
    features, positions = answers[:-1].T.astype(np.float32), np.arange(500)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        regress(features, answers[-1][:500], positions)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.02


def test_a_search_stores_the_more_precise_estimate_and_a_resumed_one_finds_the_same(tmp_path: Path) -> None:
    """`History` refines the worker's difference estimate with the matrix of what was scored in full before."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    study = Study.create(url, "x", Header({"seed": 1}, {"acc": True, "bits": False}))
    rng = np.random.default_rng(12)
    scored = world(rng, 21, n=400)
    bits = np.stack([rng.random(400) + 1.0, np.ones(400)], axis=1)

    def history() -> History:
        made = History(Study.load(url, "x"), None, lambda labelled: None, wants_items=False)  # type: ignore[arg-type]
        for candidate in Study.load(url, "x").candidates():
            made.add(candidate)
        return made

    for number in range(20):
        recipe = Recipe.build("task_arithmetic", "base", {"red": {"weight": number / 32}})
        assert study.propose(recipe, None, {}) == number
        scores = {"acc": mean_scores(scored[number]), "bits": Scores(1.5, 0.1, bits)}
        assert study.finish(number, {"search": scores}, number, {})
    positions = np.sort(rng.choice(400, 100, replace=False))
    seen = {"acc": Scores(0.5, 0.2, scored[-1][positions]), "bits": Scores(1.5, 0.1, bits[positions])}
    stopped = Stopped(0.25, 3, {"acc": positions, "bits": positions})
    outcome = Outcome(20, {"search": seen}, 0.0, 0.0, 0, "w", stopped=stopped)
    refined = history().refined(outcome)["search"]
    expected = regress(scored[:20].T.astype(np.float32), seen["acc"].items, positions)
    assert expected is not None and refined["acc"].value == pytest.approx(expected.value)
    assert refined["acc"].stderr == pytest.approx(expected.stderr) and refined["acc"].stderr < 0.05
    assert refined["bits"] is seen["bits"], "ratios keep the difference estimate"
    again = history().refined(outcome)["search"]["acc"]
    assert (again.value, again.stderr) == (refined["acc"].value, refined["acc"].stderr), "to the bit"
    precise = replace(outcome, scores={"search": {**seen, "acc": replace(seen["acc"], stderr=1e-6)}})
    assert history().refined(precise)["search"]["acc"].value == 0.5, "the more precise of the two"
    whole = replace(outcome, stopped=None)
    assert history().refined(whole) is whole.scores
