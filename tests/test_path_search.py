"""Layer-order studies from the study file to the exported model: searched, killed and continued, refused when wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge import faults
from evomerge.cli import main
from evomerge.commands import run_search
from evomerge.config import load_study_file
from evomerge.errors import ConfigError
from evomerge.export import merge
from evomerge.model import LiveModel
from evomerge.moments import whole_model
from evomerge.prepare import Prepared, prepare
from evomerge.recipe import Recipe, Slice, Source
from evomerge.selection import complexity, finalists, posterior_merits
from evomerge.study import Candidate, Header, Study
from evomerge.weights import Weights
from tests.conftest import study_rows
from tests.path_studies import make_family, write_study
from tests.small_studies import empty_study, right, study_of
from tests.test_layer_path import IDS, N, make

URL = "sqlite:///runs/tiny/ledger.db"
ENCODINGS: dict[str, dict[str, Any]] = {
    "choices": {"path": "choices", "passes": 2},
    "edits": {"path": "edits", "kinds": ["repeat", "skip", "splice", "swap", "share"]},
    "indicators": {"path": "indicators", "repeats": 2, "matrix": False},
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("paths"))


@pytest.fixture
def paths(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the family as the working directory."""
    target = tmp_path / "paths"
    shutil.copytree(made, target)
    monkeypatch.chdir(target)
    return target


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            main(list(args))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        out, err = capfd.readouterr()
        return code, out, err

    return call


def prepared(**changes: Any) -> Prepared:
    return prepare(load_study_file(str(write_study(Path(), **changes))))


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        prepared(**changes)
    return [str(p) for p in raised.value.problems]


def searched() -> list[Candidate]:
    return Study.load(URL, "tiny").candidates()


# -------------------------------------------------------------------- search, kills, export


