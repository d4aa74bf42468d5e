"""Racing: tests that do not stop whom they must not, and rivals that are the right ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evomerge import racing
from evomerge.fidelity import RUNGS, Part, count_at, item_order
from evomerge.finite_split import p_not_beaten
from evomerge.objectives import mean_scores
from evomerge.racing import (
    GATE,
    MOST_BYTES,
    MOST_RIVALS,
    RISK,
    Race,
    Rival,
    Verdict,
    estimate,
    weightings,
)
from evomerge.rivals import Rivals

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


# ---------------------------------------------------------------- racing over weightings


@pytest.mark.parametrize("n_objectives", range(1, 9))
def test_weightings_are_a_lattice_of_shares_with_its_corners_and_the_middle(n_objectives: int) -> None:
    found = weightings(n_objectives)
    assert len(set(found)) == len(found) <= 17
    assert all(sum(w) == pytest.approx(1.0) and min(w) >= 0.0 for w in found)
    assert {tuple(row) for row in np.eye(n_objectives).tolist()} <= set(found)
    assert (1.0 / n_objectives,) * n_objectives in found


def answers(rng: np.random.Generator, *shares: float, n: int = N) -> list[np.ndarray]:
    """Per objective, items `(n,)` of which exactly this share is right."""
    return [rng.permutation(np.arange(n) < round(share * n)).astype(np.float64) for share in shares]


def race_of(candidates: dict[int, list[np.ndarray]], part: Part) -> Race:
    """The race against these fully scored candidates."""
    rivals = Rivals({str(j): True for j in range(len(next(iter(candidates.values()))))}, candidates.__getitem__)
    for number, items in candidates.items():
        rivals.add(number, [float(i.mean()) for i in items])
    return rivals.race(part)


def first_verdict(race: Race, mine: list[np.ndarray], part: Part) -> tuple[float, Verdict] | None:
    """Where and why a candidate stops on full data."""
    orders = [item_order(part.seed, str(j), len(m)) for j, m in enumerate(mine)]
    for share in part.rungs[:-1]:
        seen = [m[order[: count_at(len(m), share)]] for m, order in zip(mine, orders, strict=True)]
        verdict = race.verdict(seen, [len(m) for m in mine], share)
        if verdict is not None:
            return share, verdict
    return None


def test_a_compromise_on_a_front_that_bends_inwards_goes_on() -> None:
    """The line between the ends is far above it: by weighted sums alone it would be given up."""
    rng = np.random.default_rng(5)
    n = 2000
    race = race_of({0: answers(rng, 0.9, 0.3, n=n), 1: answers(rng, 0.3, 0.9, n=n)}, WHOLE)
    assert all(first_verdict(race, answers(rng, 0.45, 0.45, n=n), WHOLE) is None for _ in range(20))
    outside = first_verdict(race, answers(rng, 0.25, 0.25, n=n), WHOLE)
    assert outside is not None


def test_a_candidate_as_good_as_the_best_of_a_weighting_stops_in_at_most_the_stated_share() -> None:
    """The hardest case: equal to the rival in the middle of a front, and worse than all by any other weighting."""
    rng = np.random.default_rng(6)
    wrong, trials = 0, 500
    for _ in range(trials):
        middle = answers(rng, 0.66, 0.66)
        race = race_of({0: answers(rng, 0.9, 0.35), 1: middle, 2: answers(rng, 0.35, 0.9)}, WHOLE)
        near = [np.where(rng.random(N) < 0.3, rng.permutation(m), m) for m in middle]
        near = [_with_total(rng, x, m.sum()) for x, m in zip(near, middle, strict=True)]
        wrong += first_verdict(race, near, WHOLE) is not None
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"


def test_the_end_of_a_front_stops_in_at_most_the_stated_share() -> None:
    """As good as the best in one objective and bad in the other: a single weighting stands between it and a stop."""
    rng = np.random.default_rng(10)
    n, wrong, trials = 2400, 0, 500
    for _ in range(trials):
        best = answers(rng, 0.85, 0.5, n=n)
        race = race_of({0: best, 1: answers(rng, 0.3, 0.9, n=n)}, WHOLE)
        moved = best[0].copy()
        moved[rng.choice(np.flatnonzero(moved == 1.0), 60, replace=False)] = 0.0
        equal = _with_total(rng, moved, best[0].sum())
        found = first_verdict(race, [equal, answers(rng, 0.05, n=n)[0]], WHOLE)
        wrong += found is not None and found[1].rule == "outweighed"
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"


def _with_total(rng: np.random.Generator, items: np.ndarray, total: float) -> np.ndarray:
    """0/1 items with as few changed as it takes to have this sum."""
    items = items.copy()
    missing = round(total - items.sum())
    wrong = np.flatnonzero(items == (0.0 if missing > 0 else 1.0))
    items[rng.choice(wrong, abs(missing), replace=False)] = 1.0 if missing > 0 else 0.0
    return items


@pytest.mark.parametrize(("n_objectives", "least"), [(2, 1), (4, 12)])
def test_searches_keep_the_best_of_every_weighting_and_stop_some_whom_no_rival_beats(
    n_objectives: int, least: int
) -> None:
    lost = outweighed = 0
    for seed in range(4):
        rng = np.random.default_rng([seed, n_objectives])
        scored = simulated(rng, 40, n_objectives, 600)
        stopped = replay(scored, Part(seed, RUNGS))
        outweighed += list(stopped.values()).count("outweighed")
        values = scored.mean(axis=2)
        front = values[[not ((values >= v).all(axis=1) & (values > v).any(axis=1)).any() for v in values]]
        scaled = (values - front.min(axis=0)) / np.ptp(front, axis=0)
        kept = [k for k in range(40) if k not in stopped]
        for shares in np.array(weightings(n_objectives)):
            smallest = (scaled[:, shares > 0] / shares[shares > 0]).min(axis=1)
            for merit in (scaled @ shares, smallest):
                lost += merit[kept].max() < merit.max() - 1e-9
    assert lost == 0
    assert outweighed >= least


def simulated(rng: np.random.Generator, candidates: int, n_objectives: int, n: int) -> np.ndarray:
    """0/1 items (candidates, objectives, n): right near the item's own point of a space of three weights."""
    x = rng.uniform(0.0, 1.2, (candidates, 1, 3))
    found = np.empty((candidates, n_objectives, n))
    for j in range(n_objectives):
        peaks = rng.uniform(0.2, 1.0, 3) + rng.normal(0.0, 0.25, (n, 3))
        distance = ((x - peaks) ** 2 * rng.uniform(0.5, 3.0, (n, 3))).sum(axis=2)
        found[:, j] = distance < rng.normal(0.7, 0.7, n)
    return found


