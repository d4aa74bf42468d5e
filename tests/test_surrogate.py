"""Tests of evomerge.surrogate: exactness, calibration, bounds and the documented rules."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from evomerge.surrogate import features, fit, n_terms, terms_for


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
