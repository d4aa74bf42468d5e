"""Tests of evomerge.optimizers.evolution and of the parts that it changes."""

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
from evomerge.optimizers import Exhausted, Facts, Goal, Result, check_optimizer, make
from evomerge.optimizers._core import rng_for
from evomerge.optimizers._parts import Parts
from evomerge.optimizers.evolution import Evolution, _Member, _ranked
from tests import path_landscapes as lands
from tests.landscapes import UNIT


def edits(slots: int = 3, scale: bool = True) -> tuple[Facts, np.ndarray]:
    """Slots of an edit: kind (none and 3 others), place (10 cells), source (2) and a scale."""
    one = [4, 10, 2, 0] if scale else [4, 10, 2]
    categorical = [True, False, True, False][: len(one)]
    start = np.tile([1 / 8, 0.05, 0.25, 0.5][: len(one)], slots)
    facts = replace(
        Facts.plain(len(start)),
        cells=np.tile(one, slots).astype(np.intp),
        categorical=np.tile(categorical, slots),
        parts=tuple(tuple(range(k * len(one), (k + 1) * len(one))) for k in range(slots)),
        neutral=start.copy(),
    )
    return facts, start


def positions(n: int = 6, cells: int = 3) -> tuple[Facts, np.ndarray]:
    """Positions of a choice and a scale each, after a loose choice that is in no part."""
    start = np.r_[0.25, np.tile([0.5 / cells, 0.5], n)]
    facts = replace(
        Facts.plain(len(start)),
        cells=np.r_[2, np.tile([cells, 0], n)].astype(np.intp),
        categorical=np.r_[True, np.tile([True, False], n)],
        parts=tuple((1 + 2 * k, 2 + 2 * k) for k in range(n)),
        neutral=start.copy(),
    )
    return facts, start


def build(given: tuple[Facts, np.ndarray], goals: tuple[Goal, ...] = UNIT[:1], **options: Any) -> Evolution:
    facts, start = given
    optimizer = make("evolution", len(start), goals, 0, start, options, facts)
    assert isinstance(optimizer, Evolution)
    return optimizer


SPACES = {"edits": edits(), "positions": positions(), "cells": edits(scale=False)}


# ------------------------------------------------------------------------------------- the contract


def test_contract_without_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_optimizer(lambda dim, goals, seed, start: make("evolution", dim, goals, seed, start))


@pytest.mark.parametrize("kind", ["categories", "whole", "part"])
def test_contract_with_cells_and_parts(kind: str) -> None:
    def build(dim: int, goals: Any, seed: int, start: np.ndarray) -> Any:
        facts = replace(Facts.plain(dim), cells=np.full(dim, 7), categorical=np.full(dim, kind == "categories"))
        if kind == "part":
            facts = replace(facts, parts=(tuple(range(dim)),), neutral=start)
        return make("evolution", dim, goals, seed, start, {}, facts)

    check_optimizer(build)


