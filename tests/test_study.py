"""The record: one transaction per step, first writer wins, readable by Optuna, refused when it is another's."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evomerge.errors import StorageError, StudyConflict
from evomerge.fidelity import Stopped
from evomerge.objectives import Scores
from evomerge.recipe import Recipe
from evomerge.storage import pack, unpack
from evomerge.study import Header, Study
from tests.large_study import large_study

BOUNDS = {"red.weight": (0.0, 1.2, False), "blue.density": (0.05, 1.0, True)}
RECIPE = Recipe.build("task_arithmetic", "base", {"red": {"weight": 0.25}, "blue": {"weight": 0.5}})


def header(**identity: object) -> Header:
    return Header({"seed": 1, **identity}, {"acc": True, "bits": False}, {"text": "name: x\n"}, {"torch": "2"})


def scores(value: float, n: int = 8) -> dict[str, dict[str, Scores]]:
    items = np.linspace(0, 2 * value, n)
    return {
        "search": {
            "acc": Scores(value, 0.1, items),
            "bits": Scores(3 - value, 0.2, np.stack([items, items + 1], axis=1)),
        }
    }


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'runs' / 'x' / 'ledger.db'}"


def test_a_candidate_is_recorded_and_read_back_exactly(url: str) -> None:
    study = Study.create(url, "x", header())
    params = {"red.weight": 0.1 + 0.2, "blue.density": 0.3}
    assert study.propose(RECIPE, params, BOUNDS) == 0
    assert study.candidates()[0].state == "running"
    assert study.finish(0, scores(0.7), 0, {"t_merge_s": 0.5, "t_eval_s": 1.5})
    again = Study.load(url, "x").candidates()[0]
    assert (again.state, again.values, again.stderr) == ("done", (0.7, 2.3), (0.1, 0.2))
    assert again.params == params
    assert again.recipe == RECIPE
    assert again.arrival == 0
    stored = study.scores(0, "search")
    assert stored is not None
    for name, expected in scores(0.7)["search"].items():
        assert np.array_equal(stored[name].items, expected.items)
    assert study.scores(0, "test") is None


def test_recipes_outside_the_space_and_failures_are_recorded(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, None, BOUNDS, "uniform soup")
    study.fail(0, "weights", "merged tensor q holds NaN", 0)
    candidate = study.candidate(0)
    assert (candidate.state, candidate.reason, candidate.params) == ("failed", "weights", None)
    assert candidate.label == "uniform soup"
    assert candidate.attrs["message"] == "merged tensor q holds NaN"


def test_a_stopped_candidate_keeps_its_estimate_and_its_items(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, None, BOUNDS)
    positions = {"acc": np.array([0, 3, 5]), "bits": np.array([1, 2])}
    seen = {"acc": Scores(0.4, 0.2, np.array([1.0, 0.0, 1.0])), "bits": Scores(2.5, 0.3, np.ones((2, 2)))}
    assert study.stop(0, seen, Stopped(0.125, 7, positions), 0, {"t_eval_s": 0.5})
    again = Study.load(url, "x")
    candidate = again.candidate(0)
    assert (candidate.state, candidate.values, candidate.stderr) == ("stopped", None, None)
    assert (candidate.estimate, candidate.estimate_stderr) == ((0.4, 2.5), (0.2, 0.3))
    assert candidate.stopped == "stopped at 1/8, beaten by #7" and candidate.arrival == 0
    stored, where = again.partial_scores(0)
    assert (where.share, where.beaten_by) == (0.125, 7)
    for name in seen:
        assert np.array_equal(stored[name].items, seen[name].items)
        assert np.array_equal(where.positions[name], positions[name])
    assert again.scores(0, "search") is None, "a part is no score"
    with pytest.raises(StorageError, match="no search items of candidate 0"):
        again.items(0)
    assert not again.finish(0, scores(0.7), 1, {}), "the first writer wins"
    assert optuna.load_study(study_name="x", storage=url).trials[0].state == optuna.trial.TrialState.PRUNED


def test_the_first_writer_wins(url: str) -> None:
    study, other = Study.create(url, "x", header()), Study.load(url, "x")
    study.propose(RECIPE, None, BOUNDS)
    assert study.finish(0, scores(0.7), 0, {})
    assert not other.finish(0, scores(0.1), 0, {})
    assert not other.fail(0, "crash", "late", 0)
    assert study.candidate(0).values == (0.7, 2.3)


def test_further_splits_are_stored_once(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, None, BOUNDS)
    study.finish(0, scores(0.7), 0, {})
    assert study.add_scores(0, "test", scores(0.6)["search"])
    assert not study.add_scores(0, "test", scores(0.9)["search"])
    stored = Study.load(url, "x").scores(0, "test")
    assert stored is not None and stored["acc"].value == 0.6


def test_values_must_be_finite(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, None, BOUNDS)
    with pytest.raises(ValueError, match="finite"):
        study.finish(0, scores(float("nan")), 0, {})
    assert study.candidate(0).state == "running"


def test_large_item_arrays_are_cut_into_pieces_that_every_database_holds(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, None, BOUNDS)
    noise = np.random.default_rng(0).normal(size=50_000)
    both = {name: Scores(0.5, 0.1, noise) for name in ("acc", "bits")}
    study.finish(0, {"search": both}, 0, {})
    stored = study.scores(0, "search")
    assert stored is not None and np.array_equal(stored["bits"].items, noise)
    path = url.removeprefix("sqlite:///")
    longest = sqlite3.connect(path).execute("select max(length(value_json)) from trial_system_attributes").fetchone()
    assert 50_000 < longest[0] <= 60_000


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=20),
        elements=st.floats(allow_nan=True, allow_infinity=True),
    )
)
def test_packing_is_exact(array: np.ndarray) -> None:
    again = unpack(pack(array))
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()


def test_sqlite_is_durable(url: str) -> None:
    study = Study.create(url, "x", header())
    for each in (study, Study.load(url, "x")):
        with each._storage.engine.connect() as connection:
            assert connection.exec_driver_sql("pragma journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("pragma synchronous").scalar() == 2  # FULL


def test_optuna_reads_it_as_one_of_its_own(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, {"red.weight": 0.25, "blue.density": 0.5}, BOUNDS)
    study.finish(0, scores(0.7), 0, {"t_merge_s": 0.5})
    loaded = optuna.load_study(study_name="x", storage=url)
    assert loaded.metric_names == ["acc", "bits"]
    assert [d.name for d in loaded.directions] == ["MAXIMIZE", "MINIMIZE"]
    trial = loaded.trials[0]
    assert trial.params == {"red.weight": 0.25, "blue.density": 0.5}
    assert trial.values == [0.7, 2.3]
    assert Recipe.from_yaml(trial.user_attrs["recipe"]) == RECIPE
    assert trial.user_attrs["stderr.search.acc"] == 0.1
    assert trial.datetime_start is not None and trial.datetime_complete is not None
    assert trial.datetime_complete >= trial.datetime_start
    assert loaded.best_trials[0].number == 0
    assert not any(k.startswith("evomerge") for k in trial.user_attrs)


def test_another_studys_record_is_a_conflict_that_names_the_difference(url: str) -> None:
    Study.create(url, "x", header(base="a", space={"method": "ties"}))
    study = Study.load(url, "x")
    study.require_identity({"seed": 1, "base": "a", "space": {"method": "ties"}})
    with pytest.raises(StudyConflict, match=r"base: stored .*a.*, now .*b") as raised:
        study.require_identity({"seed": 2, "base": "b", "space": {"method": "ties"}})
    assert "seed: stored 1, now 2" in str(raised.value)
    assert "space" not in str(raised.value)
    with pytest.raises(StudyConflict):
        Study.create(url, "x", header())


@pytest.mark.parametrize(("change", "said"), [({"novel": 1}, "novel"), ({"identity": None}, "identity")])
def test_a_header_of_another_version_is_a_conflict(
    url: str, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    Study.create(url, "x", header())
    held = {**vars(header()), **change}
    wanted = {k: v for k, v in held.items() if v is not None}
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute(
            "update study_system_attributes set value_json = ? where key = 'evomerge:header'",
            (json.dumps(json.dumps(wanted)),),
        )
    with pytest.raises(StudyConflict, match=f"another version of evomerge.*{said}"):
        Study.load(url, "x")


def test_an_optuna_study_that_is_not_ours_is_a_conflict(url: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    made = optuna.create_study(storage=url, study_name="x")
    made.optimize(lambda t: t.suggest_float("a", 0, 1), n_trials=1)
    with pytest.raises(StudyConflict, match="not made by evomerge"):
        Study.load(url, "x")
    assert Study.exists(url, "x")


def test_a_creation_that_was_interrupted_is_made_again(url: str, tmp_path: Path) -> None:
    file = tmp_path / "runs" / "x" / "ledger.db"
    file.parent.mkdir(parents=True)
    file.touch()  # killed before the first table
    assert not Study.exists(url, "x")
    optuna.storages.RDBStorage(url)  # killed before the study
    assert not Study.exists(url, "x")
    assert Study.create(url, "x", header()).candidates() == []
    assert Study.exists(url, "x")


def test_looking_never_changes_anothers_study(url: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    made = optuna.create_study(storage=url, study_name="x", directions=["maximize", "minimize"])
    made.set_metric_names(["acc", "bits"])
    assert Study.exists(url, "x")
    with pytest.raises(StudyConflict):
        Study.load(url, "x")
    assert optuna.get_all_study_names(url) == ["x"]


def test_files_that_are_no_study_database(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    file.write_bytes(b"not a database at all, but long enough to have a header" * 40)
    with pytest.raises(StorageError):
        Study.load(f"sqlite:///{file}", "x")
    empty = tmp_path / "b.db"
    sqlite3.connect(empty).execute("create table t (a)")
    with pytest.raises(StorageError, match="not a study database"):
        Study.load(f"sqlite:///{empty}", "x")
    tables = sqlite3.connect(empty).execute("select name from sqlite_master").fetchall()
    assert tables == [("t",)], "nothing was created in it"
    with pytest.raises(StorageError, match="no study database"):
        Study.load(f"sqlite:///{tmp_path / 'c.db'}", "x")
    assert not (tmp_path / "c.db").exists()


def test_the_frame_has_a_row_per_candidate(url: str) -> None:
    study = Study.create(url, "x", header())
    study.propose(RECIPE, {"red.weight": 0.25, "blue.density": 0.5}, BOUNDS)
    study.propose(RECIPE, None, BOUNDS, "base")
    study.finish(0, scores(0.7), 0, {"t_merge_s": 0.5})
    frame = study.frame()
    assert list(frame["number"]) == [0, 1]
    assert frame.loc[0, "acc"] == 0.7 and frame.loc[0, "red.weight"] == 0.25
    assert frame.loc[1, "state"] == "running" and np.isnan(frame.loc[1, "acc"])


def test_counts_are_those_of_the_candidates(url: str) -> None:
    study = Study.create(url, "x", header())
    assert study.counts() == {"done": 0, "stopped": 0, "failed": 0, "running": 0}
    for _ in range(3):
        study.propose(RECIPE, None, BOUNDS)
    study.finish(1, scores(0.7), 0, {})
    study.fail(0, "crash", "no", 1)
    assert study.counts() == {"done": 1, "stopped": 0, "failed": 1, "running": 1}


def test_many_candidates_are_read_in_parts_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of seven, of two studies whose rows lie between each other, are what is read one by one."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    study, other = Study.create(url, "x", header()), Study.create(url, "y", header())
    monkeypatch.setattr("evomerge._study_reads.PART", 7)
    for i in range(16):
        study.propose(RECIPE, {"red.weight": i / 20, "blue.density": 0.5}, BOUNDS, label=f"ü {i}")
        if i % 2:
            other.propose(RECIPE, {"red.weight": 1.0, "blue.density": 0.05}, BOUNDS)
        if i % 3:
            study.finish(i, scores(i / 10), None, {"note": [i, None, {"a": 1.5}], "same_as": 0})
    read = study.candidates()
    assert read == [study.candidate(i) for i in range(16)]
    assert [c.params["red.weight"] for c in read if c.params] == [i / 20 for i in range(16)]
    assert [c.attrs.get("note") for c in read] == [[i, None, {"a": 1.5}] if i % 3 else None for i in range(16)]
    assert len(other.candidates()) == 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_candidates_open_in_bounded_time_and_memory(tmp_path: Path) -> None:
    """Processor time, since other programs may run beside; opening is a part of resuming, which has 60 s."""
    import resource

    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    large_study(url, "large", 100_000)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    study = Study.load(url, "large")
    assert study.counts() == {"done": 85_000, "stopped": 10_000, "failed": 5_000, "running": 0}
    assert time.process_time() - started < 2.0
    started = time.process_time()
    assert len(study.candidates()) == 100_000
    assert time.process_time() - started < 30.0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
    assert grown < 1_000_000
    started = time.process_time()
    study.acquire()
    number = study.propose(RECIPE, None, BOUNDS)
    assert study.finish(number, scores(0.5), None, {}) and study.candidate(number).arrival == number == 100_000
    assert time.process_time() - started < 2.0, "a candidate costs the same, however many there were"
    study.release()
