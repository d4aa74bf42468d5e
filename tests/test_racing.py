"""Racing: tests that do not stop whom they must not, and rivals that are the right ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evomerge import racing
from evomerge.fidelity import RUNGS, Part, count_at, item_order
from evomerge.finite_split import p_not_beaten
from evomerge.limits import Terms, Whole
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


# ---------------------------------------------------------------- objectives that are scored whole

DEPTH = Terms({"depth": "exact"}, 0.0, {"a": (0.0, 1.0), "b": (0.0, 1.0)})


def deep_race(
    candidates: dict[int, tuple[list[np.ndarray], float]],
    floors: list[float] | None = None,
    terms: Terms = DEPTH,
    stderr: float = 0.0,
    runs: int = 1,
    seed: int = 0,
    part: Part | None = None,
) -> Race:
    """The race against candidates with items and a depth (or a latency, with this standard error)."""
    n = len(next(iter(candidates.values()))[0])
    ups = {**dict(zip("abcd", [True] * n, strict=False)), next(iter(terms.whole)): False}
    wholes = {number: np.full(runs, depth) for number, (_, depth) in candidates.items()}
    rivals = Rivals(ups, lambda number: [*candidates[number][0], wholes[number]], terms)
    for number, (items, depth) in candidates.items():
        rivals.add(number, [*(float(i.mean()) for i in items), depth], [0.0] * n + [stderr])
    return rivals.race(part or Part(seed, RUNGS), floors=None if floors is None else np.array(floors))


def deep_verdict(
    race: Race, mine: list[np.ndarray], depth: float, stderr: float = 0.0, runs: int = 1, part: Part = WHOLE
) -> tuple[float, Verdict] | None:
    """Where and why a candidate of this depth stops on full data."""
    whole = {len(mine): Whole(depth, stderr, runs)}
    orders = [item_order(part.seed, name, len(m)) for name, m in zip("abcd", mine, strict=False)]
    for share in part.rungs[:-1]:
        seen = [m[order[: count_at(len(m), share)]] for m, order in zip(mine, orders, strict=True)]
        found = race.verdict([*seen, np.empty(0)], [*map(len, mine), 1], share, whole)
        if found is not None:
            return share, found
    return None


def test_of_two_models_of_one_depth_the_better_one_wins_and_nobody_beats_a_shallower_one() -> None:
    rng = np.random.default_rng(20)
    race = deep_race({4: (answers(rng, 0.9), 8.0)})
    for depth in (8.0, 9.0):
        found = deep_verdict(race, answers(rng, 0.3), depth)
        assert found is not None and (found[0], found[1].rule, found[1].rival.number) == (0.125, "beaten", 4)
    assert deep_verdict(race, answers(rng, 0.3), 7.0) is None
    assert deep_verdict(race, answers(rng, 0.9), 8.0) is None


def test_equal_in_quality_and_less_deep_is_never_stopped_and_equal_in_both_in_the_stated_share() -> None:
    """The hardest case: as good and as deep as the rival; whatever is shallower goes on."""
    rng = np.random.default_rng(21)
    wrong = shallower = 0
    trials = 800
    for _ in range(trials):
        theirs = answers(rng, 0.6)[0]
        race = deep_race({1: ([theirs], 8.0), 2: ([answers(rng, 0.4)[0]], 6.0)})
        mine = [rng.permutation(theirs)]
        found = deep_verdict(race, mine, 8.0)
        wrong += found is not None
        shallower += deep_verdict(race, answers(rng, 0.02), 5.0) is not None
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"
    assert shallower == 0


def test_a_measured_objective_needs_confidence_too() -> None:
    rng = np.random.default_rng(22)
    ms = Terms({"ms": "measured"}, 0.0, {"a": (0.0, 1.0)})
    race = deep_race({4: (answers(rng, 0.9), 10.0)}, terms=ms, stderr=0.1, runs=5)
    assert deep_verdict(race, answers(rng, 0.1), 10.1, 0.1, 5) is None, "a hair slower, within the error"
    slower = deep_verdict(race, answers(rng, 0.1), 14.0, 0.1, 5)
    assert slower is not None and slower[1].rule == "beaten"
    assert deep_verdict(race, answers(rng, 0.1), 14.0, 2.0, 5) is None, "nobody knows how slow it is"
    assert deep_verdict(race, answers(rng, 0.1), 7.0, 0.1, 5) is None


def test_measurements_are_compared_by_welchs_test() -> None:
    rng = np.random.default_rng(29)
    for runs, others in ((5, 5), (3, 20)):
        mine, theirs = rng.normal(10.5, 0.4, runs), rng.normal(10.0, 0.1, others)
        rival = Rival(1, (np.empty(0),), (theirs.mean(),), (1.0,), (theirs.std(),),
                      {0: Whole(theirs.mean(), stats.sem(theirs), others)})  # fmt: skip
        score = Whole(mine.mean(), stats.sem(mine), runs)
        expected = stats.ttest_ind(mine, theirs, equal_var=False, alternative="greater").pvalue
        assert racing._p_whole(score, rival, 0, up=False) == pytest.approx(expected)
        gain, variance = racing._gain_of(score, rival.whole[0], False, 2.5)
        found = stats.ttest_ind(mine, theirs, equal_var=False)
        level = stats.norm.cdf(-2.5)
        assert gain < 0.0 and 2.5 * variance**0.5 == pytest.approx(
            -gain / found.statistic * stats.t.isf(level, found.df)
        )


def test_equal_measurements_stop_in_at_most_the_stated_share() -> None:
    """As fast as the rival in truth and far worse elsewhere: the runs alone stand between it and a stop."""
    rng = np.random.default_rng(23)
    ms = Terms({"ms": "measured"}, 0.0, {"a": (0.0, 1.0)})
    wrong, trials = 0, 800
    for _ in range(trials):
        runs = 10.0 + rng.normal(0.0, 0.3, (2, 5))
        values, errors = runs.mean(axis=1), runs.std(axis=1, ddof=1) / np.sqrt(5)
        race = deep_race({1: (answers(rng, 0.9), values[0]), 2: (answers(rng, 0.95), 30.0)}, terms=ms,
                         stderr=errors[0], runs=5)  # fmt: skip
        wrong += deep_verdict(race, answers(rng, 0.1), values[1], errors[1], 5) is not None
    assert stats.binomtest(wrong, trials).proportion_ci(0.95).low <= RISK, f"{wrong} of {trials}"


def test_equal_depths_do_not_spare_who_is_outweighed() -> None:
    """Depth tells nobody apart: the verdicts are those of the skills alone, though at a slightly stricter level."""
    without = within = 0
    for seed in range(3):
        scored = simulated(np.random.default_rng([seed, 4]), 40, 4, 600)
        without += list(replay(scored, Part(seed, RUNGS)).values()).count("outweighed")
        done: dict[int, tuple[list[np.ndarray], float]] = {}
        for number, mine in enumerate(scored):
            found = deep_verdict(deep_race(done, seed=seed), list(mine), 8.0, part=Part(seed, RUNGS)) if done else None
            if found is None:
                done[number] = (list(mine), 8.0)
            within += found is not None and found[1].rule == "outweighed"
    assert without >= 8 and within >= 0.7 * without


def test_ties_in_depth_are_decided_by_skill() -> None:
    """As shallow as the shallowest rival, and worse: depth alone does not make it promising; one layer less does."""
    part = Part(3, (0.25, 1.0), gate=0.25)
    stopped = {8.0: 0, 7.0: 0}
    for trial in range(20):
        rng = np.random.default_rng([trial, 28])
        done = {0: (answers(rng, 0.95, 0.95, n=2000), 12.0), 1: (answers(rng, 0.6, 0.6, n=2000), 8.0)}
        race = deep_race(done, seed=3, part=part)
        for depth in stopped:
            found = deep_verdict(race, answers(rng, 0.56, 0.56, n=2000), depth, part=part)
            stopped[depth] += found is not None and found[1].rule == "unpromising"
    assert stopped[8.0] >= 8 and stopped[7.0] == 0


def test_the_best_of_a_tie_goes_on() -> None:
    """As shallow as the shallowest rival, and better in one skill: for depth before that skill it is the best."""
    rng = np.random.default_rng(25)
    n = 2000
    race = deep_race({0: (answers(rng, 0.9, 0.9, n=n), 12.0), 1: (answers(rng, 0.6, 0.2, n=n), 6.0)})
    assert deep_verdict(race, answers(rng, 0.2, 0.6, n=n), 6.0) is None
    worse = deep_verdict(race, answers(rng, 0.4, 0.1, n=n), 6.0)
    assert worse is not None and worse[1].rival.number == 1


def test_with_constraints_rivals_are_feasible_and_limits_travel() -> None:
    rng = np.random.default_rng(26)
    done = {0: (answers(rng, 0.9), 14.0), 1: (answers(rng, 0.6), 8.0), 2: (answers(rng, 0.2), 4.0)}
    free = deep_race(done)
    assert {r.number for r in free.rivals} == {0, 1, 2} and free.limits.floors == ()
    bound = deep_race(done, [0.5, -10.0])
    assert [r.number for r in bound.rivals] == [1] and bound.limits.floors == (0.5, 10.0) and bound.span
    deep = bound.missed({1: Whole(11.0, 0.0, 1)})
    assert deep is not None and (deep.rule, deep.objective) == ("infeasible", 1)
    low = deep_verdict(bound, answers(rng, 0.1), 3.0)
    assert low is not None and (low[0], low[1].rule, low[1].objective) == (0.125, "infeasible", 0)
    nobody = deep_race(done, [0.95, -np.inf])
    assert {r.number for r in nobody.rivals} == {0, 1, 2} and not nobody.span and not nobody.limits.settled
    assert deep_verdict(nobody, answers(rng, 0.1), 3.0) is None, "those that miss by least are scored in full"
    assert Race(0, RUNGS).missed({1: Whole(99.0, 0.0, 1)}) is None, "known recipes have no rivals"


def test_nobody_is_hopeless_beside_candidates_that_miss_a_limit() -> None:
    """Of depth <= 3 the first one is scored in full, however bad; then hope is what the feasible ones know."""
    rng = np.random.default_rng(29)
    n = 500
    terms = Terms({"depth": "exact"}, 0.5, {"a": (0.0, 1.0), "b": (0.0, 1.0)})
    done = {i: (answers(rng, 0.8, 0.8, n=n), 8.0) for i in range(2)}
    broken = answers(rng, 0.08, 0.05, n=n)
    limits = [-np.inf, -np.inf, -3.0]
    found = deep_verdict(deep_race(done, terms=terms), broken, 3.0)
    assert found is not None and found[1].rule == "hopeless", "without the limit"
    first = deep_race(done, limits, terms=terms)
    assert first.limits.hopes == () and not first.limits.settled
    assert deep_verdict(first, broken, 3.0) is None
    later = deep_race(done | {2: (answers(rng, 0.3, 0.2, n=n), 3.0)}, limits, terms=terms)
    assert later.limits.hopes == (pytest.approx(0.15), pytest.approx(0.1), None) and later.limits.settled
    assert deep_verdict(later, answers(rng, 0.25, 0.05, n=n), 2.0) is None, "little beside 0.8, and much beside 0.3"
    worse = deep_verdict(later, answers(rng, 0.01, 0.01, n=n), 2.0)
    assert worse is not None and worse[1].rule == "hopeless"


def test_hopeless_candidates_stop_whom_nobody_beats() -> None:
    rng = np.random.default_rng(27)
    n = 500
    terms = Terms({"depth": "exact"}, 0.5, {"a": (0.0, 1.0), "b": (0.0, 1.0)})
    done = {0: (answers(rng, 0.8, 0.1, n=n), 12.0), 1: (answers(rng, 0.1, 0.7, n=n), 12.0)}
    race = deep_race(done, terms=terms)
    assert race.limits.hopes == (pytest.approx(0.4), pytest.approx(0.35), None)
    broken = deep_verdict(race, answers(rng, 0.08, 0.05, n=n), 4.0)
    assert broken is not None and (broken[0], broken[1].rule) == (0.125, "hopeless")
    assert deep_verdict(deep_race(done), answers(rng, 0.08, 0.05, n=n), 4.0) is None, "the rule is off"
    assert deep_verdict(race, answers(rng, 0.08, 0.5, n=n), 4.0) is None, "a trade-off"
