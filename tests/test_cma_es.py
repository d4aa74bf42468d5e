"""Tests of evomerge.optimizers.cma_es."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from evomerge.errors import ConfigError
from evomerge.optimizers import Facts, Goal, Optimizer, Result, check_optimizer, make
from evomerge.optimizers._cma import Normal, Run, isotropic, margin
from evomerge.optimizers.cma_es import CmaEs, spread_weights
from tests.landscapes import UNIT, Landscape, search, told


def told_foreign(optimizer: Optimizer, points: np.ndarray, score: Callable[[np.ndarray], float]) -> None:
    for number, x in enumerate(points):
        optimizer.tell(Result(10_000 + number, x, np.array([score(x)]), None))


def towards(target: float | np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda x: -float(((x - target) ** 2).sum())


# ------------------------------------------------------------------------------------- the start


def test_it_starts_at_the_best_of_a_few_known_recipes_and_forms_no_generation_of_them() -> None:
    known = np.random.default_rng(0).random((14, 3))
    optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5), {"sigma0": 0.01})
    told_foreign(optimizer, known, towards(0.2))
    best = known[np.argmin(((known - 0.2) ** 2).sum(axis=1))]
    asked = np.array([optimizer.ask(number) for number in range(30)])
    assert np.abs(asked - best).max() < 0.06  # sigma is still sigma0


@pytest.mark.parametrize("dim", [4, 104])
def test_many_known_results_set_the_mean_and_the_covariance(dim: int) -> None:
    rng = np.random.default_rng(0)
    known = rng.random((40 * dim, dim))
    known[:, 1] = np.clip(1 - known[:, 0] + 0.02 * rng.standard_normal(len(known)), 0, 1)
    optimizer = make("cma_es", dim, UNIT[:1], 0, np.full(dim, 0.5))
    told_foreign(optimizer, known[:1000], lambda x: -abs(float(x[2]) - 0.6))
    best = known[:1000][np.argsort(np.abs(known[:1000, 2] - 0.6), kind="stable")[: min(4 * dim, 100)]]
    normal = _direction(optimizer).normal
    assert normal.mean == pytest.approx(best.mean(axis=0))
    if dim == 4:
        covariance = normal.root @ normal.root.T
        assert covariance == pytest.approx(np.cov(best.T, bias=True) + 0.01 * np.eye(4))
        assert covariance[0, 1] < -0.05  # the valley along which the known ones lie
    else:
        assert normal.root == pytest.approx(np.sqrt(best.var(axis=0) + 0.01))


def test_the_covariance_start_pays_on_a_narrow_valley() -> None:
    """Known results along a diagonal ridge: the first points follow it instead of leaving it in all directions."""
    rng = np.random.default_rng(1)
    along = rng.random(200)
    known = np.clip(along[:, None] + 0.01 * rng.standard_normal((200, 6)), 0, 1)
    valley = lambda x: -float(((x - x.mean()) ** 2).sum() * 20 + (x.mean() - 0.4) ** 2)  # noqa: E731
    warm, cold = (make("cma_es", 6, UNIT[:1], 0, np.full(6, 0.9)) for _ in range(2))
    told_foreign(warm, known, valley)
    warm_scores = [valley(x) for x in told(warm, valley, 40)]
    cold_scores = [valley(x) for x in told(cold, valley, 40)]
    assert np.median(warm_scores) > 0.5 * np.median(cold_scores)


# ------------------------------------------------------------------------------------- own and foreign results


def _direction(optimizer: Optimizer, index: int = 0) -> Any:
    assert isinstance(optimizer, CmaEs)
    return optimizer._directions[index]


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
    """The corners are best and results arrive late: the steps grow and grow."""
    optimizer = make("cma_es", 2, UNIT[:1], 3, np.full(2, 0.5), {"sigma0": 0.5})
    rng, widest = np.random.default_rng(3), 0.0
    flying: list[tuple[int, np.ndarray]] = []
    for number in range(2000):
        flying.append((number, optimizer.ask(number)))
        if len(flying) >= 64:
            done, x = flying.pop(int(rng.integers(64)))
            optimizer.tell(Result(done, x, np.abs(x - 0.5).sum(keepdims=True)))
            widest = max(widest, float(_direction(optimizer).normal.deviations.max()))
    assert 0.9 < widest <= 1 + 1e-9  # without the limit 1.15


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
    ours = [search("cma_es", land, 200, workers).max() for land in lands]
    baseline = [search("random", land, 200).max() for land in lands]
    assert np.mean(ours) > np.mean(baseline) + 0.02


# ------------------------------------------------------------------------------------- the adaptation


@pytest.mark.parametrize("dim", [6, 120])
def test_a_generation_is_pycmas_own(dim: int) -> None:
    """The same samples told to pycma's serial loop and to a Run give the same mean and the same deviations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma

        rng = np.random.default_rng(3)
        options = {"popsize": 12, "randn": lambda *shape: rng.standard_normal(shape), "seed": np.nan, "verbose": -9}
        serial = cma.CMAEvolutionStrategy(
            np.full(dim, 0.5), 0.05, options | {"verb_log": 0, "signals_filename": "", "CMA_diagonal": dim > 100}
        )
        run = Run(isotropic(np.full(dim, 0.5), 0.05), 12, 0, np.zeros(dim, dtype=np.intp))
        for _ in range(6):
            points = np.array(serial.ask())
            costs = ((points - 0.3) ** 2 * np.arange(1, dim + 1)).sum(axis=1)
            serial.tell(list(points), list(costs))
            run.update(points, costs)
            # pycma's own start has eigenvalues that differ by 1e-4, so that none are equal.
            assert run.normal.mean == pytest.approx(serial.mean, abs=1e-5)
            assert run.normal.deviations == pytest.approx(serial.stds, rel=1e-3)
    assert run.normal.mean[-1] < 0.5 - 1e-3


