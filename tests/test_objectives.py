"""Objectives score what lm-eval scores, item by item, and say what is wrong with them before any model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import ConfigError, NonFinite
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
    from evomerge.objectives.lm_eval import _answer, _harness

    _answer(_harness(live, 5), ready.instances)
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
