"""Racing: tests that do not stop whom they must not, and rivals that are the right ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evomerge import racing
from evomerge.fidelity import RUNGS, Part, count_at
from evomerge.objectives import mean_scores
from evomerge.racing import (
    MOST_BYTES,
    MOST_RIVALS,
    RISK,
    Race,
    Rival,
    Rivals,
    estimate,
    p_not_beaten,
)

N = 240
WHOLE = Part(0, RUNGS)


def rival_of(number: int, *columns: np.ndarray) -> Rival:
    """A rival whose items are in the study's order already."""
    scales = tuple(float(c[:, 1].mean()) if c.ndim == 2 else 1.0 for c in columns)
    plain = [c[:, 0] / s if c.ndim == 2 else c for c, s in zip(columns, scales, strict=True)]
    values, spreads = tuple(float(p.mean()) for p in plain), tuple(float(p.std()) for p in plain)
    return Rival(number, columns, values, scales, spreads)


def stopped_at(mine: np.ndarray, theirs: np.ndarray, rungs: tuple[float, ...] = RUNGS) -> float | None:
    """The share at which a candidate is stopped on full data, or None."""
    race = Race(0, rungs, (rival_of(7, theirs),), (True,))
    for share in rungs[:-1]:
        if race.verdict([mine[: count_at(len(mine), share)]], [len(mine)]):
            return share
    return None


# ---------------------------------------------------------------- the test


