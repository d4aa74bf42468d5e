"""Searches of layer orders with a depth and rungs: what stops, what is stored, what a resume repeats."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.commands import status_of
from evomerge.config import parse_study
from evomerge.fidelity import RUNGS, count_at
from evomerge.limits import Terms
from evomerge.objectives import ObjectiveSpec, make_objective, whole_kind
from evomerge.picking import could_be_on_front
from evomerge.prepare import open_study, prepare
from evomerge.racing import Race
from evomerge.study import Study
from evomerge.worker import Job, Worker
from tests.conftest import EXPERTS, ROOT, study_rows
from tests.faults.test_kills import run_forked

URL = "sqlite:///runs/tiny/ledger.db"
LAYERS = 6
STUDY = """\
name: tiny
base: base
experts: {red: red, green: green}
space: {path: choices, frozen: [1, 1], longest: 1.5, passes: 2, scales: off}
objectives:
  - {name: depth, kind: size, count: layers}
  - {name: text, kind: perplexity, files: {search: many.txt, validation: few.txt, test: last.txt}}
optimizer: random
budget: {evaluations: 30}
workers: {local: 1, threads: 1}
seed: 3
"""


@pytest.fixture(scope="module")
def deep_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, red and green of six layers, and a text of 96 documents."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    tokenizer = ROOT / "tests" / "golden" / "e2e" / "models" / "base" / "tokenizer.json"
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "!"}
    for name in ("base", *EXPERTS[:2]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(len(name))
        for parameter in model.parameters():
            parameter.data *= 3.0  # layers that matter
            parameter.data += (0.0 if name == "base" else 0.3) * parameter.std() * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        shutil.copy(tokenizer, root / name / "tokenizer.json")
        (root / name / "tokenizer_config.json").write_text(json.dumps(special))
    rng = np.random.default_rng(0)
    documents = [f"Number {i} is {' '.join(map(str, rng.integers(0, 99, 8)))}." for i in range(112)]
    (root / "many.txt").write_text("\n\n".join(documents[:96]))
    (root / "few.txt").write_text("\n\n".join(documents[96:104]))
    (root / "last.txt").write_text("\n\n".join(documents[104:]))
    return root


@pytest.fixture
def deep(deep_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with that family and a study of its layer orders."""
    target = tmp_path / "work"
    shutil.copytree(deep_family, target)
    (target / "study.yaml").write_text(STUDY)
    monkeypatch.chdir(target)
    return target


def stops(study: Study) -> list[Any]:
    return [c for c in study.candidates() if c.state == "stopped"]


def record_of(study: Study) -> list[Any]:
    """All rows, and of each stopped candidate all that is stored of its items and estimates."""
    found: list[Any] = study_rows(study)
    for c in stops(study):
        scores, where = study.partial_scores(c.number)
        parts = {name: (s.value, s.stderr, s.items.tolist()) for name, s in scores.items()}
        found.append(
            (c.number, c.stopped, c.estimate_stderr, parts, {k: p.tolist() for k, p in where.positions.items()})
        )
    return found


def test_depth_and_rungs_go_together(deep: Path) -> None:
    """Deep and bad ones are beaten, shallow and hopeless ones stop, and depth is stored as it is."""
    assert run_forked(("budget.evaluations=24", "fidelity={keep: 0.98}")) == 0
    study = Study.load(URL, "tiny")
    candidates = study.candidates()
    assert study.header.rungs == list(RUNGS)
    assert study.header.terms == {"whole": {"depth": "exact"}, "keep": 0.98, "ends": {"text": [0.0, None]}}
    rules = {c.attrs["stop_rule"] for c in stops(study)}
    assert {"beaten", "hopeless"} <= rules
    full = Worker(prepare(parse_study(Path("study.yaml").read_text(), "study.yaml")).worker)
    for c in stops(study)[:6] + [c for c in stops(study) if c.attrs["stop_rule"] == "hopeless"]:
        scores, where = study.partial_scores(c.number)
        assert where.positions["depth"].tolist() == [0] and scores["depth"].stderr == 0.0
        assert len(where.positions["text"]) == len(scores["text"].items) == count_at(96, where.share)
        truth = full.evaluate(Job(c.number, c.recipe)).scores["search"]
        assert c.estimate is not None and c.estimate[0] == truth["depth"].value == scores["depth"].items[0]
        rival = candidates[where.beaten_by].values
        assert rival is not None
        if where.rule == "beaten":
            assert rival[0] <= c.estimate[0] and rival[1] < truth["text"].value
        if where.rule == "hopeless":
            before = [d.values for d in candidates[: c.number] if d.values is not None]
            assert truth["text"].value > min(v[1] for v in before) / 0.98
    shown = status_of(study)
    assert shown["stopped"] == len(stops(study)) and shown["best depth"].startswith(("4", "3", "2"))
    hopeless = sum(c.attrs["stop_rule"] == "hopeless" for c in stops(study))
    assert shown["hopeless"] == f"{hopeless} of those that were stopped" and "infeasible" not in shown


LIMITED = ("budget.evaluations=24", "constraints=[depth <= 7]", "fidelity={keep: 0.98}")