def search_forked(fault: str = "") -> int:
    """Search inline in a forked process, so that a kill costs no import; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.environ["EVOMERGE_FAULT"] = fault
            faults._visits.clear()
            code = run_search("study.yaml", (), resume="auto", inline=True, quiet=True, allow_task_code=False)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_a_study_is_searched_killed_continued_and_exported(paths: Path, run: Run, encoding: str) -> None:
    write_study(paths, space=ENCODINGS[encoding], known_recipes=False, budget={"evaluations": 10})
    shutil.copytree(paths, paths.parent / "killed")
    assert search_forked() == 0
    whole = Study.load(URL, "tiny")
    os.chdir(paths.parent / "killed")
    # The first visit is of measuring, when there is no study yet: killed there, it starts anew.
    assert search_forked("merging:2") == -signal.SIGKILL and not Path("runs").exists()
    assert search_forked("merging:5") == -signal.SIGKILL
    kept = Study.load(URL, "tiny")
    assert 0 < len(kept.candidates()) < 10
    assert search_forked("telling:1") == -signal.SIGKILL
    assert search_forked() == 0
    parts = Study.load(URL, "tiny")
    assert parts.header.moments == kept.header.moments == whole.header.moments
    assert list(whole.header.moments) == ["red", "blue"]
    assert study_rows(parts) == study_rows(whole)
    candidates = parts.candidates()
    assert {c.state for c in candidates} == {"done"} and len({c.fingerprint for c in candidates}) > 3
    assert all(c.params is not None and c.recipe.method == "passthrough" for c in candidates)
    scaled = [c for c in candidates if "scale" in c.recipe_of(c.number)]
    chosen = max(scaled, key=lambda c: len(c.recipe.slices))
    assert run("export", "runs/tiny", "out", "--candidate", str(chosen.number), "--inline")[0] == 0
    rows = json.loads(run("eval", "out", "study.yaml", "-f", "json")[1])
    assert [row["value"] for row in rows] == list(chosen.values or ())
    config = json.loads(Path("out/config.json").read_text())
    assert config["num_hidden_layers"] == sum(piece.length(N) for piece in chosen.recipe.slices)
    assert "passthrough" in Path("out/mergekit_config.yml").read_text()


def test_what_is_recorded_is_what_the_space_makes_with_the_stored_moments(paths: Path, run: Run) -> None:
    write_study(paths, space=ENCODINGS["edits"], known_recipes=False, budget={"evaluations": 8})
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    study = Study.load(URL, "tiny")
    ready = prepare(load_study_file("study.yaml"))
    space = ready.space_of(study.header)
    assert all(space.recipe(c.params or {}).fingerprint == c.fingerprint for c in study.candidates())
    unmatched = [ready.space.recipe(c.params or {}).fingerprint for c in study.candidates()]
    assert unmatched != [c.fingerprint for c in study.candidates()]


def test_a_study_with_a_merged_model_from_another_study(paths: Path, run: Run) -> None:
    coefficients = {"method": "task_arithmetic", "genes": {"weight": {"low": 0.0, "high": 1.0}}}
    write_study(paths, name="ps", space=coefficients, budget={"evaluations": 9})
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    write_study(paths, merged="runs/ps", budget={"evaluations": 14})
    code, _, err = run("check", "study.yaml")
    assert code == 3 and "runs/ps is the folder of a study, not a checkpoint" in err
    command = err.partition("`evomerge ")[2].partition("`")[0].split()
    assert run(*command, "--inline")[0] == 0
    merged = command[-1]
    write_study(paths, merged=merged, budget={"evaluations": 14}, constraints=["text <= 1.5 * merged"])
    code, out, err = run("check", "study.yaml", "-f", "json")
    assert code == 0, err
    said = json.loads(out)
    assert said["sources"] == "red, blue, merged" and said["backbone"] == "merged" and said["merged model"] == merged
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    study, candidates = Study.load(URL, "tiny"), searched()
    known = [c for c in candidates if c.label is not None]
    assert known[-1].label == "merged" and known[-1].params is not None
    assert list(study.header.moments) == ["red", "blue", "merged"]
    own = json.loads(run("eval", merged, "study.yaml", "-f", "json")[1])
    assert [row["value"] for row in own] == list(known[-1].values or ())
    assert any(merged in c.recipe.models for c in candidates[len(known) :])
    code, _, err = run("export", "runs/tiny", "out", "--candidate", str(candidates[-1].number), "--inline")
    assert code == 0, err
    assert f"| merged | `{merged}` |" in Path("out/README.md").read_text()
    assert json.loads(run("status", "runs/tiny", "-f", "json")[1])["done"] == 14


def test_a_merged_model_that_changed_is_noticed(paths: Path, run: Run) -> None:
    write_study(paths, merged="merged", budget={"evaluations": 10})
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    tensors = load_file("merged/model.safetensors")
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, "merged/model.safetensors", metadata={"format": "pt"})
    for command in (("front", "runs/tiny", "--split", "test", "--inline"), ("search", "study.yaml", "--inline")):
        code, _, err = run(*command)
        assert code in (3, 4) and "merged" in err, err


def test_a_search_that_is_stopped_while_it_measures_stores_nothing(
    paths: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    write_study(paths, space=ENCODINGS["choices"])
    monkeypatch.setattr("evomerge.moments._moments", stopped)  # as Ctrl-C does, between two models
    code, _, err = run("search", "study.yaml", "--inline")
    assert code == 130 and "nothing is stored yet\n  hint: run the same command again" in err and "Traceback" not in err
    assert not list(Path("runs").rglob("*.db")) or not Study.exists(URL, "tiny")


def test_the_front_shows_paths_in_one_line() -> None:
    from evomerge.results import LINE, _path

    paths = {"red": "m/red", "blue": "m/blue"}
    study = empty_study(Header({"base": "m/base", "experts": paths}, {"acc": True}))

    def path(*spans: tuple[str, int, int]) -> str:
        slices = tuple(Slice((Source(f"m/{name}", (a, b)),)) for name, a, b in spans)
        number = study.propose(Recipe("passthrough", slices, "m/base"), None, {})
        return _path(study, study.candidate(number))

    assert path(("red", 0, 1), ("blue", 1, 3), ("base", 3, 4)) == "red 0, blue 1-2, base 3"
    long = path(*[(("red", "blue")[d % 2], d, d + 1) for d in range(40)])
    assert len(long) <= LINE and long.startswith("red 0, blue 1, ") and long.endswith(", blue 39") and "..." in long
    plain = study.propose(Recipe.build("linear", None, {"m/red": {}, "m/blue": {}}), None, {})
    assert _path(study, study.candidate(plain)) == ""


# -------------------------------------------------------------------- what check says


def test_check_says_what_is_searched(paths: Path) -> None:
    said = prepared(space=ENCODINGS["choices"]).summary
    assert said["space"] == "layer orders (choices), 9 dimensions" and said["optimizer"] == "evolution"
    assert said["backbone"] == "searched among red, blue"
    assert said["frozen layers"] == "the first 1 and the last 1 of 4" and said["longest path"] == "6 layers"
    assert said["scales"] == "0.5 to 2 times the matched scale, which a new study measures"
    assert not Path("runs").exists()
    plain = prepared(space={"path": "edits", "scales": "off", "backbone": "red", "frozen": [2, 0]}).summary
    assert (plain["scales"], plain["backbone"]) == ("off", "red")
    assert plain["frozen layers"] == "the first 2 and the last 0 of 4"
    free = prepared(space={"path": "edits", "match": False, "scales": [0.25, 4]}).summary
    assert free["scales"] == "0.25 to 4"


def test_check_says_why_scales_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("stablelm", tmp_path, vocab_size=256)
    config = tmp_path / "base" / "config.json"
    monkeypatch.setattr("evomerge.summary.foldable", lambda model_type: False)
    monkeypatch.setattr("evomerge._path_form.foldable", lambda model_type: False)
    shutil.copytree(tmp_path, tmp_path.parent / "s", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    objective = {"name": "depth", "kind": "size", "count": "layers"}
    said = prepared(objectives=[objective]).summary["scales"]
    model_type = json.loads(config.read_text())["model_type"]
    assert said == f"off: those of a {model_type} model cannot be folded into its weights"


# -------------------------------------------------------------------- bad input


def test_merged_needs_a_space_of_layer_orders_and_a_name_of_its_own(paths: Path) -> None:
    found = problems(merged="merged", space="ties")
    assert len(found) == 1 and found[0].startswith("study.yaml:") and "this space has coefficients" in found[0]
    found = problems(merged="merged", experts={"red": "red", "merged": "blue"})
    assert len(found) == 1 and "an expert cannot be named `merged`" in found[0]
    found = problems(merged="merged", experts={"base": "red", "merged": "blue"}, space="ties")
    assert len(found) == 3


def test_a_missing_merged_model_is_one_error_with_its_line(paths: Path, run: Run) -> None:
    file = write_study(paths, merged="nowhere")
    line = file.read_text().splitlines().index("merged: nowhere") + 1
    code, _, err = run("check", "study.yaml")
    assert code == 3 and f"study.yaml:{line}: merged: no checkpoint folder at nowhere" in err
    assert "1 problem with files of study.yaml" in err and "`evomerge export STUDY.yaml nowhere`" in err


@pytest.mark.parametrize("role", ["merged", "expert"])
def test_layers_of_another_hidden_size_are_refused_by_name(paths: Path, run: Run, role: str) -> None:
    make("llama", paths / "wide", vocab_size=256, max_position_embeddings=128, hidden_size=64)
    if role == "merged":
        write_study(paths, merged="wide/red")
    else:
        write_study(paths, experts={"red": "red", "blue": "wide/blue"})
    code, out, err = run("check", "study.yaml")
    label = "merged" if role == "merged" else "blue"
    assert (code, out) == (2, "")
    assert f"{label}: config.json: hidden_size is 64, but 32 in the base" in err and "study.yaml:" in err
    assert err.count("has shape") == 1 and "more)" in err, "one line per model, not per tensor"
    assert not Path("runs").exists()


def test_wrong_keys_of_the_space_come_at_once_each_at_its_line(paths: Path) -> None:
    space = {"path": "edits", "sources": ["red", "green"], "scales": [0, 2], "longest": 9, "matrix": True}
    found = problems(space=space)
    lines = Path("study.yaml").read_text().splitlines()
    for key, said in (("sources", "'green'"), ("scales", "cannot be 0"), ("longest", "9"), ("matrix", "indicators")):
        line = next(i for i, text in enumerate(lines, start=1) if text.startswith(f"  {key}:"))
        assert any(p.startswith(f"study.yaml:{line}: {key}: ") and said in p for p in found), (key, found)
    numbers = [int(p.split(":")[1]) for p in found]
    assert numbers == sorted(numbers), "in the file's order"


def test_a_shipped_space_that_is_misspelt_is_guessed(paths: Path) -> None:
    (found,) = problems(space="path_edit")
    assert "no search space 'path_edit' (did you mean path_edits?)" in found


def test_each_wrong_option_of_the_optimizer_is_named(paths: Path) -> None:
    found = problems(optimizer={"name": "evolution", "population": 1, "crossover": 2})
    assert [p.split(": ")[0] for p in found] == ["optimizer.population", "optimizer.crossover"]


def test_doubts_of_a_study_of_layer_orders(paths: Path) -> None:
    depth = {"name": "depth", "kind": "size", "count": "layers"}
    edits = {"path": "edits", "scales": "off", "edits": 1, "block": 1}

    def said(**changes: Any) -> str:
        return "\n".join(map(str, prepared(space=edits, objectives=[depth], **changes).warnings))

    assert "the shortest one has 3 layers" in said(constraints=["depth <= 2"])
    assert "shortest" not in said(constraints=["depth <= 3"])
    assert "nsga2 is not made for layer orders" in said(optimizer="nsga2")
    for name in ("evolution", "catcma", "random"):
        assert "made for" not in said(optimizer=name)
    known = len(prepared(space=edits, objectives=[depth]).known)
    assert f"{known} of the {2 * known} evaluations are known recipes" in said(budget={"evaluations": 2 * known})
    assert "known recipes" not in said(budget={"evaluations": 2 * known + 1})


def test_a_merged_model_that_is_an_expert_is_refused_at_its_own_line(paths: Path) -> None:
    found = problems(merged="red")
    line = Path("study.yaml").read_text().splitlines().index("merged: red") + 1
    assert len(found) == 1 and found[0].startswith(f"study.yaml:{line}: merged: ")


def test_coarse_to_fine_would_try_the_start_again_and_again(paths: Path) -> None:
    (found,) = problems(optimizer={"name": "coarse_to_fine"})
    line = next(
        i for i, text in enumerate(Path("study.yaml").read_text().splitlines(), 1) if text.startswith("optimizer:")
    )
    assert found.startswith(f"study.yaml:{line}: coarse_to_fine goes through levels") and "evolution" in found


def test_a_folder_with_two_spellings_is_one_model(paths: Path) -> None:
    Path("link").symlink_to("blue")
    found = problems(
        experts={"red": "red", "again": "./red", "blue": "blue", "root": str(paths / "base")}, merged="link"
    )
    assert [p.partition(": ")[2] for p in found] == [
        "again: './red' is the folder of `red` too (leave one out)",
        f"root: '{paths / 'base'}' is the folder of `base` too (leave one out)",
        "merged: 'link' is the folder of `blue` too (leave one out)",
    ]
    assert all(p.startswith("study.yaml:") for p in found)


def test_a_path_through_models_of_several_dtypes_is_written_in_the_one_that_it_was_scored_in(paths: Path) -> None:
    for name in ("base", "blue"):
        file = paths / name / "model.safetensors"
        save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    space = prepared(space={"path": "choices", "backbone": "red"}).space
    recipe = space.recipe({**space.start(), "layer.1": "blue", "scale.1": 0.7})
    live = LiveModel("base")
    live.install(recipe, Weights(["base", "red", "blue"]))
    exported = LiveModel(str(merge(recipe, "out")))
    assert exported.dtype == live.dtype == torch.bfloat16
    assert torch.equal(live.model(input_ids=IDS).logits, exported.model(input_ids=IDS).logits)
    assert space.point_of(whole_model("red", N)) == space.start()


def test_nothing_is_proposed_for_preferences(paths: Path, run: Run) -> None:
    write_study(paths, space={"path": "edits", "scales": "off"}, budget={"evaluations": 9})
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    code, _, err = run("propose", "runs/tiny")
    assert code == 2 and "searches layer orders" in err


def test_resuming_with_another_merged_model_is_a_conflict(paths: Path, run: Run) -> None:
    write_study(paths, merged="merged", budget={"evaluations": 9})
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    shutil.copytree("merged", "other")
    write_study(paths, merged="other", budget={"evaluations": 9})
    code, _, err = run("check", "study.yaml")
    assert code == 4 and "merged: stored" in err


# -------------------------------------------------------------------- who wins


def order(*runs: tuple[str, int, int], scale: float | None = None) -> Recipe:
    own = () if scale is None else (("scale", scale),)
    return Recipe("passthrough", tuple(Slice((Source(m, (a, b), own),)) for m, a, b in runs))


def test_each_run_of_layers_and_each_scale_is_a_setting() -> None:
    assert complexity(whole_model("red", 4)) == 1
    assert complexity(order(("red", 0, 2), ("blue", 2, 4))) == 2
    assert complexity(order(("red", 0, 2), ("blue", 2, 4), scale=0.5)) == 4
    assert complexity(order(("red", 0, 3), ("red", 1, 4))) < complexity(
        order(("red", 0, 3), ("red", 1, 3), ("red", 2, 4))
    )


def test_finalists_of_layer_orders_keep_their_own_values() -> None:
    recipes = {n: order(("red", 0, n + 1), ("blue", n, 9)) for n in range(8)}
    values = [right(100 + (40 if n == 4 else n), first=n) for n in range(8)]
    params = [{"edit1.first": n / 10} for n in range(8)]
    paths = study_of(values, recipes=recipes, params=params, identity={"space": {"path": "edits"}})
    plain = study_of(values, recipes=recipes, params=params, identity={"space": {"method": "ties"}})
    own = posterior_merits(paths, paths.candidates())
    merits = [own[n] for n in range(8)]
    spread = [scores.value for scores in values]
    scale = (merits[4] - merits[0]) / (spread[4] - spread[0])
    assert merits == pytest.approx([merits[0] + scale * (v - spread[0]) for v in spread])
    assert finalists(paths, paths.candidates()).candidates[0].number == 4
    shrunk = posterior_merits(plain, plain.candidates())
    assert shrunk[4] < own[4] - 0.05  # its neighbours say that it was lucky
