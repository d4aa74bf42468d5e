"""Objectives score what lm-eval scores, item by item, and say what is wrong with them before any model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import CandidateFailure, ConfigError, NonFinite
from evomerge.model import LiveModel
from evomerge.objectives import ObjectiveSpec, make_objective
from evomerge.objectives.lm_eval import LmEvalObjective


def objective(file: str, metric: str = "acc", **options: Any) -> LmEvalObjective:
    spec = ObjectiveSpec("it", "lm_eval", {"file": file, "metric": metric, "batch_size": 5, **options})
    made = make_objective(spec)
    assert isinstance(made, LmEvalObjective)
    return made


def by_lm_eval(live: LiveModel, file: str, split: str, metric: str) -> tuple[float, list[float]]:
    """The same through lm-eval's own evaluator and its own reading of the file."""
    import yaml
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = yaml.safe_load(Path(file).read_text()) | {"test_split": split}
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"] = {"data_files": {k: str(Path(v).resolve()) for k, v in files.items()}}
    tasks = TaskManager(include_defaults=False).load([config])
    model = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=3)
    results = evaluator.evaluate(model, tasks, bootstrap_iters=0, log_samples=True)
    name = config["task"]
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    return results["results"][name][f"{metric},none"], [s[metric] for s in samples]


@pytest.mark.parametrize(("file", "metric"), [("pick.yaml", "acc"), ("say.yaml", "acc"), ("write.yaml", "exact_match")])
@pytest.mark.parametrize("split", ["search", "test"])
def test_scores_equal_lm_evals_item_by_item(work: Path, file: str, metric: str, split: str) -> None:
    live = LiveModel("red")
    ours = objective(file, metric).score(live, split)
    theirs, items = by_lm_eval(live, file, split, metric)
    assert ours.items.tolist() == items
    assert ours.value == theirs
    assert ours.stderr == pytest.approx(np.std(items, ddof=1) / math.sqrt(len(items)))


def test_answers_that_are_right_count(work: Path) -> None:
    """A model that is told the answer by its own greedy choice gets it right: scores are not all zero."""
    live = LiveModel("red")
    objective_ = objective("write.yaml", "exact_match")
    ready = objective_._ready("search", live)
    from evomerge.objectives._compiled import answer_by_lm_eval

    answer_by_lm_eval(live, ready.instances, 5)
    said = [i.resps[0] for i in ready.instances]
    for (_, doc), text in zip(ready.docs, said, strict=True):
        doc["answer"] = text
    assert objective_.score(live, "search").value == 1.0


def test_scoring_twice_gives_the_same_bits(work: Path) -> None:
    live = LiveModel("red")
    for made in (objective("pick.yaml"), objective("write.yaml", "exact_match")):
        assert np.array_equal(made.score(live, "search").items, made.score(live, "search").items)


def test_splits_are_derived_by_content_and_share_nothing(work: Path) -> None:
    rows = [{"prompt": f"q {i}", "choices": ["a", "b"], "gold": i % 2} for i in range(60)]
    Path("all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, *rows[:20]]))
    text = Path("pick.yaml").read_text().split("dataset_kwargs")[0]
    Path("derived.yaml").write_text(
        text + "dataset_kwargs: {data_files: {only: all.jsonl}}\ntest_split: only\ndoc_to_text: prompt\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    made = objective("derived.yaml")
    assert made.check() == []
    assert made.splits == ("search", "validation", "test")
    parts = [set(made._ids(s, made._task(s))) for s in made.splits]
    assert sum(map(len, parts)) == 80
    texts = [{made._task("search").eval_docs[i]["prompt"] for i in p} for p in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert len(parts[0]) > len(parts[1]) > 0 < len(parts[2])


def test_a_limit_takes_the_first_items(work: Path) -> None:
    live = LiveModel("red")
    whole = objective("pick.yaml").score(live, "search").items
    assert np.array_equal(objective("pick.yaml", limit=5).score(live, "search").items, whole[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "bleurt"}, "no metric 'bleurt'"),
        ({"metric": "acc,strict"}, "no filter 'strict'"),
        ({"splits": {"search": "train"}}, "no split 'train'"),
        ({"splits": {"search": "search", "test": "search"}}, "share items"),
    ],
)
def test_problems_are_found_without_a_model(work: Path, options: dict[str, Any], message: str) -> None:
    found = objective("pick.yaml", **options).check()
    assert any(message in str(p) for p in found), found


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"limit": True}, {"batch_size": -1}, {"shots": 3}, {"splits": {"test": "test"}}],
)
def test_ill_typed_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        objective("pick.yaml", **options)