def test_above_100_dimensions_only_variances_are_kept() -> None:
    scale = np.linspace(1, 30, 150)
    optimizer = make("cma_es", 150, UNIT[:1], 0, np.full(150, 0.5))
    points = told(optimizer, lambda x: -float((scale * (x - 0.45) ** 2).sum()), 600)
    assert _direction(optimizer).normal.root.shape == (150,)
    cost = [float((scale * (x - 0.45) ** 2).sum()) for x in points]
    assert np.mean(cost[-50:]) < 0.7 * np.mean(cost[:50])


# ------------------------------------------------------------------------------------- cells


@given(st.integers(2, 12), st.floats(0, 1), st.integers(1, 60), st.integers(4, 40))
@settings(max_examples=200, deadline=None)
def test_the_margin_keeps_another_cell_possible(cells: int, mean: float, dim: int, popsize: int) -> None:
    share = 1 / (popsize * dim)
    floor = float(margin(np.array([mean]), np.array([cells]), share)[0])
    cell = min(int(mean * cells), cells - 1)
    low = -np.inf if cell == 0 else cell / cells
    high = np.inf if cell == cells - 1 else (cell + 1) / cells
    if floor > 0:
        elsewhere = norm.cdf(low, mean, floor) + norm.sf(high, mean, floor)
        assert elsewhere >= share * (1 - 1e-6)
    else:
        assert mean == pytest.approx(low) or mean == pytest.approx(high)  # at the border itself


def test_continuous_and_single_cells_need_no_margin() -> None:
    assert (margin(np.full(3, 0.4), np.array([0, 1, 0]), 0.01) == 0).all()


def _counted(dim: int, cells: int, workers: int = 1) -> Facts:
    counts = np.zeros(dim, dtype=np.intp)
    counts[-1] = cells
    return replace(Facts.plain(dim, workers), cells=counts)


