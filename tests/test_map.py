"""Tests of evomerge.optimizers.map."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.special import expit

from evomerge.optimizers import Goal, Result, make
from tests.landscapes import UNIT, Landscape, told, volumes


def test_map_stays_inside_the_box_that_the_data_cover() -> None:
    optimizer = make("map", 2, UNIT, 0, np.full(2, 0.3), {"design": 12})
    rng = np.random.default_rng(0)
    for number in range(40):
        x = 0.2 + 0.2 * rng.random(2)  # everything promising lies outside
        optimizer.tell(Result(number, x, x, np.full(2, 0.01)))
    asked = np.array([optimizer.ask(number) for number in range(40, 80)])
    assert (asked >= 0.2).all() and (asked <= 0.4).all()  # the hull, not a hair beyond
    assert asked.max() > 0.38


def test_map_spreads_parallel_proposals() -> None:
    land = Landscape(3, 2, 0)
    optimizer = make("map", 3, UNIT, 0, np.full(3, 0.3), {"explore": 0.0})
    rng = np.random.default_rng(1)
    for number in range(40):
        optimizer.tell(land.score(number, rng.random(3)))
    pending: list[np.ndarray] = []
    for number in range(40, 52):
        pending.append(optimizer.ask(number, pending))
    gaps = [np.abs(a - b).max() for i, a in enumerate(pending) for b in pending[:i]]
    assert min(gaps) >= 0.005
    truth = np.array([land.true(x) for x in pending])
    assert np.ptp(truth, axis=0).min() > 0.1  # along the front, not one point of it


def test_map_does_not_repeat_an_experiment() -> None:
    optimizer = make("map", 1, UNIT[:1], 0, np.full(1, 0.5), {"explore": 0.0, "optimism": 0.0})
    told(optimizer, lambda x: float(expit(2 - 20 * (x[0] - 0.4) ** 2)), 12)
    known = [float(x[0]) for x in told(optimizer, lambda x: float(expit(2 - 20 * (x[0] - 0.4) ** 2)), 1, 12)]
    for number in range(13, 25):
        x = told(optimizer, lambda x: float(expit(2 - 20 * (x[0] - 0.4) ** 2)), 1, number)[0]
        assert min(abs(float(x[0]) - k) for k in known) >= 0.003
        known.append(float(x[0]))


def test_map_finds_one_objectives_optimum() -> None:
    optimizer = make("map", 3, UNIT[:1], 0, np.full(3, 0.9))
    points = told(optimizer, lambda x: float(expit(2 - 20 * ((x - 0.35) ** 2).sum())), 40)
    assert np.abs(np.median(points[-12:], axis=0) - 0.35).max() < 0.08


def test_map_asks_are_fast_enough_for_a_busy_search() -> None:
    land = Landscape(12, 4, 0)
    goals = [Goal(str(j), 0.0, 1.0) for j in range(4)]
    optimizer = make("map", 12, goals, 0, np.full(12, 0.3), {"explore": 0.0})
    rng = np.random.default_rng(0)
    for number in range(300):
        optimizer.tell(land.score(number, rng.random(12) * rng.random()))
    times = []
    for number in range(300, 306):
        begin = time.process_time()
        x = optimizer.ask(number)
        times.append(time.process_time() - begin)
        optimizer.tell(land.score(number, x))
    assert min(times) < 0.15  # measured 0.06 s; the best of six, since the machine may be busy


@pytest.mark.parametrize(("dim", "workers"), [(3, 1), (12, 1), (12, 8)])
def test_map_beats_random_in_true_hypervolume_at_60(dim: int, workers: int) -> None:
    ours, baseline = volumes("map", dim, 60, 5, workers), volumes("random", dim, 60, 5)
    assert ours.mean() > 1.02 * baseline.mean()
    if dim == 12:
        assert ours.mean() > 1.4 * baseline.mean()
