"""Tests of evomerge.optimum: the best point of fitted surrogates."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.optimum import optimum
from evomerge.surrogate import Quadratic, fit

LOW, HIGH = np.zeros(2), np.ones(2)


def peaks(*centres: float) -> list[Quadratic]:
    """One surrogate per centre c: 1 - |x - c|^2."""
    x = np.random.default_rng(0).random((60, 2))
    return [fit(x, 1 - ((x - c) ** 2).sum(axis=1)) for c in centres]


def test_preferences_move_the_point_along_the_front() -> None:
    models = peaks(0.2, 0.8)
    for weight in (0.0, 0.3, 0.5, 1.0):
        x, values, sd = optimum(models, [1 - weight, weight], LOW, HIGH, 0)
        assert x == pytest.approx(np.full(2, 0.2 + 0.6 * weight), abs=0.02)  # the weighted mean of the peaks
        assert values == pytest.approx([1 - 2 * (x[0] - c) ** 2 for c in (0.2, 0.8)], abs=0.02)
        assert sd.shape == (2,) and (sd < 0.05).all()


def test_objectives_are_scaled_before_they_are_weighed() -> None:
    x = np.random.default_rng(0).random((60, 2))
    models = [fit(x, s * (1 - ((x - c) ** 2).sum(axis=1))) for s, c in ((1.0, 0.2), (1000.0, 0.8))]
    assert optimum(models, [1, 1], LOW, HIGH, 0)[0] == pytest.approx([0.5, 0.5], abs=0.02)


def test_without_preferences_the_weakest_objective_counts() -> None:
    x, values, _ = optimum(peaks(0.1, 0.5, 0.9), None, LOW, HIGH, 0)
    assert x == pytest.approx([0.5, 0.5], abs=0.02)
    assert values[0] == pytest.approx(values[2], abs=0.02)


def test_floors_are_kept_and_the_box_too() -> None:
    models = peaks(0.2, 0.8)
    x, values, _ = optimum(models, [1, 0], LOW, HIGH, 0, [-np.inf, 0.82])
    assert values[1] == pytest.approx(0.82, abs=1e-3)
    assert x == pytest.approx([0.5, 0.5], abs=0.02)
    x, _, _ = optimum(models, [1, 0], LOW + 0.4, HIGH, 0)
    assert x == pytest.approx([0.4, 0.4])
    assert optimum(models, None, LOW + 0.3, LOW + 0.3, 0)[0] == pytest.approx([0.3, 0.3])


def test_where_nothing_is_feasible_the_least_violation_wins() -> None:
    x, _, _ = optimum(peaks(0.2, 0.8), [1, 0], LOW, HIGH, 0, [-np.inf, 5.0])
    assert x == pytest.approx([0.8, 0.8], abs=0.06)


def test_the_answer_is_the_same_every_time() -> None:
    first, again = (optimum(peaks(0.2, 0.8), [1, 2], LOW, HIGH, 3)[0] for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("preferences", [[0, 0], [1, -1], [1], [1, float("nan")]])
def test_wrong_preferences_are_refused(preferences: list[float]) -> None:
    with pytest.raises(ValueError, match="preferences"):
        optimum(peaks(0.2, 0.8), preferences, LOW, HIGH, 0)
