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


@settings(max_examples=150, deadline=None)
@given(arrays(np.float64, (9, 2), elements=st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan])))
def test_non_dominated_pairs_equal_brute_force_infinities_included(values: np.ndarray) -> None:
    assert np.array_equal(front.non_dominated(values), brute_mask(values) & ~np.isnan(values).any(axis=1))


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


@pytest.mark.parametrize(("n", "m"), [(60, 3), (40, 4), (25, 6), (12, 8)])
def test_the_sampled_hypervolume_is_the_exact_one_within_its_error(n: int, m: int) -> None:
    rng = np.random.default_rng([n, m])
    values = rng.random((n, m))
    values /= values.sum(axis=1, keepdims=True)  # a front of n points, thin in many dimensions
    exact = front.hypervolume(values, np.zeros(m))
    found = [front.sampled_hypervolume(values, np.zeros(m), seed) for seed in range(20)]
    errors = [(v.value - exact) / v.stderr for v in found]
    assert abs(np.mean(errors)) < 3 / np.sqrt(20) and 0.5 < np.std(errors) < 1.6
    assert all(v.stderr < 0.03 * exact for v in found)
    assert found[0] == front.sampled_hypervolume(values, np.zeros(m), 0)


def test_volume_is_exact_where_that_is_quick_and_sampled_elsewhere() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal((200, 5)))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    assert front.volume(values[:, :3], np.zeros(3)) == front.Volume(front.hypervolume(values[:, :3], np.zeros(3)))
    few = values[: front.FEW_POINTS]
    assert front.volume(few, np.zeros(5)) == front.Volume(front.hypervolume(few, np.zeros(5)))
    many = front.volume(values, np.zeros(5))
    assert many.stderr > 0 and "Monte Carlo" in str(many)
    assert front.sampled_hypervolume(values - 2.0, np.zeros(5)) == front.Volume(0.0)
    with pytest.raises(ValueError, match="reference"):
        front.volume(values, np.zeros(4))


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=SMALL))
def test_no_known_recipe_is_below_the_reference_and_some_reach_it(anchors: np.ndarray) -> None:
    reference = front.reference_of(anchors)
    assert reference is not None
    assert (anchors >= reference).all() and (anchors == reference).any(axis=0).all()
    assert front.reference_of(np.vstack([anchors, np.full(anchors.shape[1], np.nan)])) == pytest.approx(reference)


def test_without_known_recipes_there_is_no_reference() -> None:
    assert front.reference_of(np.empty((0, 2))) is None
    assert front.reference_of([[np.nan, 1.0]]) is None


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=SMALL), st.integers(0, 4))
def test_weakest_link_picks_the_front_point_with_the_best_worst_gain(values: np.ndarray, low: int) -> None:
    reference = np.full(values.shape[1], float(low))
    picked = front.weakest_link(values, reference)
    mask = brute_mask(values)
    assert mask[picked]
    gains = values[mask] - low
    best = gains.max(axis=0)
    span = np.where(best > 0, best, np.ptp(gains, axis=0))
    scaled = (values - low) / np.where(span > 0, span, 1.0)
    assert scaled[picked].min() == scaled[mask].min(axis=1).max()


def test_weakest_link_does_not_depend_on_units_and_is_never_an_extreme_for_nothing() -> None:
    values = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [np.nan, 2.0]])
    assert front.weakest_link(values, [0.1, 0.1]) == 1
    assert front.weakest_link(values * [1e6, 1e-3], [0.1e6, 0.1e-3]) == 1
    # From a base that is good at the first already, the second is what is lacking.
    assert front.weakest_link(values, [0.0, 0.4]) == 1
    assert front.weakest_link(values, [-2.0, 0.4]) == 2
    with pytest.raises(ValueError, match="empty"):
        front.weakest_link([[np.nan, 1.0]], [0.0, 0.0])


def test_at_least_keeps_what_reaches_every_floor() -> None:
    values = [[0.5, 0.2], [0.4, 0.9], [np.nan, 1.0]]
    assert front.at_least(values, [0.45, -np.inf]).tolist() == [True, False, False]
    assert front.at_least(values, [0.4, 0.2]).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="floors"):
        front.at_least(values, [0.4])


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 3)), elements=SMALL))
def test_membership_is_the_share_of_resamples_on_the_front(drawn: np.ndarray) -> None:
    expected = np.mean([brute_mask(values) for values in drawn], axis=0)
    found = front.membership(drawn)
    assert found == pytest.approx(expected)
    assert found.sum() >= 1 - 1e-9  # every resample has a front


def test_membership_needs_resamples() -> None:
    with pytest.raises(ValueError, match="resamples"):
        front.membership(np.zeros((3, 2)))


@settings(max_examples=80, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 3)), elements=SMALL), st.floats(0, 2))
def test_hopeful_rows_hold_the_front_and_lose_only_what_is_clearly_beaten(values: np.ndarray, error: float) -> None:
    mask = front.hopeful(values, np.full(values.shape, error))
    assert mask[brute_mask(values)].all()
    for i in np.flatnonzero(~mask):
        assert ((values - values[i]) > 4 * error * np.sqrt(2) - 1e-9).all(axis=1).any()