def test_missing_task_files_data_and_tasks_are_named(work: Path) -> None:
    assert "no task file" in str(objective("nowhere.yaml").check()[0])
    Path("items.test.jsonl").unlink()
    assert "items.test.jsonl" in str(objective("pick.yaml").check()[0])
    spec = ObjectiveSpec("it", "lm_eval", {"task": "no_such_task_anywhere"})
    assert "lm-eval has no task" in str(make_objective(spec).check()[0])


def test_an_installed_task_is_scored_by_its_name(work: Path) -> None:
    """arc_easy as lm-eval ships it; its data set is found under its hub name, here a local folder."""
    folder = Path("allenai/ai2_arc")
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n"
        + "".join(f"  - {{split: {s}, path: {s}.jsonl}}\n" for s in ("train", "validation", "test"))
        + "---\n"
    )
    for split in ("train", "validation", "test"):
        rows = [
            {
                "id": f"{split}{i}",
                "question": f"Is {i} odd, asks {split}?",
                "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
                "answerKey": "AB"[i % 2],
            }
            for i in range(6)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = {"task": "arc_easy", "metric": "acc_norm", "splits": {"search": "train", "test": "test"}}
    made = make_objective(ObjectiveSpec("arc", "lm_eval", options))
    assert made.check() == []
    assert made.splits == ("search", "test") and made.maximize
    scores = made.score(LiveModel("red"), "search")
    assert scores.items.shape == (6,) and 0 <= scores.value <= 1


CODE = {
    "function": "doc_to_text: !function evil.run\n",
    "class": "class: !function evil.Task\n",
    "python tag": "extra: !!python/object/apply:os.system ['touch canary']\n",
    "metric script": "metric_list: [{metric: ./evil}]\n",
    "template": "doc_to_text: \"{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}\"\n",
    "pickle": "dataset_path: pandas\n",
    "escaped template": "doc_to_text: \"{{ prompt['\\\\x5f\\\\x5fclass\\\\x5f\\\\x5f'] }}\"\n",
    "computed template": "doc_to_text: \"{{ prompt['_' ~ '_class_' ~ '_'] }}\"\n",
    "filter template": "doc_to_text: \"{{ prompt | attr('x') | map('y') }}\"\n",
    "library": "use_prompt: 'evil.yaml:x'\n",
    "hf metric": "metric_list: [{metric: acc, hf_evaluate: true, aggregation: mean, higher_is_better: true}]\n",
    "own aggregation": "metric_list: [{metric: acc, aggregation: evil, higher_is_better: true}]\n",
    "dataset script": "dataset_path: ./evil\n",
    "unknown key": "process_results: evil.run\n",
}


@pytest.mark.parametrize("kind", list(CODE))
def test_task_files_that_could_run_code_are_refused(work: Path, kind: str) -> None:
    canary = work / "canary"
    Path("evil.py").write_text(f"open({str(canary)!r}, 'w').close()\ndef run(doc): return 'x'\nTask = run\n")
    text = Path("pick.yaml").read_text()
    key = CODE[kind].split(":")[0]
    kept = [x for x in re.split(r"(?m)^(?=\w)", text) if not x.startswith(key + ":")]
    Path("bad.yaml").write_text("".join(kept) + CODE[kind])
    Path("outer.yaml").write_text("include: bad.yaml\n")
    for file in ("bad.yaml", "outer.yaml"):
        found = objective(file).check()
        assert found and "--allow-task-code" in str(found[0]), found
    assert not canary.exists()


@pytest.mark.parametrize(
    "template",
    ["{{prompt}} is", "{{ choices[0] }}", "{{prompt.strip().split(' ')[-1]|upper}}", "{% if gold %}a{% endif %}",
     "{% for c in choices %}{{c}} {% endfor %}", "{{ choices[gold + 1] if False else prompt[:3] }}"],
)  # fmt: skip
def test_templates_that_put_columns_together_are_data(work: Path, template: str) -> None:
    from evomerge.objectives._task_guard import template_problem

    expected = "computes" if "gold + 1" in template else None
    found = template_problem(template)
    assert (found is None) if expected is None else (found is not None and expected in found)


def test_the_flag_lets_task_code_run(work: Path) -> None:
    Path("mine.py").write_text("def text(doc): return 'so ' + doc['prompt']\n")
    text = Path("pick.yaml").read_text().replace("doc_to_text: prompt", "doc_to_text: !function mine.text")
    Path("mine.yaml").write_text(text)
    spec = ObjectiveSpec("it", "lm_eval", {"file": "mine.yaml"}, allow_code=True)
    made = make_objective(spec)
    assert made.check() == []
    assert isinstance(made, LmEvalObjective)
    ready = made._ready("search", LiveModel("red"))
    assert ready.instances[0].args[0].startswith("so item")


def test_nan_logits_are_never_a_score(work: Path) -> None:
    live = LiveModel("red")
    live.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFinite):
        objective("pick.yaml").score(live, "search")
    with pytest.raises(NonFinite):
        text_objective().score(live, "search")


