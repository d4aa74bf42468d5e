"""Tests of evomerge.optimizers.catcma and of the run of CatCMA behind it."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.optimizers import Exhausted, Facts, Goal, Optimizer, Result, check_optimizer, make
from evomerge.optimizers._catcma import PRIVATE, Layout, Mixed, MixedRun, _strategy, around
from evomerge.optimizers._cma import TRIES
from evomerge.optimizers._core import rng_for
from evomerge.optimizers.catcma import CatCma
from tests import path_landscapes as lands
from tests.landscapes import UNIT

# Cells of each coordinate; negative ones have an order.
KINDS: dict[str, list[int]] = {
    "numbers": [0, 0, 0],
    "whole": [-200, -200, -200],
    "choices": [40, 40, 40],
    "one choice": [12],
    "one whole": [-60],
    "numbers and whole": [0, -9, -5],
    "numbers and choices": [0, 4, 2],
    "whole and choices": [-40, 30, -2],
    "all": [0, -5, 4, -2, 1, 0],
}


def facts_of(cells: list[int], workers: int = 1) -> Facts:
    given = np.array(cells, dtype=np.intp)
    return replace(Facts.plain(len(cells), workers), cells=np.abs(given), categorical=given > 0)


def build(cells: list[int], start: float = 0.4, goals: tuple[Goal, ...] = UNIT[:1], **options: Any) -> CatCma:
    optimizer = make("catcma", len(cells), goals, 0, np.full(len(cells), start), options, facts_of(cells))
    assert isinstance(optimizer, CatCma)
    return optimizer


def distribution(optimizer: CatCma, index: int = 0) -> Mixed:
    normal = optimizer._directions[index].normal
    assert isinstance(normal, Mixed)
    return normal


# ------------------------------------------------------------------------------------- the contract


def test_contract() -> None:
    check_optimizer(lambda dim, goals, seed, start: make("catcma", dim, goals, seed, start))


@pytest.mark.parametrize("kind", ["whole", "choices", "mixed"])
def test_contract_with_cells(kind: str) -> None:
    def build(dim: int, goals: Any, seed: int, start: np.ndarray) -> Optimizer:
        cells = {"whole": [-2000] * dim, "choices": [50] * dim, "mixed": [50, 0, -7][:dim]}[kind]
        options = {"directions": 2} if len(goals) == 2 else {}
        return make("catcma", dim, goals, seed, start, options, facts_of(cells))

    check_optimizer(build)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sigma0", 0.0), ("changes", 0), ("changes", "many"), ("directions", 2), ("scalarise", "sum"), ("weights", 3)],
)
def test_a_wrong_option_value_is_a_config_error(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build([0, 3], **{option: value})
    assert caught.value.problems[0].where == f"optimizer.{option}"


# ------------------------------------------------------------------------------------- cmaes behind it


def test_cmaes_still_has_what_is_read_of_it() -> None:
    layout = Layout.of(np.array([0, 5, 3]), np.array([False, False, True]))
    es = _strategy(around(np.full(3, 0.5), 0.1, 1.0, layout), 0.1, 6)
    missing = [name for name in (*PRIVATE, "_pmut", "_eigen_decomposition", "Solution") if not hasattr(es, name)]
    assert missing == [], "cmaes has changed: see evomerge/optimizers/_catcma.py"
    es._rng = None  # nothing is drawn from it
    run = MixedRun(around(np.full(3, 0.5), 0.1, 1.0, layout), 0.1, 6)
    run._es._rng = None
    points = np.random.default_rng(0).random((6, 3))
    run.update(points, np.arange(6.0))
    assert run._es.generation == 1
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cmaes takes the median of no history where the middle costs are equal
        assert (run._es._calc_continuous_penalty(points, np.r_[0, np.ones(5)]) == 0).all()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_mixture_of_kinds_is_searched(kind: str) -> None:
    """The middle of each continuous coordinate at 0.7; the highest cell of each other is best."""
    cells = KINDS[kind]
    optimizer = build(cells)
    target = np.array([0.7 if k == 0 else (0.9 * abs(k) // 1 + 0.5) / abs(k) for k in cells])
    target = np.minimum(target, 1.0)
    wrong = np.array(cells) > 0

    def value(x: np.ndarray) -> float:
        return -float(np.where(wrong, np.abs(x - target) > 1e-6, (x - target) ** 2).sum())

    start, seen = value(np.full(len(cells), 0.4)), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(250):
            x = optimizer.ask(number)
            seen.append(value(x))
            optimizer.tell(Result(number, x, np.array([seen[-1]])))
    (best,) = optimizer.recommend()
    assert best.why == "most likely point of CatCMA"
    assert max(seen) > start + 0.05 and value(best.x) >= start
    assert max(seen) > -0.1


def test_flat_tied_and_broken_generations_leave_a_distribution_that_draws() -> None:
    layout = Layout.of(np.array([0, 6, 3, 2]), np.array([False, False, True, True]))
    run = MixedRun(around(np.full(4, 0.4), 0.1, 1.0, layout), 0.1, 6)
    rng = np.random.default_rng(0)
    before = run.normal
    run.update(rng.random((6, 4)), np.zeros(6))
    run.update(rng.random((6, 4)), np.array([0, 1, 2, 3, 4, np.nan]))
    assert run.normal is before  # nothing can be learned from these
    for _ in range(40):
        run.update(np.tile(rng.random(4), (6, 1)), rng.integers(0, 2, 6).astype(float))  # all at one place
        normal = run.normal
        assert np.isfinite(normal.draw(rng.standard_normal((TRIES, 4)))).all()
        assert normal.shares.sum(axis=1) == pytest.approx(1.0) and (normal.shares[:, :2] > 0).all()
        assert np.linalg.norm(normal.root, axis=1).max() <= 1 + 1e-9


def test_a_step_that_divides_by_zero_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of(np.array([0, 3]), np.array([False, True]))
    run = MixedRun(around(np.full(2, 0.4), 0.1, 1.0, layout), 0.1, 4)
    run._es._C = np.full((1, 1), np.nan)
    run._es._B = run._es._D = None
    before = run.normal
    run.update(np.random.default_rng(0).random((4, 2)), np.arange(4.0))
    assert run.normal is before


def test_a_point_from_far_away_does_not_tear_the_distribution_apart() -> None:
    layout = Layout.of(np.zeros(4, dtype=np.intp), np.zeros(4, dtype=bool))
    run = MixedRun(around(np.full(4, 0.2), 0.01, 1.0, layout), 0.01, 8)
    rng = np.random.default_rng(0)
    points = 0.2 + 0.01 * rng.standard_normal((8, 4))
    points[0] = 0.95  # 150 standard deviations away
    run.update(points, np.arange(8.0))
    assert np.linalg.norm(run.normal.root, axis=1).max() < 0.05
    assert 0.2 < run.normal.mean.mean() < 0.3


# ------------------------------------------------------------------------------------- drawing


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=8), st.integers(0, 1000), st.floats(0.1, 20))
@settings(max_examples=80, deadline=None)
def test_samples_are_points_whose_cells_are_at_their_middle(cells: list[int], seed: int, changes: float) -> None:
    facts = facts_of(cells)
    layout = Layout.of(facts.cells, facts.categorical)
    rng = np.random.default_rng(seed)
    place = rng.random(len(cells))
    normal = around(place, 0.3, changes, layout)
    x = normal.draw(rng.standard_normal((TRIES, len(cells))))
    assert ((x >= 0) & (x <= 1)).all()
    counted = facts.cells > 0
    scaled = x[counted] * facts.cells[counted] - 0.5
    assert scaled == pytest.approx(np.round(scaled), abs=1e-9)
    assert normal.shares.sum(axis=1) == pytest.approx(1.0)
    own = np.floor(place * facts.cells) == np.floor(normal.mean * facts.cells)
    assert own[facts.cells > 0].all()  # the start's categories are the most likely ones


@pytest.mark.parametrize(("n", "changes"), [(40, 3.0), (40, 1.0), (6, 3.0)])
def test_a_first_sample_changes_so_many_categories(n: int, changes: float) -> None:
    optimizer = build([4] * n, 0.1, changes=changes)
    x = np.array([distribution(optimizer).draw(rng_for(0, k).standard_normal((TRIES, n))) for k in range(600)])
    assert (x > 0.25).sum(axis=1).mean() == pytest.approx(changes, rel=0.1)
    assert np.bincount((x * 4).astype(int).ravel(), minlength=4)[1:] == pytest.approx(changes * 200, rel=0.2)


def test_what_is_known_or_in_flight_is_drawn_again() -> None:
    optimizer = build([3, 3], 0.1)
    seen: set[bytes] = set()
    for number in range(9):
        x = optimizer.ask(number)
        seen.add(x.tobytes())
        optimizer.tell(Result(number, x, None))  # failed: known, though it teaches nothing
    assert len(seen) >= 8
    optimizer = build([40, 40], 0.1)
    flying: list[np.ndarray] = []
    for number in range(12):
        flying.append(optimizer.ask(number, flying))
    assert len({x.tobytes() for x in flying}) == 12


def test_parts_that_are_empty_make_no_point_new() -> None:
    facts = replace(facts_of([2, 0]), parts=((0, 1),), neutral=np.array([0.25, 0.5]))
    optimizer = make("catcma", 2, UNIT[:1], 0, np.array([0.25, 0.5]), {"changes": 0.2}, facts)
    optimizer.tell(Result(900, np.array([0.25, 0.5]), np.array([0.5])))
    points = np.array([optimizer.ask(n) for n in range(100)])
    assert (points[:, 0] > 0.5).mean() > 0.75  # though four of five samples are empty


def test_a_single_point_is_all_there_is() -> None:
    optimizer = build([1, 1])
    x = optimizer.ask(0)
    assert np.array_equal(x, np.full(2, 0.5))
    optimizer.tell(Result(0, x, np.array([1.0])))
    with pytest.raises(Exhausted):
        optimizer.ask(1)


# ------------------------------------------------------------------------------------- own and foreign results


def test_own_results_are_recognised_by_their_cells_and_told_with_their_sample() -> None:
    cells = [0, -7, 3]
    exact, rounded = build(cells), build(cells)
    for number in range(40):
        a, b = exact.ask(number), rounded.ask(number)
        assert np.array_equal(a, b)
        value = np.array([-abs(a[0] - 0.2) - abs(a[1] - 0.9) - (a[2] < 0.6)])
        exact.tell(Result(number, a, value))
        rounded.tell(Result(number, np.r_[np.round(b[0], 4), b[1:]], value))
    assert not exact._directions[0].waiting
    assert distribution(exact).centre.tobytes() == distribution(rounded).centre.tobytes()


def test_the_best_known_recipe_is_the_start() -> None:
    optimizer = build([4, 4, 4, 0, -5], 0.1, changes=0.1, sigma0=0.01)
    known = np.random.default_rng(0).random((60, 5))
    for number, x in enumerate(known):
        optimizer.tell(Result(1000 + number, x, np.array([-abs(x[3] - 0.6)])))
    best = known[np.argmin(np.abs(known[:, 3] - 0.6))]
    x = np.array([optimizer.ask(n) for n in range(30)])
    assert np.abs(x[:, 3] - best[3]).max() < 0.05
    assert (np.floor(np.median(x[:, :3], axis=0) * 4) == np.floor(best[:3] * 4)).all()
    assert list(optimizer.recommend()) == []  # no generation yet


def test_directions_follow_goals_that_disagree() -> None:
    optimizer = build([3] * 6, 0.1, UNIT, directions=2)
    for number in range(400):
        x = optimizer.ask(number)
        codes = (x * 3).astype(int)
        optimizer.tell(Result(number, x, np.array([(codes == 1).mean(), (codes == 2).mean()])))
    ends = [np.bincount((r.x * 3).astype(int), minlength=3) for r in optimizer.recommend()]
    assert sorted(int(e[1]) for e in ends)[1] >= 5 and sorted(int(e[2]) for e in ends)[1] >= 5


def test_what_misses_a_floor_costs_more() -> None:
    optimizer = build([2] * 8, 0.1, UNIT, weights={"a": 1.0})
    floors = np.array([-np.inf, 0.45])
    for number in range(300):
        x = optimizer.ask(number)
        on = float((x > 0.5).mean())
        optimizer.tell(Result(number, x, np.array([on, 1 - on]), None, floors))
    assert int((optimizer.recommend()[0].x > 0.5).sum()) in (3, 4)  # 4 is the most that the floor allows


# ------------------------------------------------------------------------------------- does it search?


def test_it_is_better_than_thresholds_on_a_normal_distribution() -> None:
    """True score of what is best after 200 results on 16 choices and 15 scales, over 3 seeds."""
    best: dict[str, list[float]] = {}
    for seed in range(3):
        land = lands.Choices(seed, positions=16, scales=15, cost=0.5)
        for name in ("catcma", "cma_es", "random"):
            best.setdefault(name, []).append(lands.found(name, land, 200, seed)[-1])
    mean = {name: float(np.mean(values)) for name, values in best.items()}
    assert mean["catcma"] > mean["cma_es"] + 0.05 and mean["catcma"] > mean["random"] + 0.1


@pytest.mark.parametrize(("dim", "limit_s"), [(100, 0.02), (400, 0.2)])
def test_its_own_work_is_small(dim: int, limit_s: float) -> None:
    optimizer = build([0, 4] * (dim // 2), goals=UNIT, directions=2)
    rng = np.random.default_rng(0)
    flying: list[tuple[int, np.ndarray]] = []
    begin = time.process_time()
    for number in range(150):
        foreign = number % 5 == 0
        flying.append((number, rng.random(dim) if foreign else optimizer.ask(number, [x for _, x in flying])))
        if len(flying) > 16:
            done, x = flying.pop(int(rng.integers(16)))
            optimizer.tell(Result(done, x, rng.random(2)))
    assert (time.process_time() - begin) / 150 < limit_s
