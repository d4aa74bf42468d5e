"""Tests of evomerge.optimizers.crossover."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.optimizers import Facts, Goal, Result, check_optimizer, make
from evomerge.optimizers._core import rng_for
from evomerge.optimizers.crossover import Crossover, _fitness, _Member, _slerp, depths
from tests.landscapes import UNIT, Landscape


def build(dim: int, facts: Facts | None = None, goals: tuple[Goal, ...] = UNIT[:1], **options: Any) -> Crossover:
    optimizer = make("crossover", dim, goals, 0, np.full(dim, 0.3), options, facts)
    assert isinstance(optimizer, Crossover)
    return optimizer


def result(number: int, x: np.ndarray, items: np.ndarray | None, value: float | None = None) -> Result:
    mean = float(np.mean(items)) if value is None and items is not None else float(value or 0.0)
    return Result(number, x, np.array([mean]), None, None, None if items is None else [items])


def member(values: float, *items: np.ndarray) -> _Member:
    return _Member(0, np.zeros(1), np.array([values]), 0.0, tuple(i.astype(np.float32) for i in items) or None)


# ------------------------------------------------------------------------------------- the contract


def test_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_optimizer(lambda dim, goals, seed, start: make("crossover", dim, goals, seed, start))


def test_it_asks_for_items_and_refuses_an_archive_of_one() -> None:
    assert build(2).wants_items
    with pytest.raises(ConfigError, match="population"):
        build(2, population=1)


def test_it_begins_with_the_start_then_at_random() -> None:
    optimizer = build(3)
    assert np.array_equal(optimizer.ask(0), np.full(3, 0.3))
    pending = optimizer.ask(1, [np.full(3, 0.3)])
    assert np.abs(pending - 0.3).max() > 0.01
    optimizer.tell(result(0, np.full(3, 0.3), None, 0.5))
    assert np.array_equal(optimizer.ask(1), pending)


# ------------------------------------------------------------------------------------- fitness and parents


def test_an_item_that_few_solve_is_worth_more() -> None:
    common, rare = np.array([1, 1, 0]), np.array([0, 0, 1])
    fitness, shares = _fitness([member(0.7, common), member(0.7, common), member(0.3, rare)])
    assert shares is not None and shares == pytest.approx(np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]) / 3)
    assert fitness[0] == fitness[1] == fitness[2]  # one item of one's own is worth two that are shared by two


def test_each_goal_counts_the_same_however_many_items_it_has() -> None:
    long, short = np.ones(100), np.ones(1)
    fitness, _ = _fitness(
        [member(0.5, long, 0 * short), member(0.5, 0 * long, short), member(0.1, 0 * long, 0 * short)]
    )
    assert fitness[0] == pytest.approx(fitness[1]) and fitness[2] == 0


def test_members_without_whole_items_count_with_their_values() -> None:
    whole = [member(0.2, np.array([1, 0, 0, 0])), member(0.4, np.array([0, 1, 1, 0]))]
    fitness, shares = _fitness([*whole, member(0.4), member(0.4, np.array([1, 1]))])
    assert shares is not None and np.isnan(shares[2:]).all() and not np.isnan(shares[:2]).any()
    assert fitness[:2].sum() == pytest.approx(1.0)  # as their scaled values, 0 and 1
    assert fitness[2] == fitness[3] == 1.0


def test_items_beyond_the_unit_interval_are_scaled() -> None:
    losses = [member(v, np.array([v, v - 3.0])) for v in (-4.0, -2.0, -1.0)]
    fitness, _ = _fitness(losses)
    assert (np.diff(fitness) > 0).all() and (fitness >= 0).all()


def test_a_partner_has_what_the_first_parent_lacks() -> None:
    optimizer = build(4, population=8)
    half = np.repeat([1.0, 0.0], 50)
    for number, items in enumerate([half, half, half, 1 - half]):
        optimizer.tell(result(number, np.full(4, 0.1 + 0.2 * number), items))
    pairs = [optimizer._parents(rng_for(0, n)) for n in range(200)]
    assert {second for first, second in pairs if first != 3} == {3}
    assert {second for first, second in pairs if first == 3} == {0, 1, 2}


def test_infeasible_members_leave_first_and_breed_only_if_there_is_no_choice() -> None:
    optimizer = build(2, population=3, goals=UNIT)
    floors = np.array([-np.inf, 0.5])
    for number, values in enumerate([(0.9, 0.2), (0.8, 0.4), (0.9, 0.3), (0.1, 0.51), (0.2, 0.52)]):
        optimizer.tell(Result(number, np.full(2, 0.1 * number), np.array(values), None, floors))
    assert [m.number for m in optimizer._archive] == [1, 3, 4]  # the one that misses least, though 0 and 2 are better
    parents = {i for n in range(50) for i in optimizer._parents(rng_for(0, n))}
    assert parents == {1, 2}
    alone = build(2, population=3, goals=UNIT)
    for number in range(3):
        alone.tell(Result(number, np.full(2, 0.3 * number), np.array([0.5, 0.1]), None, floors))
    assert {i for n in range(50) for i in alone._parents(rng_for(0, n))} == {0, 1, 2}


# ------------------------------------------------------------------------------------- children


def test_depth_is_the_place_among_the_coordinates_of_an_expert() -> None:
    by_expert = depths(np.array([0, 0, 1, 1, -1]))
    by_layer = depths(np.array([0, 1, 0, 1, -1]))
    assert by_expert is not None and by_expert == pytest.approx([0.25, 0.75, 0.25, 0.75, 0.5])
    assert by_layer is not None and by_layer == pytest.approx([0.25, 0.25, 0.75, 0.75, 0.5])
    assert depths(np.array([0, 1, 2])) is None


def test_children_take_one_parent_below_and_the_other_above_a_depth() -> None:
    facts = replace(Facts.plain(20), experts=np.repeat([0, 1], 10))
    optimizer = build(20, facts)
    zero, one = np.zeros(20), np.ones(20)
    for n in range(40):
        child = optimizer._blend(zero, one, rng_for(0, n))
        assert np.array_equal(child[:10], child[10:])  # both experts are split at one depth
        steps = np.flatnonzero(np.abs(np.diff(child[:10])) > 1e-12)
        assert len(steps) <= 1 and child.min() + child.max() == pytest.approx(2 * child.mean() if not len(steps) else 1)


def test_one_coordinate_per_expert_is_blended_as_a_whole() -> None:
    optimizer = build(3, replace(Facts.plain(3), experts=np.array([0, 1, 2])))
    shares = np.array([optimizer._blend(np.zeros(3), np.ones(3), rng_for(0, n)) for n in range(300)])
    assert np.ptp(shares, axis=1).max() == 0
    assert shares.min() < 0 and shares.max() > 1 and shares.min() >= -0.1 and shares.max() <= 1.1


@given(st.integers(2, 8), st.integers(0, 100), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_an_arc_keeps_its_ends_and_its_length(dim: int, seed: int, share: float) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, dim))
    assert _slerp(a, b, np.zeros(dim)) == pytest.approx(a) and _slerp(a, b, np.ones(dim)) == pytest.approx(b)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    assert np.linalg.norm(_slerp(a, b, np.full(dim, share))) == pytest.approx(1.0, abs=1e-5)


def test_the_base_itself_is_no_trouble_for_arcs() -> None:
    assert _slerp(np.zeros(2), np.ones(2), np.full(2, 0.5)) == pytest.approx(np.full(2, 0.5))
    assert _slerp(np.ones(2), 2 * np.ones(2), np.full(2, 0.5)) == pytest.approx(np.full(2, 1.5))


def test_categories_come_from_a_parent_or_at_random_but_never_from_between() -> None:
    facts = replace(Facts.plain(4), cells=np.array([0, 0, 0, 8]), categorical=np.array([False, False, False, True]))
    optimizer = build(4, facts)
    for n in range(50):
        child = optimizer._blend(np.full(4, 0.1), np.full(4, 0.9), rng_for(0, n))
        assert child[3] in (0.1, 0.9)


# ------------------------------------------------------------------------------------- the archive


def test_a_repeated_recipe_or_number_replaces_itself() -> None:
    optimizer = build(2)
    optimizer.tell(result(0, np.full(2, 0.5), None, 0.5))
    optimizer.tell(result(1, np.full(2, 0.50001), None, 0.7))
    assert [m.number for m in optimizer._archive] == [1]
    optimizer.tell(result(1, np.full(2, 0.6), None, 0.9))
    assert [float(m.values[0]) for m in optimizer._archive] == [0.9]


def test_memory_is_bounded_and_items_are_small() -> None:
    optimizer = build(6, population=5)
    rng = np.random.default_rng(0)
    for number in range(50):
        items = rng.integers(0, 2, 1000).astype(float)
        optimizer.tell(result(number, rng.random(6), items if number % 2 else items + 0.25))
    assert len(optimizer._archive) == 5
    kinds = {each.dtype for m in optimizer._archive if m.items for each in m.items}
    assert kinds <= {np.dtype(np.uint8), np.dtype(np.float32)}


def test_odd_items_are_left_out() -> None:
    optimizer = build(2)
    for number, items in enumerate([[np.array([1.0, np.nan])], [np.ones((3, 2))], [np.empty(0)], [np.ones(3)] * 2]):
        optimizer.tell(Result(number, np.full(2, 0.2 * number), np.array([0.5]), None, None, items))
    assert len(optimizer._archive) == 4 and all(m.items is None for m in optimizer._archive)
    assert np.isfinite(optimizer.ask(9)).all()


# ------------------------------------------------------------------------------------- does it search?


def mixture(name: str, seed: int, n: int, with_items: bool) -> float:
    """The best mean accuracy of three tasks, each with an expert of 6 coefficients, whose 300 items are told apart."""
    land, experts = Landscape(24, 3, seed), np.repeat(np.arange(4), 6)
    land.best = np.random.default_rng([seed, 1]).uniform(0, 0.3, (3, 24))
    for task in range(3):
        land.best[task, experts == task] = 0.9
    hard = np.random.default_rng([seed, 2]).random((3, 100))
    facts = replace(Facts.plain(24, 4), experts=experts, zero=np.zeros(24))
    optimizer = make(name, 24, UNIT[:1], seed, np.full(24, 0.3), {}, facts)
    known = [np.zeros(24), *[(experts == e) * 1.0 for e in range(4)], np.full(24, 0.3), np.ones(24)]
    best = 0.0
    for number in range(n):
        x = known[number] if number < len(known) else optimizer.ask(number)
        items = (land.true(x)[:, None] > hard).astype(float).ravel()
        best = max(best, float(land.true(x).mean()))
        optimizer.tell(result(number, x, items if with_items else None, float(items.mean())))
    return best


@pytest.mark.parametrize("with_items", [True, False])
def test_it_beats_a_plain_genetic_algorithm_from_known_experts(with_items: bool) -> None:
    seeds = range(6)
    ours = np.array([mixture("crossover", s, 120, with_items) for s in seeds])
    plain = np.array([mixture("nsga2", s, 120, False) for s in seeds])
    assert ours.mean() > plain.mean() + 0.01


def test_its_own_work_is_small() -> None:
    optimizer = build(100, goals=UNIT)
    rng = np.random.default_rng(0)
    pending = [rng.random(100) for _ in range(64)]
    begin = time.process_time()
    for number in range(200):
        x = optimizer.ask(number, pending)
        items = [rng.integers(0, 2, 2000).astype(float) for _ in UNIT]
        optimizer.tell(Result(number, x, np.array([i.mean() for i in items]), None, None, items))
    assert (time.process_time() - begin) / 200 < 0.02  # measured 0.002 s
