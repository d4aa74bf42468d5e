"""Compiled objectives give lm-eval's answers, request by request, or leave them to lm-eval and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import CandidateFailure
from evomerge.model import LiveModel
from evomerge.objectives import ObjectiveSpec, make_objective
from evomerge.objectives._compiled import answer_by_lm_eval
from evomerge.objectives.lm_eval import LmEvalObjective
from tests.conftest import ROOT

MEAN = "aggregation: mean, higher_is_better: true"


def task(name: str, kind: str, metric: str, **keys: Any) -> LmEvalObjective:
    """A task over the family's items, scored with this metric."""
    lines = [f"task: tiny_{name}", f"output_type: {kind}", "dataset_path: json", "test_split: search"]
    files = {s: f"items.{s}.jsonl" for s in ("search", "validation", "test")}
    lines.append(f"dataset_kwargs: {json.dumps({'data_files': files})}")
    given = {"doc_to_text": "prompt", "doc_to_target": "answer", "target_delimiter": "", **keys}
    if kind == "multiple_choice":
        given = {**given, "doc_to_choice": "choices", "doc_to_target": "gold"}
    lines += [f"{key}: {json.dumps(value)}" for key, value in given.items()]
    rest = "aggregation: weighted_perplexity, higher_is_better: false" if metric == "word_perplexity" else MEAN
    lines.append(f"metric_list: [{{metric: {metric}, {rest}}}]")
    Path(f"{name}.yaml").write_text("\n".join(lines) + "\n")
    made = make_objective(ObjectiveSpec(name, "lm_eval", {"file": f"{name}.yaml", "metric": metric}))
    assert isinstance(made, LmEvalObjective)
    return made


def answers(made: LmEvalObjective, live: LiveModel) -> tuple[list[Any], list[Any]]:
    """Every request's answer, compiled and by lm-eval's own loop."""
    part = made._part("search", None, live)
    part.answer(live)
    ours = [i.resps[0] for i in part.split.instances]
    for instance in part.split.instances:
        instance.resps = []
    answer_by_lm_eval(live, part.split.instances, 3)
    return ours, [i.resps[0] for i in part.split.instances]


def uneven(**keys: Any) -> None:
    """Items whose choices differ in length and beginning, some with non-ASCII letters."""
    for split, start in (("search", 0), ("validation", 30), ("test", 60)):
        rows = [
            {
                "prompt": f"item {i} of the long list is",
                "answer": f" {i % 7} and more",
                "choices": [f" {i % 7}", f" {i % 7} but longer", " été", " x" * (i % 3 + 1)],
                "gold": i % 4,
                **keys,
            }
            for i in range(start, start + 16)
        ]
        Path(f"items.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes", "exact_match"])
def test_multiple_choice(work: Path, metric: str) -> None:
    uneven()
    live, made = LiveModel("red"), task("pick", "multiple_choice", metric)
    scores = made.score(live, "search")
    part = made._part("search", None, live)
    assert part.compiled is not None
    assert (part.vector is not None and part.proved) == (metric != "exact_match")
    ours, theirs = answers(made, live)
    assert np.allclose([a[0] for a in ours], [b[0] for b in theirs], rtol=1e-5)
    assert [a[1] for a in ours] == [b[1] for b in theirs]
    assert scores.items.tolist() == made._items(part.split)  # from lm-eval's own answers
    assert not live.notes


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("loglikelihood", "acc"), ("loglikelihood", "perplexity"), ("loglikelihood_rolling", "word_perplexity")],
)
def test_likelihoods(work: Path, kind: str, metric: str) -> None:
    if kind == "loglikelihood_rolling":
        uneven(prompt="", answer=" one two three " * 30)  # several windows
    else:
        uneven()
    live, made = LiveModel("red"), task("say", kind, metric)
    made.score(live, "search")
    ours, theirs = answers(made, live)
    first = (lambda a: a[0]) if kind == "loglikelihood" else (lambda a: a)
    assert np.allclose([first(a) for a in ours], [first(b) for b in theirs], rtol=1e-5)
    assert len(theirs) == 16


