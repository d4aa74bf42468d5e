"""The main job on the demo zoo, small: search, export, and the export scored again by everybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from evomerge.intervals import interval
from evomerge.model import LiveModel
from evomerge.objectives.lm_eval import LmEvalObjective
from evomerge.rescore import study_config
from evomerge.study import Study
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the project's, with a small search of the demo zoo and its winner exported."""
    place = tmp_path_factory.mktemp("demo")
    for name in ("zoo", "objectives", "search_spaces"):
        (place / name).symlink_to(ROOT / name)
    for args in (
        ["search", "zoo/demo.yaml", "-o", "budget.evaluations=14", "-q"],
        ["export", "runs/demo", "best"],
    ):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "evomerge", *args], cwd=place, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def winner(exported: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exported candidate's number; the working directory is the study's."""
    monkeypatch.chdir(exported)
    card = Path("best/README.md").read_text()
    return int(card.split("# demo, candidate ")[1].split()[0])


@pytest.mark.parametrize("split", ["search", "validation", "test"])
def test_the_exported_winner_scores_what_is_stored(winner: int, split: str) -> None:
    study = Study.load("sqlite:///runs/demo/ledger.db", "demo")
    stored = study.scores(winner, split)
    assert stored is not None
    live = LiveModel("best")  # loaded by plain transformers
    for spec in study_config(study).objectives:
        scores = LmEvalObjective(spec).score(live, split)
        assert np.array_equal(scores.items, stored[spec.name].items), (spec.name, split)
        assert (scores.value, scores.stderr) == (stored[spec.name].value, stored[spec.name].stderr)


@pytest.mark.parametrize("name", ["math", "cipher", "latin", "cross"])
def test_lm_eval_itself_decides_the_same_item_by_item(winner: int, name: str) -> None:
    """simple path through lm-eval: the exported folder by name, its own evaluator, its own batches."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    study = Study.load("sqlite:///runs/demo/ledger.db", "demo")
    spec = next(s for s in study_config(study).objectives if s.name == name)
    path = Path(spec.folder, spec.options["file"])
    config = yaml.safe_load(path.read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"] = {"data_files": {k: str((path.parent / v).resolve()) for k, v in files.items()}}
    task = TaskManager(include_defaults=False).load([{**config, "test_split": "search"}])
    model = HFLM(pretrained="best", device="cpu", dtype="float32", batch_size=7)
    samples = evaluator.evaluate(model, task, bootstrap_iters=0)["samples"][config["task"]]
    samples.sort(key=lambda s: s["doc_id"])
    metric = spec.options["metric"]
    stored = study.scores(winner, "search")
    assert stored is not None
    assert [s[metric] for s in samples] == stored[name].items.tolist()
    objective = LmEvalObjective(spec)
    live = LiveModel("best")
    part = objective._part("search", None, live)
    assert part.compiled is not None
    part.answer(live)
    ready = part.split
    theirs = [r[0] for s in samples for r in s["resps"]]
    ours = [i.resps[0] for i in ready.instances]
    if config["output_type"] == "generate_until":
        assert ours == theirs
    else:
        assert np.allclose([a[0] for a in ours], [b[0] for b in theirs], rtol=1e-4, atol=1e-5)


def test_a_second_merge_of_the_recipe_gives_identical_bytes(winner: int) -> None:
    subprocess.run(
        [sys.executable, "-m", "evomerge", "merge", "best/recipe.yaml", "again"], check=True, capture_output=True
    )
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("again", file).read_bytes() == Path("best", file).read_bytes()


def test_the_card_says_every_score_with_its_interval(winner: int) -> None:
    study = Study.load("sqlite:///runs/demo/ledger.db", "demo")
    card = Path("best/README.md").read_text()
    for split in ("search", "validation", "test"):
        stored = study.scores(winner, split)
        assert stored is not None
        for score in stored.values():
            assert str(interval(score)) in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model_relation"] == "merge" and "zoo/models/base" in head["base_model"]
    assert json.loads(Path("best/config.json").read_text())["dtype"] == "float32"
