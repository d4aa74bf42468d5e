"""Tests of evomerge.optimizers._tied: the surrogate search on coordinates that were one on a coarser level."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from evomerge.optimizers import Exhausted, Facts, Goal, Level, Result
from evomerge.optimizers._levels import ties
from evomerge.optimizers._tied import RADIUS, TiedSearch
from tests.landscapes import UNIT

TIES = np.repeat(np.eye(2), 3, axis=0)  # six coordinates, of which each three were one
BEST = np.array([0.8, 0.5, 0.5, 0.2, 0.4, 0.3])


def build(goals: tuple[Goal, ...] = UNIT[:1], seed: int = 0, facts: Facts | None = None) -> TiedSearch:
    return TiedSearch(6, goals, seed, np.full(6, 0.5), ties=TIES, facts=facts)


def truth(x: np.ndarray) -> float:
    return float(expit(1.5 - 30 * ((x - BEST) ** 2).mean()))


def score(number: int, x: np.ndarray, m: int = 1, floors: np.ndarray | None = None) -> Result:
    noise = 0.01 * np.random.default_rng([number, 5]).standard_normal(m)
    values = np.array([truth(x), truth(1 - x)])[:m] + noise
    return Result(number, x, np.clip(values, 0, 1), np.full(m, 0.01), floors)


def coarse(search: TiedSearch, n: int = 20, m: int = 1, floors: np.ndarray | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    points = [TIES @ rng.random(2) for _ in range(n)]
    for number, x in enumerate(points):
        search.tell(score(number, x, m, floors))
    return points


def test_it_gets_beyond_what_the_coarse_level_holds() -> None:
    bound = truth(TIES @ np.array([0.6, 0.3]))  # the best of all coarse points
    ends = []
    for seed in range(3):
        search = build(seed=seed)
        coarse(search)
        for number in range(20, 60):
            search.tell(score(number, search.ask(number)))
        (advice,) = search.recommend()
        assert advice.why == "surrogate optimum"
        ends.append(truth(advice.x))
    assert bound < 0.751 and truth(BEST) > 0.817
    assert min(ends) > bound + 0.01 and np.mean(ends) > bound + 0.02, ends


def test_proposals_stay_near_the_front_of_what_is_known() -> None:
    search = build(UNIT)
    points = coarse(search, m=2)
    front = search._front()
    assert 1 <= len(front) <= len(points)
    for number in range(20, 40):
        x = search.ask(number)
        assert np.abs(front - x).max(axis=1).min() <= RADIUS + 1e-9
    apart = np.array([search.ask(number) for number in range(20, 40)])
    assert np.abs(apart - apart @ TIES @ TIES.T / 3).max() > 0.05  # and leave the coarse level


def test_equal_histories_give_equal_points_whatever_was_asked() -> None:
    one, other = build(UNIT), build(UNIT)
    coarse(one, m=2)
    coarse(other, m=2)
    other.ask(7, [BEST])
    other.recommend()
    for number in (20, 21):
        assert np.array_equal(one.ask(number, [BEST]), other.ask(number, [BEST]))
    assert np.array_equal(one.recommend()[0].x, other.recommend()[0].x)


def test_floors_hold_a_recommendation_back() -> None:
    free, bound = build(UNIT), build(UNIT)
    coarse(free, 40, m=2)
    coarse(bound, 40, m=2, floors=np.array([-np.inf, 0.5]))
    assert truth(1 - bound.recommend()[0].x) > max(0.48, truth(1 - free.recommend()[0].x) - 0.01)
    hopeless = build(UNIT)
    coarse(hopeless, m=2, floors=np.full(2, 2.0))
    assert ((hopeless.ask(20) >= 0) & (hopeless.recommend()[0].x <= 1)).all()


def test_nothing_known_and_nothing_but_failures() -> None:
    search = build()
    assert search.recommend() == []
    first = search.ask(0)
    for number in range(5):
        search.tell(Result(number, np.full(6, 0.1 * number), None, None))
    assert search.recommend() == [] and not np.array_equal(search.ask(1), first)


@pytest.mark.parametrize("fails", [True, False])
def test_a_level_of_cells_is_searched_to_its_end(fails: bool) -> None:
    plain = Facts.plain(6)
    search = build(facts=Facts(np.full(6, 2), plain.categorical, None, plain.experts, plain.levels))
    seen = set()
    with pytest.raises(Exhausted, match="all 64 points"):
        for number in range(400):
            x = search.ask(number)
            assert np.isin(x, (0.25, 0.75)).all()
            seen.add(x.tobytes())
            search.tell(Result(number, x, None, None) if fails else score(number, x))
    assert len(seen) == 64 and number < 80


# ------------------------------------------------------------------------------------- which levels are tied


def test_ties_are_the_coarse_coordinates_that_were_split() -> None:
    whole = Level("whole", np.eye(6), np.zeros(6))
    found = ties(Level("model", TIES, np.zeros(6)), whole)
    assert found is not None and np.array_equal(found, TIES)
    groups = Level("groups", np.repeat(np.eye(3), 2, axis=0), np.zeros(6))
    assert ties(Level("model", np.ones((6, 1)), np.zeros(6)), groups) is not None


@pytest.mark.parametrize(
    "fine",
    [
        Level("new coordinate", np.eye(6), np.zeros(6)),
        Level("bent", np.column_stack([TIES, np.r_[-0.5, 0.0, 0.5, 0.0, 0.0, 0.0]]), np.zeros(6)),
    ],
    ids=lambda level: level.name,
)
def test_levels_that_do_more_than_split_are_not_tied(fine: Level) -> None:
    half = TIES * np.r_[1.0, 1.0, 1.0, 1.0, 1.0, 0.0][:, None]  # the last coordinate is not in the coarse level
    coarse_level = Level("model", half if fine.name == "new coordinate" else TIES, np.zeros(6))
    assert ties(coarse_level, fine) is None
