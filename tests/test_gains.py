"""The report of a study: gains over the best known recipe, on three splits, and what of them survives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from evomerge.card import model_card
from evomerge.gains import MEAN, best_known, report
from evomerge.intervals import holm, paired
from evomerge.objectives import Scores, mean_scores
from evomerge.recipe import Recipe
from evomerge.results import _say_report
from evomerge.study import Header, Study
from tests.small_studies import empty_study

N = 300
BYTES = 100.0


def right(count: int) -> Scores:
    return mean_scores((np.arange(N) < count).astype(float))


def bits(per_byte: float) -> Scores:
    """Bits per byte of N documents, a little spread."""
    items = np.stack([per_byte * BYTES + np.arange(N) % 7 - 3, np.full(N, BYTES)], axis=1)
    return Scores(float(items[:, 0].sum() / items[:, 1].sum()), 0.01, items)


def study_of(
    rows: Mapping[str, tuple[str | None, Mapping[str, tuple[int, float]]]],
    labels: bool = True,
    identity: Mapping[str, object] | None = None,
) -> Study:
    """Candidates by name: label, and per split how many answers are right and the bits per byte."""
    identity = {"weights": {"base": "0" * 64}, "base": "base", "experts": {}, "seed": 0, **(identity or {})}
    made = empty_study(Header(dict(identity), {"acc": True, "bpb": False}))
    for number, (label, splits) in enumerate(rows.values()):
        weight = {"red": {"weight": 0.1 * number}}
        made.propose(Recipe.build("task_arithmetic", "base", weight), None, {}, label if labels else None)
        scores = {s: {"acc": right(a), "bpb": bits(b)} for s, (a, b) in splits.items()}
        made.finish(number, {"search": scores["search"]}, number, {})
        for split in [s for s in scores if s != "search"]:
            made.add_scores(number, split, scores[split])
    return made


ROWS = {
    "base": ("base", {"search": (100, 3.0), "test": (299, 0.1)}),
    "soup": ("uniform soup", {"search": (150, 2.0), "validation": (150, 2.0), "test": (140, 2.1)}),
    "winner": (None, {"search": (190, 1.8), "validation": (180, 1.8), "test": (160, 2.0)}),
    "other": (None, {"search": (120, 1.7)}),
}


@pytest.fixture
def study() -> Study:
    return study_of(ROWS)


def test_the_baseline_is_chosen_on_search_among_the_known_recipes(study: Study) -> None:
    found = best_known(study, study.candidates())
    assert found is not None and found.label == "uniform soup"  # the base is best on test: it must not matter


def test_gains_optimism_and_what_survived(study: Study) -> None:
    candidates = study.candidates()
    found = report(study, candidates, candidates[2])
    assert found is not None and not found.is_baseline
    acc, bpb, mean = found.rows
    assert [row.name for row in found.rows] == ["acc", "bpb", MEAN]
    assert {s: g.value for s, g in acc.gains.items()} == pytest.approx(
        {"search": 40 / N, "validation": 30 / N, "test": 20 / N}
    )
    assert acc.survived == pytest.approx(0.5) and acc.optimism == pytest.approx(30 / N)
    # Fewer bits are better: a gain is positive, and so is the optimism of a search score that is too low.
    assert bpb.gains["search"].value == pytest.approx(0.2) and bpb.gains["search"].low > 0
    assert bpb.survived == pytest.approx(0.5) and bpb.optimism == pytest.approx(0.2)
    # The front is the winner and the other: ranges 70 / N and 0.1.
    assert mean.gains["test"].value == pytest.approx(0.5 * (20 / 70) + 0.5 * (0.1 / 0.1))
    expected = paired(right(160), right(140))
    assert (acc.gains["test"].low, acc.gains["test"].high) == (
        pytest.approx(expected.low),
        pytest.approx(expected.high),
    )
    text = "\n".join(found.lines())
    assert found.lines()[0].startswith("search gained something: on the test split candidate 2 leads uniform soup")
    assert "over the best known recipe on search, uniform soup (candidate 1)" in text
    assert "search +0.1333 [" in text and "50% of the search gain survived" in text and "optimism +0.1000" in text


def test_a_share_of_a_gain_that_may_be_none_is_not_told() -> None:
    tied = {"search": (152, 2.0), "test": (141, 2.1)}
    study = study_of({**ROWS, "winner": (None, tied)})
    found = report(study, study.candidates(), study.candidate(2))
    assert found is not None
    assert found.rows[0].gains["search"].value > 0 and found.rows[0].survived is None
    assert "survived" not in str(found.rows[0])


def test_only_stored_splits_are_told(study: Study) -> None:
    found = report(study, study.candidates(), study.candidate(3))
    assert found is not None
    assert list(found.rows[0].gains) == ["search"]
    assert found.rows[0].survived is None and found.rows[0].optimism is None


def test_the_best_known_recipe_gains_nothing_over_itself(study: Study) -> None:
    found = report(study, study.candidates(), study.candidate(1))
    assert found is not None and found.is_baseline
    assert found.lines() == [
        "search added nothing: candidate 1 is a known recipe, uniform soup",
        "candidate 1 is itself the best known recipe on search: uniform soup",
    ]


def test_without_known_recipes_there_is_nothing_to_compare_with() -> None:
    study = study_of(ROWS, labels=False)
    assert report(study, study.candidates(), study.candidate(2)) is None


@pytest.mark.parametrize("number", [1, 2])
def test_the_card_tells_the_gain(study: Study, number: int) -> None:
    candidate = study.candidate(number)
    scores = {s: study.scores(number, s) or {} for s in ("search", "validation", "test")}
    found = report(study, study.candidates(), candidate)
    card = model_card(study, candidate, scores, [], found)
    assert "statistically tied at the top of the search" in card
    if number == 1:
        assert "this candidate is the best known recipe on the search split" in card
    else:
        assert "| acc | +0.1333 [" in card and "| 50% | +0.1000 |" in card
    assert "was named by hand" in model_card(study, candidate, scores, [], found, by_hand=True)


def test_the_tests_are_exact_where_they_can_be_and_corrected_over_all() -> None:
    rows = {**ROWS, "red": ("red", {"search": (140, 2.5), "test": (150, 1.9)})}
    study = study_of(rows, identity={"experts": {"red": "red"}})
    found = report(study, study.candidates(), study.candidate(2))
    assert found is not None
    against = [(t.kind, t.baseline.label, t.name, t.test.method) for t in found.tests]
    assert against == [
        (kind, label, name, method)
        for kind, label in (("best standard recipe", "uniform soup"), ("best expert", "red"))
        for name, method in (("acc", "mcnemar"), ("bpb", "bootstrap"), (MEAN, "bootstrap"))
    ]
    raw = [t.test.p_value for t in found.tests]
    assert raw[0] == pytest.approx(2 * 0.5**20)  # 20 items won, none lost
    decide = [i for i, t in enumerate(found.tests) if t.name == MEAN]
    explain = [i for i, t in enumerate(found.tests) if t.name != MEAN]
    for family in (decide, explain):
        assert [found.tests[i].p_value for i in family] == pytest.approx(holm([raw[i] for i in family]))
    worse = next(t for t in found.tests if (t.kind, t.name) == ("best expert", "bpb"))
    assert worse.test.lead.high < 0  # 2.0 bits against 1.9: fewer are better
    assert "over the 2 of merit, which decide, and over the 4 of objectives" in "\n".join(found.lines())


@pytest.mark.parametrize(("red", "said"), [((200, 1.5), "is worse than red"), ((160, 2.0), "can tell: candidate 2")])
def test_a_gain_over_one_baseline_alone_is_no_gain(red: tuple[int, float], said: str) -> None:
    """The soup is the better baseline on search, and the winner leads it on test; but not the best expert."""
    study = study_of(
        {**ROWS, "red": ("red", {"search": (140, 2.5), "test": red})}, identity={"experts": {"red": "red"}}
    )
    found = report(study, study.candidates(), study.candidate(2))
    assert found is not None and found.verdict is not None and found.baseline.label == "uniform soup"
    assert found.verdict.startswith("search added nothing") and said in found.verdict
    assert "red (candidate 4)" in found.verdict


def test_without_a_feasible_known_recipe_the_report_says_that(capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of(ROWS, identity={"constraints": ["acc >= 0.6"]})
    candidates = study.candidates()
    found = report(study, candidates, candidates[2])
    assert found is None
    _say_report(candidates, found)
    assert "no known recipe meets the constraints" in capsys.readouterr().err


def test_baselines_are_chosen_on_search_and_never_on_test(study: Study) -> None:
    # The base is best by far on test.
    found = report(study, study.candidates(), study.candidate(2))
    assert found is not None and {t.baseline.label for t in found.tests} == {"uniform soup"}


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ((141, 2.1), "search added nothing that the test split can tell: candidate 2 against uniform soup"),
        ((100, 2.3), "search added nothing: on the test split candidate 2 is worse than uniform soup"),
        ((170, 1.8), "search gained something: on the test split candidate 2 leads uniform soup (candidate 1) by +"),
    ],
)
def test_the_first_line_says_whether_search_added_anything(test: tuple[int, float], said: str) -> None:
    study = study_of({**ROWS, "winner": (None, {"search": (190, 1.8), "test": test})})
    found = report(study, study.candidates(), study.candidate(2))
    assert found is not None and found.verdict is not None
    assert found.lines()[0] == found.verdict
    assert found.verdict.startswith(said) and " [" in found.verdict and "p = " in found.verdict
    card = model_card(study, study.candidate(2), {"search": study.scores(2, "search") or {}}, [], found)
    assert card.index(found.verdict[1:]) < card.index("## Scores")


def test_without_test_scores_nothing_is_claimed(study: Study) -> None:
    found = report(study, study.candidates(), study.candidate(3))
    assert found is not None and found.verdict is None and found.tests == ()


def test_that_a_known_recipe_leads_on_search_claims_nothing() -> None:
    study = study_of({"base": ("base", {"search": (100, 3.0)}), "worse": (None, {"search": (90, 3.5)})})
    found = report(study, study.candidates(), study.candidate(0))
    assert found is not None and found.is_baseline and found.verdict is None
