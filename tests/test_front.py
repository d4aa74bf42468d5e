"""Tests of evomerge.front against brute force, Optuna's hypervolume and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume

from evomerge import front

SMALL = st.integers(0, 4).map(float)


def brute_mask(values: np.ndarray) -> np.ndarray:
    return np.array(
        [not any((other >= row).all() and (other > row).any() for other in values) for row in values], dtype=bool
    )


@settings(max_examples=150, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.integers(1, 4)), elements=SMALL))
def test_non_dominated_equals_brute_force_duplicates_included(values: np.ndarray) -> None:
    assert np.array_equal(front.non_dominated(values), brute_mask(values))


def test_rows_with_nan_are_never_on_the_front_and_dominate_nothing() -> None:
    values = [[np.nan, 9.0], [1.0, 1.0], [0.0, np.nan], [1.0, 1.0], [0.0, 1.0]]
    assert front.non_dominated(values).tolist() == [False, True, False, True, False]
    assert not front.non_dominated([[np.nan, np.nan]]).any()


@settings(max_examples=150, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(0, 7), st.integers(1, 5)), elements=SMALL))
def test_hypervolume_counts_unit_cells(values: np.ndarray) -> None:
    # Values on an integer grid: the volume is the number of unit cells that some row covers.
    cells = np.stack(np.meshgrid(*[np.arange(1, 5)] * values.shape[1]), axis=-1).reshape(-1, values.shape[1])
    covered = (values[:, None, :] >= cells[None]).all(axis=2).any(axis=0).sum() if len(values) else 0
    assert front.hypervolume(values, np.zeros(values.shape[1])) == pytest.approx(covered)


@pytest.mark.parametrize(("n", "m"), [(40, 1), (60, 2), (60, 3), (30, 4), (20, 5)])
def test_hypervolume_equals_optunas(n: int, m: int) -> None:
    values = np.random.default_rng([n, m]).standard_normal((n, m))
    reference = np.full(m, -1.0)
    expected = compute_hypervolume(-values[(values > reference).all(axis=1)], -reference)
    assert front.hypervolume(values, reference) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_ignores_nan_and_what_is_not_above_the_reference() -> None:
    assert front.hypervolume([[2.0, 3.0], [np.nan, 9.0], [9.0, 0.0]], [0.0, 0.0]) == 6.0
    assert front.hypervolume(np.empty((0, 3)), np.zeros(3)) == 0.0
    with pytest.raises(ValueError, match="reference"):
        front.hypervolume([[1.0, 2.0]], [0.0])


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 4)), elements=SMALL))
def test_contribution_is_the_volume_lost_without_the_row(values: np.ndarray) -> None:
    reference = np.zeros(values.shape[1])
    whole = front.hypervolume(values, reference)
    lost = [whole - front.hypervolume(np.delete(values, i, axis=0), reference) for i in range(len(values))]
    assert front.contributions(values, reference) == pytest.approx(np.array(lost))


def test_knee_and_weighted_pick_from_the_front_only() -> None:
    values = [[0.0, 1.0], [0.8, 0.8], [1.0, 0.0], [0.79, 0.79], [np.nan, 5.0]]
    assert front.knee(values) == 1
    assert front.weighted(values, [1.0, 0.0]) == 2
    assert front.weighted(values, [0.0, 1.0]) == 0
    with pytest.raises(ValueError, match="weights"):
        front.weighted(values, [0.0, 0.0])
    with pytest.raises(ValueError, match="empty"):
        front.knee([[np.nan, 1.0]])


def test_knee_does_not_depend_on_the_scales_of_the_objectives() -> None:
    values = np.array([[0.0, 1.0], [0.3, 0.9], [0.9, 0.3], [1.0, 0.2]])
    assert front.knee(values) == front.knee(values * [1e6, 1e-3])


def test_separated_is_paired() -> None:
    rng = np.random.default_rng(0)
    items = rng.standard_normal(400)  # items differ far more than the candidates do
    a, b = items + 0.05 + 0.1 * rng.standard_normal(400), items
    difference = front.separated(a, b)
    assert difference.separated and difference.low < 0.05 < difference.high and difference.n == 400
    assert not front.separated(a, rng.permutation(b)).separated


def test_separated_covers_at_its_level() -> None:
    rng = np.random.default_rng(1)
    wrong = sum(front.separated(rng.standard_normal(30), rng.standard_normal(30)).separated for _ in range(800))
    assert 20 <= wrong <= 62  # 40 expected, three standard deviations


def test_separated_leaves_nan_items_out_and_never_trusts_one_item() -> None:
    assert front.separated([1.0, np.nan, 2.0], [0.0, 5.0, 1.5]).n == 2
    one = front.separated([1.0, np.nan], [0.0, 1.0])
    assert (one.low, one.high, one.separated) == (-np.inf, np.inf, False)
    with pytest.raises(ValueError, match="equal item lists"):
        front.separated([1.0], [1.0, 2.0])


def test_mutually_separated_finds_the_largest_group() -> None:
    rng = np.random.default_rng(2)

    def noisy(mean: float) -> np.ndarray:
        return mean + 0.01 * rng.standard_normal(50)

    # Points 1 and 2 are one point in truth; 0 differs from them in the second objective only.
    items = [[noisy(0.5), noisy(0.9)], [noisy(0.5), noisy(0.1)], [noisy(0.5), noisy(0.1)], [noisy(0.9), noisy(0.0)]]
    assert front.mutually_separated(items) == (0, 1, 3)
    assert front.mutually_separated([]) == ()
    # The first point is too noisy to tell from anything: taking it first would leave a group of one.
    vague = [[10 * rng.standard_normal(50)], [noisy(0.1)], [noisy(0.2)]]
    assert front.mutually_separated(vague) == (1, 2)
