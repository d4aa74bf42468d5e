"""Tests of the optimizers on Optuna's samplers: nsga2, nsga3, tpe and gp."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.front import non_dominated
from evomerge.optimizers import Goal, Optimizer, Result, make
from evomerge.optimizers._optuna import OUTSIDE, PENDING, Row, Rows, asked, cube, finished, quiet, running, study
from evomerge.optimizers.gp import MOST_RESULTS
from evomerge.optimizers.nsga3 import directions, divisions
from tests.landscapes import UNIT, told, volumes

GENETIC = ("nsga2", "nsga3")


def goals(count: int) -> list[Goal]:
    return [Goal(f"goal{j}") for j in range(count)]


def bowls(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Values (m,) of points (d,): minus the squared distances to the centres (m, d)."""
    return np.asarray(-((x - centres) ** 2).sum(axis=1))


def run(optimizer: Optimizer, centres: np.ndarray, n: int, floors: np.ndarray | None = None) -> np.ndarray:
    points = []
    for number in range(n):
        x = optimizer.ask(number)
        points.append(x)
        optimizer.tell(Result(number, x, bowls(x, centres), None, floors))
    return np.array(points)


# ------------------------------------------------------------------------------------- rows and studies


def test_a_study_shows_the_rows_and_keeps_nothing() -> None:
    rows = [Row(n, np.full(2, 0.1 * n), np.array([float(n), -1.0])) for n in range(3)]
    trials = finished(rows, np.array([1.5, -np.inf])) + running([np.full(2, 0.9)])
    shown = study(trials, 2)
    assert [t.number for t in shown.get_trials()] == [0, 1, 2, PENDING]
    assert [t.number for t in shown.best_trials] == [2]  # feasible: 2 >= 1.5; and the values are minimised there
    assert [t.constraints for t in shown.get_trials()[:3]] == [{"0": 1.5}, {"0": 0.5}, {"0": -0.5}]
    assert shown.get_trials()[0].values == [0.0, 1.0] and asked(2).number == OUTSIDE
    assert len(study([], 2).get_trials()) == 0  # one study leaves nothing to the next


def test_rows_are_a_window_of_the_newest_and_a_second_telling_replaces() -> None:
    rows = Rows(1, 1, 3)
    for number in (5, 1, 9, 1, 7):
        rows.tell(Result(number, np.array([0.1 * number]), np.array([float(len(rows))]), None, np.array([0.5])))
    assert [(row.number, row.values[0]) for row in rows] == [(1, 3.0), (9, 2.0), (7, 3.0)]
    rows.tell(Result(8, None, None, None, np.array([0.7])))
    assert len(rows) == 3 and rows.floors == 0.7  # a failure teaches nothing but the floors


# ------------------------------------------------------------------------------------- nsga2, nsga3


def test_nsga2_breeds_from_the_elite_after_one_generation() -> None:
    optimizer = make("nsga2", 4, UNIT[:1], 0, np.full(4, 0.5), {"population": 10})
    points = np.array(told(optimizer, lambda x: -float(((x - 0.3) ** 2).sum()), 150))
    distance = ((points - 0.3) ** 2).sum(axis=1)
    assert distance[-30:].mean() < 0.3 * distance[:10].mean()


@pytest.mark.parametrize("name", GENETIC)
def test_the_parents_are_the_elite_of_everything_told(name: str) -> None:
    optimizer: Any = make(name, 3, goals(2), 1, np.full(3, 0.5), {"population": 8})
    points = run(optimizer, np.array([[0.2] * 3, [0.8] * 3]), 8 * 12)
    values = np.array([bowls(x, np.array([[0.2] * 3, [0.8] * 3])) for x in points])
    parents = list(optimizer._parents.values())
    assert len(parents) == 8 and len(optimizer._newest) == 0
    # Elitism: no parent is dominated by any result, and both ends of the front are among them (nsga2).
    front = {p.tobytes() for p in points[non_dominated(values)]}
    assert all(row.x.tobytes() in front for row in parents)
    if name == "nsga2":
        best = values[[row.number for row in parents]].max(axis=0)
        assert np.allclose(best, values.max(axis=0))


@pytest.mark.parametrize("name", GENETIC)
def test_generations_keep_two_populations_at_most_and_take_a_second_telling(name: str) -> None:
    optimizer: Any = make(name, 2, goals(2), 0, np.full(2, 0.5), {"population": 8})
    rng = np.random.default_rng(0)
    for number in range(100):
        optimizer.tell(Result(number, rng.random(2), rng.random(2), None))
        assert len(optimizer._parents) <= 8 and len(optimizer._newest) < 8
    parent = next(iter(optimizer._parents))
    newest = len(optimizer._newest)
    optimizer.tell(Result(parent, np.zeros(2), np.full(2, 5.0), None))
    assert optimizer._parents[parent].values[0] == 5.0 and len(optimizer._newest) == newest
    gone = next(n for n in range(50) if n not in optimizer._parents)
    optimizer.tell(Result(gone, np.zeros(2), np.full(2, 5.0), None))
    assert gone in optimizer._newest  # forgotten: it competes anew


