"""Tests of the search loop on a made-up landscape: what it asks for, tells, repeats and why it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.constraints import floors, read_constraints
from evomerge.events import Budget, Event
from evomerge.fidelity import Stopped
from evomerge.objectives import Scores, mean_scores
from evomerge.optimizers import Exhausted, Recommendation, Result, make
from evomerge.optimizers._core import Goal
from evomerge.recipe import Recipe
from evomerge.search import CONFIRMED, REPEATS, Search
from evomerge.space import SearchSpace, known_recipes
from evomerge.study import Header, Study
from evomerge.worker import Failed, Job, Outcome
from tests.small_studies import empty_study

EXPERTS = {"red": "models/red", "green": "models/green"}
SPACE = {"method": "task_arithmetic", "genes": {"weight": {"low": 0.0, "high": 1.2}}}
GOALS = (Goal("acc", 0.0, 1.0), Goal("chat", 0.0, 1.0))
N = 200


class Answers:
    """A pool of one worker whose models answer an item when their weights are near the item's own."""

    size = 1

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.items = {"acc": rng.normal([0.8, 0.3], 0.25, (N, 2)), "chat": rng.normal([0.3, 0.7], 0.25, (N, 2))}
        self.jobs: list[Job] = []
        self._queue: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self._queue.append(job)

    def wait(self, timeout_s: float) -> list[Outcome | Failed]:
        job = self._queue.pop(0)
        scores = {name: self.scores(job.recipe, name) for name in self.items}
        return [Outcome(job.number, {"search": scores}, 0.0, 0.0, 0, "here", stopped=self.stopped(job))]

    def scores(self, recipe: Recipe, name: str) -> Scores:
        plans = recipe.plan(["model.layers.0.mlp.up_proj.weight"], 1)
        weights = np.array([values["weight"] for values in plans[0].per_input], dtype=np.float64)
        return mean_scores((np.abs(self.items[name] - weights).max(axis=1) < 0.45).astype(float))

    def stopped(self, job: Job) -> Stopped | None:
        return None

    def close(self) -> None:
        self._queue.clear()


def new_study(objectives: Mapping[str, bool] | None = None) -> Study:
    return empty_study(Header({"seed": 3}, dict(objectives or {"acc": True, "chat": True})))


def search(study: Study, optimizer: Any, evaluations: int | None, pool: Any = None, **more: Any) -> Search:
    space = SearchSpace.from_dict(more.pop("space", SPACE), "models/base", EXPERTS, 1)
    used = pool or Answers()
    made = (
        make(optimizer, space.dim, GOALS, 3, space.encode(space.start())) if isinstance(optimizer, str) else optimizer
    )
    return Search(study, space, made, lambda: used, Budget(evaluations), **more)


class Fixed:
    """Proposes given points in turn, then none; recommends given points."""

    def __init__(self, points: Sequence[Sequence[float]], wishes: Sequence[Sequence[float]] = ()) -> None:
        self.points, self.wishes, self.told = points, wishes, list[Result]()

    def ask(self, number: int, pending: Sequence[np.ndarray] = ()) -> np.ndarray:
        if number >= len(self.points):
            raise Exhausted("no point is left")
        return np.array(self.points[number])

    def tell(self, result: Result) -> None:
        self.told.append(result)

    def recommend(self) -> list[Recommendation]:
        return [Recommendation(np.array(x), f"wish {i}") for i, x in enumerate(self.wishes)]


def test_the_last_evaluations_of_a_budget_go_to_recommended_points() -> None:
    study = new_study()
    wishes = [(0.5, 0.5), (0.505, 0.5), (0.1, 0.1), (0.9, 0.2)]
    points = [(0.01 * i, 0.3) for i in range(40)]
    events: list[Event] = []
    ending = search(study, Fixed(points, wishes), 30, on_event=events.append).run()
    candidates = study.candidates()
    assert len(candidates) == 30 and "30 evaluations" in ending.why and not ending.stopped
    # A tenth of 30; the second wish is the first again, but for a 200th of the range.
    assert [(c.number, c.source) for c in candidates if c.source] == [(27, "wish 0"), (28, "wish 2"), (29, "wish 3")]
    assert [e.source for e in events][-3:] == ["wish 0", "wish 2", "wish 3"]


def test_a_wish_that_moves_with_every_result_leaves_room_for_the_others() -> None:
    class Moving(Fixed):
        def recommend(self) -> list[Recommendation]:
            moved = np.array([0.03 * (len(self.told) % 5), 0.5])
            return [Recommendation(moved, "the mean"), Recommendation(np.array([0.9, 0.9]), "the weakest")]

    study = new_study()
    search(study, Moving([(0.01 * i, 0.3) for i in range(40)]), 30).run()
    sources = [c.source for c in study.candidates() if c.source]
    assert sources == ["the mean", "the weakest", "the mean"]


def test_at_most_four_are_confirmed_and_known_recipes_do_not_count() -> None:
    known = known_recipes("models/base", EXPERTS)
    study = new_study()
    wishes = [(0.05 * i, 0.9) for i in range(12)]
    search(study, Fixed([(0.01 * i, 0.3) for i in range(99)], wishes), len(known) + 60, known=known).run()
    assert sum(c.source is not None for c in study.candidates()) == CONFIRMED
    few = new_study()
    search(few, Fixed([(0.01 * i, 0.3) for i in range(99)], wishes), len(known) + 9, known=known).run()
    assert not any(c.source for c in few.candidates())  # a tenth of nine is none


