"""Tests of evomerge.surrogate: exactness, calibration, bounds and the documented rules."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from evomerge.surrogate import features, fit, n_terms, posterior, terms_for
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
