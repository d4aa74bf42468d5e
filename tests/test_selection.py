"""The winner: fresh items choose among finalists, the simplest of equals wins, and the test split chooses nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge import rescore, selection
from evomerge.errors import ConfigError
from evomerge.objectives import Scores, mean_scores
from evomerge.recipe import Recipe
from evomerge.rescore import Found
from evomerge.rounds import NAMES, WHOLE, Rounds
from evomerge.selection import (
    CONTENDERS,
    complexity,
    contenders,
    finalists,
    posterior_merits,
    stored_winner,
    winner,
)
from evomerge.study import Candidate, Header, Study
from tests.small_studies import N, recipe, right, study_of


@pytest.fixture(autouse=True)
def all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every study here has all three splits; what is scored on them is stored by the tests."""
    monkeypatch.setattr(selection, "splits_of", lambda config: ("search", "validation", "test"))


def numbers(study: Study) -> list[int]:
    return [c.number for c in contenders(study, study.candidates())]


def chosen(study: Study) -> tuple[int, list[str]]:
    best, notes = winner(study, None, study.candidates())  # type: ignore[arg-type]
    return best.number, notes


def test_the_winner_is_best_on_validation_with_every_objective_weighing_the_same() -> None:
    values = [(0.1, 5.0), (0.5, 4.0), (0.5, 6.0), (0.9, 9.0), (0.3, 1.0)]
    pairs = [[Scores(up, 0.1, np.zeros(4)), Scores(down, 0.1, np.zeros(4))] for up, down in values]
    study = study_of(pairs, objectives={"up": True, "down": False})
    held_out = {1: (0.8, 2.0), 2: (0.1, 6.0), 3: (0.9, 9.0), 4: (0.2, 1.0)}
    for number, (up, down) in held_out.items():
        scores = {"up": Scores(up, 0.1, np.zeros(4)), "down": Scores(down, 0.1, np.zeros(4))}
        study.add_scores(number, "validation", scores)
        # On the test split another one would win: it must not matter.
        study.add_scores(
            number, "test", {"up": Scores(float(number == 3), 0, np.zeros(4)), "down": Scores(0, 0, np.zeros(4))}
        )
    assert chosen(study) == (1, ["4 candidates are statistically tied at the top on search"])
    found = stored_winner(study, study.candidates())
    assert found is not None and found[0].number == 1 and "validation" in found[1]


def test_the_lucky_best_on_search_loses_to_a_tied_one_on_validation() -> None:
    # 1 leads 0 by three items of 200; 2 is far behind both, and would win on validation.
    study = study_of([right(137), right(140), right(60)], [right(150), right(130), right(199)])
    assert numbers(study) == [1, 0]
    assert chosen(study) == (0, ["2 candidates are statistically tied at the top on search"])


def test_ties_are_judged_by_the_items_and_not_by_the_values() -> None:
    # Both lead by ten: one on ten items, with all others answered alike, the other on other items altogether.
    study = study_of([right(100), right(90), right(90, first=80)])
    assert numbers(study) == [0, 2]


def test_a_clear_best_is_the_winner_whatever_validation_says_of_the_others() -> None:
    study = study_of([right(60), right(140)], [right(199), right(100)])
    assert chosen(study) == (1, ["no other candidate is statistically tied with the best on search"])