def test_a_recommended_point_that_was_stopped_early_is_scored_in_full() -> None:
    class Impatient(Answers):
        def stopped(self, job: Job) -> Stopped | None:
            positions = {name: np.arange(20) for name in self.items}
            return Stopped(0.1, 0, positions, "beaten") if job.number == 4 else None

    pool, study = Impatient(), new_study()
    points = [(0.02 * i, 0.3) for i in range(20)]
    optimizer = Fixed(points, [points[4]])
    search(study, optimizer, 20, pool).run()
    candidates = study.candidates()
    assert candidates[4].state == "stopped" and candidates[4].estimate is not None
    assert (candidates[18].source, candidates[18].state) == ("wish 0", "done")
    assert candidates[18].fingerprint == candidates[4].fingerprint
    assert sum(job.recipe.fingerprint == candidates[4].fingerprint for job in pool.jobs) == 2
    # And whoever proposes it again gets the whole score.
    assert search(study, Fixed([*points, points[4]]), 21, pool).run()
    assert study.candidates()[20].attrs["same_as"] == 18


def test_an_optimizer_that_has_nothing_left_ends_the_search_with_its_reason() -> None:
    study = new_study()
    ending = search(study, Fixed([(0.1, 0.2), (0.3, 0.4)]), 50).run()
    assert ending.why == "no point is left" and not ending.stopped
    assert len(study.candidates()) == 2


@pytest.mark.parametrize("evaluations", [None, 1000])
def test_a_space_whose_points_are_all_known_ends_the_search(evaluations: int | None) -> None:
    study = new_study()
    space = {"method": "task_arithmetic", "genes": {"weight": {"choices": [0.0, 0.5]}}}
    made = search(study, "random", evaluations, space=space)
    made.budget = Budget(evaluations, seconds=600.0)
    ending = made.run()
    assert f"the last {REPEATS} proposals repeat" in ending.why
    assert len({c.fingerprint for c in study.candidates()}) == 4


def test_repeats_of_a_failed_recipe_end_the_search_too() -> None:
    class Half(Answers):
        def wait(self, timeout_s: float) -> list[Outcome | Failed]:
            found = super().wait(timeout_s)[0]
            first = study.candidate(found.number).params or {}
            return [Failed(found.number, "non_finite", "NaN") if first["red.weight"] == 0.5 else found]

    study = new_study()
    space = {"method": "task_arithmetic", "genes": {"weight": {"choices": [0.0, 0.5]}}}
    made = search(study, "random", 1000, Half(), space=space)
    ending = made.run()
    assert f"the last {REPEATS} proposals repeat" in ending.why
    assert len(study.candidates()) < 200


def test_a_budget_of_hours_says_so() -> None:
    made = search(new_study(), "random", None)
    made.budget = Budget(None, seconds=0.0)
    assert made.run().why == "the budget of 0 hours is spent"


def test_constraints_are_told_as_floors_once_their_references_are_scored() -> None:
    known = known_recipes("models/base", EXPERTS)
    objectives = {"acc": True, "chat": True}
    limits = read_constraints(["acc >= base", "chat >= 0.1"], objectives, EXPERTS)
    optimizer, study, pool = Fixed([(0.5, 0.5)] * 99), new_study(), Answers()
    search(study, optimizer, len(known) + 1, pool, known=known,
           floors=lambda labelled: floors(limits, objectives, labelled)).run()  # fmt: skip
    base = study.candidates()[0].values
    assert base is not None
    for told in optimizer.told:
        assert told.floors is not None and told.floors.tolist() == [base[0], 0.1]


def test_items_are_told_to_optimizers_that_want_them_also_after_a_restart() -> None:
    class Curious(Fixed):
        wants_items = True

    points = [(0.1 * i, 0.3) for i in range(6)]
    first, study, pool = Curious(points), new_study(), Answers()
    search(study, first, 4, pool).run()
    second = Curious(points)
    search(study, second, 6, pool).run()
    for told, again in zip(first.told, second.told, strict=False):
        assert told.items is not None and again.items is not None
        assert [i.tolist() for i in told.items] == [i.tolist() for i in again.items]
        assert [i.mean() for i in told.items] == pytest.approx(told.values)
    assert len(second.told) == 6
    assert all(told.items is None for told in _told(Fixed(points), 3))


def _told(optimizer: Fixed, evaluations: int) -> list[Result]:
    search(new_study(), optimizer, evaluations).run()
    return optimizer.told


def test_a_search_in_two_parts_is_the_search_in_one() -> None:
    """With the portfolio, so that stages, items and recommendations are all rebuilt."""
    whole, parts = new_study(), new_study()
    search(whole, "coarse_to_fine", 40).run()
    for _ in range(3):
        stopping = search(parts, "coarse_to_fine", 40)
        left = [12]

        def stop(event: Event, made: Search = stopping, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                made.stop.set()

        stopping.on_event = stop
        assert stopping.run().stopped
    search(parts, "coarse_to_fine", 40).run()
    assert [(c.params, c.values, c.source) for c in whole.candidates()] == [
        (c.params, c.values, c.source) for c in parts.candidates()
    ]
