"""Picks of a study's front, how sure membership is, and which stopped candidates could be on it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.fidelity import Stopped
from evomerge.objectives import Scores, mean_scores
from evomerge.picking import Pick, could_be_on_front, hypervolume_line, memberships, picked, read_pick
from evomerge.study import Study
from tests.small_studies import N, recipe, right, study_of

TWO = {"acc": True, "err": False}


def wrong(count: int) -> Scores:
    return right(count)


@pytest.fixture(scope="module")
def study() -> Study:
    """A base and three points of a front: few errors, a balance, many right answers; and one that is dominated."""
    rows = [(60, 40), (70, 20), (100, 50), (140, 90), (90, 60)]
    return study_of([[right(a), wrong(e)] for a, e in rows], objectives=TWO, labels={0: "base"})


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"prefer": "acc=1"}, 3),
        ({"prefer": "err=2.5"}, 1),
        ({"prefer": "acc=0.5, err=0.5"}, 2),
        ({"knee": True}, 2),
        ({"prefer": "acc=1", "at_least": "err=0.3"}, 2),  # an error of 0.45 is too much
        ({"at_least": "acc=0.6"}, 3),
        ({"weakest_link": True}, 1),  # the only one with fewer errors than the base
    ],
)
def test_every_way_to_pick(study: Study, options: dict, number: int) -> None:
    found = picked(study, study.candidates(), read_pick(study, **options))
    assert found is not None and found.number == number


def test_a_pick_says_what_it_is(study: Study) -> None:
    assert str(read_pick(study, "acc=0.7,err=0.3", "acc=0.25")) == "preferred acc=0.7 err=0.3, at least acc=0.25"
    assert str(Pick(weakest_link=True)) == "weakest link"
    assert str(Pick(at_least={"acc": 0.5})) == "knee, at least acc=0.5"
    assert not Pick() and Pick(knee=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefer": "math=1"}, "--prefer: there is no objective 'math' (there are acc, err)"),
        ({"prefer": "acc"}, "--prefer: 'acc' is no NAME=NUMBER (as in --prefer acc=0.7)"),
        ({"at_least": "acc=nan"}, "'acc=nan' is no NAME=NUMBER"),
        ({"prefer": "acc=1,acc=2"}, "acc is given twice"),
        ({"prefer": "acc=-1,err=2"}, "not all zero"),
        ({"prefer": "acc=0"}, "not all zero"),
        ({"prefer": " , "}, "nothing is given"),
        ({"prefer": "acc=1", "knee": True}, "give one"),
    ],
)
def test_options_that_cannot_be_read_are_refused(study: Study, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_pick(study, **options)


def test_floors_that_no_point_reaches_name_the_best(study: Study) -> None:
    with pytest.raises(ConfigError, match=r"the best acc is 0\.7000 \(candidate 3\), not 0\.8"):
        picked(study, study.candidates(), read_pick(study, at_least="acc=0.8"))


def test_an_empty_front_has_no_pick() -> None:
    study = study_of([[right(60), wrong(40)]], objectives=TWO, identity={"constraints": ["acc >= 0.9"]})
    assert picked(study, study.candidates(), Pick(knee=True)) is None
    assert hypervolume_line(study, study.candidates()) is None
    assert set(memberships(study, study.candidates()).values()) == {0.0}


def test_the_hypervolume_is_told_with_its_reference(study: Study) -> None:
    said = hypervolume_line(study, study.candidates())
    # Above the base (0.3, 0.2): only the point with fewer errors adds, 0.05 x 0.1.
    assert said == "hypervolume 0.005 above the worst of the known recipes in each objective: acc 0.3000, err 0.2000"


def scattered(share: float, seed: int) -> Scores:
    return mean_scores((np.random.default_rng(seed).random(N) < share).astype(float))


def test_membership_is_sure_where_the_items_are_and_not_where_luck_is() -> None:
    clear = [[scattered(0.9, 1), scattered(0.5, 2)], [scattered(0.2, 3), scattered(0.05, 4)]]
    tied = [[scattered(0.6, n), scattered(0.25, n + 20)] for n in range(10, 14)]
    beaten = [[scattered(0.2, 5), scattered(0.9, 6)]]
    study = study_of([*clear, *tied, *beaten], objectives=TWO)
    candidates = study.candidates()
    found = [memberships(study, candidates)[c.fingerprint] for c in candidates]
    assert found[0] == 1.0 and found[1] == 1.0 and found[-1] == 0.0
    assert all(0.0 < share < 1.0 for share in found[2:6])
    assert memberships(study, candidates) == memberships(study, candidates)


def test_what_agrees_on_every_item_has_the_same_membership() -> None:
    study = study_of([[right(100), wrong(50)], [right(100), wrong(50)], [right(101), wrong(49)]], objectives=TWO)
    found = list(memberships(study, study.candidates()).values())
    assert found[0] == found[1]
    # The last is ahead by one item in each objective: beside it is who draws neither of these, exp(-2) of the time.
    assert found[2] == 1.0 and found[0] == pytest.approx(np.exp(-2), abs=0.03)


def test_stopped_candidates_may_be_on_the_front_if_nothing_beats_their_good_ends() -> None:
    study = study_of([[right(100), wrong(50)]], objectives=TWO)
    for number, (acc, err) in enumerate([(0.48, 0.26), (0.3, 0.4), (0.45, 0.29)], start=1):
        study.propose(recipe(0.01 * number), None, {})
        estimates = {"acc": Scores(acc, 0.02, np.zeros(2)), "err": Scores(err, 0.02, np.zeros(2))}
        parts = {name: np.arange(2) for name in TWO}
        study.stop(number, estimates, Stopped(0.25, 0, parts), number, {})
    # 0.48 + 1.96 * 0.02 is above 0.5 and 0.26 - 0.039 below 0.25; the second and the third are beaten in both.
    assert [c.number for c in could_be_on_front(study, study.candidates())] == [1]