def test_too_deep_candidates_stop_before_any_forward_pass_and_a_resume_repeats_all(deep: Path) -> None:
    assert run_forked(LIMITED) == 0
    study = Study.load(URL, "tiny")
    expected = record_of(study)
    early = [c for c in stops(study) if c.attrs["share"] == 0.0]
    assert len(early) >= 3 and all(c.attrs["stop_rule"] == "infeasible" for c in early)
    known = [c for c in study.candidates() if c.state == "done"]
    for c in early:
        assert str(c.stopped) == "stopped before scoring, infeasible: depth misses its limit"
        scores, where = study.partial_scores(c.number)
        assert scores["depth"].value > 7 and len(scores["text"].items) == len(where.positions["text"]) == 0
        done = [d.values[1] for d in known if d.values and (d.arrival or 0) < (c.arrival or 0)]
        assert c.estimate == (scores["depth"].value, pytest.approx(np.mean(done))), "nothing is known of its text"
        assert c.estimate_stderr is not None and c.estimate_stderr[1] >= np.std(done) > 0
    rest = [c for c in study.candidates() if c not in early]
    assert all((c.values or c.estimate or (9.0,))[0] <= 7 for c in rest), "all that were scored meet the limit"
    hopeful = {c.number for c in could_be_on_front(study, study.candidates())}
    assert not hopeful & {c.number for c in early}
    os.rename("runs", "first")
    assert run_forked(LIMITED, fault="telling:12") != 0
    assert run_forked(LIMITED, fault="scoring:3") != 0
    assert run_forked(LIMITED) == 0
    assert record_of(Study.load(URL, "tiny")) == expected


def prepared_with(*overrides: str, text: str = STUDY) -> Any:
    return prepare(parse_study(text, "study.yaml", overrides))


def test_check_says_what_is_scored_whole(deep: Path) -> None:
    shown = prepared_with().summary
    assert shown["rungs"] == "1/8, 1/4, 1/2, 1"
    hope = "who keeps less than 1/2 of the best everywhere"
    assert shown["scored whole"] == "depth (exact)" and shown["hopeless"] == hope
    off = prepared_with("fidelity={keep: off}")
    assert off.summary["scored whole"] == "depth (exact)" and "hopeless" not in off.summary
    assert off.header.identity["keep"] == 0.0
    none = prepared_with("fidelity=off")
    assert "scored whole" not in none.summary and none.header.terms == {}
    timed = prepared_with(text=STUDY.replace("kind: size, count: layers", "kind: latency"))
    assert timed.summary["scored whole"] == "depth (measured)" and timed.summary["hopeless"] == hope
    assert timed.header.rungs == list(RUNGS)
    alone = "\n".join(line for line in STUDY.splitlines() if "perplexity" not in line)
    assert prepared_with(text=alone).summary["rungs"] == "off: no objective has items that could be scored in parts"


ZOO = """\
name: zoo
base: {root}/zoo/models/base
experts: {math: "{root}/zoo/models/math", latin: "{root}/zoo/models/latin"}
space: {path: choices, scales: off}
objectives:
  - {root}/objectives/zoo_math.yaml
  - {root}/objectives/zoo_latin.yaml
  - {root}/objectives/zoo_cipher.yaml
  - {name: depth, kind: size, count: layers}
budget: {evaluations: 30}
"""


def test_what_guessing_gives_is_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zoo_math and zoo_cipher have four choices; zoo_latin is a log-likelihood, where guessing gives nothing."""
    monkeypatch.chdir(tmp_path)
    text = ZOO.replace("{root}", str(ROOT))
    prepared = prepared_with(text=text)
    terms = json.loads(json.dumps(prepared.header.terms))
    assert terms["chance"] == {"math": 0.25, "cipher": 0.25} and terms["even"] == pytest.approx(1 / 3)
    assert terms["keep"] == 0.5 and terms["ends"] == {name: [0.0, 1.0] for name in ("math", "latin", "cipher")}
    assert Terms.of(terms).chance == terms["chance"]
    assert prepared.summary["hopeless"] == (
        "who keeps less than 1/2 of the best everywhere (or 1/3, while nobody keeps more of all), "
        "counted from what guessing gives: math 0.25, cipher 0.25"
    )
    asked = prepared_with("fidelity={keep: 0.4}", text=text).header.terms
    assert asked["keep"] == 0.4 and "even" not in asked, "a share that the file names is the share"
    assert "chance" not in prepared_with("fidelity={keep: off}", text=text).header.terms
    alone = text.replace("  - {name: depth, kind: size, count: layers}\n", "")
    assert prepared_with(text=alone).header.terms == {}, "the rule is off"
    assert prepared_with("fidelity={keep: 0.4}", text=alone).header.terms["whole"] == {}


def test_a_study_from_before_keeps_its_choice(deep: Path) -> None:
    """Such studies had no rungs beside a depth: opened again they have none."""
    prepared = prepared_with()
    old = {k: v for k, v in vars(prepared.header).items() if k != "terms"} | {"rungs": []}
    Study.create(URL, "tiny", type(prepared.header)(**old))
    study, existed = open_study(prepared)
    assert existed and study.header.rungs == [] and study.header.terms == {}


def test_latency_is_measured_once_beside_the_first_part(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = STUDY.replace("kind: size, count: layers", "kind: latency, new_tokens: 2, prompt_tokens: 4")
    prepared = prepared_with(text=text)
    worker = Worker(prepared.worker)
    calls: list[str] = []
    for objective in worker.objectives:
        score = objective.score

        def counted(*args: Any, own: Any = objective, run: Any = score) -> Any:
            calls.append(own.name)
            return run(*args)

        monkeypatch.setattr(objective, "score", counted)
    outcome = worker.evaluate(Job(0, prepared.known[0][1], race=Race(3, RUNGS), twice=True))
    assert calls == ["text", "depth", "text", "text", "text", "depth", "text"], "and once more each, to see the noise"
    assert len(outcome.scores["search"]["depth"].items) == 5 and outcome.stopped is None


def test_kinds_of_objectives_without_parts() -> None:
    def kind(**spec: Any) -> str:
        return whole_kind(make_objective(ObjectiveSpec("o", spec.pop("kind"), spec)))

    assert kind(kind="size") == "exact" and kind(kind="latency") == "measured"
    assert kind(kind="perplexity", files={"search": "a"}) == ""