@pytest.mark.parametrize("until", [["\n"], ["e"], [" a", "t", "."], ["é", "q"], []])
def test_generation(work: Path, until: list[str]) -> None:
    uneven()
    live = LiveModel("red")
    made = task("write", "generate_until", "exact_match", generation_kwargs={"until": until, "max_gen_toks": 9})
    made.score(live, "search")
    assert made._part("search", None, live).compiled is not None
    ours, theirs = answers(made, live)
    assert ours == theirs and any(ours)


@pytest.mark.parametrize("kwargs", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 2}, {"min_new_tokens": 3}])
def test_what_is_not_greedy_is_left_to_lm_eval(work: Path, kwargs: dict[str, Any]) -> None:
    live = LiveModel("red")
    made = task(
        "write", "generate_until", "exact_match", generation_kwargs={"until": ["\n"], "max_gen_toks": 3, **kwargs}
    )
    scores = made.score(live, "search")
    assert len(scores.items) == 12
    assert made._part("search", None, live).compiled is None
    (note,) = live.notes
    assert "write" in note and next(k for k in kwargs if k != "temperature") in note


def test_a_generation_config_with_penalties_is_left_to_lm_eval(work: Path) -> None:
    live = LiveModel("red")
    live.model.generation_config.repetition_penalty = 1.3
    made = task("write", "generate_until", "exact_match", generation_kwargs={"until": ["\n"], "max_gen_toks": 3})
    made.score(live, "search")
    assert any("repetition_penalty" in note for note in live.notes)


@pytest.mark.parametrize("until", [[""], ["", "e"]])
def test_an_empty_stop_string_is_left_to_lm_eval(work: Path, until: list[str]) -> None:
    live = LiveModel("red")
    made = task("write", "generate_until", "exact_match", generation_kwargs={"until": until, "max_gen_toks": 3})
    made.score(live, "search")
    assert any("stop strings" in note for note in live.notes)


def test_a_generation_config_that_sets_the_length_is_left_to_lm_eval(work: Path) -> None:
    live = LiveModel("red")
    live.model.generation_config.max_new_tokens = 2
    made = task("write", "generate_until", "exact_match", generation_kwargs={"until": ["\n"], "max_gen_toks": 9})
    made.score(live, "search")
    assert any("max_new_tokens" in note for note in live.notes)


def test_generation_arguments_that_run_code_are_refused(work: Path) -> None:
    Path("custom").mkdir()
    made = task(
        "write", "generate_until", "exact_match", generation_kwargs={"until": ["x"], "custom_generate": "custom"}
    )
    problems = made.check()
    assert any("custom_generate" in str(p) and "not plain data" in str(p) for p in problems), problems