def text_objective(**options: Any) -> Any:
    files = {s: f"text.{s}.txt" for s in ("search", "validation", "test")}
    return make_objective(ObjectiveSpec("text", "perplexity", {"files": files, **options}))


def test_bits_per_byte_equal_a_plain_computation(work: Path) -> None:
    live = LiveModel("red")
    scores = text_objective(batch_size=2).score(live, "search")
    documents = [d for d in Path("text.search.txt").read_text().split("\n\n") if d]
    bits = []
    for document in documents:
        ids = torch.tensor([live.tokenizer(document, add_special_tokens=False)["input_ids"]])
        logprobs = torch.log_softmax(live.model(input_ids=ids).logits[0, :-1].double(), -1)
        bits.append(-logprobs.gather(1, ids[0, 1:, None]).sum().item() / math.log(2))
    size = sum(len(d.encode()) for d in documents)
    assert scores.value == pytest.approx(sum(bits) / size, rel=1e-5)
    assert scores.items[:, 0] == pytest.approx(bits, rel=1e-5)
    assert scores.items[:, 1].sum() == size
    assert not text_objective().maximize


def test_long_documents_are_cut_into_windows(work: Path) -> None:
    live = LiveModel("red")
    whole = text_objective().score(live, "search")
    cut = text_objective(max_tokens=8).score(live, "search")
    assert cut.items.shape == whole.items.shape
    assert cut.value != whole.value


def test_text_problems(work: Path) -> None:
    Path("text.test.txt").write_text(Path("text.search.txt").read_text())
    assert "share documents" in str(text_objective().check()[0])
    Path("text.test.txt").write_text("\n\n")
    assert "holds no text" in str(text_objective().check()[0])
    Path("text.test.txt").unlink()
    assert "cannot read" in str(text_objective().check()[0])
    with pytest.raises(ConfigError, match="files"):
        make_objective(ObjectiveSpec("text", "perplexity", {"files": {"test": "x"}, "window": 3}))


def test_fingerprints_see_items_but_not_places(work: Path) -> None:
    before = objective("pick.yaml").fingerprint()
    assert objective("pick.yaml", batch_size=2).fingerprint() == before
    assert objective("pick.yaml", limit=3).fingerprint() != before
    text = Path("items.test.jsonl").read_text()
    Path("items.test.jsonl").write_text(text.replace("item 80", "item 800"))
    assert objective("pick.yaml").fingerprint() != before


def task_file(name: str, drop: str = "", extra: str = "", of: str = "pick.yaml") -> str:
    """A copy of a task file with whole top-level keys left out and others added."""
    blocks = re.split(r"(?m)^(?=\w)", Path(of).read_text())
    kept = [b for b in blocks if b.split(":")[0] not in drop.split()]
    Path(name).write_text("".join(kept) + extra)
    return name


@pytest.mark.parametrize("name", ["../../../{evil}", "{evil}", "..", "a*", "a/b", ""])
def test_an_installed_task_is_a_name_and_not_a_path(work: Path, name: str) -> None:
    canary = work / "canary"
    Path("evil.py").write_text(f"open({str(canary)!r}, 'w').close()\ndef run(doc): return 'x'\n")
    text = task_file("evil.yaml", "doc_to_text", "doc_to_text: !function evil.run\n")
    name = name.replace("{evil}", str(work / "evil"))
    Path(text).write_text(Path(text).read_text().replace("task: tiny_pick", f"task: {name}"))
    with pytest.raises(ConfigError, match="task"):
        make_objective(ObjectiveSpec("it", "lm_eval", {"task": name})).check()
    assert not canary.exists()


