"""Fronts, winners and further splits: what is shown is what is stored, and the test split chooses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge import rescore
from evomerge.errors import ConfigError
from evomerge.objectives import Scores, mean_scores
from evomerge.recipe import Recipe
from evomerge.rescore import CONTENDERS, contenders, eligible, front_of, stored_winner, weights_of, winner
from evomerge.study import Header, Study

N = 200


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


@pytest.fixture(autouse=True)
def all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every study here has all three splits; what is scored on them is stored by the tests."""
    monkeypatch.setattr(rescore, "splits_of", lambda config: ("search", "validation", "test"))


def right(count: int, first: int = 0) -> Scores:
    """Accuracy of a model that answers `count` of N items, from the item `first` on."""
    return mean_scores(np.roll(np.arange(N) < count, first).astype(float))


def study_of(folder: Path, search: Sequence[Scores], validation: Sequence[Scores | None] = ()) -> Study:
    """A study with one objective."""
    made = Study.create(f"sqlite:///{folder}/one.db", "one", Header({}, {"acc": True}))
    for number, scores in enumerate(search):
        made.propose(recipe(0.01 * number), None, {})
        made.finish(number, {"search": {"acc": scores}}, number, {})
    for number, held_out in enumerate(validation):
        if held_out is not None:
            made.add_scores(number, "validation", {"acc": held_out})
    return made


def numbers(study: Study) -> list[int]:
    return [c.number for c in contenders(study, study.candidates())]


def test_the_front_is_that_of_brute_force_without_repeats(study: Study) -> None:
    assert [c.number for c in front_of(study, study.candidates())] == [3, 1, 5]


def test_the_winner_is_best_on_validation_with_every_objective_weighing_the_same(study: Study) -> None:
    values = {1: (0.8, 2.0), 2: (0.1, 6.0), 3: (0.9, 9.0), 5: (0.2, 1.0)}
    for number, (up, down) in values.items():
        scores = {"up": Scores(up, 0.1, np.zeros(4)), "down": Scores(down, 0.1, np.zeros(4))}
        study.add_scores(number, "validation", scores)
        # On the test split another one would win: it must not matter.
        study.add_scores(
            number, "test", {"up": Scores(float(number == 3), 0, np.zeros(4)), "down": Scores(0, 0, np.zeros(4))}
        )
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    assert best.number == 1
    assert notes == ["4 candidates are statistically tied at the top on search"]
    found = stored_winner(study, study.candidates())
    assert found is not None and found[0].number == 1 and "validation" in found[1]


def test_merits_do_not_depend_on_units(study: Study) -> None:
    assert weights_of(study, study.candidates()) == pytest.approx([0.5 / 0.6, -0.5 / 8.0])


def test_the_lucky_best_on_search_loses_to_a_tied_one_on_validation(tmp_path: Path) -> None:
    # 1 leads 0 by three items of 200; 2 is far behind both, and would win on validation.
    study = study_of(tmp_path, [right(137), right(140), right(60)], [right(150), right(130), right(199)])
    assert numbers(study) == [1, 0]
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    assert (best.number, notes) == (0, ["2 candidates are statistically tied at the top on search"])


def test_ties_are_judged_by_the_items_and_not_by_the_values(tmp_path: Path) -> None:
    # Both lead by ten: one on ten items, with all others answered alike, the other on other items altogether.
    study = study_of(tmp_path, [right(100), right(90), right(90, first=80)])
    assert numbers(study) == [0, 2]


def test_equal_scores_on_validation_go_to_the_known_recipe_that_came_first(tmp_path: Path) -> None:
    study = study_of(tmp_path, [right(137), right(140), right(138)], [right(150)] * 3)
    assert winner(study, None, study.candidates())[0].number == 0  # type: ignore[arg-type]


def test_a_clear_best_is_the_winner_whatever_validation_says_of_the_others(tmp_path: Path) -> None:
    study = study_of(tmp_path, [right(60), right(140)], [right(199), right(100)])
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    assert (best.number, notes) == (1, ["no other candidate is statistically tied with the best on search"])


def test_only_the_best_of_very_many_tied_candidates_go_to_validation(tmp_path: Path) -> None:
    count = CONTENDERS + 4
    search = [right(140 - n // 4) for n in range(count)]
    validation: list[Scores | None] = [right(100 + n) for n in range(CONTENDERS)]
    study = study_of(tmp_path, search, [*validation, *[right(190)] * 4])
    assert len(numbers(study)) == count
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    assert best.number == CONTENDERS - 1
    assert f"{count} candidates" in notes[0] and f"the {CONTENDERS} best of them" in notes[0]


def test_without_a_validation_split_the_search_scores_decide_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescore, "splits_of", lambda config: ("search", "test"))
    study = study_of(tmp_path, [right(137), right(140)])
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    assert best.number == 1 and "optimistic" in notes[-1]
    found = stored_winner(study, study.candidates())
    assert found is not None and found[0].number == 1 and "nothing is scored on validation" in found[1]


def test_what_has_yet_to_be_scored_is_not_guessed(tmp_path: Path) -> None:
    study = study_of(tmp_path, [right(137), right(140)], [right(150), None])
    assert stored_winner(study, study.candidates()) is None


def test_candidates_that_were_stopped_or_failed_can_win_nothing(study: Study) -> None:
    candidates = study.candidates()
    assert [c.number for c in eligible(candidates)] == [0, 1, 2, 3, 5]
    partial = [replace(c, state="stopped") if c.number == 3 else c for c in candidates]
    assert [c.number for c in front_of(study, partial)] == [1, 5]
    assert 3 not in [c.number for c in contenders(study, partial)]


def test_a_study_without_scores_has_no_winner(tmp_path: Path) -> None:
    study = study_of(tmp_path, [])
    assert stored_winner(study, []) is None
    with pytest.raises(ConfigError, match="no candidate to choose from"):
        winner(study, None, [])  # type: ignore[arg-type]