def test_only_the_best_of_very_many_tied_candidates_go_to_validation() -> None:
    count = CONTENDERS + 4
    search = [right(140 - n // 4) for n in range(count)]
    validation: list[Scores | None] = [right(100 + n) for n in range(CONTENDERS)]
    study = study_of(search, [*validation, *[right(190)] * 4])
    assert len(numbers(study)) == count
    best, notes = chosen(study)
    assert best == CONTENDERS - 1
    assert f"{count} candidates" in notes[0] and f"the {CONTENDERS} best of them" in notes[0]


def test_without_a_validation_split_the_search_scores_decide_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "splits_of", lambda config: ("search", "test"))
    study = study_of([right(137), right(140)])
    best, notes = chosen(study)
    assert best == 1 and "optimistic" in notes[-1]
    found = stored_winner(study, study.candidates())
    assert found is not None and found[0].number == 1 and "nothing is scored on validation" in found[1]


def test_what_has_yet_to_be_scored_is_not_guessed() -> None:
    study = study_of([right(137), right(140)], [right(150), None])
    assert stored_winner(study, study.candidates()) is None


def test_a_study_without_scores_has_no_winner() -> None:
    study = study_of([])
    assert stored_winner(study, []) is None
    with pytest.raises(ConfigError, match="no candidate to choose from"):
        winner(study, None, [])  # type: ignore[arg-type]


def test_a_study_without_feasible_candidates_says_who_is_nearest() -> None:
    study = study_of([right(137), right(140)], identity={"constraints": ["acc >= 0.9"]})
    with pytest.raises(ConfigError, match=r"candidate 1 comes nearest: acc is 0\.7000, 0\.2000 short of `acc >= 0\.9`"):
        winner(study, None, study.candidates())  # type: ignore[arg-type]


# -------------------------------------------------------------------- finalists


def test_recommended_candidates_and_baselines_go_to_validation_too() -> None:
    search = [right(n) for n in (20, 60, 50, 70, 180, 90, 100)]
    labels = {0: "base", 1: "red", 2: "green", 3: "uniform soup"}
    identity = {"experts": {"red": "red", "green": "green"}}
    study = study_of(search, labels=labels, sources={5: "mean of CMA-ES"}, identity=identity)
    found = finalists(study, study.candidates())
    assert found.candidates[0].number == 4
    assert sorted(c.number for c in found.candidates) == [0, 1, 3, 4, 5]  # not green, the second best expert, nor 6
    assert "with 1 recommended and 3 known recipes 5 went on to validation" in found.note


def test_infeasible_candidates_are_no_finalists() -> None:
    rows = [[right(n), right(200 - n)] for n in (100, 120, 140)]
    two = {"acc": True, "qa": True}
    study = study_of(rows, objectives=two, identity={"constraints": ["qa >= 0.35"]}, sources={2: "x"})
    assert sorted(c.number for c in finalists(study, study.candidates()).candidates) == [0, 1]


def test_posterior_merits_are_nearer_to_the_truth_than_the_scores() -> None:
    rng = np.random.default_rng(1)
    x = rng.random((40, 2)).round(4)
    true = 0.75 - 0.4 * ((x - 0.5) ** 2).sum(axis=1)
    search = [mean_scores((rng.random(80) < p).astype(float)) for p in true]
    params = [{"a": float(a), "b": float(b)} for a, b in x]
    recipes = {n: recipe(float(a), float(b)) for n, (a, b) in enumerate(x)}
    study = study_of(search, params=params, recipes=recipes)
    candidates = study.candidates()
    merit = posterior_merits(study, candidates)
    raw = np.array([s.value for s in search])
    shrunk = np.array([merit[n] for n in range(40)]) * np.ptp(raw)  # merits are in units of the range
    assert np.mean((shrunk - true) ** 2) < 0.7 * np.mean((raw - true) ** 2)
    found = finalists(study, candidates)
    assert found.candidates[0].number == max(merit, key=merit.__getitem__)
    assert [c.number for c in found.candidates] == sorted(
        (c.number for c in found.candidates), key=lambda n: (-merit[n], n)
    )


# -------------------------------------------------------------------- rounds


def steps(study: Study, parts: dict[str, Sequence[int]]) -> tuple[list[tuple[str, list[int]]], Candidate, list[str]]:
    """Run the rounds on made-up scores: round -> how many of N items each candidate gets right. Who was asked for."""
    asked: list[tuple[str, list[int]]] = []

    def fetch(group: Sequence[Candidate], name: str) -> Found:
        asked.append((name, [c.number for c in group]))
        return {c.number: {"acc": right(parts[name][c.number])} for c in group}

    found = finalists(study, study.candidates())
    best, notes = selection._select(study, study.candidates(), found, NAMES, fetch)
    return asked, best, notes


def test_rounds_drop_the_clearly_worse_and_at_most_half_stay() -> None:
    study = study_of([right(140)] * 1 + [right(140, first=n) for n in range(1, 8)])
    counts = {NAMES[0]: [150, 149, 148, 147, 146, 60, 50, 40], NAMES[1]: [100, 148, 150, 149, 0, 0, 0, 0]}
    counts[WHOLE] = [0, 140, 150, 0, 0, 0, 0, 0]
    asked, best, notes = steps(study, counts)
    assert [(name, len(group)) for name, group in asked] == [(NAMES[0], 8), (NAMES[1], 4), (WHOLE, 2)]
    assert set(asked[1][1]) == {0, 1, 2, 3} and set(asked[2][1]) == {2, 3}
    assert best.number == 2 and "8, 4, 2 of them were scored in the rounds on validation" in notes


def test_known_recipes_only_leave_the_rounds_when_clearly_worse() -> None:
    search = [right(135), right(138), right(139), right(140), right(60)]
    labels = {0: "uniform soup", 4: "red"}
    study = study_of(search, labels=labels, identity={"experts": {"red": "red"}})
    rounds = {name: [145, 146, 147, 148, 60] for name in NAMES}
    asked, best, _ = steps(study, rounds)
    assert 0 in asked[1][1] and 4 not in asked[1][1]  # 0 is the last but one of five
    assert best.number == 0 or 0 in asked[2][1]


def test_the_last_round_may_leave_one() -> None:
    study = study_of([right(140), right(139)])
    asked, best, _ = steps(study, {name: [50, 190] for name in NAMES})
    assert [group for _, group in asked[1:]] == [[1], [1]] and best.number == 1


# -------------------------------------------------------------------- one standard error


def scattered(count: int, seed: int) -> Scores:
    items = np.zeros(N)
    items[np.random.default_rng(seed).permutation(N)[:count]] = 1
    return mean_scores(items)


def test_of_candidates_within_one_standard_error_the_simplest_wins() -> None:
    layers = [
        {
            "sources": [{"model": "red", "layer_range": [i, i + 1], "parameters": {"weight": 0.1 * (i + 1)}}],
        }
        for i in range(4)
    ]
    data = {"merge_method": "task_arithmetic", "base_model": "base", "compat": "paper", "seed": 0, "slices": layers}
    recipes = {0: recipe(0.3, 0.4), 1: Recipe.from_dict(data), 2: recipe(0.2)}
    assert [complexity(recipes[n]) for n in range(3)] == [2, 4, 1]
    search = [scattered(140, n) for n in range(3)]
    # 1 leads 0 by a hair, and 2, the simplest, by far more than the noise.
    study = study_of(search, [scattered(149, 5), scattered(150, 6), scattered(90, 7)], recipes=recipes)
    best, notes = chosen(study)
    assert best == 0
    assert "candidate 1 is best on validation, and candidate 0 within one standard error of it and simpler" in notes[1]
    assert "(2 settings, not 4)" in notes[1]


def test_of_one_level_the_best_wins_known_or_not() -> None:
    study = study_of(
        [scattered(140, 1), scattered(141, 2)],
        [scattered(149, 3), scattered(150, 4)],
        labels={0: "uniform soup"},
        recipes={0: recipe(0.3, 0.3, 0.3), 1: recipe(0.3, 0.2, 0.0)},
    )
    best, notes = chosen(study)
    assert best == 1 and not any("simpler" in note for note in notes)


def test_equal_scores_on_validation_go_to_the_known_recipe_that_came_first() -> None:
    study = study_of([right(137), right(140), right(138)], [right(150)] * 3, labels={0: "base", 2: "red"})
    assert chosen(study)[0] == 0


def test_complexity_counts_different_settings() -> None:
    assert complexity(recipe(0.3, 0.3, 0.3)) == 3
    assert complexity(recipe(0.3, 0.2, 0.0)) == 3
    curve = Recipe.build("task_arithmetic", "base", {"red": {"weight": [0.1, 0.5, 0.1]}, "green": {"weight": 0.5}})
    assert complexity(curve) == 3
    filtered = [{"filter": "mlp", "value": 0.1}, {"value": 0.7}]
    parts = Recipe.build("ties", "base", {"red": {"weight": filtered, "density": 0.7}})
    assert complexity(parts) == 3


# -------------------------------------------------------------------- the parts of the validation split


class Fake:
    """An objective as far as rounds know it."""

    maximize = True

    def __init__(self, name: str, n: int, partial: bool = True) -> None:
        self.name, self.n, self.partial = name, n, partial
        self.items = np.random.default_rng([n]).random(n)

    def size(self, split: str) -> int:
        return self.n

    def aggregate(self, items: np.ndarray) -> Scores:
        assert self.partial
        return mean_scores(items)

    def score(self, live: object, split: str, positions: Sequence[int] | None = None) -> Scores:
        return mean_scores(self.items if positions is None else self.items[list(positions)])


@pytest.mark.parametrize(
    ("sizes", "names"),
    [((400, 1000), NAMES), ((120, 400), NAMES[1:]), ((60,), NAMES[2:]), ((1,), NAMES[2:]), ((1, 400), NAMES)],
)
def test_small_splits_have_fewer_rounds(sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
    rounds = Rounds.of([Fake(f"o{i}", n) for i, n in enumerate(sizes)], 3)  # type: ignore[misc]
    assert rounds.names == names and len(rounds.parts) == len(names)


def test_parts_join_to_the_whole_however_they_come() -> None:
    from evomerge.worker import score_parts

    made = [Fake("a", 401), Fake("b", 250), Fake("whole", 30, partial=False)]
    rounds = Rounds.of(made, 5)  # type: ignore[arg-type]
    whole = score_parts(made, None, "validation", rounds.parts)  # type: ignore[arg-type]
    for name, scores in whole.items():
        assert np.array_equal(scores.items, {o.name: o for o in made}[name].items)
    step = score_parts(made, None, "validation", rounds.parts[:1])  # type: ignore[arg-type]
    assert len(step["a"].items) == 100 and len(step["whole"].items) == 30
    for index in (1, 2):
        added = score_parts(made, None, "validation", rounds.parts[index : index + 1])  # type: ignore[arg-type]
        step = rounds.joined((rounds.names[index - 1], step), added, rounds.names[index])
        read = rounds.part_of(whole, rounds.names[index])
        for name, scores in step.items():
            assert np.array_equal(scores.items, read[name].items) and scores.value == read[name].value
    assert np.array_equal(step["a"].items, made[0].items)
    both = score_parts(made, None, "validation", rounds.parts[1:])  # type: ignore[arg-type]
    first = score_parts(made, None, "validation", rounds.parts[:1])  # type: ignore[arg-type]
    assert np.array_equal(rounds.joined((rounds.names[0], first), both, WHOLE)["b"].items, made[1].items)


def test_a_selection_that_was_interrupted_goes_on_with_what_is_stored() -> None:
    study = study_of([right(140), right(139), right(138)])
    planned = selection._stored_rounds(study, study.candidates(), NAMES)
    assert planned == NAMES
    study.add_scores(1, NAMES[0], {"acc": right(30)})
    assert selection._stored_rounds(study, study.candidates()) == NAMES
    assert stored_winner(study, study.candidates()) is None
    for number, name in ((0, NAMES[0]), (2, NAMES[0])):
        study.add_scores(number, name, {"acc": right(31 - number)})
    # Two of three go on; their further scores are missing.
    assert stored_winner(study, study.candidates()) is None
    for name in NAMES[1:]:
        for number in (0, 1):
            study.add_scores(number, name, {"acc": right(80 + number)})
    found = stored_winner(study, study.candidates())
    assert found is not None and found[0].number in (0, 1)
    assert "3, 2, 1 of them were scored in the rounds" in found[1]


def test_front_of_and_winner_know_the_same_study() -> None:
    study = study_of([right(137), right(140)], [right(150), right(150)])
    assert rescore.front_of(study, study.candidates())[0].number == 1
    assert isinstance(study.header, Header)
