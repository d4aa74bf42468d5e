"""Fronts, winners and further splits: what is shown is what is stored, and the test split chooses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evomerge import rescore
from evomerge.objectives import Scores
from evomerge.recipe import Recipe
from evomerge.rescore import front_of, winner
from evomerge.study import Header, Study


def recipe(weight: float) -> Recipe:
    return Recipe.build("task_arithmetic", "base", {"red": {"weight": weight}})


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Six candidates on one objective to be maximised and one to be minimised."""
    made = Study.create(f"sqlite:///{tmp_path}/l.db", "s", Header({}, {"up": True, "down": False}))
    values = [(0.1, 5.0), (0.5, 4.0), (0.5, 6.0), (0.9, 9.0), (0.5, 4.0), (0.3, 1.0)]
    for number, (up, down) in enumerate(values):
        made.propose(recipe(0.1 * (number if number != 4 else 1)), None, {})  # 4 repeats 1
        scores = {"up": Scores(up, 0.1, np.zeros(4)), "down": Scores(down, 0.1, np.zeros(4))}
        made.finish(number, {"search": scores}, number, {})
    made.propose(recipe(0.7), None, {})
    made.fail(6, "oom", "", 6)
    return made


def test_the_front_is_that_of_brute_force_without_repeats(study: Study) -> None:
    assert [c.number for c in front_of(study, study.candidates())] == [3, 1, 5]


def test_the_winner_is_best_on_validation_with_every_objective_weighing_the_same(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescore, "splits_of", lambda config: ("search", "validation", "test"))
    for number, (up, down) in {3: (0.9, 9.0), 1: (0.8, 2.0), 5: (0.2, 1.0)}.items():
        scores = {"up": Scores(up, 0.1, np.zeros(4)), "down": Scores(down, 0.1, np.zeros(4))}
        study.add_scores(number, "validation", scores)
        # On the test split another one would win: it must not matter.
        study.add_scores(
            number, "test", {"up": Scores(float(number == 3), 0, np.zeros(4)), "down": Scores(0, 0, np.zeros(4))}
        )
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    assert (best.number, notes) == (1, [])