def test_nsga3_covers_the_directions_where_the_objectives_differ_in_scale() -> None:
    centres = np.eye(3)
    optimizer: Any = make("nsga3", 3, goals(3), 3, np.full(3, 0.5), {"population": 21})
    scale = np.array([1.0, 100.0, 0.01])
    for number in range(21 * 25):
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, bowls(x, centres) * scale, None))
    losses = -np.array([row.values for row in optimizer._parents.values()]) / scale
    nearest = np.argmin(losses, axis=1)  # the task that each parent serves best
    assert np.bincount(nearest, minlength=3).min() >= 3
    assert (losses.min(axis=0) < 0.35).all()  # the sum of squares is 2 at the other corners, 2/3 in the middle


@pytest.mark.parametrize("m", range(2, 12))
def test_nsga3_never_has_more_directions_than_candidates(m: int) -> None:
    optimizer: Any = make("nsga3", 2, goals(m), 0, np.full(2, 0.5))
    population, parts = optimizer._population, optimizer._divisions
    assert directions(m, parts) <= population < directions(m, parts + 1)
    assert parts >= 2 and divisions(m, m) == 1
    assert directions(m, parts) == math.comb(m + parts - 1, m - 1)
    from optuna.samplers._nsgaiii._elite_population_selection_strategy import _generate_default_reference_point

    assert len(_generate_default_reference_point(m, parts)) == directions(m, parts)


def test_nsga3_refuses_one_objective_and_a_population_below_the_objectives() -> None:
    with pytest.raises(ConfigError, match="there is one: a") as caught:
        make("nsga3", 2, UNIT[:1], 0, np.full(2, 0.5))
    assert "cma_es, map or nsga2" in caught.value.problems[0].hint
    with pytest.raises(ConfigError, match="population is 5"):
        make("nsga3", 2, goals(6), 0, np.full(2, 0.5), {"population": 5})


