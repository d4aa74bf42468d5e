"""Tests of the optimizers on Optuna's samplers: nsga2, nsga3, tpe and gp."""

from __future__ import annotations

import numpy as np

from evomerge.optimizers import Result, make
from tests.landscapes import UNIT, told, volumes


def test_nsga2_breeds_from_the_elite_after_one_generation() -> None:
    optimizer = make("nsga2", 4, UNIT[:1], 0, np.full(4, 0.5), {"population": 10})
    points = np.array(told(optimizer, lambda x: -float(((x - 0.3) ** 2).sum()), 150))
    distance = ((points - 0.3) ** 2).sum(axis=1)
    assert distance[-30:].mean() < 0.3 * distance[:10].mean()


def test_tpe_forgets_what_left_the_window() -> None:
    rng = np.random.default_rng(0)
    history = [Result(n, x := rng.random(2), -((x - 0.3) ** 2).sum(keepdims=True), None) for n in range(40)]
    whole, tail = (make("tpe", 2, UNIT[:1], 0, np.full(2, 0.5), {"window": 20}) for _ in range(2))
    for result in history:
        whole.tell(result)
    for result in history[20:]:
        tail.tell(result)
    assert np.array_equal(whole.ask(40), tail.ask(40))


def test_tpe_avoids_pending_points() -> None:
    optimizer = make("tpe", 1, UNIT[:1], 0, np.full(1, 0.5))
    told(optimizer, lambda x: -abs(float(x[0]) - 0.5), 60)
    free = np.array([optimizer.ask(n)[0] for n in range(100, 115)])
    taken = [np.array([v]) for v in np.linspace(0.47, 0.53, 15)]
    crowded = np.array([optimizer.ask(n, taken)[0] for n in range(100, 115)])
    assert np.mean(np.abs(crowded - 0.5)) > np.mean(np.abs(free - 0.5))


def test_tpe_beats_random_in_true_hypervolume() -> None:
    assert volumes("tpe", 12, 60, 3).mean() > 1.1 * volumes("random", 12, 60, 3).mean()
