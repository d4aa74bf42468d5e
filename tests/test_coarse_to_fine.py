"""Tests of evomerge.optimizers.coarse_to_fine: its stages, the race of operators, the basis shift and the guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.optimizers import Exhausted, Facts, Goal, Result, check_optimizer, coarse_to_fine, make
from evomerge.optimizers._guard import Guard
from evomerge.optimizers._levels import Arm
from evomerge.optimizers._operators import MOST, OperatorRace
from evomerge.optimizers.coarse_to_fine import CoarseToFine
from evomerge.optimizers.random import RandomSearch
from evomerge.space import SearchSpace
from evomerge.strict_yaml import load_yaml
from tests.conftest import ROOT
from tests.landscapes import UNIT

TURNS = "all levels in turn"
Score = Callable[[dict[str, Any], np.ndarray], np.ndarray | None]


def space(spec: dict[str, Any], experts: str = "abc", layers: int = 8) -> SearchSpace:
    return SearchSpace.from_dict(spec, "models/base", {name: f"models/{name}" for name in experts}, layers, 3)


def shipped(name: str, experts: str = "abc") -> SearchSpace:
    path = ROOT / "search_spaces" / f"{name}.yaml"
    return space(load_yaml(path.read_text(encoding="utf-8"), path.name).data, experts, 12)


WEIGHT = {"low": 0.0, "high": 1.2}
SMALL = {"method": "task_arithmetic", "components": ["attention", "rest"], "genes": {"weight": WEIGHT}}
LAYERED = {"method": "task_arithmetic", "layer_groups": "each", "genes": {"weight": WEIGHT}}
CHOICES = {
    "method": ["ties", "dare_ties"],
    "genes": {"weight": {"choices": [0.0, 0.5, 1.0]}, "density": {"choices": [0.3, 0.6], "per_expert": False}},
}


def build(
    made: SearchSpace,
    seed: int = 0,
    goals: tuple[Goal, ...] = UNIT,
    workers: int = 1,
    n: int | None = None,
    **options: Any,
) -> CoarseToFine:
    facts, start = made.facts(workers=workers, evaluations=n), made.encode(made.start())
    optimizer = make("coarse_to_fine", made.dim, goals, seed, start, options, facts)
    assert isinstance(optimizer, CoarseToFine)
    return optimizer


def peaks(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Two objectives that want different experts (coordinates modulo 3, roughly)."""
    away = np.arange(len(x)) % 3 == 0
    first, second = np.where(away, 0.8, 0.3), np.where(away, 0.2, 0.6)
    return np.exp(-4 * np.array([((x - first) ** 2).mean(), ((x - second) ** 2).mean()]))


