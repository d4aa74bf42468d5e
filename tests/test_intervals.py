"""Intervals of scores: their coverage by simulation, their edge cases, and that pairing sees what is paired."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evomerge.intervals import (
    RESAMPLES,
    Interval,
    holm,
    interval,
    lead_test,
    leads,
    paired,
    resampled,
    spread,
)
from evomerge.objectives import Scores, mean_scores

Rng = np.random.Generator


def ratio(top: np.ndarray, bottom: np.ndarray) -> Scores:
    return Scores(float(top.sum() / bottom.sum()), 0.1, np.stack([top, bottom], axis=1))


def share(rng: Rng, n: int, p: float) -> Scores:
    return mean_scores((rng.random(n) < p).astype(float))


def bits_per_byte(rng: Rng, n: int) -> Scores:
    size = rng.lognormal(5, 0.7, n)
    return ratio(size * rng.normal(2, 0.3, n), size)


def perplexity(rng: Rng, n: int) -> Scores:
    loglikelihood = -rng.gamma(4, 0.5, n)
    return Scores(float(np.exp(-loglikelihood.mean())), 0.1, loglikelihood)


@pytest.mark.parametrize(
    ("make", "truth", "method"),
    [
        (lambda rng: share(rng, 12, 0.5), 0.5, "wilson"),
        (lambda rng: share(rng, 50, 0.98), 0.98, "wilson"),
        (lambda rng: share(rng, 300, 0.9), 0.9, "wilson"),
        (lambda rng: mean_scores(rng.beta(0.5, 0.5, 12)), 0.5, "bootstrap"),
        (lambda rng: mean_scores(rng.lognormal(0, 0.5, 100)), math.exp(0.125), "bootstrap"),
        (lambda rng: bits_per_byte(rng, 12), 2.0, "bootstrap"),
        (lambda rng: bits_per_byte(rng, 100), 2.0, "bootstrap"),
        (lambda rng: perplexity(rng, 50), math.exp(2), "bootstrap"),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    make: Callable[[Rng], Scores], truth: float, method: str
) -> None:
    rng = np.random.default_rng(1)
    found = [interval(make(rng)) for _ in range(600)]
    assert {i.method for i in found} == {method}
    assert 0.915 <= np.mean([i.low <= truth <= i.high for i in found]) <= 0.99


def correlated_shares(rng: Rng, n: int, p: float, changed: float) -> tuple[Scores, Scores]:
    """Two models of equal skill that differ on a share of the items."""
    b = rng.random(n) < p
    gained, lost = ~b & (rng.random(n) < changed / 2 / (1 - p)), b & (rng.random(n) < changed / 2 / p)
    return mean_scores(((b | gained) & ~lost).astype(float)), mean_scores(b.astype(float))


def correlated_ratios(rng: Rng, n: int) -> tuple[Scores, Scores]:
    size, hard = rng.lognormal(5, 0.7, n), rng.normal(2, 0.3, n)
    return ratio(size * (hard + rng.normal(0, 0.1, n)), size), ratio(size * hard, size)


@pytest.mark.parametrize(
    ("make", "widest"),
    [
        (lambda rng: correlated_shares(rng, 12, 0.7, 0.1), 1.0),
        (lambda rng: correlated_shares(rng, 300, 0.7, 0.1), 0.08),
        (lambda rng: correlated_shares(rng, 300, 0.7, 0.3), 0.14),
        (lambda rng: correlated_ratios(rng, 50), 0.08),
    ],
)
def test_paired_intervals_hold_the_truth_and_profit_from_the_pairing(
    make: Callable[[Rng], tuple[Scores, Scores]], widest: float
) -> None:
    rng = np.random.default_rng(2)
    pairs = [make(rng) for _ in range(400)]
    found = [paired(a, b) for a, b in pairs]
    assert np.mean([i.low <= 0 <= i.high for i in found]) >= 0.92
    width = np.mean([i.high - i.low for i in found])
    alone = np.mean([i.high - i.low for i in (interval(b) for _, b in pairs)])
    assert width < widest and (width < math.sqrt(2) * alone)


def test_shares_of_nothing_and_of_everything_keep_an_honest_interval() -> None:
    none, all_ = interval(mean_scores(np.zeros(20))), interval(mean_scores(np.ones(20)))
    assert (none.low, all_.high) == (0.0, 1.0)
    assert none.high == pytest.approx(0.1611, abs=1e-4) and all_.low == pytest.approx(1 - 0.1611, abs=1e-4)


def test_models_that_agree_on_every_item_may_differ_on_the_next() -> None:
    a = mean_scores(np.array([0.0, 1.0] * 10))
    found = paired(a, a)
    assert found.value == 0 and found.low < -0.1 and found.high > 0.1
    assert found.high < interval(a).high - 0.5, "not as uncertain as one score alone"


def test_one_item_has_no_interval_and_equal_items_have_an_empty_one() -> None:
    assert str(interval(mean_scores(np.array([24.0])))) == "24.0000"
    assert math.isnan(interval(mean_scores(np.array([1.0]))).high)
    equal = interval(mean_scores(np.full(5, 0.3)))
    assert equal.low == pytest.approx(0.3) and equal.high == pytest.approx(0.3)
    cost = paired(mean_scores(np.array([24.0])), mean_scores(np.array([20.0])))
    assert (cost.value, cost.method, cost.separated) == (4.0, "none", False)


def test_what_has_no_form_gets_its_standard_error() -> None:
    items = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])  # gold and guess, as for F1
    found = interval(Scores(0.66, 0.2, items))
    assert (found.method, found.low, found.high) == (
        "normal",
        pytest.approx(0.268, abs=1e-3),
        pytest.approx(1.052, abs=1e-3),
    )
    gap = paired(Scores(0.66, 0.03, np.zeros((400, 2))), Scores(0.56, 0.04, np.zeros((400, 2))))
    assert gap.method == "normal"
    assert (gap.low, gap.high) == (pytest.approx(0.002, abs=1e-3), pytest.approx(0.198, abs=1e-3))


def test_intervals_repeat_and_large_splits_are_resampled_in_parts() -> None:
    rng = np.random.default_rng(3)
    score = mean_scores(rng.normal(0, 1, 30_000))
    first = interval(score)
    assert first == interval(Scores(score.value, 0.0, score.items.copy()))
    assert (first.high - first.low) / 2 == pytest.approx(1.96 * score.stderr, rel=0.06)


def test_leads_of_many_are_the_leads_of_each_and_add_over_objectives() -> None:
    rng = np.random.default_rng(4)
    best = [share(rng, 200, 0.6), bits_per_byte(rng, 40)]
    others = [[share(rng, 200, p), ratio(best[1].items[:, 0] + 10, best[1].items[:, 1])] for p in (0.3, 0.6)]
    both = leads(others, best, [0.5, -0.5])
    for other, lead in zip(others, both, strict=True):
        alone = leads([other], best, [0.5, -0.5])[0]
        assert (alone.low, alone.high) == (pytest.approx(lead.low), pytest.approx(lead.high))
    expected = 0.5 * (others[0][0].value - best[0].value) - 0.5 * (others[0][1].value - best[1].value)
    assert both[0].value == pytest.approx(expected)
    assert both[0].separated and both[0].high < 0
    lone = paired(others[0][0], best[0])
    halved = leads([[others[0][0]]], [best[0]], [0.5])[0]
    assert (2 * halved.low, 2 * halved.high) == (pytest.approx(lone.low), pytest.approx(lone.high))


def test_an_objective_in_two_metrics_of_the_same_items_is_not_two_independent_ones() -> None:
    rng = np.random.default_rng(5)
    a, b = share(rng, 200, 0.6), share(rng, 200, 0.5)
    once, twice = leads([[a]], [b], [1.0])[0], leads([[a, a]], [b, b], [0.5, 0.5])[0]
    assert (once.low, once.high) == (pytest.approx(twice.low), pytest.approx(twice.high))


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="the same items; got 3 and 4"):
        paired(mean_scores(np.zeros(3)), mean_scores(np.zeros(4)))


def test_the_spread_of_two_scores_of_one_model() -> None:
    a = mean_scores(np.array([0.0, 1.0, 1.0]))
    assert spread(a, mean_scores(a.items.copy())) is None
    found = spread(a, mean_scores(np.array([1.0, 0.0, 0.0])))
    assert found is not None and (found.item, found.value) == (1.0, pytest.approx(1 / 3))
    swapped = spread(a, mean_scores(np.array([1.0, 0.0, 1.0])))
    assert swapped is not None and (swapped.item, swapped.value) == (1.0, 0.0)


def test_intervals_are_shown_with_their_value() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5000 [0.2500, 0.7500]"


def test_mcnemar_is_the_binomial_test_of_the_items_that_only_one_gets_right() -> None:
    a, b = np.zeros(100), np.zeros(100)
    a[:60], b[9:62] = 1, 1  # 9 won, 2 lost
    found = lead_test([mean_scores(a)], [mean_scores(b)], [1.0])
    assert (found.method, found.p_value) == ("mcnemar", pytest.approx(stats.binomtest(9, 11).pvalue))
    assert found.lead.value == pytest.approx(0.07)
    assert lead_test([mean_scores(a)], [mean_scores(a)], [1.0]).p_value == 1.0
    # The direction of the objective changes the sign of the lead, and nothing else.
    turned = lead_test([mean_scores(a)], [mean_scores(b)], [-1.0])
    assert (turned.p_value, turned.lead.value) == (found.p_value, pytest.approx(-0.07))


@pytest.mark.parametrize("kind", ["share", "bits", "both"])
def test_tests_reject_as_often_as_they_may(kind: str) -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(400):
        a, b = correlated_shares(rng, 120, 0.6, 0.3)
        size = rng.lognormal(5, 0.5, 120)
        c, d = (ratio(size * rng.normal(2, 0.3, 120), size) for _ in range(2))
        if kind == "share":
            found = lead_test([a], [b], [1.0])
        elif kind == "bits":
            found = lead_test([c], [d], [-1.0])
        else:
            found = lead_test([a, c], [b, d], [1.0, -1.0])
        rejected += found.p_value <= 0.05
    assert rejected / 400 <= 0.08
    if kind != "share":  # which is exact, and so cautious
        assert rejected / 400 >= 0.025


def test_a_clear_lead_has_the_smallest_p_value_that_resampling_can_tell() -> None:
    size = np.full(50, 100.0)
    a, b = ratio(np.arange(50) + 300.0, size), ratio(np.arange(50) + 200.0, size)
    found = lead_test([a], [b], [1.0])
    assert found.p_value == pytest.approx(2 / (RESAMPLES + 1)) and found.lead.low > 0


def test_single_numbers_cannot_be_tested() -> None:
    one = Scores(3.0, 0.0, np.array([3.0]))
    assert lead_test([one], [one], [1.0]).method == "none"
    assert math.isnan(lead_test([one], [one], [1.0]).p_value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_p_values_and_bonferroni(p_values: list[float]) -> None:
    found = holm(p_values)
    for p, q in zip(p_values, found, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12
    assert min(found) == pytest.approx(min(1.0, min(p_values) * len(p_values)))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(found)[order]) >= 0).all()


def test_holm_leaves_out_what_was_not_tested() -> None:
    assert holm([0.01, math.nan, 0.04])[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(holm([0.01, math.nan])[1])


def test_resampled_values_share_their_items() -> None:
    rng = np.random.default_rng(0)
    a, b = correlated_shares(rng, 300, 0.6, 0.1)
    drawn = resampled([a, b, a])
    assert drawn.shape == (RESAMPLES, 3)
    assert np.array_equal(drawn[:, 0], drawn[:, 2])
    gap = drawn[:, 0] - drawn[:, 1]
    assert gap.std() == pytest.approx(np.std(a.items - b.items) / np.sqrt(300), rel=0.1)
    assert drawn.mean(axis=0) == pytest.approx([a.value, b.value, a.value], abs=0.005)
    scores = [bits_per_byte(rng, 40), perplexity(rng, 40)]
    assert resampled(scores).mean(axis=0) == pytest.approx([s.value for s in scores], rel=0.03)


def test_resampled_values_without_a_form_get_noise_of_their_own() -> None:
    median = Scores(2.0, 0.5, np.arange(30.0))
    drawn = resampled([median, median])
    assert drawn.std(axis=0) == pytest.approx([0.5, 0.5], rel=0.1)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.1
    one = Scores(3.0, 0.0, np.array([3.0]))
    assert (resampled([one, one]) == 3.0).all()
    with pytest.raises(ValueError, match="same items"):
        resampled([median, one])
