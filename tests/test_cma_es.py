"""Tests of evomerge.optimizers.cma_es."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evomerge.optimizers import Optimizer, Result, make
from evomerge.optimizers.cma_es import CmaEs
from tests.landscapes import UNIT, Landscape, search, told


def told_foreign(optimizer: Optimizer, points: np.ndarray, score: Callable[[np.ndarray], float]) -> None:
    for number, x in enumerate(points):
        optimizer.tell(Result(10_000 + number, x, np.array([score(x)]), None))


def towards(target: float | np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda x: -float(((x - target) ** 2).sum())


# ------------------------------------------------------------------------------------- the start


def test_it_starts_at_the_best_of_a_few_known_recipes_and_forms_no_generation_of_them() -> None:
    known = np.random.default_rng(0).random((14, 3))
    optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5), {"sigma0": 0.01})
    told_foreign(optimizer, known, towards(0.2))
    best = known[np.argmin(((known - 0.2) ** 2).sum(axis=1))]
    asked = np.array([optimizer.ask(number) for number in range(30)])
    assert np.abs(asked - best).max() < 0.06  # sigma is still sigma0


@pytest.mark.parametrize("dim", [4, 104])
def test_many_known_results_set_the_mean_and_the_covariance(dim: int) -> None:
    rng = np.random.default_rng(0)
    known = rng.random((40 * dim, dim))
    known[:, 1] = np.clip(1 - known[:, 0] + 0.02 * rng.standard_normal(len(known)), 0, 1)
    optimizer = make("cma_es", dim, UNIT[:1], 0, np.full(dim, 0.5))
    told_foreign(optimizer, known[:1000], lambda x: -abs(float(x[2]) - 0.6))
    best = known[:1000][np.argsort(np.abs(known[:1000, 2] - 0.6), kind="stable")[: min(4 * dim, 100)]]
    normal = _direction(optimizer).normal
    assert normal.mean == pytest.approx(best.mean(axis=0))
    if dim == 4:
        covariance = normal.root @ normal.root.T
        assert covariance == pytest.approx(np.cov(best.T, bias=True) + 0.01 * np.eye(4))
        assert covariance[0, 1] < -0.05  # the valley along which the known ones lie
    else:
        assert normal.root == pytest.approx(np.sqrt(best.var(axis=0) + 0.01))


def test_the_covariance_start_pays_on_a_narrow_valley() -> None:
    """Known results along a diagonal ridge: the first points follow it instead of leaving it in all directions."""
    rng = np.random.default_rng(1)
    along = rng.random(200)
    known = np.clip(along[:, None] + 0.01 * rng.standard_normal((200, 6)), 0, 1)
    valley = lambda x: -float(((x - x.mean()) ** 2).sum() * 20 + (x.mean() - 0.4) ** 2)  # noqa: E731
    warm, cold = (make("cma_es", 6, UNIT[:1], 0, np.full(6, 0.9)) for _ in range(2))
    told_foreign(warm, known, valley)
    warm_scores = [valley(x) for x in told(warm, valley, 40)]
    cold_scores = [valley(x) for x in told(cold, valley, 40)]
    assert np.median(warm_scores) > 0.5 * np.median(cold_scores)


# ------------------------------------------------------------------------------------- own and foreign results


def _direction(optimizer: Optimizer, index: int = 0) -> Any:
    assert isinstance(optimizer, CmaEs)
    return optimizer._directions[index]


def test_cma_recognises_its_own_points_after_rounding() -> None:
    exact, rounded = (make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5)) for _ in range(2))
    for number in range(40):
        a, b = exact.ask(number), rounded.ask(number)
        assert np.abs(a - b).max() < 0.03  # a point taken for a foreign one would become the centre
        exact.tell(Result(number, a, np.array([a[0]]), None))
        rounded.tell(Result(number, np.round(b, 3), np.array([b[0]]), None))


def test_cma_never_ends_on_a_flat_or_a_solved_landscape() -> None:
    for score in (lambda x: 0.0, lambda x: -float(((x - 0.5) ** 2).sum())):
        points = np.array(told(make("cma_es", 2, UNIT[:1], 0, np.full(2, 0.4)), score, 900))
        assert len(np.unique(points, axis=0)) == 900
        assert ((points >= 0) & (points <= 1)).all()
    # The solved one has restarted: it looks far away again after it converged.
    away = np.abs(points - 0.5).max(axis=1)
    converged = int(np.flatnonzero(away < 0.003)[0])
    assert away[converged:].max() > 0.3


def test_cma_steps_never_outgrow_the_box() -> None:
    optimizer = make("cma_es", 2, UNIT[:1], 0, np.full(2, 0.5), {"sigma0": 0.9})
    widest = 0.0
    for number in range(1500):  # the corners are best: without a limit the steps grow to hundreds of boxes
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, np.abs(x - 0.5).sum(keepdims=True), None))
        widest = max(widest, float(_direction(optimizer).normal.deviations.max()))
    assert widest <= 1 + 1e-9


def test_cma_weights_choose_the_trade_off() -> None:
    found = []
    for weights in ({"a": 1.0}, {"b": 1.0}):
        optimizer = make("cma_es", 2, UNIT, 0, np.full(2, 0.5), {"weights": weights})
        for number in range(150):
            x = optimizer.ask(number)
            values = np.array([-((x - 0.2) ** 2).sum(), -((x - 0.8) ** 2).sum()])
            optimizer.tell(Result(number, x, values, None))
        found.append(np.mean([optimizer.ask(n) for n in range(150, 170)]))
    assert found[0] == pytest.approx(0.2, abs=0.1) and found[1] == pytest.approx(0.8, abs=0.1)


def test_cma_balances_objectives_of_different_scale_by_default() -> None:
    optimizer = make("cma_es", 1, UNIT, 0, np.full(1, 0.5))
    for number in range(120):
        x = optimizer.ask(number)
        values = np.array([-1000 * (x[0] - 0.2) ** 2, -0.001 * (x[0] - 0.8) ** 2])
        optimizer.tell(Result(number, x, values, None))
    assert np.mean([optimizer.ask(n) for n in range(120, 150)]) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("workers", [1, 8])
def test_cma_beats_random_on_a_noisy_quadratic_of_12_dimensions(workers: int) -> None:
    lands = [Landscape(12, 1, seed) for seed in range(5)]
    ours = [search("cma_es", land, 200, workers).max() for land in lands]
    baseline = [search("random", land, 200).max() for land in lands]
    assert np.mean(ours) > np.mean(baseline) + 0.02
