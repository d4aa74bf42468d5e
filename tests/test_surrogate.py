"""Tests of evomerge.surrogate: exactness, calibration, bounds and the documented rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from evomerge.front import non_dominated
from evomerge.surrogate import features, fit, n_terms, nearness, posterior, terms_for
from tests.landscapes import Landscape


def quadratic(x: np.ndarray) -> np.ndarray:
    z = x - np.array([0.3, 0.6, 0.5])
    return np.asarray(1.5 - 6 * z[:, 0] ** 2 - 3 * z[:, 1] ** 2 - 2 * z[:, 0] * z[:, 1] - z[:, 2])


def test_an_exact_quadratic_is_found_again() -> None:
    rng = np.random.default_rng(0)
    x, test = rng.random((60, 3)), rng.random((200, 3))
    mean, sd = fit(x, 100 + 7 * quadratic(x)).predict(test)
    assert np.abs(mean - 100 - 7 * quadratic(test)).max() < 0.1
    assert sd.max() < 0.2


def test_a_logit_quadratic_is_found_from_binomial_scores() -> None:
    rng = np.random.default_rng(1)
    x, test = rng.random((30, 3)), rng.random((500, 3))
    scores = rng.binomial(400, expit(quadratic(x))) / 400
    model = fit(x, scores, np.sqrt(scores * (1 - scores) / 400), lower=0.0, upper=1.0)
    truth = expit(quadratic(test))
    residual = model.predict(test)[0] - truth
    assert model.terms == "full" and model.kind == "logit"
    assert 1 - residual.var() / truth.var() > 0.93  # search.md 2.7 measured 0.965


def test_the_uncertainty_is_calibrated() -> None:
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(40):
        x, test = rng.random((40, 3)), rng.random((20, 3))
        scores = rng.binomial(200, expit(quadratic(x))) / 200
        stderr = np.sqrt(np.maximum(scores * (1 - scores), 1e-3) / 200)
        mean, sd = fit(x, scores, stderr, lower=0.0, upper=1.0).predict(test)
        inside.append(np.abs(mean - expit(quadratic(test))) < 1.96 * sd)
    assert 0.88 <= np.mean(inside) <= 0.995


def test_unknown_noise_is_estimated_from_the_residuals() -> None:
    rng = np.random.default_rng(3)
    x, test = rng.random((80, 3)), rng.random((50, 3))
    noisy = expit(quadratic(x)) + 0.05 * rng.standard_normal(80)
    _, sd = fit(x, np.clip(noisy, 0, 1), lower=0.0, upper=1.0).predict(test)
    assert 0.01 < np.median(sd) < 0.06


def test_scores_of_exactly_0_and_1_and_beyond_are_taken() -> None:
    x = np.random.default_rng(4).random((20, 2))
    scores = np.where(x[:, 0] > 0.5, 1.0, 0.0)
    mean, sd = fit(x, scores, np.zeros(20), lower=0.0, upper=1.0).predict(x)
    beyond = fit(x, scores * 1.3, np.zeros(20), lower=0.0, upper=1.0).predict(x)
    assert np.array_equal(mean, beyond[0])  # no score is better than the bound
    assert np.isfinite(mean).all() and np.isfinite(sd).all()
    assert (mean > 0).all() and (mean < 1).all()
    assert mean[x[:, 0] > 0.7].min() > mean[x[:, 0] < 0.3].max()


def test_bounds_other_than_0_and_1_are_kept() -> None:
    x = np.random.default_rng(5).random((20, 1))
    model = fit(x, -10 + 20 * expit(6 * x[:, 0] - 3), lower=-10.0, upper=10.0)
    far = model.predict(np.array([[-3.0], [4.0]]))[0]
    assert far.min() > -10 and far.max() < 10


def test_precise_points_count_more() -> None:
    x = np.full((2, 1), 0.5)
    mean, _ = fit(x, [0.2, 0.8], [0.001, 0.3], lower=0.0, upper=1.0).predict([[0.5]])
    assert mean[0] < 0.3


def test_unknown_errors_count_as_the_median() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.random((10, 2)), rng.random(10)
    stderr = np.full(10, 0.1)
    partly = stderr.copy()
    partly[3] = np.nan
    assert np.array_equal(fit(x, y, stderr).coefficients, fit(x, y, partly).coefficients)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_points_than_coefficients_give_a_finite_model(n: int) -> None:
    mean, sd = fit(np.full((n, 4), 0.5), np.full(n, 0.7), lower=0.0, upper=1.0).predict(np.eye(4))
    assert np.isfinite(mean).all() and np.isfinite(sd).all()


def test_the_rule_for_the_terms() -> None:
    assert [n_terms(3, t) for t in ("linear", "diagonal", "full")] == [4, 7, 10]
    assert [terms_for(dim) for dim in (1, 26, 27)] == ["full", "full", "diagonal"]
    assert features(np.random.default_rng(0).random((5, 3)), "full").shape == (5, 10)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="fit together"):
        fit(np.zeros((3, 2)), [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        fit(np.zeros((2, 2)), [1.0, np.nan])
    with pytest.raises(ValueError, match="stderr"):
        fit(np.zeros((2, 2)), [1.0, 2.0], [0.1])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_bound_gives_a_softplus_link_that_keeps_it(sign: float) -> None:
    rng = np.random.default_rng(7)
    x, test = rng.random((60, 3)), rng.random((200, 3))
    truth = sign * np.logaddexp(0.0, 2 * quadratic(test))
    bound = {"lower": 0.0} if sign > 0 else {"upper": 0.0}
    model = fit(x, sign * np.logaddexp(0.0, 2 * quadratic(x)) + 0.01 * rng.standard_normal(60), **bound)
    mean, sd = model.predict(test)
    assert model.kind == "softplus" and (sd > 0).all()
    assert (sign * mean >= 0).all() and (sign * model.predict(test * 9 - 4)[0] >= 0).all()
    assert 1 - (mean - truth).var() / truth.var() > 0.97
    better = model.hopeful(test, 1.0)
    assert (better > mean).all()  # hope is upwards on either side


def test_broken_candidates_do_not_hide_the_others() -> None:
    rng = np.random.default_rng(8)
    x, test = rng.random((60, 2)), rng.random((100, 2)) * 0.8
    loss = 2 + 3 * ((x - 0.4) ** 2).sum(axis=1)
    broken = loss.copy()
    broken[x[:, 0] > 0.9] = 1e5
    model = fit(x, -broken, upper=0.0)
    truth = -(2 + 3 * ((test - 0.4) ** 2).sum(axis=1))
    assert np.corrcoef(model.predict(test)[0], truth)[0, 1] > 0.8


@pytest.mark.parametrize("terms", ["linear", "diagonal", "full"])
@pytest.mark.parametrize("bounds", [(None, None), (0.0, 1.0), (0.0, None), (None, 2.0)])
def test_the_gradient_is_that_of_the_prediction(terms: str, bounds: tuple[float | None, float | None]) -> None:
    rng = np.random.default_rng(9)
    x = rng.random((30, 3))
    model = fit(x, expit(quadratic(x)), lower=bounds[0], upper=bounds[1], terms=terms)  # type: ignore[arg-type]
    at, step = rng.random(3), 1e-5
    numeric = [
        (model.mean((at + step * e)[None]) - model.mean((at - step * e)[None]))[0] / (2 * step) for e in np.eye(3)
    ]
    assert model.gradient(at) == pytest.approx(np.array(numeric), abs=1e-6)


def test_posterior_means_choose_better_than_scores() -> None:
    raw, shrunk, inside = [], [], []
    for seed in range(30):
        land, rng = Landscape(4, 1, seed, items=100), np.random.default_rng([seed, 8])
        x = np.clip(land.best[0] + rng.normal(0, 0.25, (60, 4)), 0, 1)
        told = [land.score(number, point) for number, point in enumerate(x)]
        values = np.array([r.values[0] for r in told if r.values is not None])
        stderr = np.array([r.stderr[0] for r in told if r.stderr is not None])
        truth = np.array([land.true(point)[0] for point in x])
        mean, sd = posterior(x, values, stderr, 0.0, 1.0)
        raw.append(truth[values.argmax()])
        shrunk.append(truth[mean.argmax()])
        inside.append(np.abs(mean - truth) < 1.96 * sd)
    assert np.mean(shrunk) > np.mean(raw) + 0.005
    assert 0.85 < np.mean(inside) < 1


def test_a_posterior_needs_points_and_noise() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 3)), rng.random(40)
    for points, values, stderr in ((x[:9], y[:9], np.full(9, 0.1)), (x, y, None), (x, y, np.zeros(40))):
        assert np.array_equal(posterior(points, values, stderr)[0], values)


def test_a_precise_score_moves_less_than_a_noisy_one() -> None:
    rng = np.random.default_rng(1)
    x = rng.random((40, 2))
    y, stderr = expit(3 * x[:, 0]), np.full(40, 0.05)
    y[:2], stderr[0] = 0.2, 0.001
    moved = np.abs(posterior(x, y, stderr, 0.0, 1.0)[0] - y)
    assert moved[0] < 0.02 and moved[1] > 5 * moved[0]


# ------------------------------------------------------------------------------------- coordinates that were split

TIES = np.repeat(np.eye(3), (3, 2, 1), axis=0)  # six coordinates, of which three were one, two were one, one is alone


def split(x: np.ndarray) -> np.ndarray:
    return x @ TIES / TIES.sum(axis=0)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, 1.0), (0.0, None), (None, 2.0)])
@pytest.mark.parametrize("terms", ["diagonal", "full"])
def test_the_gradient_with_ties_is_that_of_the_prediction(
    bounds: tuple[float | None, float | None], terms: str
) -> None:
    rng = np.random.default_rng(10)
    x = rng.random((60, 6))
    y = expit(quadratic(split(x)) + x[:, 0] - 2 * (x[:, 4] - 0.4) ** 2)
    model = fit(x, y, lower=bounds[0], upper=bounds[1], ties=TIES, terms=terms)  # type: ignore[arg-type]
    assert len(model.coefficients) == n_terms(3, model.terms) + 2 * 6
    for at in rng.random((3, 6)):
        step = 1e-5 * np.eye(6)
        numeric = (model.mean(at + step) - model.mean(at - step)) / 2e-5
        assert model.gradient(at) == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, 1.0)])
def test_without_deviations_ties_change_nothing(bounds: tuple[float | None, float | None]) -> None:
    rng = np.random.default_rng(11)
    z, test = rng.random((40, 3)), rng.random((50, 3))
    y, stderr = np.clip(expit(quadratic(z)) + 0.02 * rng.standard_normal(40), 0, 1), np.full(40, 0.02)
    coarse = fit(z, y, stderr, lower=bounds[0], upper=bounds[1])
    tied = fit(z @ TIES.T, y, stderr, lower=bounds[0], upper=bounds[1], ties=TIES)
    assert tied.coefficients[: len(coarse.coefficients)] == pytest.approx(coarse.coefficients, abs=1e-6)
    assert np.abs(tied.coefficients[len(coarse.coefficients) :]).max() < 1e-9
    for one, other in zip(tied.predict(test @ TIES.T), coarse.predict(test), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    apart = test @ TIES.T
    apart[:, 0] += 0.3  # nothing is known of that: the same mean but for the shared coordinate, and less certain
    apart[:, 1] -= 0.3
    assert (tied.link(apart)[1] > tied.link(test @ TIES.T)[1]).all()
    assert tied.mean(apart) == pytest.approx(coarse.mean(test), abs=1e-6)


def test_what_a_deviation_does_is_learned_beside_the_coarse_model() -> None:
    rng = np.random.default_rng(12)
    x = np.vstack([rng.random((30, 3)) @ TIES.T, rng.random((60, 6))])
    test = rng.random((200, 6))

    def truth(x: np.ndarray) -> np.ndarray:
        return quadratic(split(x)) + 2.0 * (x[:, 0] - x[:, 1])

    y = truth(x) + 0.05 * rng.standard_normal(90)
    plain = fit(split(x), y, np.full(90, 0.05))
    tied = fit(x, y, np.full(90, 0.05), ties=TIES)
    error, coarse = ((m - truth(test)).var() for m in (tied.mean(test), plain.mean(split(test))))
    assert error < 0.2 * coarse


def test_a_coordinate_that_is_alone_has_no_deviation() -> None:
    x = np.random.default_rng(0).random((20, 6))
    columns = features(x, "full", TIES)
    lone = n_terms(3, "full") + np.array([5, 11])  # of the sixth coordinate, linear and square
    assert np.abs(columns[:, lone]).max() < 1e-12


def test_posterior_means_with_ties_and_focus_beat_the_scores() -> None:
    rng = np.random.default_rng(13)
    raw, tied, focused = [], [], []
    for _ in range(10):
        x = np.vstack([rng.random((40, 3)) @ TIES.T, rng.random((40, 6))])
        truth = expit(quadratic(split(x)) + x[:, 0] - x[:, 1])
        y, stderr = np.clip(truth + 0.04 * rng.standard_normal(80), 0, 1), np.full(80, 0.04)
        raw.append(((y - truth) ** 2).mean())
        mean, sd = posterior(x, y, stderr, 0.0, 1.0, TIES)
        tied.append(((mean - truth) ** 2).mean())
        near = nearness(y[:, None])
        focused.append((near * (posterior(x, y, stderr, 0.0, 1.0, TIES, near)[0] - truth) ** 2).sum() / near.sum())
        assert (sd < stderr).all()
    assert np.mean(tied) < 0.5 * np.mean(raw)
    assert np.mean(focused) < 0.7 * np.mean(raw)


def test_posterior_with_ties_needs_points_for_the_coarse_model_only() -> None:
    rng = np.random.default_rng(14)
    x, y = rng.random((12, 6)), rng.random(12)
    assert not np.array_equal(posterior(x, y, np.full(12, 0.2), ties=TIES)[0], y)  # 2 * 3 + 4 = 10
    assert np.array_equal(posterior(x, y, np.full(12, 0.2))[0], y)


# ------------------------------------------------------------------------------------- noise that items share


def test_calm_residuals_are_believed_down_to_a_tenth() -> None:
    rng = np.random.default_rng(15)
    x, test = rng.random((60, 3)), rng.random((100, 3))
    eta = quadratic(x)
    sds = {}
    for share in (1.0, 0.3, 0.1, 0.01):  # of the stated standard error that really varies
        y = eta + share * 0.3 * rng.standard_normal(60)
        sds[share] = float(np.mean(fit(x, y, np.full(60, 0.3)).predict(test)[1]))
    assert sds[0.3] < 0.6 * sds[1.0]
    assert sds[0.01] > 0.15 * sds[1.0]  # sqrt(0.1) is the least that the noise shrinks to; the prior's part shrinks too


# ------------------------------------------------------------------------------------- nearness to the front

MATRICES = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.lists(st.integers(-20, 20), min_size=m, max_size=m), min_size=1, max_size=25)
)
QUIET = settings(deadline=None, derandomize=True, max_examples=60)


@QUIET
@given(MATRICES)
def test_nearness_is_1_on_the_front_and_falls_with_dominance(rows: list[list[int]]) -> None:
    y = np.array(rows, dtype=np.float64)
    near = nearness(y)
    assert near.shape == (len(y),) and (near >= np.exp(-6.0) - 1e-12).all() and (near <= 1.0).all()
    assert (near[non_dominated(y)] == 1.0).all()
    for a, one in enumerate(y):
        for b, other in enumerate(y):
            if (one >= other).all():
                assert near[a] >= near[b] - 1e-12


@QUIET
@given(MATRICES, st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.integers(-50, 50))
def test_nearness_does_not_depend_on_units(rows: list[list[int]], scales: list[float], shift: int) -> None:
    y = np.array(rows, dtype=np.float64)
    moved = y * np.array(scales[: y.shape[1]]) + shift
    assert nearness(moved) == pytest.approx(nearness(y), abs=1e-4)


def test_half_of_the_points_behind_the_front_count_at_most_as_the_median() -> None:
    near = nearness(np.arange(11.0)[:, None])
    assert near[10] == 1.0 and near[4] == pytest.approx(np.exp(-2 * 6 / 5.5)) and near[0] < np.exp(-3)
    assert nearness(np.full((5, 2), 0.3)) == pytest.approx(np.ones(5))


def test_focus_finds_the_optimum_of_what_is_not_a_quadratic() -> None:
    """Scores fall six times as fast on one side, so a fit to all points puts the best too far on the other."""
    lost: dict[bool, list[float]] = {True: [], False: []}
    best, pool = np.array([0.3, 0.45, 0.6]), np.random.default_rng(1).random((4000, 3))

    def truth(x: np.ndarray) -> np.ndarray:
        away = x - best
        return np.asarray(-np.where(away > 0, 6 * away**2, away**2).mean(axis=-1) - 4 * np.maximum(away[:, 0] - 0.2, 0))

    for seed in range(20):
        rng = np.random.default_rng([seed, 16])
        x = np.vstack([rng.random((30, 3)), np.clip(best + 0.2 * rng.standard_normal((30, 3)), 0, 1)])
        y = truth(x) + 0.02 * rng.standard_normal(60)
        for focused in (True, False):
            model = fit(x, y, np.full(60, 0.02), focus=nearness(y[:, None]) if focused else None)
            lost[focused].append(-float(truth(pool[[model.mean(pool).argmax()]])[0]))
    assert np.mean(lost[True]) < 0.5 * np.mean(lost[False])  # measured: 0.011 against 0.050
