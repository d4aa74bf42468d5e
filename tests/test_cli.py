"""The command line as people use it: data on stdout, errors with exit codes, nothing created by mistakes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.cli import app, main
from evomerge.output import Format, emit, emit_one
from evomerge.study import Study
from tests.conftest import ROOT, study_rows

URL = "sqlite:///runs/tiny/ledger.db"
Run = Callable[..., tuple[int, str, str]]


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


def edit_study(change: Callable[[dict], None]) -> None:
    data = yaml.safe_load(Path("study.yaml").read_text())
    change(data)
    Path("study.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def edit_tensors(path: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate() -> None:
    file = Path("red/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only() -> None:
    Path("red/model.safetensors").rename("red/pytorch_model.bin")


def smaller_vocabulary() -> None:
    edit_tensors("red/model.safetensors", lambda t: t.update({k: v[:200] for k, v in t.items() if "embed" in k}))


def change_config(key: str, value: object) -> None:
    config = json.loads(Path("red/config.json").read_text())
    Path("red/config.json").write_text(json.dumps(config | {key: value}))


def change_base(key: str, value: object) -> None:
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {key: value}))


def binary_space() -> None:
    edit_study(lambda d: d.update(space="s.yaml"))
    Path("s.yaml").write_bytes(b"\xff")


def set_objective(key: str, value: object) -> None:
    edit_study(lambda d: d["objectives"][0].update({key: value}))


def set_space(key: str, value: object) -> None:
    edit_study(lambda d: d["space"].update({key: value}))


def drop_tensor() -> None:
    edit_tensors("red/model.safetensors", lambda t: t.pop("model.norm.weight"))


def extra_tensor() -> None:
    edit_tensors("red/model.safetensors", lambda t: t.update({"model.extra.weight": torch.zeros(2)}))


def nan_in_expert() -> None:
    edit_tensors("red/model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))


def foreign_database() -> None:
    import optuna

    Path("runs/tiny").mkdir(parents=True)
    optuna.create_study(storage=URL, study_name="tiny").add_trial(optuna.trial.create_trial(value=1.0))


BAD = {
    "missing weights": (lambda: Path("red/model.safetensors").unlink(), 3, "no model.safetensors"),
    "truncated weights": (truncate, 3, "not a complete safetensors file"),
    "pickled weights": (pickle_only, 3, "pickled weights"),
    "missing folder": (lambda: shutil.rmtree("red"), 3, "no checkpoint folder at red"),
    "missing tensor": (drop_tensor, 2, "has no tensor model.norm.weight"),
    "extra tensor": (extra_tensor, 2, "model.extra.weight"),
    "vocabulary": (smaller_vocabulary, 2, "shape (200, 32), but (256, 32)"),
    "other architecture": (lambda: change_config("hidden_act", "gelu"), 2, "hidden_act is 'gelu'"),
    "nan": (nan_in_expert, 2, "32 values that are NaN"),
    "unknown task": (lambda: set_objective("file", "none.yaml"), 2, "no task file"),
    "unknown metric": (lambda: set_objective("metric", "blue"), 2, "no metric 'blue'"),
    "unknown method": (lambda: set_space("method", "magic"), 2, "magic"),
    "unknown gene": (lambda: set_space("genes", {"wieght": {"low": 0.0, "high": 1.0}}), 2, "wieght"),
    "range upside down": (lambda: set_space("genes", {"weight": {"low": 1.0, "high": 0.0}}), 2, "low"),
    "unknown key": (lambda: edit_study(lambda d: d.update({"bugdet": 3})), 2, "unknown key `bugdet`"),
    "negative budget": (lambda: edit_study(lambda d: d.update({"budget": {"evaluations": -1}})), 2, "budget"),
    "unknown option": (lambda: edit_study(lambda d: d.update({"optimizer": {"name": "map", "x": 1}})), 2, "x"),
    "unwritable": (lambda: edit_study(lambda d: d.update({"storage": "sqlite:////proc/1/x/l.db"})), 3, "/proc/1"),
    "in a file": (lambda: edit_study(lambda d: d.update({"storage": "sqlite:///study.yaml/l.db"})), 3, "cannot write"),
    "no tokenizer": (lambda: [p.unlink() for p in Path("base").glob("tokenizer*")], 2, "cannot load the tokenizer"),
    "config of nothing": (lambda: Path("base/config.json").write_text('{"model_type": ["x"]}'), 2, "cannot build"),
    "binary space": (binary_space, 2, "s.yaml"),
    "quantised": (lambda: [change_base("quantization_config", {"bits": 4})], 2, "quantization_config"),
    "foreign database": (foreign_database, 4, "not made by evomerge"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_clear_error_before_anything_happens(work: Path, run: Run, case: str) -> None:
    spoil, code, message = BAD[case]
    spoil()
    before = sorted(str(p) for p in Path().rglob("*") if p.is_file() and ".db" not in p.name)
    for command in ("check", "search"):
        got, out, err = run(command, "study.yaml")
        assert (got, out) == (code, ""), err
        assert err.count("error:") == 1 and message in err, err
        assert "Traceback" not in err
    after = sorted(str(p) for p in Path().rglob("*") if p.is_file() and ".db" not in p.name)
    assert after == before
    assert Path("runs").exists() == (case == "foreign database")


def test_all_problems_come_at_once(work: Path, run: Run) -> None:
    drop_tensor()
    set_objective("metric", "blue")
    set_space("genes", {"wieght": {"low": 0.0, "high": 1.0}})
    truncated = Path("blue/model.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:500])
    code, _, err = run("check", "study.yaml")
    assert code == 2
    for message in (
        "model.norm.weight",
        "study.yaml:14: objective pick: task tiny_pick has no metric 'blue'",
        "wieght",
        "blue/model.safetensors",
    ):
        assert message in err, (message, err)


def test_a_study_from_search_to_export(work: Path, run: Run) -> None:
    code, out, _ = run("check", "study.yaml", "-f", "json")
    assert code == 0 and json.loads(out)["space"] == "task_arithmetic, 3 dimensions"
    assert not Path("runs").exists()
    code, out, err = run("search", "study.yaml", "--inline")
    assert (code, out) == (0, ""), err
    assert err.count("/14 | #") == 14 and "cannot" not in err and "a crash in one ends the search" in err
    code, out, _ = run("status", "study.yaml", "-f", "json")
    assert json.loads(out)["done"] == 14
    code, out, _ = run("front", "runs/tiny", "-f", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows and {"candidate", "pick", "low.pick", "high.text", "recipe"} <= set(rows[0])
    assert all(float(r["low.text"]) < float(r["text"]) < float(r["high.text"]) for r in rows)
    code, out, _ = run("front", "runs/tiny")
    assert f"{float(rows[0]['pick']):.4f} [{float(rows[0]['low.pick']):.4f}, " in out and "low.pick" not in out
    code, out, _ = run("front", "runs/tiny", "--all", "-f", "yaml")
    assert len(yaml.safe_load(out)) == 14
    code, out, err = run("export", "runs/tiny", "best", "--inline")
    assert code == 0 and out.strip() == "best", err
    assert "best of them on the validation split" in err and "statistically tied" in err
    assert "best known recipe on search" in err
    status = json.loads(run("status", "runs/tiny", "-f", "json")[1])
    assert "the best on validation" in status["winner"]
    files = {p.name for p in Path("best").iterdir()}
    assert {"recipe.yaml", "mergekit_config.yml", "README.md", "model.safetensors", "config.json"} <= files
    assert {"tokenizer.json", "MANIFEST.sha256"} <= files
    subprocess.run(["sha256sum", "--check", "--quiet", "MANIFEST.sha256"], cwd="best", check=True)
    card = (Path("best") / "README.md").read_text()
    assert (
        "base_model_relation: merge" in card
        and "| objective | better | search | validation | test |" in card
        and "Wilson's interval for shares of right answers (pick)" in card
        and "## Gain over the best known recipe" in card
    )
    code, _, err = run("export", "runs/tiny", "best", "--inline")
    assert code == 2 and "exists already" in err
    code, _, err = run("export", "runs/tiny", "other", "--candidate", "99")
    assert code == 2 and not Path("other").exists()


def test_the_test_split_is_scored_once_and_then_shown(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    _, first, said = run("front", "runs/tiny", "--split", "test", "--inline", "-f", "json")
    shutil.move("items.test.jsonl", "gone")  # a second look cannot score anything
    _, second, err = run("front", "runs/tiny", "--split", "test", "--inline", "-f", "json")
    assert first == second, err
    assert "the winner, best of them on the validation split" in err
    told = [line.strip() for line in err.splitlines() if line.startswith("  ")]
    gain, tests = ([line for line in told if line.startswith("over ") == which] for which in (False, True))
    assert set(told) <= {line.strip() for line in said.splitlines()}
    shown = json.loads(run("status", "runs/tiny", "-f", "json")[1])  # which scores nothing at all
    assert shown["verdict"] == next(line for line in err.splitlines() if line.startswith("search "))
    assert next(iter(shown)) == "verdict"
    for line in gain:
        name, _, text = line.partition(": ")
        assert text.startswith("search ") and " test " in text
        assert shown[f"gain, {name}"] == text
    for line in tests:
        assert any(line.endswith(f": {text}") for text in shown.values())
    study = Study.load(URL, "tiny")
    number = json.loads(first)[0]["candidate"]
    stored = study.scores(number, "test")
    assert stored is not None and stored["pick"].value == json.loads(first)[0]["pick"]


def test_a_point_of_the_front_is_picked_and_new_recipes_are_proposed(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    _, out, err = run("front", "runs/tiny", "-f", "json")
    points = {row["candidate"]: row for row in json.loads(out)}
    assert "hypervolume " in err and "above the worst of the known recipes in each objective: pick " in err
    assert all(0 < row["membership"] <= 1 for row in points.values())
    for options in (["--prefer", "pick=1"], ["--prefer", "text=1,pick=0"], ["--knee"], ["--weakest-link"]):
        code, out, err = run("front", "runs/tiny", "-f", "json", *options)
        first, *rest = json.loads(out)
        assert code == 0 and first["picked"] and not any(row["picked"] for row in rest), err
        assert {row["candidate"] for row in (first, *rest)} == set(points)
    assert json.loads(run("front", "runs/tiny", "-f", "json", "--prefer", "pick=1")[1])[0]["pick"] == max(
        row["pick"] for row in points.values()
    )
    best = min(row["text"] for row in points.values())
    reached = json.loads(run("front", "runs/tiny", "-f", "json", "--at-least", f"text={best!r}")[1])[0]
    assert (reached["text"], reached["picked"]) == (best, f"knee, at least text={best:g}")
    code, _, err = run("front", "runs/tiny", "--at-least", "pick=1.1")
    assert code == 2 and "the best pick is " in err and "lower --at-least" in err
    code, _, err = run("front", "runs/tiny", "--prefer", "pik=1,text=x", "--knee")
    assert code == 2 and "no objective 'pik'" in err and "'text=x' is no NAME=NUMBER" in err
    assert run("front", "runs/tiny", "--prefer", "pick=1", "--knee")[0] == 2

    code, out, err = run("propose", "runs/tiny", "--prefer", "pick=0.7,text=0.3", "--inline", "-f", "json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["objective"] for row in rows] == ["pick", "text"]
    assert [row["preference"] for row in rows] == [0.7, 0.3]
    made = Study.load(URL, "tiny").candidate(rows[0]["candidate"])
    assert made.number == 14 and made.state == "done" and made.attrs["source"] == "preferred pick=0.7 text=0.3"
    assert made.values == (rows[0]["measured"], rows[1]["measured"])
    assert all(row["low.predicted"] <= row["predicted"] <= row["high.predicted"] for row in rows)
    code, _, err = run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=16")
    assert code == 0 and len(Study.load(URL, "tiny").candidates()) == 16, err  # the study goes on after it


def test_an_equal_recipe_is_proposed_once(work: Path, run: Run) -> None:
    edit_study(lambda d: d["space"]["genes"].update(weight={"choices": [0.5, 0.75], "per_expert": False}))
    edit_study(lambda d: d.update(known_recipes=False))
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    code, out, err = run("propose", "runs/tiny", "--prefer", "pick=1", "--inline", "-f", "json")
    assert code == 0 and "has this recipe already" in err, err
    assert json.loads(out)[0]["candidate"] < 14 and len(Study.load(URL, "tiny").candidates()) == 14


def test_a_proposal_needs_results_to_learn_from(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=3")[0] == 0
    code, _, err = run("propose", "runs/tiny", "--prefer", "pick=1", "--inline")
    assert code == 2 and "fewer than its" in err and "continue the search" in err


def test_constraints_that_nothing_meets_are_said_with_the_nearest(work: Path, run: Run) -> None:
    edit_study(lambda d: d.update(constraints=["text <= 1.0"]))
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=12")[0] == 0
    code, out, err = run("front", "runs/tiny", "-f", "json")
    assert code == 0 and "no candidate of" in err and "comes nearest: text is " in err, err
    assert len(json.loads(out)) == 1 and json.loads(out)[0]["membership"] == 0
    assert "short of `text <= 1.0`" in json.loads(run("status", "runs/tiny", "-f", "json")[1])["verdict"]
    code, _, err = run("export", "runs/tiny", "out", "--inline")
    assert code == 2 and "comes nearest" in err and not Path("out").exists()
    assert {row["state"] for row in json.loads(run("front", "runs/tiny", "--all", "-f", "json")[1])} == {"infeasible"}


def test_the_final_selection_scores_the_validation_split_in_rounds(
    work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge import rounds

    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    monkeypatch.setattr(rounds, "FEWEST", 1)  # this split has 10 items and 5 documents
    code, _, err = run("export", "runs/tiny", "best", "--no-weights", "--inline")
    assert code == 0 and "of them were scored in the rounds on validation" in err, err
    study = Study.load(URL, "tiny")
    held = {name: [n for n in range(14) if study.scores(n, name)] for name in rounds.NAMES}
    first, half, whole = (held[name] for name in rounds.NAMES)
    assert len(first) >= len(half) >= len(whole) >= 1
    found = {name: study.scores(whole[0], name) for name in rounds.NAMES}
    sizes = [[len(scores[o].items) for o in ("pick", "text")] for scores in found.values() if scores]
    assert sizes == [[2, 1], [5, 2], [10, 5]]
    Path("r.yaml").write_text(study.candidate(whole[0]).recipe.to_yaml())
    plain = json.loads(run("eval", "r.yaml", "study.yaml", "--split", "validation", "-f", "json")[1])
    for row in plain:
        scores = found[rounds.WHOLE]
        assert scores is not None and scores[row["objective"]].value == pytest.approx(row["value"], rel=1e-5)
    status = json.loads(run("status", "runs/tiny", "-f", "json")[1])
    assert "the best on validation" in status["winner"] and "in the rounds" in status["winner"]
    again = run("front", "runs/tiny", "--split", "test", "--inline")[2]
    winner = next(line for line in err.splitlines() if ": the winner" in line)
    assert winner in again and status["winner"].startswith("#" + winner.split()[1].rstrip(":"))


@pytest.mark.parametrize("fidelity", ["off", "{rungs: [0.5, 1]}"])
def test_scores_that_do_not_repeat_are_reported_with_their_spread(work: Path, run: Run, fidelity: str) -> None:
    Path("dice.py").write_text("import random\n\ndef throw(m, t, items): return [random.randrange(6) for _ in items]\n")
    files = {s: f"items.{s}.jsonl" for s in ("search", "validation", "test")}
    dice = {"name": "dice", "kind": "python", "file": "dice.py", "function": "throw", "items": files}
    edit_study(lambda d: d["objectives"].append(dice))
    code, _, err = run(
        "search",
        "study.yaml",
        "--inline",
        "--allow-task-code",
        "-o",
        "budget.evaluations=2",
        "-o",
        f"fidelity={fidelity}",
    )
    assert code == 0, err
    said = [line for line in err.splitlines() if "not deterministic" in line]
    assert len(said) == 1 and "objective dice is not deterministic: two scores of one model differ by" in said[0]
    status = json.loads(run("status", "runs/tiny", "-f", "json")[1])
    found = {k: v for k, v in status.items() if k.startswith("not deterministic")}
    assert list(found) == ["not deterministic: dice"]
    spread = Study.load(URL, "tiny").candidates()[0].attrs["spreads"]["dice"]
    assert 1 <= spread["item"] <= 5 and spread["value"] <= spread["item"]


def test_changed_weights_are_never_scored_into_an_old_study(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=2")[0] == 0
    edit_tensors("red/model.safetensors", lambda t: t["model.norm.weight"].mul_(2))
    code, _, err = run("front", "runs/tiny", "--split", "test", "--inline")
    assert code == 3 and "has changed" in err
    code, _, err = run("search", "study.yaml", "--inline")
    assert code == 4 and "weights" in err


def test_another_study_under_the_same_name_is_a_conflict(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=2")[0] == 0
    before = study_rows(Study.load(URL, "tiny"))
    for override in ("seed=9", "space.genes.weight.high=0.9", "optimizer=tpe", "experts={red: red}"):
        for command in ("check", "search"):
            code, _, err = run(command, "study.yaml", "-o", override)
            assert code == 4 and "now" in err, err
    assert run("search", "study.yaml", "--resume", "never")[0] == 4
    assert run("search", "study.yaml", "-o", "name=other", "--resume", "must")[0] == 4
    assert study_rows(Study.load(URL, "tiny")) == before


def test_the_budget_and_workers_may_change(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=2")[0] == 0
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=4", "-o", "workers=3")[0] == 0
    assert len(Study.load(URL, "tiny").candidates()) == 4
    started = time.monotonic()
    assert run("search", "study.yaml", "-q", "-o", "budget={hours: 0.0001}")[0] == 0
    assert time.monotonic() - started < 60


def test_infeasible_candidates_are_recorded_and_the_search_goes_on(work: Path, run: Run) -> None:
    edit_study(lambda d: d["space"]["genes"]["weight"].update(low=-2.0, high=2.0))
    edit_tensors("blue/model.safetensors", lambda t: t["model.norm.weight"].fill_(3e38))
    code, _, err = run("search", "study.yaml", "--inline")
    assert code == 0, err
    failed = [c for c in Study.load(URL, "tiny").candidates() if c.state == "failed"]
    assert failed and {c.reason for c in failed} <= {"weights", "logits"}
    assert len(Study.load(URL, "tiny").candidates()) == 14
    _, out, _ = run("status", "runs/tiny", "-f", "json")
    assert any(k.startswith("failed: ") for k in json.loads(out))


def test_nothing_but_failures_ends_the_search(work: Path, run: Run) -> None:
    for name in ("red", "green", "blue"):
        edit_tensors(f"{name}/model.safetensors", lambda t: t["model.norm.weight"].fill_(3e38))
    edit_study(lambda d: d.update(known_recipes=False))
    edit_study(lambda d: d["space"]["genes"]["weight"].update(low=1.0))
    code, _, err = run("search", "study.yaml", "--inline", "-q")
    assert code == 5 and "all failed" in err


@pytest.mark.parametrize("how", [["--inline"], ["-o", "workers={local: 3, threads: 1}"]])
def test_equal_recipes_are_scored_once(work: Path, run: Run, how: list[str]) -> None:
    edit_study(lambda d: d["space"]["genes"].update(weight={"choices": [0.5, 0.75], "per_expert": False}))
    code, _, err = run("search", "study.yaml", *how)
    assert code == 0, err
    candidates = Study.load(URL, "tiny").candidates()
    twins = [c for c in candidates if "same_as" in c.attrs]
    assert len({c.fingerprint for c in candidates}) == 14 - len(twins)
    assert twins, err
    for c in twins:
        assert c.values == candidates[c.attrs["same_as"]].values


def test_eval_scores_recipes_and_checkpoints_alike(work: Path, run: Run) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "compat": "paper", "seed": 0,
              "models": [{"model": "red", "parameters": {"weight": 0.5}}]}  # fmt: skip
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    code, first, err = run("eval", "r.yaml", "study.yaml", "-f", "json")
    assert code == 0, err
    assert run("merge", "r.yaml", "merged")[0] == 0
    assert run("eval", "merged", "study.yaml", "-f", "json")[1] == first
    code, out, _ = run("eval", "r.yaml", "study.yaml", "--split", "validation", "-f", "csv")
    assert code == 0 and "validation" in out


def test_a_genome_file_is_searched(work: Path, run: Run) -> None:
    text = "genome: {models: [red, green], merge_method: ties, base_model: base, layer_granularity: 1, smooth: true}\n"
    Path("genome.yml").write_text(text + "tasks: [arc_easy]\napply_chat_template: false\n")
    code, _, err = run(
        "search", "genome.yml", "--inline", "-o", "budget.evaluations=12",
        "-o", "objectives=[{name: pick, kind: lm_eval, file: pick.yaml}]", "-o", "workers={local: 1, threads: 1}",
    )  # fmt: skip
    assert code == 0, err
    assert "note: genome.smooth" in err
    candidate = Study.load("sqlite:///runs/genome/ledger.db", "genome").candidates()[-1]
    assert candidate.recipe.method == "ties" and len(candidate.params or {}) == 8


@pytest.mark.parametrize(
    ("genome", "dims"),
    [
        ("{models: [base, red, green], merge_method: linear}", 3),
        ("{models: [base, red], base_model: base, merge_method: slerp, layer_granularity: 1}", 2),
        ("{models: [red, Blue2.5], base_model: base, merge_method: dare_ties, filters: [mlp]}", 8),
        ("{models: [red], base_model: base, merge_method: task_arithmetic, allow_negative_weights: true}", 1),
    ],
)
def test_every_kind_of_genome_file_is_searched(work: Path, run: Run, genome: str, dims: int) -> None:
    shutil.copytree("blue", "Blue2.5")
    Path("genome.yml").write_text(f"genome: {genome}\ntasks: [{{name: pick, weight: 2.0}}, {{name: text}}]\n")
    study = yaml.safe_load(Path("study.yaml").read_text())
    Path("pick_.yaml").write_text(yaml.safe_dump({**study["objectives"][0], "name": "pick"}))
    Path("text_.yaml").write_text(yaml.safe_dump({**study["objectives"][1], "name": "text"}))
    overrides = ["objectives=[pick_.yaml, text_.yaml]", "budget.evaluations=14", "workers={local: 1, threads: 1}"]
    code, _, err = run("search", "genome.yml", "--inline", *[x for o in overrides for x in ("-o", o)])
    assert code == 0, err
    record = Study.load("sqlite:///runs/genome/ledger.db", "genome")
    assert len(record.candidates()[-1].params or {}) == dims
    assert record.header.identity["optimizer"] == {"name": "cma_es", "weights": {"pick": 2.0, "text": 1.0}}


def test_a_database_never_lets_task_code_run(work: Path, run: Run) -> None:
    Path("mine.py").write_text("open('ran', 'a').write('x')\ndef text(doc): return doc['prompt']\n")
    text = Path("pick.yaml").read_text()
    Path("pick.yaml").write_text(text.replace("doc_to_text: prompt", "doc_to_text: !function mine.text"))
    assert run("search", "study.yaml", "--inline", "-q")[0] == 2
    assert not Path("ran").exists()
    assert run("search", "study.yaml", "--inline", "-q", "--allow-task-code")[0] == 0
    Path("ran").unlink()
    for command in (["front", "runs/tiny", "--split", "test"], ["export", "runs/tiny", "out"]):
        code, _, err = run(*command, "--inline")
        assert code == 2 and "--allow-task-code" in err
        assert not Path("ran").exists()
    assert run("front", "runs/tiny", "--split", "test", "--inline", "--allow-task-code")[0] == 0


def test_the_command_that_continues_can_be_pasted(work: Path, run: Run) -> None:
    import shlex

    from evomerge.commands import _resume_command

    overrides = ("workers={local: 1, threads: 1}", "storage=postgresql://me:s3cret@host/db")
    text = _resume_command("my study.yaml", overrides, inline=True, allow_task_code=True)
    assert "s3cret" not in text
    assert shlex.split(text)[2:5] == ["my study.yaml", "-o", overrides[0]]
    assert text.endswith("--inline --allow-task-code")


def test_eval_scores_in_the_dtype_that_merge_writes(work: Path, run: Run) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "compat": "paper", "seed": 0,
              "dtype": "bfloat16", "models": [{"model": "red", "parameters": {"weight": 0.5}}]}  # fmt: skip
    for compat in ("paper", None):
        Path("r.yaml").write_text(
            yaml.safe_dump({k: v for k, v in (recipe | {"compat": compat}).items() if v is not None})
        )
        assert run("merge", "r.yaml", f"merged-{compat}")[0] == 0
        code, first, err = run("eval", "r.yaml", "study.yaml", "-f", "json")
        assert code == 0, err
        assert run("eval", f"merged-{compat}", "study.yaml", "-f", "json")[1] == first


def test_a_config_that_lies_about_the_dtype_changes_no_score(work: Path, run: Run) -> None:
    for name in ("base", "red", "green", "blue"):
        config = json.loads(Path(name, "config.json").read_text())
        Path(name, "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert run("search", "study.yaml", "--inline", "-q")[0] == 0
    assert run("export", "runs/tiny", "out", "--candidate", "12", "--inline")[0] == 0
    _, out, _ = run("eval", "out", "study.yaml", "-f", "json")
    stored = Study.load(URL, "tiny").candidate(12).values
    assert stored is not None and [r["value"] for r in json.loads(out)] == list(stored)


def test_a_changed_tokenizer_is_another_study(work: Path, run: Run) -> None:
    assert run("search", "study.yaml", "--inline", "-q", "-o", "budget.evaluations=2")[0] == 0
    for name in ("base", "red", "green", "blue"):
        path = Path(name, "tokenizer.json")
        data = json.loads(path.read_text())
        data["model"]["vocab"]["a"], data["model"]["vocab"]["b"] = (
            data["model"]["vocab"]["b"],
            data["model"]["vocab"]["a"],
        )
        path.write_text(json.dumps(data))
    assert run("search", "study.yaml", "--inline", "-q")[0] == 4


@pytest.mark.parametrize("device", ["tpu", "foo", "cuda:99"])
def test_merge_on_a_device_that_is_not_there(work: Path, run: Run, device: str) -> None:
    Path("r.yaml").write_text("merge_method: linear\nmodels: [{model: red, parameters: {weight: 1.0}}]\n")
    assert run("merge", "r.yaml", "out", "--device", device)[0] == 2
    assert not Path("out").exists()


def test_ls_lists_what_a_study_can_name(run: Run) -> None:
    _, out, _ = run("ls", "-f", "json")
    rows = json.loads(out)
    named = {(r["kind"], r["name"]) for r in rows}
    assert {("method", "ties"), ("optimizer", "map"), ("objective", "lm_eval"), ("space", "task_arithmetic")} <= named
    assert all(r["summary"] for r in rows), [r for r in rows if not r["summary"]]
    assert run("ls", "methods")[0] == 0
    assert run("ls", "models")[0] == 2


def test_cp_copies_and_never_overwrites(work: Path, run: Run) -> None:
    assert run("cp", "task_arithmetic", "mine.yaml")[0] == 0
    assert "method: task_arithmetic" in Path("mine.yaml").read_text()
    assert run("cp", "task_arithmetic", "mine.yaml")[0] == 2
    assert run("cp", "no_such", "x.yaml")[0] == 2


def test_usage_errors_exit_with_2(run: Run) -> None:
    for args in (["search"], ["serach", "x"], ["front", "x", "--split", "train"], ["search", "x", "--resume", "no"]):
        code, out, err = run(*args)
        assert code == 2 and out == "" and err, args
    assert run("search", "no-such.yaml")[0] == 2
    assert run("status", "no-such.yaml")[0] == 2


def test_every_help_ends_in_runnable_examples(run: Run) -> None:
    names = sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)
    assert names == sorted(["check", "search", "status", "front", "propose", "eval", "merge", "export", "ls", "cp"])
    for name in (None, *names):
        _, out, _ = run(*([name] if name else []), "--help")
        examples = out.rstrip().splitlines()
        assert "Examples:" in out
        assert examples[-1].strip().startswith("evomerge ") or examples[-2].strip().startswith("evomerge "), out


def test_help_and_import_do_not_import_torch() -> None:
    script = "import sys, time\nimport evomerge\nfrom evomerge.cli import main\n"
    script += "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch is imported'\n"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT)
    assert time.monotonic() - started < 3, "the help takes seconds"


def test_the_package_gives_its_public_names() -> None:
    import evomerge

    for name in evomerge.__all__:
        assert getattr(evomerge, name) is not None
    with pytest.raises(AttributeError):
        _ = evomerge.nothing


def test_tables_show_control_characters_of_a_database_and_do_not_send_them(capsys: pytest.CaptureFixture[str]) -> None:
    emit([{"label": "a\x1b[2Jb", "x\x07": 1}], Format.table)
    emit_one({"failed: \x1b]0;title": 2}, Format.table)
    shown = capsys.readouterr().out
    assert "a\\x1b[2Jb" in shown and all(c.isprintable() for c in shown.replace("\n", ""))
