"""Tests of evomerge.optimizers.cma_es."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.optimizers import Result, make
from tests.landscapes import UNIT, Landscape, search, told


def test_cma_starts_at_the_best_known_recipe_and_forms_no_generation_of_them() -> None:
    known = np.random.default_rng(0).random((60, 3))
    optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5), {"sigma0": 0.01})
    for number, x in enumerate(known):
        optimizer.tell(Result(number, x, np.array([-np.abs(x - 0.2).sum()]), None))
    best = known[np.argmin(np.abs(known - 0.2).sum(axis=1))]
    asked = np.array([optimizer.ask(number) for number in range(60, 90)])
    assert np.abs(asked - best).max() < 0.06  # sigma is still sigma0


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
        widest = max(widest, float(np.linalg.norm(optimizer._root, axis=1).max()))  # type: ignore[attr-defined]
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
    ours = [search("cma_es", land, 200, workers, {"workers": workers}).max() for land in lands]
    baseline = [search("random", land, 200).max() for land in lands]
    assert np.mean(ours) > np.mean(baseline) + 0.02
