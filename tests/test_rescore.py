"""Fronts, merits, constraints and baselines of a study, read from its stored scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evomerge.objectives import Scores
from evomerge.rescore import (
    FEW,
    baselines,
    best_known,
    broken_limits,
    eligible,
    feasible,
    floors_of,
    front_of,
    nearest,
    none_feasible,
    remarks,
    weights_of,
)
from evomerge.study import Header, Study
from tests.small_studies import empty_study, recipe, right, study_of

TWO = {"up": True, "down": False}


def pair(up: float, down: float) -> list[Scores]:
    return [Scores(up, 0.1, np.zeros(4)), Scores(down, 0.1, np.zeros(4))]


@pytest.fixture
def study() -> Study:
    """Six candidates on one objective to be maximised and one to be minimised."""
    made = empty_study(Header({}, TWO))
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


def test_merits_do_not_depend_on_units(study: Study) -> None:
    assert weights_of(study, study.candidates()) == pytest.approx([0.5 / 0.6, -0.5 / 8.0])


def test_candidates_that_were_stopped_or_failed_are_on_no_front(study: Study) -> None:
    candidates = study.candidates()
    assert [c.number for c in eligible(candidates)] == [0, 1, 2, 3, 5]
    partial = [replace(c, state="stopped") if c.number == 3 else c for c in candidates]
    assert [c.number for c in front_of(study, partial)] == [1, 5]


def constrained(*constraints: str) -> Study:
    rows = [pair(0.5, 4.0), pair(0.6, 6.0), pair(0.4, 3.0), pair(0.9, 9.0), pair(0.55, 3.9)]
    identity = {"constraints": list(constraints), "experts": {"red": "red", "green": "green"}, "known_recipes": True}
    labels = {0: "base", 1: "red", 2: "green"}
    return study_of(rows, objectives=TWO, identity=identity, labels=labels)


def test_only_what_meets_the_constraints_is_on_the_front() -> None:
    study = constrained("up >= base", "down <= 1.5 * base")
    candidates = study.candidates()
    assert floors_of(study, candidates) == pytest.approx([0.5, -6.0])
    assert [c.number for c in feasible(study, candidates)] == [0, 1, 4]
    assert [c.number for c in front_of(study, candidates)] == [1, 4]  # 3 and 2 are not, though nothing dominates them
    assert nearest(study, candidates) is None and none_feasible(study, candidates) is None


def test_if_nothing_is_feasible_the_nearest_is_named_with_what_it_misses() -> None:
    study = constrained("up >= 0.85", "down <= 7")
    candidates = study.candidates()
    assert front_of(study, candidates) == []
    found = nearest(study, candidates)
    # Scaled by the ranges 0.5 and 6: 3 misses by 2 / 6, 1 by 0.25 / 0.5.
    assert found is not None and (found[0].number, found[1]) == (3, {"down": pytest.approx(2.0)})
    said = none_feasible(study, candidates)
    assert said is not None
    assert "no candidate of 5 meets the constraints; candidate 3 comes nearest: down is 9.0000, 2.0000 short of" in said
    assert "`down <= 7`" in said and "relax the constraint" in said
    assert weights_of(study, candidates) == pytest.approx([0.5 / 0.5, -0.5 / 6.0])  # ranges over everybody


def test_the_baselines_are_the_best_feasible_ones_of_each_kind() -> None:
    rows = [right(100), right(150), right(160), right(140), right(155), right(199)]
    labels = {0: "base", 1: "red", 2: "green", 3: "uniform soup", 4: "ties 0.2"}
    experts = {"red": "red", "green": "green"}
    study = study_of(rows, labels=labels, identity={"experts": experts})
    found = baselines(study, study.candidates())
    assert {kind: c.label for kind, c in found.items()} == {"best expert": "green", "best standard recipe": "ties 0.2"}
    best = best_known(study, study.candidates())
    assert best is not None and best.label == "green"
    limited = study_of(rows, labels=labels, identity={"experts": experts, "constraints": ["acc >= .9"]})
    assert baselines(limited, limited.candidates()) == {} and best_known(limited, limited.candidates()) is None


def test_an_objective_that_never_changes_is_remarked_on() -> None:
    rows = [[right(100), right(n)] for n in (90, 100, 110)]
    study = study_of(rows, objectives={"flat": True, "steep": True})
    said = remarks(study, study.candidates())
    assert said == [
        "objective flat was 0.5000 for all 3 candidates: it chose nothing; give it more items or leave it out"
    ]
    assert remarks(study, study.candidates()[:1]) == []  # one candidate shows nothing


def test_a_count_is_remarked_on_only_once_the_search_has_proposed_something() -> None:
    """Known recipes of one base are all as deep as that: this says nothing of the space."""

    def depth(value: float) -> list[Scores]:
        return [right(100 + int(value)), Scores(value, 0.0, np.zeros(1))]

    ups = {"acc": True, "depth": False}
    known = study_of([[right(90), *depth(4.0)[1:]], depth(4.0)], objectives=ups, labels={0: "base", 1: "red"})
    assert remarks(known, known.candidates()) == []
    same = study_of([[right(90), *depth(4.0)[1:]], depth(4.0)], objectives=ups, labels={0: "base"})
    assert [r.split(" for all")[0] for r in remarks(same, same.candidates())] == ["objective depth was 4.0000"]
    candidates = same.candidates()
    stopped = replace(candidates[1], number=2, state="stopped", values=None, estimate=(0.1, 3.0), fingerprint="x")
    assert remarks(same, [*candidates, stopped]) == [], "depths of stopped ones are known too"


def test_with_few_searched_candidates_nothing_is_said_of_the_space() -> None:
    labels = {0: "base", 1: "red"}
    made = {n: study_of([right(90 + i) for i in range(n)], labels=labels, identity={"constraints": ["acc >= 0.9"]})
            for n in (2, 3, 4, 2 + FEW)}  # fmt: skip
    said = {n: none_feasible(study, study.candidates()) or "" for n, study in made.items()}
    assert "No searched candidate ran" in said[2] and "Only 1 searched candidate ran" in said[3]
    assert "Only 2 searched candidates ran beside the known recipes: raise the budget" in said[4]
    assert "widen the space" in said[2 + FEW] and not any("widen" in said[n] for n in (2, 3, 4))


def test_a_limit_without_its_reference_is_remarked_on() -> None:
    study = study_of([right(90), right(100)], identity={"constraints": ["acc >= base"]})
    assert remarks(study, study.candidates()) == [
        "the constraint `acc >= base` has no effect: its reference has no scores"
    ]


def test_limits_that_are_missed_on_fresh_items_are_told() -> None:
    identity = {"constraints": ["acc >= base", "acc >= 0.6", "acc >= red"], "experts": {"red": "red"}}
    study = study_of([right(100), right(110), right(150)], [right(140), None, right(110)],
                     labels={0: "base", 1: "red"}, identity=identity)  # fmt: skip
    candidates = study.candidates()
    # 0.55 against 0.7 of the base; the red one is not scored there.
    assert broken_limits(study, candidates, candidates[2], "validation") == [
        "on the validation split candidate 2 misses `acc >= base` by 0.1500",
        "on the validation split candidate 2 misses `acc >= 0.6` by 0.0500",
    ]
    assert broken_limits(study, candidates, candidates[2], "test") == []