@pytest.mark.parametrize(
    ("option", "value"), [("population", 1), ("population", 2.5), ("crossover", 1.1), ("more", -1), ("more", True)]
)
def test_a_wrong_option_value_is_a_config_error(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build(edits(), **{option: value})
    assert caught.value.problems[0].where == f"optimizer.{option}"


# ------------------------------------------------------------------------------------- parts


def test_edits_are_slots_and_positions_are_not() -> None:
    facts, start = edits(4)
    assert Parts.of(facts, start).slots == ((0, 1, 2, 3),)
    facts, start = positions(4)
    parts = Parts.of(facts, start)
    assert parts.slots == ()
    assert [list(own) for own in parts.members] == [[1, 2], [3, 4], [5, 6], [7, 8], [0]]  # the loose one is last


def test_slots_with_another_neutral_are_no_slots_of_the_same_kind() -> None:
    facts, start = edits(3)
    assert facts.neutral is not None
    other = facts.neutral.copy()
    other[0] = 7 / 8
    assert Parts.of(replace(facts, neutral=other), start).slots == ((1, 2),)


@given(st.integers(0, 10_000), st.sampled_from(["edits", "cells"]))
@settings(max_examples=60, deadline=None)
def test_neither_the_order_of_slots_nor_what_empty_ones_hold_makes_a_point_new(seed: int, kind: str) -> None:
    facts, start = SPACES[kind]
    parts, rng = Parts.of(facts, start), np.random.default_rng(seed)
    x = rng.random(len(start))
    rows = x.reshape(3, -1)
    y = rows[rng.permutation(3)].copy()
    empty = y[:, 0] < 1 / 4
    y[empty, 1:] = rng.random((int(empty.sum()), y.shape[1] - 1))
    assert parts.key(x) == parts.key(y.ravel())
    y[0, 0] = (y[0, 0] + 0.5) % 1.0  # another kind, or none
    assert parts.key(x) != parts.key(y.ravel())


def test_the_order_of_positions_counts() -> None:
    facts, start = positions(3)
    parts = Parts.of(facts, start)
    x, y = start.copy(), start.copy()
    x[1], y[3] = 0.9, 0.9
    assert parts.key(x) != parts.key(y) != parts.key(start)


@given(st.integers(0, 10_000), st.sampled_from(sorted(SPACES)))
@settings(max_examples=100, deadline=None)
def test_every_change_does_what_its_name_says(seed: int, kind: str) -> None:
    facts, start = SPACES[kind]
    parts, rng = Parts.of(facts, start), np.random.default_rng(seed)
    x = np.where(rng.random(len(start)) < 0.5, start, rng.random(len(start)))
    before = parts.filled(x)
    for change, more in ((parts.fill, 1), (parts.clear, -1), (parts.move, 0)):
        y = x.copy()
        if not change(y, rng):
            assert np.array_equal(x, y)
            possible = {1: not before.all(), -1: before.any(), 0: before.any() and kind != "positions"}[more]
            assert not possible
            continue
        assert parts.filled(y).sum() == before.sum() + more
        assert ((y >= 0) & (y <= 1)).all()
        changed = [k for k, own in enumerate(parts.members) if not np.array_equal(x[own], y[own])]
        assert len(changed) == 1
        if more == 0:
            assert (x != y).sum() == 1
            j = int(np.flatnonzero(x != y)[0])
            if facts.cells[j] > 0 and not facts.categorical[j]:
                assert 1 <= abs(parts.codes(x)[j] - parts.codes(y)[j]) <= 2


@given(st.integers(0, 10_000), st.sampled_from(sorted(SPACES)))
@settings(max_examples=100, deadline=None)
def test_a_child_of_two_holds_what_both_do_and_nothing_else_than_they_do(seed: int, kind: str) -> None:
    facts, start = SPACES[kind]
    parts, rng = Parts.of(facts, start), np.random.default_rng(seed)
    common = start.copy()
    parts.fill(common, rng)
    first, second = common.copy(), common.copy()
    parts.fill(first, rng)
    parts.fill(second, rng)
    child = parts.unite(first, second, rng)

    def contents(x: np.ndarray) -> set[bytes]:
        codes, slotted = parts.codes(x), {k for group in parts.slots for k in group}
        places = {int(k): b"" if k in slotted else bytes([k]) for k in np.flatnonzero(parts.filled(x))}
        return {place + codes[parts.members[k]].tobytes() for k, place in places.items()}

    assert contents(child) <= contents(first) | contents(second)
    assert contents(child) >= contents(first) & contents(second)


def test_half_of_the_unions_keep_everything_and_full_slots_are_cut_at_random() -> None:
    facts, start = edits(3)
    parts = Parts.of(facts, start)
    first, second = start.copy().reshape(3, 4), start.copy().reshape(3, 4)
    first[0, :2], second[2, :2] = (0.4, 0.55), (0.9, 0.15)
    counts = [int(parts.filled(parts.unite(first.ravel(), second.ravel(), rng_for(0, n))).sum()) for n in range(400)]
    assert counts.count(2) / 400 == pytest.approx(0.5 + 0.5 / 4, abs=0.08)
    first[:, 0], first[:, 1] = 0.4, (0.15, 0.35, 0.55)
    second[:, 0], second[:, 1] = 0.9, (0.15, 0.35, 0.55)
    children = [parts.unite(first.ravel(), second.ravel(), rng_for(0, n)).reshape(3, 4) for n in range(200)]
    assert max(int(parts.filled(c.ravel()).sum()) for c in children) == 3
    assert len({tuple(np.sort(np.round(c[:, 0] * 10 + c[:, 1], 3))) for c in children}) > 10


def test_runs_of_one_source_grow() -> None:
    facts, start = positions(20, cells=6)
    parts = Parts.of(facts, start)
    x = start.copy()
    x[1 + 2 * 9] = 5.5 / 6
    grown = 0
    for n in range(400):
        y = x.copy()
        parts.fill(y, rng_for(1, n))
        grown += any(y[1 + 2 * k] == x[19] and y[2 + 2 * k] == x[20] for k in (8, 10))
    assert 0.4 < grown / 400 < 0.65


@pytest.mark.parametrize("given", [edits(2, scale=False), edits(1, scale=False)])
def test_a_finite_space_is_counted_and_listed(given: tuple[Facts, np.ndarray]) -> None:
    parts = Parts.of(*given)
    keys = {parts.key(x) for x in parts.points()}
    assert len(keys) == parts.count == {3: 1 + 60, 6: 61 * 62 // 2}[len(given[1])]
    assert {parts.key(np.random.default_rng(n).random(len(given[1]))) for n in range(50)} <= keys
    assert Parts.of(*edits(2)).count is None


# ------------------------------------------------------------------------------------- the search


def test_it_begins_with_the_neutral_point_then_single_edits() -> None:
    facts, start = edits(4)
    other = np.random.default_rng(0).random(len(start))
    optimizer = build((facts, other), population=6)
    first = [optimizer.ask(0)]
    optimizer.tell(Result(0, first[0], np.array([0.5])))
    first.append(optimizer.ask(1))
    assert np.array_equal(first[0], start) and np.array_equal(first[1], other)
    optimizer.tell(Result(1, other, np.array([0.1])))
    for number in range(2, 6):
        x = optimizer.ask(number)
        assert 1 <= optimizer._parts.filled(x).sum() <= 2
        optimizer.tell(Result(number, x, np.array([0.4])))


def test_a_start_that_comes_back_rounded_is_known() -> None:
    facts = Facts.plain(7)
    start = np.array([0.5, 7 / 16, 1 / 3, 0.1, 0.0625, 0.0005, 1.0])
    parts = Parts.of(facts, start)
    for sign in (-1, 1):
        assert parts.key(np.clip(start + sign * 1e-6, 0, 1)) == parts.key(start)
        assert parts.key(start) != parts.key(np.clip(start - 2e-3, 0, 1))


@pytest.mark.parametrize("kind", sorted(SPACES))
def test_nothing_known_or_in_flight_is_proposed_again(kind: str) -> None:
    optimizer = build(SPACES[kind])
    seen: set[bytes] = set()
    flying: list[tuple[int, np.ndarray]] = []
    for number in range(300):
        x = optimizer.ask(number, [p for _, p in flying])
        key = optimizer._parts.key(x)
        assert key not in seen
        seen.add(key)
        flying.append((number, x))
        if len(flying) > 8:
            done, x = flying.pop(0)
            optimizer.tell(Result(done, x, None if done % 7 == 3 else np.array([float(x.sum())])))


def test_a_finite_space_is_tried_to_its_end() -> None:
    given = edits(1, scale=False)
    optimizer = build(given)
    points = []
    with pytest.raises(Exhausted, match="all 61 points"):
        for number in range(100):
            points.append(optimizer.ask(number))
            optimizer.tell(Result(number, points[-1], np.array([0.5]) if number % 3 else None))
    assert len({optimizer._parts.key(x) for x in points}) == len(points) == 61


@pytest.mark.parametrize("name", ["evolution", "catcma"])
def test_points_that_mean_the_same_are_one(name: str) -> None:
    """Sources matter to one kind of edit, and scales to none."""
    facts, start = edits(3)

    def meaning(x: np.ndarray) -> tuple[tuple[int, ...], ...]:
        rows = Parts.of(facts, start).codes(x).reshape(3, 4)
        return tuple(sorted((int(k), int(a), int(s) * (k == 3)) for k, a, s, _ in rows if k))

    optimizer = make(name, len(start), UNIT[:1], 0, start, {}, replace(facts, meaning=meaning))
    seen = set()
    for number in range(80):
        x = optimizer.ask(number)
        seen.add(meaning(x))
        optimizer.tell(Result(number, x, np.array([0.5 + 0.1 * np.sin(number)])))
    assert len(seen) >= (80 if name == "evolution" else 78)


def test_a_finite_space_of_which_points_mean_the_same_ends_too() -> None:
    facts, start = edits(1, scale=False)
    optimizer = build((replace(facts, meaning=lambda x: int(x[0] * 4) if x[0] >= 0.25 else None), start))
    points = []
    with pytest.raises(Exhausted, match="mean"):
        for number in range(100):
            points.append(optimizer.ask(number))
            optimizer.tell(Result(number, points[-1], np.array([0.5])))
    assert len(points) == 4


def test_a_single_point_is_all_there_is() -> None:
    facts = replace(Facts.plain(2), cells=np.ones(2, dtype=np.intp))
    optimizer = build((facts, np.full(2, 0.5)))
    assert np.array_equal(optimizer.ask(0), np.full(2, 0.5))
    optimizer.tell(Result(0, np.full(2, 0.5), np.array([1.0])))
    with pytest.raises(Exhausted):
        optimizer.ask(1)


def _member(number: int, values: tuple[float, ...], missing: float = 0.0) -> _Member:
    return _Member(number, np.zeros(1), bytes([number]), np.array(values), missing)


def test_ranking_is_by_violation_then_rank_then_crowding() -> None:
    members = [
        _member(0, (0.9, 0.9), 0.2),
        _member(1, (0.5, 0.5)),
        _member(2, (0.51, 0.49)),
        _member(3, (0.9, 0.1)),
        _member(4, (0.1, 0.9)),
        _member(5, (0.4, 0.4)),
        _member(6, (0.2, 0.2), 0.1),
    ]
    order = [m.number for m in _ranked(members)]
    assert set(order[:2]) == {3, 4} and set(order[2:4]) == {1, 2} and order[4:] == [5, 6, 0]


def test_infeasible_members_outrank_nobody() -> None:
    members = [_member(0, (0.9, 0.9), 0.1), _member(1, (0.1, 0.95)), _member(2, (0.5, 0.5))]
    assert [m.number for m in _ranked(members)] == [2, 1, 0]


def test_the_worst_leaves_and_a_new_score_replaces_the_old() -> None:
    optimizer = build(edits(), population=3)
    rng = np.random.default_rng(0)
    points = rng.random((5, 12))
    for number, value in enumerate([0.5, 0.9, 0.1, 0.7, 0.3]):
        optimizer.tell(Result(number, points[number], np.array([value])))
    assert [m.number for m in optimizer._archive] == [1, 3, 0]
    optimizer.tell(Result(1, points[1], np.array([0.2])))
    assert [m.number for m in optimizer._archive] == [3, 0, 1]


def test_floors_come_before_values() -> None:
    optimizer = build(positions(8), UNIT, population=8)
    floors = np.array([-np.inf, 0.7])
    rng = np.random.default_rng(0)
    feasible = 0
    for number in range(150):
        x = optimizer.ask(number)
        on = optimizer._parts.filled(x).mean()
        result = Result(number, x, np.array([on, 1 - on]) + 0.01 * rng.standard_normal(2), None, floors)
        optimizer.tell(result)
        feasible += number >= 100 and 1 - on >= 0.65
    assert feasible > 30
    assert all(m.missing == 0 for m in optimizer._archive)
    assert max(m.values[0] for m in optimizer._archive) > 0.2


def test_several_goals_give_a_front_from_end_to_end() -> None:
    optimizer = build(positions(8), UNIT)
    for number in range(150):
        x = optimizer.ask(number)
        kinds = optimizer._parts.codes(x)[1::2]
        optimizer.tell(Result(number, x, np.array([(kinds == 1).mean(), (kinds == 2).mean()])))
    values = np.array([m.values for m in optimizer._archive])
    assert values[:, 0].max() >= 0.75 and values[:, 1].max() >= 0.75
    assert values.sum(axis=1).min() > 0.7


@pytest.mark.parametrize(("land", "more"), [(lands.Path, 0.04), (lands.Choices, 0.08)])
def test_it_beats_random_points_and_the_start(land: type[Any], more: float) -> None:
    ours = [lands.found("evolution", land(s), 120, s)[-1] for s in range(3)]
    blind = [lands.found("random", land(s), 120, s)[-1] for s in range(3)]
    assert np.mean(ours) > np.mean(blind) + more
    assert np.mean(ours) > np.mean([land(s).true(land(s).start) for s in range(3)]) + more


def test_its_own_work_is_small() -> None:
    land = lands.Choices(0, positions=100, scales=99)
    optimizer = build((land.facts, land.start), UNIT)
    rng = np.random.default_rng(0)
    pending = [rng.random(199) for _ in range(64)]
    begin = time.process_time()
    for number in range(200):
        x = optimizer.ask(number, pending)
        optimizer.tell(Result(number, x, rng.random(2)))
    assert (time.process_time() - begin) / 200 < 0.05  # measured 0.005 s