def test_a_cell_that_all_have_settled_in_can_be_left() -> None:
    """Five cells, the fourth is best; the start is in the first, ten standard deviations from the next."""

    def value(x: np.ndarray) -> float:
        return -float(10 * (x[0] - 0.35) ** 2 + abs(min(int(x[1] * 5), 4) - 3))

    found = []
    for facts in (_counted(2, 5), Facts.plain(2)):
        for seed in range(4):
            optimizer = make("cma_es", 2, UNIT[:1], seed, np.array([0.35, 0.1]), {"sigma0": 0.01}, facts)
            number = 0
            while _direction(optimizer).run_number == 0 and number < 300:
                x = optimizer.ask(number)
                optimizer.tell(Result(number, x, np.array([value(x)])))
                number += 1
            found.append(int(optimizer.recommend()[0].x[1] * 5))  # type: ignore[attr-defined]
    assert found == [3] * 4 + [0] * 4  # without the margin it stays where it was


def test_own_points_are_recognised_by_their_cell() -> None:
    exact, middle = (make("cma_es", 2, UNIT[:1], 0, np.full(2, 0.5), {}, _counted(2, 4)) for _ in range(2))
    for number in range(40):
        a, b = exact.ask(number), middle.ask(number)
        assert np.array_equal(a, b)
        value = np.array([-abs(a[0] - 0.2) - abs(np.floor(a[1] * 4) - 1)])
        exact.tell(Result(number, a, value))
        told_x = np.array([np.round(b[0], 4), (min(np.floor(b[1] * 4), 3) + 0.5) / 4])  # as a space encodes it
        middle.tell(Result(number, told_x, value))
    assert not _direction(exact).waiting


# ------------------------------------------------------------------------------------- several objectives


def _two_peaks(x: np.ndarray) -> np.ndarray:
    return np.array([-((x - 0.2) ** 2).sum(), -((x - 0.8) ** 2).sum()])


@pytest.mark.parametrize("options", [{"directions": 3}, {"directions": 2, "scalarise": "tchebycheff"}])
@pytest.mark.parametrize("workers", [1, 40])
def test_the_contract_holds_for_every_way_to_scalarise(
    options: dict[str, object], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def build(dim: int, goals: Any, seed: int, start: np.ndarray) -> Optimizer:
        fit = {**options, "directions": 1} if len(goals) == 1 else options
        return make("cma_es", dim, goals, seed, start, fit, _counted(dim, 3, workers))

    check_optimizer(build)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_directions_follow_the_front_whatever_numbers_they_get(stride: int) -> None:
    options = {"directions": 3, "scalarise": "tchebycheff"}
    optimizer = make("cma_es", 2, UNIT, 0, np.full(2, 0.5), options)
    for number in range(0, 360 * stride, stride):
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, _two_peaks(x)))
    means = np.array([r.x for r in optimizer.recommend()])  # type: ignore[attr-defined]
    assert means.shape == (3, 2)
    assert np.ptp(means, axis=1).max() < 0.15  # on the line between the peaks, which is the front
    # Weights 1/6, 1/2, 5/6: where the weighted squared distances from the two peaks are equal.
    ends = 0.2 + 0.6 / (1 + np.sqrt([5, 1, 0.2]))
    assert np.sort(means.mean(axis=1)) == pytest.approx(np.sort(ends), abs=0.06)


def test_tchebycheff_reaches_the_inside_of_a_concave_front() -> None:
    """A quarter circle bent inwards: every weighted sum is best at an end, the Tchebycheff distance is not."""
    found = {}
    for scalarise in ("weighted", "tchebycheff"):
        optimizer = make("cma_es", 1, UNIT, 0, np.full(1, 0.4), {"scalarise": scalarise})
        for number in range(120):
            x = np.full(1, float(number)) if number < 2 else optimizer.ask(number)  # the ends are known
            optimizer.tell(Result(number, x, np.array([1 - np.sqrt(1 - x[0] ** 2), 1 - np.sqrt(1 - (1 - x[0]) ** 2)])))
        found[scalarise] = float(optimizer.recommend()[0].x[0])  # type: ignore[attr-defined]
    assert min(found["weighted"], 1 - found["weighted"]) < 0.08
    assert found["tchebycheff"] == pytest.approx(0.5, abs=0.1)