def test_the_exact_test_is_the_worst_case_over_what_was_not_seen() -> None:
    for n, size, wins, losses in ((40, 80, 2, 11), (30, 120, 0, 8), (20, 21, 1, 9), (16, 64, 0, 16)):
        gain = np.repeat([1.0, -1.0, 0.0], [wins, losses, n - wins - losses])
        m = wins + losses
        worst = max(
            stats.hypergeom.cdf(wins, total, good, m)
            for total in range(m, m + size - n + 1)
            for good in range(-(-total // 2), total + 1)
        )
        assert p_not_beaten(gain, size) == pytest.approx(worst, rel=1e-9)
        assert p_not_beaten(gain, size) <= stats.binom.cdf(wins, m, 0.5), "at most the sign test's"
        assert p_not_beaten(gain / 3, size) == p_not_beaten(gain, size), "the unit does not matter"


def test_ties_gains_and_single_items_are_never_beaten() -> None:
    for gain in (np.zeros(50), np.ones(50), np.r_[np.ones(25), -np.ones(25)], np.array([-1.0]), np.empty(0)):
        assert p_not_beaten(gain, 100) == 1.0


def test_a_clear_loser_is_stopped_at_once_and_a_winner_never() -> None:
    rng = np.random.default_rng(0)
    good = (rng.random(N) < 0.9).astype(float)
    bad = (rng.random(N) < 0.1).astype(float)
    assert stopped_at(bad, good) == 0.125
    assert stopped_at(good, bad) is None and stopped_at(good, good) is None


def test_a_tiny_difference_is_never_stopped_however_certain() -> None:
    theirs = np.random.default_rng(1).normal(size=5000)
    assert stopped_at(theirs - 0.01, theirs) is None
    assert stopped_at(theirs - 0.05, theirs) == 0.125


def test_too_few_items_give_no_verdict() -> None:
    assert stopped_at(np.zeros(24), np.ones(24), (0.625, 1.0)) is None  # 15 items
    assert stopped_at(np.zeros(32), np.ones(32), (0.5, 1.0)) == 0.5  # 16


def test_one_rival_must_be_better_in_every_objective() -> None:
    rng = np.random.default_rng(2)
    high, low = (rng.random(N) < 0.9).astype(float), (rng.random(N) < 0.3).astype(float)
    half = N // 2
    race = Race(0, (0.5, 1.0), (rival_of(4, high, low), rival_of(5, low, high)), (True, True))
    assert race.verdict([low[:half][::-1], low[:half][::-1]], [N, N]) is None, "each rival is better in one only"
    both = Race(0, (0.5, 1.0), (rival_of(4, high, low), rival_of(6, high, high)), (True, True))
    beaten_by = both.verdict([low[:half], low[:half]], [N, N])
    assert beaten_by is not None and beaten_by.rival.number == 6 and beaten_by.rule == "beaten"
    nearly = high[:half].copy()
    nearly[np.flatnonzero(nearly)[:4]] = 0.0
    assert both.verdict([low[:half], nearly], [N, N]) is None, "worse in the second, but who knows"
    down = Race(0, (0.5, 1.0), (rival_of(6, high, high),), (True, False))
    assert down.verdict([low[:half], low[:half]], [N, N]) is None, "smaller is better in the second"
    assert down.verdict([low[:half], 2 - high[:half]], [N, N]) is not None


def test_ratios_are_compared_where_the_denominators_agree() -> None:
    rng = np.random.default_rng(3)
    size = rng.integers(20, 200, N).astype(float)
    theirs = np.stack([2.0 * size * rng.uniform(0.9, 1.1, N), size], axis=1)
    mine = theirs * [1.2, 1.0]
    race = Race(0, (0.5, 1.0), (rival_of(1, theirs),), (False,))
    assert race.verdict([mine[: N // 2]], [N]) is not None
    assert race.verdict([mine[: N // 2] + np.array([0.0, 1.0])], [N]) is None
    assert race.verdict([np.where(np.arange(N // 2)[:, None] == 7, np.nan, mine[: N // 2])], [N]) is None


@pytest.mark.parametrize("kind", ["0/1", "skewed", "near ties"])
def test_the_better_of_two_is_stopped_in_at_most_the_stated_share(kind: str) -> None:
    """The hardest case for the rule: a candidate that is exactly as good as its rival over the whole split."""
    rng = np.random.default_rng(11)
    wrong, trials = 0, 3000
    for _ in range(trials):
        theirs = (rng.random(N) < 0.6).astype(float)
        if kind == "0/1":
            mine = rng.permutation(theirs)
        elif kind == "skewed":  # the candidate's advantage lies in a fifth of the items
            gain = np.where(rng.random(N) < 0.2, rng.exponential(4.0, N), -rng.exponential(1.0, N))
            mine = theirs + gain - gain.mean()
        else:
            mine = theirs.copy()
            mine[rng.choice(N, 12, replace=False)] += np.repeat([1.0, -1.0], 6)
        wrong += stopped_at(mine, theirs) is not None
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"


def test_the_estimate_takes_away_what_easy_items_add() -> None:
    """All candidates that stop at a rung saw the same items: their plain means share one error, estimates do not."""
    rng = np.random.default_rng(5)
    plain, paired, errors = [], [], []
    for _ in range(400):
        ease = rng.normal(size=N)
        theirs = ease + 0.1 * rng.normal(size=N)
        mine = ease - 0.5 + 0.1 * rng.normal(size=N)
        seen = mean_scores(mine[:30])
        value, stderr = estimate(seen.value, seen.stderr, mine[:30], rival_of(1, theirs), 0, N)
        plain.append(seen.value + 0.5)
        paired.append(value + 0.5)
        errors.append((stderr, mean_scores(mine).stderr))
    assert np.std(paired) < 0.5 * np.std(plain)
    mean_error, full_error = np.mean(errors, axis=0)
    assert mean_error == pytest.approx(np.std(paired), rel=0.15), "the standard error is honest"
    assert mean_error > full_error, "and wider than that of all items"


# ---------------------------------------------------------------- rivals


def test_rivals_are_the_incumbent_or_the_best_of_the_front_within_the_cap() -> None:
    rng = np.random.default_rng(0)
    loaded: list[int] = []

    def load(number: int) -> list[np.ndarray]:
        loaded.append(number)
        return [rng.random(100)] * 2

    single = Rivals({"bits": False}, lambda number: [rng.random(100)])
    for number, value in enumerate((3.0, 1.0, 2.0, 1.0)):
        single.add(number, [value])
    race = single.race(WHOLE)
    assert [r.number for r in race.rivals] == [1] and len(race.rivals[0].items[0]) == 50
    known = single.race(WHOLE, to_the_end=True)
    assert known.rivals == () and known.rungs == RUNGS

    several = Rivals({"a": True, "b": True}, load)
    for number, x in enumerate(np.linspace(0, 1, 30)):
        several.add(number, [x, 1 - x**2])
    several.add(99, [0.0, 0.0])
    race = several.race(WHOLE)
    assert len(race.rivals) == MOST_RIVALS
    assert 99 not in loaded, "it is not on the front"
    assert 0 in loaded and 29 in loaded, "the ends are the best of weightings"
    seen = len(loaded)
    several.race(WHOLE)
    assert len(loaded) == seen, "items are read once"


def test_what_travels_with_a_job_is_bounded() -> None:
    n = 20_000
    several = Rivals({"a": True, "b": True}, lambda number: [np.zeros(n), np.zeros(n)])
    for number in range(8):
        several.add(number, [number, -number])
    race = several.race(WHOLE)
    assert len(race.rivals) == MOST_BYTES // (2 * 8 * n // 2)


def test_the_risk_is_what_the_docstring_and_the_readme_say() -> None:
    assert RISK == 0.01 and "at most `RISK` in all" in " ".join(str(racing.__doc__).split())
