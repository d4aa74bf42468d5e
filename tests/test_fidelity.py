"""Rungs: one order of items per study, a test that does not stop whom it must not, and searches that stop early."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from scipy import stats

from evomerge import fidelity
from evomerge.commands import find_study, run_search, status_of
from evomerge.config import parse_study
from evomerge.errors import ConfigError, StudyConflict
from evomerge.fidelity import (
    MOST_BYTES,
    MOST_RIVALS,
    RISK,
    RUNGS,
    Race,
    Rival,
    Rivals,
    additive,
    count_at,
    estimate,
    item_order,
    new_items,
    p_not_beaten,
    read_rungs,
    share_text,
)
from evomerge.objectives import mean_scores
from evomerge.prepare import open_study, prepare
from evomerge.rescore import front_of
from evomerge.study import Study
from evomerge.worker import Job, Worker
from tests.conftest import STUDY, study_rows
from tests.faults.test_kills import run_forked

N = 240
URL = "sqlite:///runs/tiny/ledger.db"


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


# ---------------------------------------------------------------- order and rungs


def test_the_order_is_a_permutation_fixed_by_seed_and_name_alone() -> None:
    order = item_order(3, "math", 100)
    assert sorted(order.tolist()) == list(range(100))
    assert order[:5].tolist() == [27, 4, 1, 44, 17], "the order of existing studies has changed"
    assert order.tolist() != item_order(4, "math", 100).tolist() != item_order(4, "latin", 100).tolist()
    first = item_order(3, "math", 40)
    assert [i for i in order.tolist() if i < 40] == first.tolist(), "a longer split keeps the order of the shorter"


@pytest.mark.parametrize("n", [1, 3, 64, 300, 1001])
def test_rungs_add_up_to_all_items_once(n: int) -> None:
    parts = [new_items(item_order(0, "a", n), RUNGS, k) for k in range(len(RUNGS))]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all((np.diff(p) > 0).all() for p in parts), "positions ascend"
    assert n < 64 or len(parts[0]) == pytest.approx(n / 8, abs=1)


@pytest.mark.parametrize(
    "value", [None, True, "on", [0.5, 1], {}, {"rungs": []}, {"rungs": [0.5, 0.25, 1]}, {"rungs": [0.5]},
              {"rungs": [0, 1]}, {"rungs": [0.5, 1.5]}, {"rungs": [0.5, 0.5, 1]}, {"rungs": ["half", 1]},
              {"rungs": [True]}, {"rungs": [0.5, 1], "risk": 1}]
)  # fmt: skip
def test_what_is_no_list_of_rungs_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        read_rungs(value)
    text = STUDY.replace("seed: 3", f"fidelity: {json.dumps(value)}\nseed: 3")
    with pytest.raises(ConfigError, match=r"s\.yaml:19: `fidelity`: .*, not "):
        parse_study(text, "s.yaml")


def test_rungs_are_read() -> None:
    assert read_rungs("off") == () and read_rungs({"rungs": [0.25, 1]}) == (0.25, 1.0)
    assert [share_text(s) for s in (*RUNGS, 0.3, 0.1234)] == ["1/8", "1/4", "1/2", "1", "3/10", "12.3 %"]


def test_only_means_and_ratios_are_compared_item_by_item() -> None:
    assert additive(lambda items: mean_scores(items).value)
    assert additive(lambda items: items[:, 0].sum() / items[:, 1].sum())
    assert not additive(lambda items: float(np.exp(-items.mean())))
    assert not additive(lambda items: float(items[:, 0].mean()))


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
    assert beaten_by is not None and beaten_by.number == 6
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

    single = Rivals(0, RUNGS, {"bits": False}, lambda number: [rng.random(100)])
    for number, value in enumerate((3.0, 1.0, 2.0, 1.0)):
        single.add(number, [value])
    race = single.race(to_the_end=False)
    assert race is not None and [r.number for r in race.rivals] == [1] and len(race.rivals[0].items[0]) == 50
    known = single.race(to_the_end=True)
    assert known is not None and known.rivals == () and known.rungs == RUNGS
    assert Rivals(0, (), {"bits": False}, load).race(to_the_end=False) is None

    several = Rivals(0, RUNGS, {"a": True, "b": True}, load)
    for number, x in enumerate(np.linspace(0, 1, 30)):
        several.add(number, [x, 1 - x**2])
    several.add(99, [0.0, 0.0])
    race = several.race(to_the_end=False)
    assert race is not None and len(race.rivals) == MOST_RIVALS
    assert 99 not in loaded and 0 not in loaded and 29 not in loaded, "the ends of the front dominate least"
    seen = len(loaded)
    several.race(to_the_end=False)
    assert len(loaded) == seen, "items are read once"


def test_what_travels_with_a_job_is_bounded() -> None:
    n = 20_000
    several = Rivals(0, RUNGS, {"a": True, "b": True}, lambda number: [np.zeros(n), np.zeros(n)])
    for number in range(8):
        several.add(number, [number, -number])
    race = several.race(to_the_end=False)
    assert race is not None and len(race.rivals) == MOST_BYTES // (2 * 8 * n // 2)


# ---------------------------------------------------------------- searches that stop early

BITS = """\
objectives:
  - name: text
    kind: perplexity
    files: {search: many.txt, validation: text.validation.txt, test: text.test.txt}