def test_an_empty_choice_is_found_by_check_and_named(work: Path) -> None:
    from evomerge.model import Outline

    uneven()
    rows = [json.loads(line) for line in Path("items.search.jsonl").read_text().splitlines()]
    rows[5]["choices"][1] = ""
    Path("items.search.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    problems, _ = task("pick", "multiple_choice", "acc").fit(Outline("base"))
    assert len(problems) == 1 and "document 5" in str(problems[0]) and "search split" in str(problems[0])


def test_an_empty_last_text_scores_zero(work: Path) -> None:
    uneven(prompt="", answer=" one two")
    rows = [json.loads(line) for line in Path("items.search.jsonl").read_text().splitlines()]
    rows[-1]["answer"] = ""
    Path("items.search.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    live, made = LiveModel("red"), task("say", "loglikelihood_rolling", "word_perplexity")
    part = made._part("search", None, live)
    part.answer(live)
    assert [i.resps for i in part.split.instances][-1] == [0.0]


def test_items_longer_than_the_context_are_named(work: Path) -> None:
    uneven(prompt="word " * 150)
    live, made = LiveModel("red"), task("pick", "multiple_choice", "acc")
    made.score(live, "search")
    (note,) = live.notes
    assert "16 items" in note and "128 tokens" in note and "documents 0, 1, 2" in note
    ours, theirs = answers(made, live)
    assert np.allclose([a[0] for a in ours], [b[0] for b in theirs], rtol=1e-5)


def test_what_can_never_fit_is_a_clear_failure(work: Path) -> None:
    live = LiveModel("red")
    uneven(choices=["word " * 150, "b"], gold=0)
    with pytest.raises(CandidateFailure, match=r"continuation has .* tokens, but the model's context 128"):
        task("pick", "multiple_choice", "acc").score(live, "search")
    made = task("write", "generate_until", "exact_match", generation_kwargs={"until": ["\n"], "max_gen_toks": 200})
    with pytest.raises(CandidateFailure, match="max_gen_toks is 200"):
        made.score(live, "search")


def test_a_vectorised_metric_that_differs_is_dropped(work: Path) -> None:
    """The guard at work: a wrong form of the metric is noticed on the first model and never used."""
    uneven()
    live, made = LiveModel("red"), task("pick", "multiple_choice", "acc")
    right = made.score(live, "search").items
    made._parts.clear()
    part = made._part("search", None, live)
    vector = part.vector
    assert vector is not None
    part.vector = lambda found: 1.0 - vector(found)
    assert made.score(live, "search").items.tolist() == right.tolist()
    assert part.vector is None


def test_bits_repeat_for_every_size_of_batch(work: Path) -> None:
    uneven()
    live, made = LiveModel("red"), task("say", "loglikelihood", "perplexity")
    for size in (64, 200, 4096):
        live.batch_tokens = size
        first = made.score(live, "search").items
        made.score(live, "search", range(0, 16, 3))
        assert np.array_equal(made.score(live, "search").items, first)
        fresh = task("say", "loglikelihood", "perplexity")
        other = LiveModel("red")
        other.batch_tokens = size
        assert np.array_equal(fresh.score(other, "search").items, first)


@pytest.mark.parametrize("name", ["math", "cipher", "latin", "cross"])
def test_the_zoos_tasks(name: str) -> None:
    """Trained models and real decisions: what lm-eval's own loop answers, one request in a batch."""
    live = LiveModel(str(ROOT / "zoo/models/base"))
    files = {"math": "acc", "cipher": "acc", "latin": "acc", "cross": "exact_match"}
    options = {"file": str(ROOT / f"zoo/tasks/{name}.yaml"), "metric": files[name], "limit": 60}
    made = make_objective(ObjectiveSpec(name, "lm_eval", options))
    assert isinstance(made, LmEvalObjective)
    items = made.score(live, "search").items.tolist()
    ours, theirs = answers(made, live)
    if name == "cross":
        assert ours == theirs
    else:
        assert np.allclose([a[0] for a in ours], [b[0] for b in theirs], rtol=1e-4, atol=1e-5)
    assert items == made._items(made._part("search", None, live).split)


def test_check_finds_what_cannot_be_fed_before_any_work(work: Path, evomerge: Any) -> None:
    task("write", "generate_until", "exact_match", generation_kwargs={"until": ["\n"], "max_gen_toks": 200})
    task("beams", "generate_until", "exact_match", generation_kwargs={"max_gen_toks": 3, "num_beams": 2})
    text = Path("study.yaml").read_text()
    entry = "  - {{name: {0}, kind: lm_eval, file: {0}.yaml, metric: exact_match}}\n"
    Path("study.yaml").write_text(text.replace("objectives:\n", "objectives:\n" + entry.format("write")))
    done = evomerge("check", "study.yaml")
    assert done.returncode == 2 and "max_gen_toks is 200" in done.stderr and "search split" in done.stderr
    Path("study.yaml").write_text(text.replace("objectives:\n", "objectives:\n" + entry.format("beams")))
    done = evomerge("check", "study.yaml")
    assert done.returncode == 0 and "answered by lm-eval itself" in done.stderr and "num_beams" in done.stderr


def test_the_size_of_batches_is_the_studys(work: Path, evomerge: Any) -> None:
    """Recorded with each candidate, lowered where memory runs out, and used again by every later job."""
    from evomerge.rescore import study_config
    from evomerge.study import Study
    from evomerge.worker import Job, Worker, WorkerSpec

    assert evomerge("search", "study.yaml", "--inline", "-o", "budget.evaluations=3").returncode == 0
    study = Study.load("sqlite:///runs/tiny/ledger.db", "tiny")
    assert {c.attrs["batch_tokens"] for c in study.candidates()} == {LiveModel("base").batch_tokens}
    config = study_config(study)
    worker = Worker(WorkerSpec("base", ("base", "red", "green", "blue"), config.objectives, threads=1))
    recipe = study.candidates()[1].recipe
    assert worker.evaluate(Job(1, recipe, batch_tokens=128)).batch_tokens == 128
    assert worker.live.batch_tokens == 128


def test_a_tokenizer_that_lacks_a_token(work: Path, evomerge: Any) -> None:
    """Both need a token that this tokenizer has lost: found by `check`, with what to do."""
    uneven(prompt="")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "!"}
    for name in ("base", "red", "green", "blue"):
        Path(name, "tokenizer_config.json").write_text(json.dumps(special))
    task("say", "loglikelihood", "acc")
    task("write", "generate_until", "exact_match", generation_kwargs={"until": ["x"], "max_gen_toks": 3})
    text = Path("study.yaml").read_text()
    rows = [f"  - {{name: {n}, kind: lm_eval, file: {n}.yaml, metric: {m}}}\n" for n, m in
            (("say", "acc"), ("write", "exact_match"))]  # fmt: skip
    Path("study.yaml").write_text(text.replace("objectives:\n", "objectives:\n" + "".join(rows)))
    done = evomerge("check", "study.yaml")
    assert done.returncode == 2, done.stderr
    assert "neither a beginning- nor an end-of-sequence token" in done.stderr
    assert "no end-of-sequence token, which lm-eval needs to generate" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_text_file_is_divided_by_content(work: Path) -> None:
    Path("all.txt").write_text("\n\n".join(f"Text number {i} says {i * i}." for i in range(60)))
    made = make_objective(ObjectiveSpec("text", "perplexity", {"file": "all.txt"}))
    assert made.check() == [] and made.splits == ("search", "validation", "test")
    sizes = [made.size(s) for s in made.splits]
    assert sum(sizes) == 60 and sizes[0] > sizes[1] > 0 and sizes[2] > 0
    live = LiveModel("red")
    assert len(made.score(live, "validation").items) == sizes[1]
    whole = Path("all.txt").read_text().split("\n\n")
    Path("all.txt").write_text("\n\n".join(reversed(whole)))
    again = make_objective(ObjectiveSpec("text", "perplexity", {"file": "all.txt"}))
    assert [again.size(s) for s in again.splits] == sizes


def test_text_that_the_tokenizer_does_not_know_is_said(tmp_path: Path) -> None:
    """The zoo's tokenizer knows some three hundred words."""
    from evomerge.model import Outline

    outline = Outline(str(ROOT / "zoo/models/base"))
    (tmp_path / "a.txt").write_text("Ganz andere Dinge werden hier gesagt.\n\nUnd hier auch.")
    made = make_objective(ObjectiveSpec("text", "perplexity", {"files": {"search": str(tmp_path / "a.txt")}}))
    problems, notes = made.fit(outline)  # type: ignore[attr-defined]
    assert not problems and len(notes) == 1 and "unknown to the tokenizer" in notes[0]
    known = {"file": str(ROOT / "zoo/tasks/math.yaml"), "metric": "acc"}
    assert make_objective(ObjectiveSpec("math", "lm_eval", known)).fit(outline) == ([], [])  # type: ignore[attr-defined]