class Search:
    """A search that goes on as a study does: decoded, scored with noise, encoded again, told."""

    def __init__(self, made: SearchSpace, optimizer: CoarseToFine, score: Score = peaks, items: int = 0) -> None:
        self.made, self.optimizer, self.score, self.items = made, optimizer, score, items
        self.asked: list[np.ndarray] = []
        self.told: list[Result] = []
        self.stages: list[str] = []  # in which each was asked

    def result(self, number: int, x: np.ndarray) -> Result:
        params = self.made.decode(x)
        recipe = self.made.recipe(params)
        assert self.made.point_of(recipe) is not None  # a recipe of this space, of the original experts
        point, rng = self.made.encode(params), np.random.default_rng([3, number])
        true = self.score(params, point)
        if true is None:
            return Result(number, point, None, None)
        values = np.clip(true + 0.02 * rng.standard_normal(len(true)), 0, 1)
        items = [(rng.random(self.items) < v).astype(float) for v in values] if self.items else None
        return Result(number, point, values, np.full(len(true), 0.02), None, items)

    def go(self, n: int) -> Search:
        for number in range(len(self.told), len(self.told) + n):
            self.stages.append(self.optimizer._stage)
            self.asked.append(self.optimizer.ask(number))
            self.told.append(self.result(number, self.asked[-1]))
            self.optimizer.tell(self.told[-1])
        return self

    @property
    def order(self) -> list[str]:
        return list(dict.fromkeys(self.stages))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage ends at its first look: nothing gains the whole hypervolume again."""
    monkeypatch.setattr(coarse_to_fine, "GAIN", 1.0)


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.slow
def test_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_optimizer(lambda dim, goals, seed, start: make("coarse_to_fine", dim, goals, seed, start))


@pytest.mark.slow
def test_contract_on_nested_levels(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = {1: "task_arithmetic", 3: "task_arithmetic"}
    made = {
        dim: space(
            {"method": method, "genes": {"weight": WEIGHT}}
            | ({"components": ["attention", "mlp", "rest"]} if dim == 3 else {}),
            "a",
        )
        for dim, method in parts.items()
    }
    assert [level.dim for level in made[3].facts().levels] == [1, 3]
    opened: list[CoarseToFine] = []

    def nested(dim: int, goals: Any, seed: int, start: np.ndarray) -> CoarseToFine:
        optimizer = make("coarse_to_fine", dim, goals, seed, start, None, made[dim].facts())
        assert isinstance(optimizer, CoarseToFine)
        opened.append(optimizer)
        return optimizer

    check_optimizer(nested)
    assert {(optimizer._stage, len(optimizer._arms)) for optimizer in opened} >= {(TURNS, 1), (TURNS, 2)}


SPACES: dict[str, tuple[Callable[[], SearchSpace], dict[str, Any], int, list[str]]] = {
    "nested": (lambda: space(SMALL), {}, 56, ["model", "groups", "shift", TURNS]),
    "shipped": (lambda: shipped("nested", "ab"), {}, 66, ["model", "groups", "shift", TURNS]),
    "operators": (lambda: shipped("operators"), {}, 72, ["model", "operator", "shift", TURNS]),
    "layers": (
        lambda: space(LAYERED, "ab"),
        {"finest": "layers"},
        110,
        ["model", "groups", "smooth", "layers", "shift", TURNS],
    ),
    "choices": (lambda: space(CHOICES, "ab"), {}, 26, ["model", "operator"]),
}


@cache
def recorded(name: str) -> Search:
    """A search through all stages of a space; to be used with `quick`."""
    factory, options, n, _ = SPACES[name]
    made = factory()
    return Search(made, build(made, **options)).go(n)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SPACES)
def test_stages_come_in_order_and_a_search_that_was_killed_goes_on(name: str) -> None:
    search, (_, options, n, order) = recorded(name), SPACES[name]
    assert search.order == order
    changes = [k for k in range(1, n) if search.stages[k] != search.stages[k - 1]]
    replayed, done = build(search.made, **options), 0
    for k in sorted({k + step for k in [1, *changes, n - 1] for step in (-1, 0, 1) if k + step < n}):
        for result in search.told[done:k]:
            replayed.tell(result)
        done = k
        assert replayed._stage == search.stages[k]
        assert np.array_equal(replayed.ask(k), search.asked[k]), (k, replayed._stage)
        replayed.recommend()  # leaves no trace


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["nested", "operators"])
def test_what_was_told_is_copied(name: str) -> None:
    search, options = recorded(name), SPACES[name][1]
    other = build(search.made, **options)
    for result in search.told:
        assert result.x is not None and result.values is not None and result.stderr is not None
        mine = replace(result, x=result.x.copy(), values=result.values.copy(), stderr=result.stderr.copy())
        other.tell(mine)
        for array in (mine.x, mine.values, mine.stderr):
            assert array is not None
            array[:] = 0.9
    assert np.array_equal(other.ask(500), search.optimizer.ask(500))


def test_points_and_recommendations_lie_in_the_finest_level_that_is_open() -> None:
    made = space(LAYERED, "ab")
    groups = made.facts().levels[1]
    search = Search(made, build(made)).go(40)
    for x in [*search.asked, *(r.x for r in search.optimizer.recommend())]:
        assert groups.project(x) is not None


@pytest.mark.usefixtures("quick")
def test_sixty_four_pending_points_are_not_proposed_again() -> None:
    search = recorded("nested")
    rng = np.random.default_rng(0)
    pending = [search.optimizer.ask(1000 + k) for k in range(8)] + list(rng.random((56, search.made.dim)))
    for number in range(2000, 2004):
        x = search.optimizer.ask(number, pending)
        assert np.abs(np.array(pending) - x).max(axis=1).min() > 1e-6


@pytest.mark.usefixtures("quick")
def test_every_kind_of_result_is_survived_in_every_stage() -> None:
    made = space(SMALL)
    optimizer, other = build(made), build(made)
    rng = np.random.default_rng(4)
    history: list[Result] = []
    for number in range(90):
        # The open stage's own points, mostly; asked for seldom, as that takes the time.
        x = (
            optimizer.ask(number)
            if number % 6 == 0 or optimizer._stage == "shift"
            else made.facts().levels[number % 2].embed(rng.random((3, 6)[number % 2]))
        )
        good = Search(made, optimizer).result(number, x)
        assert good.values is not None
        values: list[np.ndarray | None] = [good.values, np.full(2, 0.5), None, np.full(2, np.nan), good.values]
        items = [None, [rng.random(5), rng.random(9)], [rng.random(5 + number % 2), rng.random(9)], None, []]
        floors = [None, np.array([0.9, -np.inf]), np.full(2, 2.0)][number % 3]
        kind = number % 5
        history.append(replace(good, values=values[kind], floors=floors, items=items[kind]))
        if number % 7 == 3:
            history.append(replace(good, values=good.values * 0.9))  # told twice
        if number % 11 == 3:
            history.append(replace(good, x=None))
        for result in history[-1:]:
            optimizer.tell(result)
        for result in history[-1:]:
            other.tell(result)
    assert optimizer._stage == TURNS
    assert np.array_equal(optimizer.ask(99), other.ask(99))
    assert all(np.isfinite(r.x).all() for r in optimizer.recommend())


@pytest.mark.parametrize("floors", [None, np.full(2, 2.0)], ids=["constant", "infeasible"])
def test_a_flat_or_infeasible_landscape_goes_through_all_stages(floors: np.ndarray | None) -> None:
    made = space(SMALL)
    optimizer = build(made)
    rng = np.random.default_rng(5)
    for number in range(120):
        x = (
            optimizer.ask(number)
            if number % 6 == 0
            else rng.random(made.dim)
            if number % 2
            else (made.facts().levels[0].embed(rng.random(3)))
        )
        optimizer.tell(Result(number, x, np.full(2, 0.5), np.full(2, 0.02), floors))
    assert optimizer._stage == TURNS
    optimizer.recommend()


# ------------------------------------------------------------------------------------- stages


def test_a_small_budget_is_all_for_the_first_stage() -> None:
    made = space(SMALL)
    flat = Search(made, build(made, n=59), lambda params, x: np.full(2, 0.5)).go(40)
    assert flat.order[0] == "model" and len(flat.optimizer._arms) == 1
    model = made.facts().levels[0]
    assert all(model.project(x) is not None for x in flat.asked)


def test_a_stage_that_gains_is_not_cut_off_and_one_that_does_not_is() -> None:
    made = space(SMALL)
    model = made.facts().levels[0]
    rising, flat = build(made, goals=UNIT[:1]), build(made, goals=UNIT[:1])
    for number in range(60):
        x = model.embed(np.full(3, number / 60))
        rising.tell(Result(number, x, np.array([0.2 + 0.01 * number]), np.array([0.001])))
        level = 0.5 + 0.001 * np.random.default_rng(number).standard_normal()
        flat.tell(Result(number, x, np.array([level]), np.array([0.001])))
    assert rising._stage == "model" and flat._stage != "model"


def test_an_unknown_finest_level_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="it has model, groups") as caught:
        build(space(SMALL), finest="layers")
    assert caught.value.problems[0].where == "optimizer.finest"


@pytest.mark.parametrize(("finest", "expected"), [(None, "groups"), ("model", "model"), ("layers", "layers")])
def test_the_search_descends_to_groups_unless_told_otherwise(finest: str | None, expected: str) -> None:
    optimizer = build(space(LAYERED, "ab"), **({} if finest is None else {"finest": finest}))
    assert optimizer._levels[-1].name == expected


@pytest.mark.usefixtures("quick")
def test_coarse_points_stay_in_use() -> None:
    search = recorded("shipped")
    model = search.made.facts().levels[0]
    coarse = [
        model.project(x) is not None for x, stage in zip(search.asked, search.stages, strict=True) if stage == "groups"
    ]
    assert len(coarse) >= 28 and 0.25 < np.mean(coarse) < 0.75


@pytest.mark.usefixtures("quick")
def test_a_shift_point_is_told_to_the_search_that_asked_for_it() -> None:
    search = recorded("nested")
    (shift,) = (arm for arm in search.optimizer._arms if arm.level.name == "shift")
    for number in range(700, 712):
        x = search.result(number, shift.ask(number)).x
        assert x is not None and shift.level.project(x) is not None


def test_a_point_that_leaves_the_cube_is_drawn_back_into_its_level() -> None:
    made = space(LAYERED, "ab", 16)
    smooth = next(level for level in made.facts().levels if level.name == "smooth")
    arm = Arm(smooth, RandomSearch(smooth.dim, UNIT, 0, np.full(smooth.dim, 0.5)))
    lost = 0
    for number in range(100):
        lost += smooth.project(smooth.embed(arm.search.ask(number))) is None
        assert smooth.project(arm.ask(number)) is not None
    assert lost > 50  # clipped they would have been outside


@pytest.mark.parametrize(
    "spec",
    [
        CHOICES,
        {"method": "ties", "genes": {"weight": {"choices": [0.0, 0.5, 1.0]}}},
        {"method": "ties", "genes": {"normalize": "search", "sign_election": "search"}},
        {"method": ["ties", "dare_ties"], "genes": {"weight": {"choices": [0.0, 1.0], "per_group": True}}}
        | {"layer_groups": 2},
    ],
    ids=["operators", "numbers", "categories", "groups"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_space_of_cells_ends_with_a_message(spec: dict[str, Any], fails: bool) -> None:
    made = space(spec, "ab")
    points = int(np.prod(made.facts().cells))
    optimizer = build(made)
    search = Search(made, optimizer, (lambda params, x: None) if fails else peaks)
    with pytest.raises(Exhausted, match="have been tried"):
        search.go(4 * points + 40)
    for number in range(10_000, 10_040):  # and stays so
        with pytest.raises(Exhausted):
            optimizer.ask(number)


# ------------------------------------------------------------------------------------- operators


def better(name: str, margin: float) -> Callable[[dict[str, Any], np.ndarray], np.ndarray]:
    return lambda params, x: 0.6 * peaks(params, x[1:]) + margin * (params["method"] == name)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties"])
def test_the_race_finds_the_better_operator(name: str) -> None:
    made = shipped("operators")
    search = Search(made, build(made, goals=UNIT[:1]), lambda p, x: better(name, 0.08)(p, x)[:1]).go(68)
    assert "operator" in search.order and search.optimizer._race is None
    x = search.optimizer._coarse.level.embed(np.full(search.optimizer._coarse.level.dim, 0.5))
    assert made.decode(x)["method"] == name


@pytest.mark.usefixtures("quick")
def test_an_operator_that_always_fails_or_breaks_the_floor_loses() -> None:
    made = shipped("operators")
    for score in (lambda params, x: None, lambda params, x: np.array([0.1, 0.99])):
        search = Search(made, build(made), lambda p, x, s=score: s(p, x) if p["method"] == "ties" else peaks(p, x))  # type: ignore[misc]
        for _ in range(70):
            number = len(search.told)
            result = replace(search.result(number, search.optimizer.ask(number)), floors=np.array([0.4, -np.inf]))
            search.told.append(result)
            search.optimizer.tell(result)
        assert search.optimizer._race is None
        x = search.optimizer._coarse.level.embed(np.full(search.optimizer._coarse.level.dim, 0.5))
        assert made.decode(x)["method"] != "ties"


def test_the_worth_of_an_operator_is_the_volume_of_what_keeps_the_floors() -> None:
    optimizer, reference = build(shipped("operators")), np.zeros(2)
    optimizer.tell(Result(0, np.full(optimizer._dim, 0.5), np.full(2, 0.5), None, np.array([0.4, -np.inf])))
    means = np.array([[0.9, 0.1], [0.2, 0.9]])
    assert optimizer._worth(means, reference) == pytest.approx(0.09)
    assert optimizer._worth(means[1:], reference) == pytest.approx(-0.2)
    assert optimizer._worth(means[:0], reference) == -np.inf


def test_with_many_combinations_each_category_is_changed_alone() -> None:
    spec = {
        "method": ["task_arithmetic", "ties", "dare_ties", "dare_linear"],
        "genes": {"weight": WEIGHT, "normalize": "search", "sign_election": "search"},
    }
    made = space(spec)
    facts = made.facts()
    level = next(level for level in facts.levels if level.name == "operator")
    start = made.encode(made.start())
    race = OperatorRace(level, UNIT, 0, start, start[None], facts)
    combinations = [made.decode(arm.level.embed(np.full(arm.level.dim, 0.5))) for arm in race.arms]
    total = int(np.prod(facts.cells[facts.categorical]))
    alone = 1 + int((facts.cells[facts.categorical] - 1).sum())
    assert total > MOST and len(race.arms) == alone
    names = [gene.name for gene, categorical in zip(made.genes, facts.categorical, strict=True) if categorical]
    first = {name: made.start()[name] for name in names}
    assert {name: combinations[0][name] for name in names} == first
    assert all(sum(one[name] != first[name] for name in names) == 1 for one in combinations[1:])
    assert len({tuple(one[name] for name in names) for one in combinations}) == alone


# ------------------------------------------------------------------------------------- the guard


def guarded(seed: int, lead: float, n: int = 400, rivals: int = 100) -> bool:
    """Whether the guard lets pass the best of finer candidates that each differ in a tenth of the coarse best's items.

    On those they are right with chance 0.6 + `lead`, and the coarse best with 0.6.
    """
    rng = np.random.default_rng([seed, 17])
    guard, shared = Guard(1, seed), (rng.random(n) < 0.6).astype(float)
    for number in range(rivals + 1):
        changed = rng.random(n) < 0.1
        items = np.where(changed, rng.random(n) < 0.6 + lead, shared) if number else shared
        guard.tell(Result(number, np.zeros(1), np.array([items.mean()]), None, None, [items]), coarse=number == 0)
    return guard.passes()


def test_the_guard_refuses_luck_and_lets_a_real_gain_pass() -> None:
    passed = {lead: np.mean([guarded(seed, lead) for seed in range(n)]) for lead, n in ((0.0, 200), (0.4, 40))}
    assert passed[0.0] < 0.2 and passed[0.4] > 0.95  # measured: 0.15 and 1; one standard error is a chance of 0.16


def test_the_guard_needs_items_of_one_length_on_both_sides() -> None:
    guard, x = Guard(1, 0), np.zeros(1)

    def tell(number: int, value: float, items: list[np.ndarray] | None, *, coarse: bool, floor: float = -1.0) -> None:
        guard.tell(Result(number, x, np.array([value]), None, np.array([floor]), items), coarse=coarse)

    tell(0, 0.1, [np.zeros(50)], coarse=True)
    assert not guard.passes()  # no rival
    tell(1, 0.9, None, coarse=False)
    tell(2, 0.9, [np.ones(40)], coarse=False)
    tell(3, 0.9, [np.ones(50)], coarse=False, floor=0.95)
    tell(4, 0.9, [np.ones(1)], coarse=False)
    assert not guard.passes()
    tell(5, 0.9, [np.ones(50)], coarse=False)
    assert guard.passes()
    tell(5, 0.0, [np.zeros(50)], coarse=False)  # scored again
    assert not guard.passes()


def test_recommendations_begin_with_the_finer_level_only_past_the_guard() -> None:
    made = space(SMALL)
    firsts = {}
    for lead in (0.0, 0.25):
        optimizer = build(made, goals=UNIT[:1])
        model, rng = made.facts().levels[0], np.random.default_rng(2)
        for number in range(90):
            fine = number >= 40 and number % 2 == 1
            x = rng.random(made.dim) if fine else model.embed(rng.random(3))
            items = (rng.random(100) < 0.5 + lead * fine).astype(float)
            optimizer.tell(Result(number, x, np.array([items.mean()]), np.array([0.05]), None, [items]))
        assert len(optimizer._arms) > 1
        firsts[lead] = optimizer.recommend()[0].why
    assert firsts[0.0].endswith("model") and firsts[0.25].endswith(("groups", "shift"))


# ------------------------------------------------------------------------------------- what it costs


def test_results_are_kept_by_the_searches_alone_once_all_levels_are_open(quick: None) -> None:
    search = recorded("nested")
    assert search.stages[-1] == TURNS and search.optimizer._told == []


@pytest.mark.slow
def test_it_gains_from_finer_levels_on_a_landscape_that_needs_them() -> None:
    made = shipped("nested", "ab")
    facts: Facts = made.facts()
    rng = np.random.default_rng(0)
    model = facts.levels[0]

    def truth(x: np.ndarray) -> float:
        return float(np.exp(-3 * ((x - best) ** 2).mean()))

    gains = []
    for seed in range(3):
        best = np.clip(model.embed(rng.uniform(0.3, 0.7, 2)) + 0.25 * rng.standard_normal(made.dim), 0, 1)
        search = Search(made, build(made, seed, UNIT[:1]), lambda params, x: np.array([truth(x)]), items=0).go(250)
        coarse = max(truth(r.x) for r in search.told if r.x is not None and model.project(r.x) is not None)
        gains.append(max(truth(r.x) for r in search.told if r.x is not None) - coarse)
    assert np.mean(gains) > 0.03


@pytest.mark.usefixtures("quick")
def test_it_says_which_levels_were_opened() -> None:
    made = space(SMALL)
    few = build(made, n=40)
    assert "levels searched: model" in few.describe() and "not opened: groups" in few.describe()
    done = recorded("nested").optimizer.describe()
    assert "groups" in done and "not opened" not in done
