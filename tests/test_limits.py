"""Limits of a race: exact tests on a finite split, error rates of the two rules, and what hope is counted from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evomerge.fidelity import RUNGS, count_at
from evomerge.finite_split import p_reaches
from evomerge.limits import KEEP, SURE, Limits, Terms, Whole, hopes_of, kept_of, least_of
from evomerge.racing import FEWEST, RISK

N = 240


def answers(rng: np.random.Generator, share: float, n: int = N) -> np.ndarray:
    """Items `(n,)` of which exactly this share is right, in a random order."""
    return rng.permutation(np.arange(n) < round(share * n)).astype(np.float64)


# ---------------------------------------------------------------- the test


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 60), st.integers(0, 60), st.floats(0.0, 1.0), st.booleans(), st.data())
def test_of_right_and_wrong_items_the_test_is_exact(
    n: int, more: int, limit: float, up: bool, data: st.DataObject
) -> None:
    size = n + more
    right = data.draw(st.integers(0, n))
    items = np.r_[np.ones(right), np.zeros(n - right)]
    good = right if up else n - right
    meets = [k for k in range(size + 1) if (k / size >= limit - 1e-12 if up else k / size <= limit + 1e-12)]
    tails = [stats.hypergeom.cdf(good, size, k if up else size - k, n) for k in meets]
    assert p_reaches(items, size, limit, up) == pytest.approx(max(tails, default=0.0), rel=1e-7, abs=1e-12)


def test_ratios_and_plain_numbers_are_tested_too_and_what_is_not_finite_says_nothing() -> None:
    rng = np.random.default_rng(0)
    b = rng.integers(20, 60, 60).astype(float)
    pairs = np.stack([2.0 * b * rng.uniform(0.8, 1.2, 60), b], axis=1)
    assert p_reaches(pairs, N, 2.3, maximize=True) < 1e-4 < 0.05 < p_reaches(pairs, N, 1.9, maximize=True)
    assert p_reaches(pairs, N, 1.7, maximize=False) < 1e-4 < 0.05 < p_reaches(pairs, N, 2.1, maximize=False)
    numbers = rng.normal(1.0, 0.5, 60)
    assert p_reaches(numbers, N, 1.5, maximize=True) < 1e-4 < 0.05 < p_reaches(numbers, N, 0.9, maximize=True)
    for wrong in (np.nan, np.inf):
        assert p_reaches(np.append(numbers, wrong), N, 9.0, maximize=True) == 1.0
    assert p_reaches(numbers, N, np.nan, maximize=True) == 1.0


# ---------------------------------------------------------------- infeasible


def stopped_by(limits: Limits, columns: list[np.ndarray], ups: tuple[bool, ...], rule: str) -> float | None:
    """The share at which a candidate stops on full data, as a race asks."""
    level = RISK / (len(RUNGS) - 1)
    for share in RUNGS[:-1]:
        seen = {j: c[: count_at(len(c), share)] for j, c in enumerate(columns)}
        enough = {j: c for j, c in seen.items() if len(c) >= FEWEST}
        sizes = {j: len(c) for j, c in enumerate(columns)}
        asked = limits.infeasible if rule == "infeasible" else limits.hopeless
        found = asked(enough, sizes, ups, level)
        if found is not None and found is not False:
            return share
    return None


@pytest.mark.parametrize("kind", ["0/1", "skewed", "smaller is better"])
def test_a_candidate_that_just_meets_its_limits_stops_in_at_most_the_stated_share(kind: str) -> None:
    """The hardest case: both objectives exactly at their floors over the whole split."""
    rng = np.random.default_rng(3)
    wrong, trials = 0, 2500
    ups = (kind != "smaller is better",) * 2
    for _ in range(trials):
        if kind == "skewed":
            made = [np.where(rng.random(N) < 0.2, rng.exponential(4.0, N), rng.normal(size=N)) for _ in range(2)]
            columns = [m - m.mean() + 0.6 for m in made]
        else:
            columns = [answers(rng, 0.6), answers(rng, 0.6)]
        limits = Limits((0.6 - 1e-9, 0.6 - 1e-9) if ups[0] else (0.6 + 1e-9, 0.6 + 1e-9), (), settled=True)
        wrong += stopped_by(limits, columns, ups, "infeasible") is not None
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"


def test_who_misses_a_limit_clearly_stops_at_once_and_never_before_anybody_meets_all() -> None:
    rng = np.random.default_rng(4)
    limits = Limits((0.7, None), (), settled=True)
    columns = [answers(rng, 0.1), answers(rng, 0.9)]
    assert stopped_by(limits, columns, (True, True), "infeasible") == 0.125
    enough = {j: c[:60] for j, c in enumerate(columns)}
    assert limits.infeasible(enough, {0: N, 1: N}, (True, True), RISK) == 0, "the index of the objective"
    assert stopped_by(Limits((None, 0.7)), columns[::-1], (True, True), "infeasible") is None, "nobody is feasible yet"
    assert stopped_by(Limits((None, 0.8), (), settled=True), columns, (True, True), "infeasible") is None


def test_an_objective_that_is_scored_whole_misses_its_limit_by_its_value() -> None:
    limits = Limits((None, 8.0))
    assert limits.missed({1: Whole(9.0, 0.0, 1)}, (True, False)) == 1
    assert limits.missed({1: Whole(8.0, 0.0, 1)}, (True, False)) is None
    assert limits.missed({1: Whole(7.0, 0.0, 1)}, (True, True)) == 1, "larger is better"
    assert Limits().missed({0: Whole(9.0, 0.0, 1)}, (True,)) is None


# ---------------------------------------------------------------- hopeless


def test_hope_is_counted_from_the_worst_possible_score() -> None:
    assert least_of(0.6, (0.0, 1.0), True, 0.5) == pytest.approx(0.3)
    assert least_of(0.2, (0.0, 1.0), False, 0.5) == pytest.approx(0.6), "an error rate"
    assert least_of(1.5, (0.0, None), False, 0.5) == pytest.approx(3.0), "bits per byte: twice as many"
    assert least_of(1.5, (0.0, None), False, 0.25) == pytest.approx(6.0)
    assert least_of(-2.0, (None, 0.0), True, 0.5) == pytest.approx(-4.0), "a log-likelihood"
    assert least_of(1.5, (None, None), True, 0.5) is None and least_of(0.0, (0.0, None), False, 0.5) is None


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.05, 0.95), st.sampled_from([(0.0, 1.0), (0.25, 1.0), (None, 1.0), (0.0, None)]), st.booleans(),
    st.floats(0.05, 0.95),
)  # fmt: skip
def test_the_least_of_hope_keeps_just_the_share(
    best: float, ends: tuple[float | None, float | None], up: bool, keep: float
) -> None:
    least = least_of(best, ends, up, keep)
    if least is not None and best != ends[0 if up else 1]:
        assert kept_of(np.array([least, best]), best, ends, up) == pytest.approx([keep, 1.0])


def hopes(values: list[list[float]], terms: Terms, stderr: float = 0.0) -> tuple[float | None, ...]:
    """Of objectives a, b, .. that are better larger, and a depth as the last one."""
    names = [*"abcde"[: len(values[0]) - 1], "depth"]
    ups = [True] * (len(names) - 1) + [False]
    return hopes_of(np.array(values), np.full((len(values), len(names)), stderr), names, ups, terms)


def test_there_is_a_rule_only_if_it_is_on_and_ends_are_known() -> None:
    values = [[0.2, 12.0], [0.8, 10.0]]
    ends = {"a": (0.0, 1.0)}
    whole = {"depth": "exact"}
    assert hopes(values, Terms(whole, 0.5, ends)) == (0.4, None)
    assert hopes(values, Terms()) == () == hopes(values, Terms(whole, 0.0, ends))
    assert hopes(values, Terms(whole, 0.5, {"a": (None, None)})) == ()
    assert hopes_of(np.array([[0.2], [0.8]]), np.zeros((2, 1)), ["a"], [True], Terms({}, 0.5, ends)) == (0.4,)
    assert not Limits().hopeless({0: np.zeros(60)}, {0: N}, (True,), RISK)
    assert Limits((), (0.4,)).hopeless({0: np.zeros(60)}, {0: N}, (True,), RISK)
    half = Limits((), (0.4, 0.4))
    assert not half.hopeless({0: np.zeros(60)}, {0: N, 1: N}, (True, True), RISK), "nothing is known of the second"


def test_hope_is_counted_from_guessing_once_somebody_surely_knows_more() -> None:
    """Four choices: of 0.7, half is 0.475; a study from before counts from 0."""
    stored: dict[str, Any] = {"whole": {"depth": "exact"}, "keep": 0.5, "ends": {"a": (0.0, 1.0)}}
    before = Terms.of(json.loads(json.dumps(stored)))
    now = Terms.of(json.loads(json.dumps(stored | {"chance": {"a": 0.25}})))
    values = [[0.3, 12.0], [0.7, 10.0]]
    assert hopes(values, before) == (0.35, None)
    assert hopes(values, now) == (pytest.approx(0.475), None)
    surely = 0.45 / SURE
    assert hopes(values, now, 0.99 * surely) == (pytest.approx(0.475), None)
    assert hopes(values, now, 1.01 * surely) == (0.35, None), "the best may have guessed: from the worst, as before"
    assert hopes([[0.2, 1.0]], now) == (0.1, None), "nobody is better than guessing"
    wrong = Terms({}, 0.5, {"a": (0.0, 1.0)}, {"a": 0.75})
    assert hopes_of(np.array([[0.3]]), np.zeros((1, 1)), ["a"], [False], wrong) == (pytest.approx(0.525),), "error rate"
    losses = [answers(np.random.default_rng(i), 0.05) for i in range(2)]
    limits = Limits((), hopes([[0.7, 0.6, 9.0]], Terms({"depth": "exact"}, 0.5, dict.fromkeys("ab", (0.0, 1.0)),
                                                      dict.fromkeys("ab", 0.25))))  # fmt: skip
    assert stopped_by(limits, losses, (True, True, False), "hopeless") == 0.125, "worse than guessing: nothing is kept"


def test_of_three_skills_a_third_of_each_is_hope_until_somebody_keeps_more_of_all() -> None:
    ends = dict.fromkeys("abc", (0.0, 1.0))
    terms = Terms({"depth": "exact"}, 0.5, ends, dict.fromkeys("abc", 0.25), 1 / 3)
    specialists = [[0.85, 0.25, 0.25, 9.0], [0.25, 0.85, 0.25, 9.0], [0.25, 0.25, 0.85, 9.0]]
    third, most, half = 0.25 + 0.6 / 3, 0.25 + 0.6 * 0.4, 0.25 + 0.6 / 2
    assert hopes(specialists, terms)[:3] == pytest.approx((third,) * 3)
    assert hopes([*specialists, [0.49, 0.49, 0.49, 9.0]], terms)[:3] == pytest.approx((most,) * 3)
    assert hopes([*specialists, [0.70, 0.70, 0.56, 9.0]], terms)[:3] == pytest.approx((half,) * 3)
    told = Terms(terms.whole, 0.5, ends, terms.chance)
    assert hopes(specialists, told)[:3] == pytest.approx((half,) * 3), "as the file says, and as studies from before"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 12))
def test_who_has_no_hope_is_the_best_for_no_weighted_sum(seed: int, m: int, n: int) -> None:
    """A thousand weightings, and a candidate that is just below all hopes; nobody is worse than guessing."""
    rng = np.random.default_rng(seed)
    values = np.c_[rng.uniform(0.25, 0.9, (n, m)), np.full(n, 9.0)]
    names = "abcde"[:m]
    even = {"even": 1.0 / m} if m > 2 else {}
    found = hopes(
        values.tolist(), Terms({"depth": "exact"}, KEEP, dict.fromkeys(names, (0.0, 1.0)),
                               dict.fromkeys(names, 0.25), **even)
    )  # fmt: skip
    limits = np.array([f for f in found if f is not None])
    spans = values[:, :m].max(axis=0) - 0.25
    mine, theirs = (limits - 1e-9 - 0.25) / spans, (values[:, :m] - 0.25) / spans
    weights = rng.dirichlet(np.full(m, 0.5), 1000)
    assert ((theirs @ weights.T).max(axis=0) >= mine @ weights.T - 1e-9).all()


def test_who_keeps_half_of_the_best_in_one_objective_stops_in_at_most_the_stated_share() -> None:
    rng = np.random.default_rng(5)
    limits, wrong, trials = Limits((), (0.3, 0.4, None)), 0, 2500
    for _ in range(trials):
        columns = [answers(rng, 0.3), answers(rng, 0.02)]
        wrong += stopped_by(limits, columns, (True, True, False), "hopeless") is not None
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"


@pytest.mark.parametrize(
    ("n", "m", "best", "counted", "first", "second", "third"),
    [(128, 2, 0.7, 0.25, 0.04, 0.42, 0.99), (300, 1, 0.7, 0.25, 0.50, 0.98, 1.0), (300, 2, 0.7, 0.25, 0.30, 0.96, 1.0),
     (300, 4, 0.7, 0.25, 0.06, 0.93, 1.0), (300, 2, 0.5, 0.25, 0.01, 0.27, 0.93), (500, 2, 0.5, 0.25, 0.08, 0.49, 1.0),
     (300, 2, 0.7, 0.0, 0.0, 0.08, 0.61), (500, 2, 0.5, 0.0, 0.0, 0.0, 0.0)],
)  # fmt: skip
def test_power_on_candidates_at_chance(
    n: int, m: int, best: float, counted: float, first: float, second: float, third: float
) -> None:
    """Four choices: shares stopped by 1/8, 1/4 and 1/2; counted from 0, the rule is silent where chance is half."""
    rng = np.random.default_rng(6)
    limits = Limits((), (counted + KEEP * (best - counted),) * m)
    trials = 200
    found = [stopped_by(limits, [answers(rng, 0.25, n) for _ in range(m)], (True,) * m, "hopeless")
             for _ in range(trials)]  # fmt: skip
    for share, expected in zip(RUNGS, (first, second, third), strict=False):
        assert abs(np.mean([f is not None and f <= share for f in found]) - expected) <= 0.1
    if third == 0.0:
        assert not any(found)
