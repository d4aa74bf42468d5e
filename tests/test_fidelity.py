"""Rungs: one order of items per study, a test that does not stop whom it must not, and searches that stop early."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from evomerge.commands import find_study, run_search, status_of
from evomerge.config import parse_study
from evomerge.errors import ConfigError, StudyConflict
from evomerge.fidelity import (
    RUNGS,
    SHARE,
    Epochs,
    Fidelity,
    Part,
    Schedule,
    Stopped,
    additive,
    count_at,
    epoch_of,
    epoch_seed,
    item_order,
    new_items,
    read_fidelity,
    share_text,
)
from evomerge.objectives import mean_scores
from evomerge.prepare import open_study, prepare
from evomerge.racing import Race
from evomerge.rescore import front_of
from evomerge.study import Study
from evomerge.worker import Job, Worker
from tests.conftest import STUDY, study_rows
from tests.faults.test_kills import run_forked

URL = "sqlite:///runs/tiny/ledger.db"


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
              {"rungs": [True]}, {"rungs": [0.5, 1], "risk": 1}, {"epochs": "on"}, {"epochs": {"share": 1}},
              {"epochs": {"share": True}}, {"epochs": {"share": 0}}, {"epochs": {"candidates": 1}},
              {"epochs": {"candidates": 9.5}}, {"epochs": {"length": 9}}, {"rungs": [0.5, 1], "epochs": None},
              {"keep": 0}, {"keep": 1}, {"keep": True}, {"keep": "half"}]
)  # fmt: skip
def test_what_is_no_list_of_rungs_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        read_fidelity(value)
    text = STUDY.replace("seed: 3", f"fidelity: {json.dumps(value)}\nseed: 3")
    with pytest.raises(ConfigError, match=r"s\.yaml:19: `fidelity`: .*, not "):
        parse_study(text, "s.yaml")


def test_rungs_are_read() -> None:
    assert read_fidelity("off") == Fidelity((), False)
    assert read_fidelity({"rungs": [0.25, 1]}) == Fidelity((0.25, 1.0), None)
    assert read_fidelity({"epochs": "off"}) == Fidelity(None, False)
    assert read_fidelity({"epochs": {}}) == Fidelity(None, Epochs(SHARE, None))
    both = {"rungs": [1], "epochs": {"share": 0.5, "candidates": 20}}
    assert read_fidelity(both) == Fidelity((1.0,), Epochs(0.5, 20))
    assert read_fidelity({"keep": 0.7}) == Fidelity(None, None, 0.7)
    assert read_fidelity({"rungs": [0.5, 1], "keep": "off"}) == Fidelity((0.5, 1.0), None, 0.0)
    assert [share_text(s) for s in (*RUNGS, 0.3, 0.1234)] == ["1/8", "1/4", "1/2", "1", "3/10", "12.3 %"]


def test_people_are_told_where_and_by_which_rule_a_candidate_stopped() -> None:
    said = [str(Stopped(share, 9, {}, rule)) for share, rule in ((0.25, "beaten"), (0.5, "outweighed"))]
    assert said == ["stopped at 1/4, beaten by #9", "stopped at 1/2, for every weighting beaten, nearest by #9"]
    assert str(Stopped(0.125, 9, {}, "infeasible", "math")) == "stopped at 1/8, infeasible: math misses its limit"
    assert str(Stopped(0.0, 9, {}, "infeasible", "depth")).startswith("stopped before scoring, infeasible: depth")
    assert str(Stopped(0.125, 9, {}, "hopeless")).startswith("stopped at 1/8, hopeless: little is left")
    assert str(Stopped(0.015625, 9, {}, "unpromising")) == "stopped at 1/64, unpromising beside #9"


def test_only_means_and_ratios_are_compared_item_by_item() -> None:
    assert additive(lambda items: mean_scores(items).value)
    assert additive(lambda items: items[:, 0].sum() / items[:, 1].sum())
    assert not additive(lambda items: float(np.exp(-items.mean())))
    assert not additive(lambda items: float(items[:, 0].mean()))


# ---------------------------------------------------------------- epochs


def test_epochs_are_blocks_of_candidates_whose_share_grows_with_the_budget() -> None:
    found = [epoch_of(number, known=8, evaluations=100, share=0.125, candidates=16) for number in range(140)]
    assert found[:8] == [None] * 8
    blocks = [f for f in found if f is not None]
    assert [e for e, _ in blocks] == [k // 16 for k in range(132)]
    begins = {e: 8 + 16 * e for e, _ in blocks}
    for epoch, share in blocks:
        assert share == (0.125, 0.25, 0.5, 1.0)[sum(begins[epoch] >= b for b in (25, 50, 75))]
    assert epoch_of(99, known=0, evaluations=100, share=0.5, candidates=16) == (6, 1.0), "never above 1"


def test_the_order_and_the_parts_of_an_epoch_are_its_own() -> None:
    schedule = Schedule(3, RUNGS, {"known": 2, "evaluations": 40, "share": 0.25, "candidates": 4})
    parts = [schedule.part(number) for number in range(40)]
    assert parts[0] == parts[1] == Part(3, RUNGS) == schedule.part(30, to_the_end=True)
    assert parts[2] == parts[5] and parts[2] is not None and parts[6] is not None
    assert parts[2].rungs == (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0) and parts[2].gate == 0.25
    last = parts[-1]
    assert last is not None and (last.rungs, last.gate) == (RUNGS, 1.0)
    seeds = {part.seed for part in parts if part is not None}
    assert len(seeds) == 1 + 10, "of the study, and of each epoch"
    assert epoch_seed(3, 0) == parts[2].seed == 2296184439398151, "the seeds of existing studies have changed"
    first, second = (set(item_order(part.seed, "math", 800)[:200].tolist()) for part in (parts[2], parts[6]))
    assert 20 < len(first & second) < 80, "another quarter of the items"
    assert schedule.attrs(7) == {"epoch": 1, "epoch_share": 0.25}
    assert schedule.attrs(1) == schedule.attrs(7, to_the_end=True) == {}
    bare = Schedule(3, (), {"known": 0, "evaluations": 40, "share": 0.25, "candidates": 4}).part(0)
    assert bare is not None and bare.rungs == (0.25, 1.0)
    assert Schedule(3, (), {}).part(0) is None


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
    return run_forked(("optimizer=random", "budget.evaluations=22", *overrides), fault=fault)


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


EPOCHS = "fidelity={epochs: {share: 0.25, candidates: 4}}"


RUNGS_ALONE = "fidelity={rungs: [0.125, 0.25, 0.5, 1], epochs: off}"


@pytest.mark.parametrize("chosen", [pytest.param(RUNGS_ALONE, marks=pytest.mark.slow), EPOCHS], ids=["rungs", "epochs"])
def test_killed_and_resumed_with_rungs_equals_uninterrupted(texts: Path, chosen: str) -> None:
    assert search(chosen) == 0
    expected = record_of(Study.load(URL, "tiny"))
    last = expected[1][-1][0]
    assert len(expected[1]) >= 2
    os.rename("runs", "first")
    assert search(chosen, fault=f"telling:{last - 2}") != 0
    assert search(chosen, fault="scoring:3") != 0  # inside a candidate, between two rungs
    assert search(chosen, fault="finishing:2") != 0
    assert search(chosen) == 0
    assert record_of(Study.load(URL, "tiny")) == expected


def record_of(study: Study) -> tuple[Any, list[Any]]:
    """All rows, and of each stopped candidate its estimate, its epoch and the items that were scored."""
    stopped = []
    for c in stops(study):
        scores, where = study.partial_scores(c.number)
        items, positions = scores["text"].items.tolist(), where.positions["text"].tolist()
        stopped.append((c.number, c.estimate, c.estimate_stderr, c.stopped, c.attrs.get("epoch"), items, positions))
    return study_rows(study), stopped


def stops(study: Study) -> list[Any]:
    return [c for c in study.candidates() if c.state == "stopped"]


def test_candidates_of_an_epoch_share_its_items_and_go_on_to_all_of_them_or_stop(texts: Path) -> None:
    assert search(EPOCHS) == 0
    study = Study.load(URL, "tiny")
    candidates = study.candidates()
    known = study.header.epochs["known"]
    assert study.header.epochs == {"known": known, "evaluations": 22, "share": 0.25, "candidates": 4}
    for c in candidates:
        expected = epoch_of(c.number, **study.header.epochs)
        assert (c.attrs.get("epoch"), c.attrs.get("epoch_share")) == (expected or (None, None))
        if c.state == "done":
            assert [len(items) for items in study.items(c.number)] == [96], "the whole split"
            continue
        _, where = study.partial_scores(c.number)
        assert expected is not None and where.rule in {"beaten", "unpromising"}
        order = item_order(epoch_seed(3, expected[0]), "text", 96)
        assert np.array_equal(where.positions["text"], np.sort(order[: count_at(96, where.share)]))
    assert all(c.state == "done" for c in candidates[:known]) and stops(study)
    assert "epoch" in study.frame() and study.frame()["stop_rule"].notna().sum() == len(stops(study))


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
    assert asked.summary["rungs"] == "1/2, 1"
    assert not any("stopped early" in str(warning) for warning in asked.warnings)
    monkeypatch.setattr("evomerge.objectives.perplexity.PerplexityObjective.partial", False)
    whole = prepare(parse_study(text, "s", ("fidelity={rungs: [0.5, 1]}",)))
    assert whole.summary["rungs"].startswith("off: text has no score for a part of its items")
    assert any("no candidate is stopped early: text" in str(warning) for warning in whole.warnings)
    assert whole.header.rungs == []


def test_epochs_are_the_default_where_there_are_many_items_and_evaluations_count(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path("study.yaml").read_text()
    few = prepare(parse_study(text, "s"))
    assert few.summary["epochs"] == "off: text has 96 search items, fewer than 512" and not few.header.epochs
    asked = prepare(parse_study(text, "s", ("fidelity={epochs: {share: 0.5, candidates: 9}}",)))
    assert asked.summary["epochs"] == "9 candidates each, from 1/2 of the items"
    assert asked.summary["rungs"] == "1/8, 1/4, 1/2, 1", "the default, since the file says nothing of rungs"
    assert asked.header.identity["epochs"] == {"share": 0.5, "candidates": 9}
    monkeypatch.setattr("evomerge.rungs.WORTH_EPOCHS", 96)
    many = prepare(parse_study(text, "s", ("workers=9",)))
    assert many.summary["epochs"] == "18 candidates each, from 1/8 of the items"
    assert "epochs" not in many.header.identity, "evomerge's own choice is not compared"
    for off in ("off", "{epochs: off}"):
        none = prepare(parse_study(text, "s", (f"fidelity={off}",)))
        assert none.summary["epochs"] == "off" and not none.header.epochs
    hours = prepare(parse_study(text, "s", ("budget={hours: 1}", "fidelity={epochs: {}}")))
    assert hours.summary["epochs"].startswith("off: their share of the items grows with the evaluations")
    assert "there are no epochs" in str(hours.warnings[0])