"""


@pytest.fixture
def texts(work: Path) -> Path:
    """The tiny family with one objective: bits per byte on 96 documents, which tell any two merges apart."""
    rng = np.random.default_rng(0)
    documents = (f"Number {i} is {' '.join(map(str, rng.integers(0, 99, 8)))}." for i in range(96))
    Path("many.txt").write_text("\n\n".join(documents))
    head, rest = STUDY.split("objectives:\n")
    Path("study.yaml").write_text(head + BITS + rest[rest.index("optimizer:") :])
    return work


def search(*overrides: str, fault: str = "") -> int:
    return run_forked(("optimizer=map", "budget.evaluations=22", *overrides), fault=fault)


def test_a_search_stops_beaten_candidates_and_says_so(texts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = parse_study(Path("study.yaml").read_text(), "study.yaml", ("budget.evaluations=24",))
    prepared = prepare(config)
    assert prepared.summary["rungs"] == "1/8, 1/4, 1/2, 1"
    run = run_search("study.yaml", ("budget.evaluations=24",), resume="auto", inline=True, quiet=False,
                     allow_task_code=False)  # fmt: skip
    assert run == 0
    study = Study.load(URL, "tiny")
    candidates = study.candidates()
    stopped = [c for c in candidates if c.state == "stopped"]
    known = len(prepared.known)
    assert all(c.state == "done" for c in candidates[:known]), "known recipes are scored in full"
    assert len(stopped) >= 3, [c.state for c in candidates]
    full = Worker(prepared.worker)
    whole = prepared.known[-1][1]
    race = Race(config.seed, RUNGS)  # no rivals: scored in the same parts as in the search, to the end
    last = full.evaluate(Job(0, whole, race=race)).scores["search"]["text"]
    recorded = study.scores(known - 1, "search")
    assert recorded is not None and np.array_equal(last.items, recorded["text"].items), "scores repeat to the bit"
    for c in stopped:
        assert c.values is None and c.estimate is not None and c.estimate_stderr is not None
        scores, where = study.partial_scores(c.number)
        rival = candidates[where.beaten_by]
        assert rival.number < c.number and rival.values is not None and rival.values[0] < c.estimate[0]
        positions = where.positions["text"]
        assert len(positions) == len(scores["text"].items) == count_at(96, where.share)
        truth = full.evaluate(Job(c.number, c.recipe)).scores["search"]["text"]
        assert truth.value > rival.values[0], "it was beaten"
        assert abs(truth.value - c.estimate[0]) < 4 * c.estimate_stderr[0]
        np.testing.assert_allclose(scores["text"].items, truth.items[positions], rtol=1e-4)
    done = next(c for c in candidates[known:] if c.state == "done")
    again = full.evaluate(Job(done.number, done.recipe)).scores["search"]["text"]
    stored = study.scores(done.number, "search")
    assert stored is not None and stored["text"].value == full.objectives[0].aggregate(stored["text"].items).value
    np.testing.assert_allclose(stored["text"].items, again.items, rtol=1e-4)
    assert not {c.number for c in front_of(study, candidates)} & {c.number for c in stopped}
    _check_what_is_shown(study, len(stopped), stopped[0].number, capfd.readouterr().err)


def _check_what_is_shown(study: Study, count: int, first: int, shown: str) -> None:
    status = status_of(study)
    assert status["stopped"] == count == sum(v for k, v in status.items() if k.startswith("stopped at"))
    line = next(line for line in shown.splitlines() if f"| #{first}: " in line)
    assert f"#{first}: {study.candidate(first).stopped} | 1 stopped" in line and "beaten by #" in line
    trials = optuna.load_study(study_name="tiny", storage=URL).trials
    assert sum(t.state == optuna.trial.TrialState.PRUNED for t in trials) == count
    frame = study.frame()
    assert frame["share"].notna().sum() == count and frame.loc[first, "state"] == "stopped"


def test_killed_and_resumed_with_rungs_equals_uninterrupted(texts: Path) -> None:
    assert search() == 0
    study = Study.load(URL, "tiny")
    expected = study_rows(study), [study.partial_scores(c.number)[0]["text"].items.tolist() for c in stops(study)]
    assert len(expected[1]) >= 2
    last = stops(study)[-1].number
    os.rename("runs", "first")
    assert search(fault=f"telling:{last - 2}") != 0
    assert search(fault="scoring:3") != 0  # inside a candidate, between two rungs
    assert search(fault="finishing:2") != 0
    assert search() == 0
    study = Study.load(URL, "tiny")
    found = study_rows(study), [study.partial_scores(c.number)[0]["text"].items.tolist() for c in stops(study)]
    assert found == expected


def stops(study: Study) -> list[Any]:
    return [c for c in study.candidates() if c.state == "stopped"]


def test_a_repeat_of_a_stopped_candidate_is_stopped_too(texts: Path) -> None:
    space = "space={method: task_arithmetic, genes: {weight: {choices: [0.0, 0.6, 1.2]}}}"
    assert search(space, "known_recipes=false", "optimizer=random") == 0
    study = Study.load(URL, "tiny")
    repeats = [c for c in stops(study) if "same_as" in c.attrs]
    assert repeats, [(c.state, c.params) for c in study.candidates()]
    for c in repeats:
        twin = study.candidate(c.attrs["same_as"])
        assert (c.estimate, c.stopped, c.fingerprint) == (twin.estimate, twin.stopped, twin.fingerprint)


def test_off_means_that_all_is_scored(texts: Path) -> None:
    assert search("fidelity=off", "budget.evaluations=12") == 0
    study = find_study("runs/tiny", None, None)
    assert {c.state for c in study.candidates()} == {"done"} and study.header.rungs == []


def test_a_study_keeps_its_rungs(texts: Path) -> None:
    """One from before there were rungs goes on without them; another choice than the study's own is a conflict."""
    text = Path("study.yaml").read_text()
    prepared = prepare(parse_study(text, "study.yaml"))
    assert list(prepared.header.rungs) == list(RUNGS) and "fidelity" not in prepared.header.identity
    old = {k: v for k, v in vars(prepared.header).items() if k != "rungs"}
    Study.create(URL, "tiny", type(prepared.header)(**old))
    study, existed = open_study(prepared)
    assert existed and not study.header.rungs
    changed = prepare(parse_study(text, "study.yaml", ("fidelity={rungs: [0.5, 1]}",)))
    with pytest.raises(StudyConflict, match=r"fidelity: stored null, now \[0.5, 1.0\]"):
        open_study(changed)


def test_check_says_why_there_are_no_rungs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("study.yaml").read_text()
    assert prepare(parse_study(text, "s")).summary["rungs"] == "off: pick has 12 search items, fewer than 64"
    asked = prepare(parse_study(text, "s", ("fidelity={rungs: [0.5, 1]}",)))
    assert asked.summary["rungs"] == "1/2, 1" and not asked.warnings
    monkeypatch.setattr("evomerge.objectives.perplexity.PerplexityObjective.partial", False)
    whole = prepare(parse_study(text, "s", ("fidelity={rungs: [0.5, 1]}",)))
    assert whole.summary["rungs"].startswith("off: text has no score for a part of its items")
    assert "no candidate is stopped early: text" in str(whole.warnings[0]) and whole.header.rungs == []


def test_the_risk_is_what_the_docstring_and_the_readme_say() -> None:
    assert RISK == 0.01 and "at most `RISK` in all" in " ".join(str(fidelity.__doc__).split())