@given(st.integers(1, 16), st.integers(1, 8))
@settings(max_examples=12, deadline=None)
def test_weights_lie_on_the_simplex_and_apart(n: int, m: int) -> None:
    weights = spread_weights(n, m)
    assert weights.shape == (n, m) and (weights >= 0).all()
    assert weights.sum(axis=1) == pytest.approx(1.0)
    if m > 1:
        gaps = [np.abs(a - b).max() for i, a in enumerate(weights) for b in weights[:i]]
        assert min(gaps, default=1.0) > 0.02


def test_weights_for_two_goals_are_the_middles_of_equal_parts() -> None:
    assert np.sort(spread_weights(4, 2)[:, 0]) == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.02)


@pytest.mark.parametrize(
    ("goals", "options", "where"),
    [
        (UNIT, {"scalarise": "sum"}, "scalarise"),
        (UNIT, {"directions": 17}, "directions"),
        (UNIT, {"directions": 0}, "directions"),
        (UNIT[:1], {"directions": 2}, "directions"),
        (UNIT, {"directions": 2, "weights": {"a": 1.0}}, "directions"),
    ],
)
def test_options_that_make_no_sense_are_refused(goals: tuple[Goal, ...], options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make("cma_es", 2, goals, 0, np.full(2, 0.5), options)
    assert caught.value.problems[0].where == f"optimizer.{where}"


def test_a_few_broken_candidates_do_not_drown_an_objective() -> None:
    optimizer = make("cma_es", 2, UNIT, 0, np.full(2, 0.5))
    for number in range(200):
        x = optimizer.ask(number)
        values = _two_peaks(x)
        if number in (3, 11, 17):  # a perplexity of a million
            values = np.array([-1e6, values[1]])
        optimizer.tell(Result(number, x, values))
    assert np.abs(optimizer.recommend()[0].x - 0.5).max() < 0.2  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------- constraints


def test_what_misses_a_floor_costs_more_than_everything_that_does_not() -> None:
    optimizer = make("cma_es", 2, UNIT, 0, np.full(2, 0.5), {"weights": {"b": 1.0}})
    floors = np.array([-0.2, -np.inf])  # not further from the first peak than this
    for number in range(250):
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, _two_peaks(x), None, floors))
    mean = optimizer.recommend()[0].x  # type: ignore[attr-defined]
    edge = 0.2 + np.sqrt(0.1)  # the second peak pulls up to the floor of the first
    assert mean == pytest.approx(np.full(2, edge), abs=0.03)


def test_if_nothing_is_feasible_it_goes_to_where_the_floors_are_nearly_met() -> None:
    optimizer = make("cma_es", 2, UNIT[:1], 0, np.full(2, 0.9))
    for number in range(120):
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, np.array([-((x - 0.2) ** 2).sum()]), None, np.array([0.5])))
    assert np.abs(optimizer.recommend()[0].x - 0.2).max() < 0.05  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------- what happens on the way


def test_nothing_is_recommended_before_the_first_generation() -> None:
    optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5))
    told_foreign(optimizer, np.random.default_rng(0).random((30, 3)), towards(0.2))
    assert list(optimizer.recommend()) == []  # type: ignore[attr-defined]


def test_after_a_restart_the_good_mean_is_still_recommended() -> None:
    optimizer = make("cma_es", 2, UNIT[:1], 0, np.full(2, 0.4))
    told(optimizer, towards(0.3), 500)
    assert _direction(optimizer).run_number > 0
    (best,) = optimizer.recommend()  # type: ignore[attr-defined]
    assert best.x == pytest.approx(np.full(2, 0.3), abs=0.005)
    assert best.why == "mean of CMA-ES"