def replay(scored: np.ndarray, part: Part) -> dict[int, str]:
    """Candidate -> rule by which it was stopped, when all are raced in turn; scored: (candidates, objectives, n)."""
    rivals = Rivals({str(j): True for j in range(scored.shape[1])}, lambda number: list(scored[number]))
    stopped = {}
    for number, mine in enumerate(scored):
        found = first_verdict(rivals.race(part), list(mine), part)
        if found is None:
            rivals.add(number, mine.mean(axis=1).tolist())
        else:
            stopped[number] = found[1].rule
    return stopped


def test_a_single_objective_is_never_outweighed_and_a_race_without_rivals_never_stops() -> None:
    scored = simulated(np.random.default_rng(8), 40, 1, 600)
    assert set(replay(scored, WHOLE).values()) == {"beaten"}
    assert Race(0, RUNGS).verdict([np.zeros(100)], [600], 0.25) is None
    assert Rivals({"a": True}, lambda number: []).race(WHOLE).rivals == (), "nobody is scored yet"


# ---------------------------------------------------------------- the gate of an epoch


def test_at_the_gate_only_the_promising_go_on() -> None:
    """Equal candidates stop there in the share that `GATE` standard errors stand for, and nowhere else."""
    part = Part(3, (0.25, 0.5, 1.0), gate=0.25)
    stopped = {0.54: 0, 0.60: 0, 0.66: 0}
    for share in stopped:
        for trial in range(300):
            rng = np.random.default_rng([trial, 1])
            rival = answers(rng, 0.60, n=800)
            found = first_verdict(race_of({5: rival}, part), answers(rng, share, n=800), part)
            if found is not None and found[1].rule == "unpromising":
                assert found[0] == 0.25 and found[1].rival.number == 5
                stopped[share] += 1
    expected = stats.norm.cdf(-GATE)
    assert stopped[0.60] / 300 == pytest.approx(expected, abs=0.07)
    assert stopped[0.66] < 0.05 * 300 < 0.5 * 300 < stopped[0.54]
    assert first_verdict(race_of({5: rival}, Part(3, (0.25, 0.5, 1.0))), answers(rng, 0.56, n=800), part) is None


def test_with_several_objectives_one_promising_weighting_is_enough() -> None:
    part = Part(3, (0.25, 1.0), gate=0.25)
    rng = np.random.default_rng(9)
    n = 2000
    race = race_of({0: answers(rng, 0.8, 0.4, n=n), 1: answers(rng, 0.4, 0.8, n=n)}, part)
    assert first_verdict(race, answers(rng, 0.84, 0.1, n=n), part) is None
    found = [first_verdict(race, answers(rng, share, share, n=n), part) for share in (0.37, 0.20)]
    assert [f[1].rule for f in found if f is not None] == ["unpromising", "beaten"]