def test_task_files_outside_of_lm_eval_are_not_installed(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the way up nor through a link."""
    import lm_eval.tasks

    from evomerge.objectives._task_files import installed_task_file

    root = tmp_path / "tasks"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (tmp_path / "up.yaml").write_text("task: ../up\n")
    (root / "link.yaml").symlink_to(tmp_path / "link.yaml")
    (tmp_path / "link.yaml").write_text("task: link\n")
    (root / "in.yaml").write_text("task: in\n")
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(root / "__init__.py"))
    assert installed_task_file("in") == root / "in.yaml"
    assert installed_task_file("link") is None
    assert installed_task_file("../up") is None


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "itself": "metadata: &m [*m]\n",
    "deep": "metadata: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep mapping": "metadata: " + "{a: " * 5000 + "}" * 5000 + "\n",
    "deep template": 'doc_to_text: "{{ ' + "(" * 5000 + "prompt" + ")" * 5000 + ' }}"\n',
    "list key": "? [a]\n: b\n",
    "files": "dataset_kwargs: [a]\n",
    "file number": "dataset_kwargs: {data_files: 3}\n",
}


@pytest.mark.parametrize("kind", list(BOMBS))
def test_hostile_task_files_are_refused_at_once(work: Path, kind: str) -> None:
    made = objective(task_file("bomb.yaml", BOMBS[kind].split(":")[0], BOMBS[kind]))
    import lm_eval.tasks._yaml_loader  # noqa: F401  (its import is not what is timed)

    start = time.monotonic()
    found = made.check()
    assert time.monotonic() - start < 1
    assert found and "bomb.yaml" in str(found[0]), found


def test_files_that_include_each_other_are_read_once(work: Path) -> None:
    for i in range(30):
        Path(f"part{i}.yaml").write_text(f"include: [part{i + 1}.yaml, ./part{i + 1}.yaml]\n")
    Path("part30.yaml").write_text("metadata: {}\n")
    assert objective(task_file("parts.yaml", "", "include: part0.yaml\n")).check()


def derived(shots: int, extra: str = "") -> LmEvalObjective:
    rows = [
        {"prompt": f"question {i} is", "answer": f" <{i}>", "choices": ["a", "b"], "gold": i % 2} for i in range(40)
    ]
    Path("all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    head = "dataset_kwargs: {data_files: {only: all.jsonl}}\ntest_split: only\n"
    return objective(task_file("one.yaml", "dataset_kwargs test_split", head + extra, "say.yaml"), num_fewshot=shots)


@pytest.mark.parametrize("extra", ["", "fewshot_split: only\n", "validation_split: only\n", "training_split: only\n",
                                   "fewshot_split: only\nfewshot_config: {sampler: first_n}\n"])  # fmt: skip
def test_examples_of_derived_splits_come_from_the_search_share(work: Path, extra: str) -> None:
    made = derived(3, extra)
    assert made.check() == []
    live = LiveModel("red")
    answers = {s: {made._task(s).eval_docs[i]["answer"] for i in made._ids(s, made._task(s))} for s in made.splits}
    for split in made.splits:
        for instance in made._ready(split, live).instances:
            shown = set(re.findall(r" <\d+>", instance.args[0]))
            assert len(shown) == 3
            assert shown <= answers["search"] - {instance.doc["answer"]}


@pytest.mark.parametrize("extra", ["fewshot_split: test\n", "validation_split: validation\n", "training_split: test\n",
                                   "", "fewshot_config: {samples: [%s]}\n"])  # fmt: skip
def test_examples_from_held_out_splits_are_a_problem(work: Path, extra: str) -> None:
    first = Path("items.test.jsonl").read_text().splitlines()[0]
    made = objective(task_file("leak.yaml", "", extra.replace("%s", first)), num_fewshot=2)
    assert any("few-shot" in str(p) and "share" in str(p) for p in made.check()), made.check()
    assert objective("leak.yaml", num_fewshot=0).check() == []


def test_examples_from_the_search_split_never_show_the_item_itself(work: Path) -> None:
    for extra in ("fewshot_split: search\n", "training_split: search\n"):
        made = objective(task_file("shots.yaml", "", extra, "say.yaml"), "acc", num_fewshot=11)
        assert made.check() == []
        for instance in made._ready("search", LiveModel("red")).instances:
            assert instance.args[0].count(instance.doc["prompt"]) == 1
        assert objective("shots.yaml", num_fewshot=3).fingerprint() != made.fingerprint()


def test_fingerprints_see_few_shot_examples(work: Path) -> None:
    rows = [{"prompt": f"shot {i} is", "answer": f" {i}", "choices": ["a", "b"], "gold": 0} for i in range(4)]
    Path("shots.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = Path("say.yaml").read_text().replace("    search:", "    shots: shots.jsonl\n    search:")
    Path("shown.yaml").write_text(text + "fewshot_split: shots\n")
    before = objective("shown.yaml", num_fewshot=2).fingerprint()
    Path("shots.jsonl").write_text(Path("shots.jsonl").read_text().replace("shot 1", "shot 9"))
    assert objective("shown.yaml", num_fewshot=2).fingerprint() != before


CODED = """\
fewshot_config: {samples: !function mine.samples}
filter_list: [{name: own, filter: [{function: custom, filter_fn: !function mine.clean}, {function: take_first}]}]
metric_list: [{metric: !function mine.right, aggregation: !function mine.total, higher_is_better: true}]
process_docs: !function mine.docs
"""
MINE = """\
def samples(): return [{"prompt": "a", "answer": " b"}] * 3
def clean(resps, docs): return [[r.strip() for r in rs] for rs in resps]
def right(references, predictions, **kwargs): return float(references == predictions)
def total(items): return sum(items) / len(items)
def docs(rows): return rows
"""


def test_fingerprints_of_task_code_hold_across_processes(work: Path) -> None:
    task_file("coded.yaml", "metric_list", CODED, "write.yaml")
    script = (
        "from evomerge.objectives import *\n"
        "o = {'file': 'coded.yaml', 'metric': 'right', 'num_fewshot': 1}\n"
        "made = make_objective(ObjectiveSpec('it', 'lm_eval', o, allow_code=True))\n"
        "assert made.check() == [], made.check()\nprint(made.fingerprint())\n"
    )

    def fingerprint(seed: str, folder: Path) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip().splitlines()[-1]

    Path("mine.py").write_text(MINE)
    first = fingerprint("1", work)
    moved = work.parent / "moved"
    shutil.copytree(work, moved)
    assert fingerprint("2", moved) == first
    (moved / "mine.py").write_text(MINE.replace("sum(items) / len(items)", "max(items)"))
    assert fingerprint("2", moved) != first


def metric_file(metric: str, of: str) -> str:
    return task_file("corpus.yaml", "metric_list", f"metric_list: [{{metric: {metric}}}]\n", of)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter", "brier_score", "mcc", "perplexity"])
def test_corpus_metrics_are_lm_evals(work: Path, metric: str) -> None:
    of = {"brier_score": "pick.yaml", "mcc": "pick.yaml", "perplexity": "say.yaml"}.get(metric, "write.yaml")
    file = metric_file(metric, of)
    made = objective(file, metric)
    assert made.check() == []
    live = LiveModel("red")
    scores = made.score(live, "search")
    theirs, items = by_lm_eval(live, file, "search", metric)
    assert scores.value == pytest.approx(theirs)
    assert len(scores.items) == len(items) and scores.items.dtype == np.float64
    assert np.isfinite(scores.items).all() and np.isfinite(scores.stderr) and scores.stderr >= 0
    again = made.score(live, "search")
    assert np.array_equal(again.items, scores.items) and again.stderr == scores.stderr


def test_what_cannot_be_aggregated_is_found_before_the_search(work: Path) -> None:
    """F1 is of two classes, and these items have three."""
    made = objective(metric_file("f1", "pick.yaml"), "f1")
    assert any("f1" in str(p) and "aggregat" in str(p) for p in made.check()), made.check()
    with pytest.raises(CandidateFailure, match="f1"):
        made.score(LiveModel("red"), "search")


def test_an_aggregate_that_fails_on_some_samples_still_has_a_standard_error() -> None:
    from evomerge.objectives._aggregate import aggregated

    def needs_the_first(items: list[Any]) -> float:
        if ("0", "x") not in items:
            raise ValueError("no first item")
        return len(set(items)) / len(items)

    items = [(str(i), "x") for i in range(8)]
    scores = aggregated("it", needs_the_first, items)
    assert scores.value == 1.0 and scores.stderr > 0
    assert scores.items.tolist() == [1.0] + [0.0] * 7

    def needs_all(items: list[Any]) -> float:
        if len(set(items)) < 8:
            raise ValueError("one is missing")
        return 3.0

    scores = aggregated("it", needs_all, items)
    assert scores.value == 3.0 and np.isfinite(scores.stderr)
    with pytest.raises(CandidateFailure, match="aggregate"):
        aggregated("it", needs_the_first, items[1:])


@pytest.mark.parametrize(("metric", "message"), [("bleurt", "no metric 'bleurt'"), ("acc,own", "no filter 'own'")])
def test_unknown_metrics_are_named_without_a_check_too(work: Path, metric: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective("pick.yaml", metric).score(LiveModel("red"), "search")


@pytest.mark.parametrize(
    "options",
    [{"file": 3}, {"task": ["a"], "file": None}, {"splits": ["search"]}, {"splits": {"search": 3}},
     {"splits": "search"}, {"num_fewshot": "x"}, {"num_fewshot": -1}, {"num_fewshot": True}, {"num_fewshot": 1.0},
     {"limit": {"serch": 3}},
     {"limit": {"search": 0}}, {"limit": "3"}, {"limit": 1.5}, {"apply_chat_template": "maybe"},
     {"apply_chat_template": 1}, {"fewshot_as_multiturn": "no"}, {"metric": 3}, {"metric": ["acc"]}, {"metric": ""},
     {"metric": ",none"}, {"batch_size": "auto"}, {"task": "arc_easy"}, {"task": "../up", "file": None}],
    ids=str,
)  # fmt: skip
def test_options_of_the_wrong_type_are_named(work: Path, options: dict[str, Any]) -> None:
    spec = {k: v for k, v in {"file": "pick.yaml", **options}.items() if v is not None}
    with pytest.raises(ConfigError, match="|".join(options)):
        make_objective(ObjectiveSpec("it", "lm_eval", spec))


@pytest.mark.parametrize(
    "options",
    [{"files": {"search": 3}}, {"files": {"search": "a", "tset": "b"}}, {"files": {}}, {"files": "a"}, {"limit": 0},
     {"max_tokens": 1}, {"max_tokens": "8"}, {"batch_size": 0}, {"batch_size": None, "window": 3}],
    ids=str,
)  # fmt: skip
def test_text_options_of_the_wrong_type_are_named(work: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join(options)):
        text_objective(**options)


def test_every_problem_of_the_options_is_listed() -> None:
    with pytest.raises(ConfigError) as error:
        objective("pick.yaml", limit={"serch": 3}, batch_size=0, shots=2)
    assert len(error.value.problems) == 3


def test_more_examples_than_there_are_is_a_problem(work: Path) -> None:
    file = task_file("shots.yaml", "", "fewshot_split: search\n")
    assert any("1000" in str(p) for p in objective(file, num_fewshot=1000).check())
    with pytest.raises(ConfigError):
        objective(file, num_fewshot=1000).score(LiveModel("red"), "search")


def test_folders_and_bytes_are_not_task_files(work: Path) -> None:
    Path("folder").mkdir()
    Path("bytes.yaml").write_bytes(bytes(range(256)) * 10)
    Path("bytes.txt").write_bytes(bytes(range(256)) * 10)
    assert "folder" in str(objective("folder").check()[0])
    assert "bytes.yaml" in str(objective("bytes.yaml").check()[0])
    for allow in (False, True):
        spec = ObjectiveSpec("it", "lm_eval", {"file": "bytes.yaml"}, allow_code=allow)
        assert make_objective(spec).check()
    assert "bytes.txt" in str(text_objective(files={"search": "bytes.txt"}).check()[0])
    assert "folder" in str(text_objective(files={"search": "folder"}).check()[0])


@pytest.mark.parametrize("make", [lambda: objective("pick.yaml"), text_objective], ids=["lm_eval", "perplexity"])
def test_parts_of_a_split_are_scored_alone_and_joined(work: Path, make: Any) -> None:
    live, made = LiveModel("red"), make()
    assert made.partial
    whole = made.score(live, "search")
    n = made.size("search")
    assert n == len(whole.items)
    parts = [made.score(live, "search", range(0, n, 2)), made.score(live, "search", range(1, n, 2))]
    joined = np.empty_like(whole.items)
    joined[0::2], joined[1::2] = parts[0].items, parts[1].items
    assert np.allclose(joined, whole.items, rtol=1e-5)
    again = made.aggregate(whole.items)
    assert (again.value, again.stderr) == (whole.value, whole.stderr)