# ------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(("name", "n"), [("nsga2", 144), ("nsga3", 144), ("tpe", 120), ("gp", 16)])
def test_floors_move_the_search_to_where_they_hold(name: str, n: int) -> None:
    centres = np.array([[0.2, 0.2], [0.8, 0.8]])
    floors = np.array([-0.1, -np.inf])  # within 0.32 of the first centre
    options: dict[str, object] = {"startup": 10} if name == "gp" else {}
    share = []
    for given in (floors, None):
        points = run(make(name, 2, goals(2), 0, np.full(2, 0.5), options), centres, n, given)[max(10, n // 2) :]
        share.append(np.mean([bowls(x, centres)[0] >= floors[0] for x in points]))
    assert share[0] > 0.6 and share[0] > share[1] + 0.2


@pytest.mark.parametrize("name", ["nsga2", "nsga3", "tpe"])
def test_the_newest_floors_hold_for_the_whole_history(name: str) -> None:
    """Told with other floors before, or with none: what counts is what is known now."""
    rng = np.random.default_rng(4)
    history = [(x := rng.random(2), bowls(x, np.array([[0.2, 0.2], [0.8, 0.8]]))) for _ in range(48)]
    late, early = (
        make(name, 2, goals(2), 0, np.full(2, 0.5), {} if name == "tpe" else {"population": 48}) for _ in "ab"
    )
    for number, (x, values) in enumerate(history):
        last = number == len(history) - 1
        late.tell(Result(number, x, values, None, np.full(2, -0.3) if last else None))
        early.tell(Result(number, x, values, None, np.full(2, -0.3)))
    assert all(np.array_equal(late.ask(n), early.ask(n)) for n in range(50, 60))


# ------------------------------------------------------------------------------------- tpe


def test_tpe_forgets_what_left_the_window() -> None:
    rng = np.random.default_rng(0)
    history = [Result(n, x := rng.random(2), -((x - 0.3) ** 2).sum(keepdims=True), None) for n in range(40)]
    whole, tail = (make("tpe", 2, UNIT[:1], 0, np.full(2, 0.5), {"window": 20}) for _ in range(2))
    for result in history:
        whole.tell(result)
    for result in history[20:]:
        tail.tell(result)
    assert np.array_equal(whole.ask(40), tail.ask(40))


def test_tpe_avoids_pending_points() -> None:
    optimizer = make("tpe", 1, UNIT[:1], 0, np.full(1, 0.5))
    told(optimizer, lambda x: -abs(float(x[0]) - 0.5), 60)
    free = np.array([optimizer.ask(n)[0] for n in range(100, 115)])
    taken = [np.array([v]) for v in np.linspace(0.47, 0.53, 15)]
    crowded = np.array([optimizer.ask(n, taken)[0] for n in range(100, 115)])
    assert np.mean(np.abs(crowded - 0.5)) > np.mean(np.abs(free - 0.5))


def test_tpe_proposes_what_optunas_own_loop_would() -> None:
    """The study that lasts one question hides nothing from the sampler: the same answer as from a stored study."""
    import optuna
    from optuna.samplers import TPESampler

    from evomerge.optimizers._optuna import seed_for

    rng = np.random.default_rng(2)
    optimizer = make("tpe", 3, goals(2), 9, np.full(3, 0.5))
    with quiet():
        stored = optuna.create_study(directions=["minimize"] * 2)
        for number in range(40):
            x = rng.random(3)
            values = bowls(x, np.array([[0.2] * 3, [0.7] * 3]))
            optimizer.tell(Result(number, x, values, None))
            params = dict(zip(cube(3), x.tolist(), strict=True))
            stored.add_trial(optuna.trial.create_trial(values=(-values).tolist(), params=params, distributions=cube(3)))
        stored.sampler = TPESampler(seed=seed_for(9, 40), multivariate=True)
        expected = stored.ask(cube(3)).params
    assert optimizer.ask(40).tolist() == [expected[name] for name in cube(3)]


def test_tpe_beats_random_in_true_hypervolume() -> None:
    assert volumes("tpe", 12, 60, 3).mean() > 1.1 * volumes("random", 12, 60, 3).mean()


# ------------------------------------------------------------------------------------- gp


def test_gp_finds_one_objectives_optimum_and_repeats_no_experiment() -> None:
    optimizer = make("gp", 2, UNIT[:1], 0, np.full(2, 0.9))
    points = np.array(told(optimizer, lambda x: float(np.exp(-8 * ((x - 0.35) ** 2).sum())), 26))
    assert np.abs(points[10:] - 0.35).max(axis=1).min() < 0.03
    gaps = [np.abs(a - b).max() for i, a in enumerate(points) for b in points[:i]]
    assert min(gaps) > 1e-4


def test_gp_is_replayed_from_what_it_was_told_and_spreads_pending_points() -> None:
    first, second = (make("gp", 2, goals(2), 4, np.full(2, 0.5)) for _ in range(2))
    centres = np.array([[0.2, 0.2], [0.8, 0.8]])
    run(first, centres, 12)
    rng = np.random.default_rng(0)
    history = [Result(n, x := rng.random(2), bowls(x, centres), None) for n in range(14)]
    for result in history:
        second.tell(result)
    third = make("gp", 2, goals(2), 4, np.full(2, 0.5))
    for result in history:
        third.tell(result)
        if result.number == 12:
            third.ask(99)
    one = second.ask(14)
    assert np.array_equal(one, third.ask(14))
    assert np.abs(second.ask(14, [one]) - one).max() > 0.01


@pytest.mark.parametrize("reason", ["dimensions", "results", "goals", "floors", "front"])
def test_gp_hands_over_to_the_surrogate_where_it_would_take_too_long(reason: str) -> None:
    dim, m, n = {"dimensions": 31, "floors": 2}.get(reason, 2), {"goals": 4}.get(reason, 2), 20
    n = {"results": MOST_RESULTS + 1, "front": 41}.get(reason, n)
    optimizer: Any = make("gp", dim, goals(m), 0, np.full(dim, 0.5))
    surrogate = make("map", dim, goals(m), 0, np.full(dim, 0.5))
    rng = np.random.default_rng(0)
    for number in range(n):
        x = rng.random(dim)
        values = np.array([x[0], -x[0]]) if reason == "front" else rng.random(m)
        floors = np.zeros(2) if reason == "floors" else None
        for each in (optimizer, surrogate):
            assert each is surrogate or number < 10 or reason != "front" or each._affordable()
            each.tell(Result(number, x, values, None, floors))
    assert not optimizer._affordable()
    assert np.array_equal(optimizer.ask(n), surrogate.ask(n))


def test_gp_keeps_no_more_rows_than_it_can_use() -> None:
    optimizer: Any = make("gp", 1, UNIT[:1], 0, np.full(1, 0.5))
    for number in range(MOST_RESULTS + 50):
        optimizer.tell(Result(number, np.full(1, 0.5), np.zeros(1)))
    assert len(optimizer._rows) == MOST_RESULTS + 1