def test_results_of_an_ended_run_do_not_pull_the_next_one_back() -> None:
    optimizer = make("cma_es", 2, UNIT[:1], 0, np.full(2, 0.4))
    number, late = 0, []
    while _direction(optimizer).run_number == 0:
        x = optimizer.ask(number)
        late.append((1_000_000 + number, optimizer.ask(1_000_000 + number)))
        optimizer.tell(Result(number, x, np.array([towards(0.3)(x)])))
        number += 1
    before = _direction(optimizer).normal
    for n, x in late[-20:]:
        optimizer.tell(Result(n, x, np.array([towards(0.3)(x)])))
    assert _direction(optimizer).normal is before and not _direction(optimizer).buffer


def test_a_better_point_found_elsewhere_joins_the_next_generation() -> None:
    means = []
    for helped in (False, True):
        optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.2), {"sigma0": 0.02})
        told(optimizer, towards(0.8), 7)
        if helped:
            told_foreign(optimizer, np.full((1, 3), 0.8), towards(0.8))
        told(optimizer, towards(0.8), 7, first=7)
        means.append(_direction(optimizer).normal.mean.mean())
    assert means[1] > means[0] + 0.005


def test_a_new_score_replaces_the_old_one_until_it_was_used() -> None:
    def history(*wrong: tuple[int, int]) -> Normal:
        """Two generations of 7 and a half; `wrong` says after which candidate which one is told a score of 99."""
        optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5))
        points = []
        for number in range(17):
            points.append(optimizer.ask(number))
            optimizer.tell(Result(number, points[number], np.array([towards(0.2)(points[number])])))
            for after, which in wrong:
                if after == number:
                    optimizer.tell(Result(which, points[which], np.array([99.0])))
        return _direction(optimizer).normal

    def same(a: Normal, b: Normal) -> bool:
        return np.array_equal(a.mean, b.mean) and np.array_equal(a.root, b.root)

    plain = history()
    assert same(plain, history((8, 3)))  # its generation is over
    assert not same(plain, history((5, 3)))  # it is still to come


def test_a_new_score_of_a_known_recipe_moves_the_start() -> None:
    optimizer = make("cma_es", 3, UNIT[:1], 0, np.full(3, 0.5))
    told_foreign(optimizer, np.array([[0.1] * 3, [0.9] * 3]), towards(0.8))
    assert _direction(optimizer).normal.mean == pytest.approx(np.full(3, 0.9))
    told_foreign(optimizer, np.array([[0.1] * 3]), lambda x: 1.0)
    assert _direction(optimizer).normal.mean == pytest.approx(np.full(3, 0.1))


def test_workers_set_the_size_of_a_generation() -> None:
    for workers, directions, expected in ((1, 1, 10), (64, 1, 32), (64, 2, 16), (64, 16, 10)):
        optimizer = make("cma_es", 8, UNIT, 0, np.full(8, 0.5), {"directions": directions}, Facts.plain(8, workers))
        assert _direction(optimizer)._popsize == expected


@pytest.mark.parametrize(("dim", "directions"), [(100, 1), (400, 8)])
def test_its_own_work_is_small_with_many_workers_and_a_long_history(dim: int, directions: int) -> None:
    optimizer = make(
        "cma_es", dim, UNIT, 0, np.full(dim, 0.3), {"directions": directions}, Facts.plain(dim, workers=64)
    )
    rng = np.random.default_rng(0)
    flying: list[tuple[int, np.ndarray]] = []
    begin = time.process_time()
    for number in range(664):
        foreign = number % 4 == 0
        flying.append((number, rng.random(dim) if foreign else optimizer.ask(number, [x for _, x in flying])))
        if len(flying) > 64:
            done, x = flying.pop(int(rng.integers(64)))
            optimizer.tell(Result(done, x, _two_peaks(x)))
    assert (time.process_time() - begin) / 600 < 0.02  # measured 0.002 s
    assert all(len(d._recent) <= 32 for d in optimizer._directions)  # type: ignore[attr-defined]
