"""Every further kind of objective on a tiny real model against plain computations; and its bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.config import parse_study
from evomerge.errors import CandidateFailure, ConfigError, NonFinite
from evomerge.model import LiveModel, Outline
from evomerge.objectives import Objective, ObjectiveSpec, make_objective
from evomerge.recipe import Recipe
from evomerge.testing import check_objective
from evomerge.weights import Weights
from evomerge.worker import Job, Worker, WorkerSpec
from tests.conftest import ROOT

MODELS = {"base": "base", "red": "red", "green": "green", "blue": "blue"}
FILES = {split: f"items.{split}.jsonl" for split in ("search", "validation", "test")}
PICK = {"name": "pick", "kind": "lm_eval", "file": "pick.yaml", "metric": "acc"}
SAY = {"name": "say", "kind": "lm_eval", "file": "say.yaml", "metric": "acc"}
TEXT = {"name": "text", "kind": "bits_per_byte", "files": {s: f"text.{s}.txt" for s in FILES}}


def make(kind: str, allow_code: bool = False, **options: Any) -> Any:
    return make_objective(ObjectiveSpec("it", kind, options, allow_code=allow_code, models=MODELS))


def problems_of(kind: str, allow_code: bool = False, **options: Any) -> str:
    """All that is said against an objective, whether by its options or by its check."""
    try:
        return "\n".join(str(p) for p in make(kind, allow_code, **options).check())
    except ConfigError as error:
        return "\n".join(str(p) for p in error.problems)


def items(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(FILES[split]).read_text().splitlines()]


def write(file: str, rows: list[Any]) -> str:
    Path(file).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


def logprobs(live: LiveModel, text: str) -> torch.Tensor:
    """(T, V) log-probabilities after each token of one text alone, in float64."""
    ids = torch.tensor([live.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return torch.log_softmax(live.model(input_ids=ids).logits[0].double(), dim=-1)


def continuation(live: LiveModel, text: str, new: int, until: str | None = None) -> list[int]:
    """Greedy tokens of one prompt, one whole forward pass after the other, without a cache."""
    ids = live.tokenizer(text)["input_ids"]
    found: list[int] = []
    while len(found) < new:
        with torch.no_grad():
            token = int(live.model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
        if token == live.model.generation_config.eos_token_id:
            break
        found.append(token)
        if until is not None and until in live.tokenizer.decode(found):
            break
    return found


def merged(live: LiveModel, weight: float = 0.7) -> LiveModel:
    recipe = Recipe.build("task_arithmetic", "base", {"red": {"weight": weight}, "green": {"weight": weight}})
    live.install(recipe, Weights(list(MODELS.values())))
    return live


def observed(objective: Any, live: LiveModel) -> Any:
    """The objective after a worker would have shown it its references, and the live model is a merge again."""
    from evomerge.objectives._references import observe_references

    observe_references([objective], live, Weights(list(MODELS.values())), objective.splits, set())
    merged(live)
    return objective


# ---------------------------------------------------------------- the contract


def write_function() -> dict[str, Any]:
    Path("mine.py").write_text(
        "def likes(model, tokenizer, items):\n"
        "    import torch\n"
        "    rows = [torch.tensor([tokenizer(i['prompt'])['input_ids']]) for i in items]\n"
        "    return [model(input_ids=r).logits[0, -1].float().max().item() + i['gold'] for r, i in zip(rows, items)]\n"
    )
    return {"file": "mine.py", "function": "likes", "items": FILES}


KINDS: dict[str, dict[str, Any]] = {
    "exact_match": {"files": FILES, "max_tokens": 3},
    "entropy": {"files": FILES},
    "agreement": {"prompts": {"red": FILES, "green": "words.jsonl"}},
    "response_length": {"files": FILES, "max_tokens": 6, "until": ["a"]},
    "size": {},
    "latency": {"new_tokens": 4, "runs": 3},
    "weakest_link": {"of": [PICK, SAY], "temperature": 0.2},
    "negative_flips": {"of": [PICK], "reference": "red"},
    "bits_per_byte": {"files": TEXT["files"]},
}


@pytest.mark.parametrize("kind", [*KINDS, "python"])
def test_every_kind_keeps_the_contract(work: Path, kind: str) -> None:
    write("words.jsonl", [{"prompt": f"word {i} of {i * i}"} for i in range(30)])
    options = write_function() if kind == "python" else KINDS[kind]
    objective = observed(make(kind, kind == "python", **options), live := LiveModel("base"))
    check_objective(objective, live, make(kind, kind == "python", **options))


# ---------------------------------------------------------------- values


def test_exact_match_compares_whole_responses(work: Path) -> None:
    live = LiveModel("red")
    rows = items("search")
    said = [live.tokenizer.decode(continuation(live, r["prompt"], 3)).split("\n")[0] for r in rows]
    for i, (row, text) in enumerate(zip(rows, said, strict=True)):
        row["answer"] = f" {text.strip()} " if i % 3 else f"not {text}"
    write("said.jsonl", rows)
    files = {"search": "said.jsonl", "test": FILES["test"]}
    objective = make("exact_match", files=files, max_tokens=3)
    assert objective.check() == [] and objective.splits == ("search", "test")
    expected = [1.0 if text.strip() and i % 3 else 0.0 for i, text in enumerate(said)]
    scores = objective.score(live, "search")
    assert scores.items.tolist() == expected and scores.value == np.mean(expected) > 0
    upper = write("upper.jsonl", [{**r, "answer": r["answer"].upper()} for r in rows])
    loose = make("exact_match", files={"search": upper}, max_tokens=3, ignore_case=True)
    assert loose.score(live, "search").items.tolist() == expected
    strict = make("exact_match", files={"search": upper}, max_tokens=3)
    assert strict.score(live, "search").value < scores.value


def test_entropy_is_that_of_next_tokens(work: Path) -> None:
    live = LiveModel("red")
    scores = make("entropy", files=FILES, batch_size=5).score(live, "search")
    expected = []
    for row in items("search"):
        p = logprobs(live, row["prompt"]).exp().numpy()
        expected.append(np.mean([-sum(x * math.log(x) for x in row_ if x > 0) for row_ in p]))
    assert scores.items == pytest.approx(expected, rel=1e-5)
    assert scores.value == pytest.approx(np.mean(expected), rel=1e-5)
    short = make("entropy", files=FILES, max_tokens=2).score(live, "search")
    p = logprobs(live, items("search")[0]["prompt"])[:2]
    assert short.items[0] == pytest.approx(float(-(p.exp() * p).sum(1).mean()), rel=1e-5)
    assert any("cut to their first 2 tokens" in note for note in live.notes)


def test_agreement_is_the_mean_over_experts_of_kl_on_their_own_prompts(work: Path) -> None:
    write("few.jsonl", [{"prompt": f"few words, {i}"} for i in range(3)])
    objective = make("agreement", prompts={"red": FILES, "green": {"search": "few.jsonl"}})
    assert objective.check() == [] and objective.splits == ("search",) and objective.references == ("red", "green")
    live = LiveModel("base")
    scores = observed(objective, live).score(live, "search")
    means = []
    for expert, file in (("red", FILES["search"]), ("green", "few.jsonl")):
        their = LiveModel(expert)
        kls = []
        for line in Path(file).read_text().splitlines():
            q, p = (logprobs(m, json.loads(line)["prompt"]) for m in (their, live))
            kls.append(float(torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(1).mean()))
        means.append(np.mean(kls))
    assert scores.value == pytest.approx(np.mean(means), rel=1e-3)
    assert scores.items.shape == (12 + 3, 2)
    # An expert agrees with itself, to the bit.
    alone = observed(make("agreement", prompts={"red": FILES}), live)
    live.install(Recipe.build("passthrough", None, {"red": {}}), Weights(["red"]))
    assert alone.score(live, "search").value == 0.0


def test_response_length_counts_generated_tokens(work: Path) -> None:
    live = LiveModel("red")
    first = live.tokenizer.decode(continuation(live, items("search")[0]["prompt"], 1))
    for until in (first, "a", "zzz"):
        objective = make("response_length", files=FILES, max_tokens=7, until=[until], batch_size=5)
        expected = [len(continuation(live, r["prompt"], 7, until)) for r in items("search")]
        assert objective.score(live, "search").items.tolist() == expected
    assert set(expected) != {0}
    assert not objective.maximize and make("response_length", files=FILES, maximize=True).maximize
    # Every token ends a sequence: nothing is said.
    live.model.generation_config.eos_token_id = list(range(256))
    assert objective.score(live, "search").value == 0.0


def test_sizes_are_counted(work: Path) -> None:
    live = LiveModel("red")
    stored = sum(math.prod(i.shape) for i in live.checkpoint.info.values())
    assert make("size").score(live, "search").value == stored
    assert make("size", count="layers").score(live, "test").value == 2
    # A layer that is used a second time is written a second time.
    layers = live.model.model.layers
    layers.append(layers[0])
    assert make("size", count="layers").score(live, "test").value == 3
    assert make("size").score(live, "search").value == stored + sum(p.numel() for p in layers[0].parameters())


def test_latency_grows_with_the_layers(work: Path) -> None:
    """Twenty times the layers: no machine is so busy that this takes no longer."""
    live = LiveModel("red")
    objective = make("latency", new_tokens=6, runs=3, prompt_tokens=4)
    scores = objective.score(live, "search")
    assert scores.items.shape == (3,) and scores.value == np.median(scores.items) > 0 and scores.stderr >= 0
    layers = list(live.model.model.layers)
    live.model.model.layers.extend(_copies(layers, 19))
    live.model.config.num_hidden_layers = 40
    assert objective.score(live, "search").value > scores.value


def _copies(layers: list[Any], times: int) -> list[Any]:
    import copy

    found = [copy.deepcopy(layer) for _ in range(times) for layer in layers]
    for index, layer in enumerate(found):
        layer.self_attn.layer_idx = len(layers) + index
    return found


def test_the_weakest_link_is_the_minimum(work: Path) -> None:
    live = merged(LiveModel("base"))
    parts = [
        make_objective(ObjectiveSpec(o["name"], "lm_eval", _options(o))).score(live, "search") for o in (PICK, SAY)
    ]
    values = [p.value for p in parts]
    hard = make("weakest_link", of=[PICK, SAY])
    assert hard.check() == [] and hard.maximize and hard.bounds == (0.0, 1.0)
    found = hard.score(live, "search")
    assert found.value == min(values)
    assert found.stderr == parts[int(np.argmin(values))].stderr
    for t in (0.01, 0.3, 1000.0):
        soft = make("weakest_link", of=[PICK, SAY], temperature=t).score(live, "search")
        assert soft.value == pytest.approx(-t * math.log(np.mean([math.exp(-v / t) for v in values])))
        assert min(values) - 1e-9 <= soft.value <= np.mean(values) + 1e-9
    # The error by differences of the formula itself.
    t, h = 0.3, 1e-6
    soft = make("weakest_link", of=[PICK, SAY], temperature=t).score(live, "search")
    slopes = []
    for k in range(2):
        up = [v + h * (j == k) for j, v in enumerate(values)]
        slopes.append((-t * math.log(np.mean([math.exp(-v / t) for v in up])) - soft.value) / h)
    expected = math.hypot(*(s * p.stderr for s, p in zip(slopes, parts, strict=True)))
    assert soft.stderr == pytest.approx(expected, rel=1e-4)


def _options(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k not in ("name", "kind")}


def test_the_weakest_of_what_should_be_small_is_the_largest(work: Path) -> None:
    live = merged(LiveModel("base"))
    entropy = {"kind": "entropy", "files": FILES}
    objective = make("weakest_link", of=[TEXT, entropy])
    assert not objective.maximize and objective.bounds == (0.0, None)
    values = [make(kind, **_options(o)).score(live, "search").value for kind, o in
              (("bits_per_byte", TEXT), ("entropy", entropy))]  # fmt: skip
    assert objective.score(live, "search").value == pytest.approx(max(values), rel=1e-6)
    # Items of the second objective alone: the first is left out.
    texts = objective.inner[0].size("search")
    only = objective.score(live, "search", range(texts, objective.size("search")))
    assert only.value == pytest.approx(values[1], rel=1e-5)
    assert "one direction" in problems_of("weakest_link", of=[TEXT, PICK])
    assert "two or more" in problems_of("weakest_link", of=[PICK])
    assert "temperature" in problems_of("weakest_link", of=[PICK, SAY], temperature=0)


def test_negative_flips_are_what_the_reference_has_right_alone(work: Path) -> None:
    live = LiveModel("base")
    objective = observed(make("negative_flips", of=[PICK], reference="red"), live)
    assert objective.check() == [] and not objective.maximize
    inner = make_objective(ObjectiveSpec("pick", "lm_eval", _options(PICK)))
    assert objective.score(live, "search").value == 0.0  # merges of so small differences change nothing
    torch.manual_seed(5)
    for parameter in live.model.parameters():
        parameter.data.normal_(std=0.1)
    now, before = (inner.score(m, "search").items for m in (live, LiveModel("red")))
    expected = [float(b == 1 and n == 0) for b, n in zip(before, now, strict=True)]
    scores = objective.score(live, "search")
    assert scores.items.tolist() == expected
    assert 0 < scores.value == np.mean(expected) < 1 - now.mean()  # what both have wrong has not flipped
    some = [1, 2, 5, 10]
    assert objective.score(live, "search", some).items.tolist() == [expected[i] for i in some]


def test_negative_flips_say_what_they_need(work: Path) -> None:
    assert "right and wrong" in problems_of("negative_flips", of=[TEXT], reference="red")
    assert "no checkpoint folder at nowhere" in problems_of("negative_flips", of=[PICK], reference="nowhere")
    assert "one objective" in problems_of("negative_flips", of=[PICK, SAY], reference="red")
    assert "`reference:` is missing" in problems_of("negative_flips", of=[PICK])
    with pytest.raises(ConfigError, match="not observed"):
        make("negative_flips", of=[PICK], reference="red").score(LiveModel("base"), "search")


def test_a_python_function_scores_items(work: Path) -> None:
    options = write_function()
    live = LiveModel("red")
    scores = make("python", True, **options).score(live, "search")
    expected = []
    for row in items("search"):
        ids = torch.tensor([live.tokenizer(row["prompt"])["input_ids"]])
        expected.append(float(live.model(input_ids=ids).logits[0, -1].max()) + row["gold"])
    assert scores.items == pytest.approx(expected, rel=1e-6)
    assert scores.value == pytest.approx(np.mean(expected), rel=1e-6)


def test_python_code_does_not_run_unasked(work: Path) -> None:
    Path("mine.py").write_text(
        "open('canary', 'w').close()\ndef likes(model, tokenizer, items): return [1] * len(items)\n"
    )
    objective = make("python", file="mine.py", function="likes", items=FILES)
    assert "--allow-task-code" in str(objective.check()[0])
    objective.fingerprint()
    with pytest.raises(ConfigError, match="allow-task-code"):
        objective.score(LiveModel("red"), "search")
    assert not Path("canary").exists()
    assert make("python", True, file="mine.py", function="likes", items=FILES).check() == []
    assert Path("canary").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('a thing')", "mine.py.*in likes.*KeyError: 'a thing'"),
        ("return [1.0]", "1 numbers for 12 items"),
        ("return [float('nan')] * len(items)", "not finite, first for .*items.search.jsonl:1"),
        ("return None", "TypeError"),
    ],
)
def test_what_a_python_function_does_wrong_is_the_candidates(work: Path, body: str, message: str) -> None:
    Path("mine.py").write_text(f"def likes(model, tokenizer, items):\n    {body}\n")
    objective = make("python", True, file="mine.py", function="likes", items=FILES)
    with pytest.raises(CandidateFailure, match="(?s)" + message) as error:
        objective.score(LiveModel("red"), "search")
    assert error.value.reason == "objective"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): pass\n", "no function 'likes'"),
        ("def likes(:\n", "fails when it is loaded.*SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
        (None, "cannot read .*mine.py"),
    ],
)
def test_python_files_are_checked(work: Path, text: str | None, message: str) -> None:
    if text is not None:
        Path("mine.py").write_text(text)
    found = problems_of("python", True, file="mine.py", function="likes", items={"search": "none.jsonl"})
    assert __import__("re").search(message, found, 16), found
    assert "none.jsonl" in found  # all problems at once


# ---------------------------------------------------------------- workers and studies


def test_a_worker_shows_references_once_and_scores_the_same(work: Path) -> None:
    options = {
        "kl": ("agreement", {"prompts": {"red": FILES, "blue": FILES}}),
        "flips": ("negative_flips", {"of": [PICK], "reference": "base"}),
        "worst": ("weakest_link", {"of": [{"kind": "negative_flips", "of": [SAY], "reference": "blue"},
                                          {"kind": "entropy", "files": FILES}]}),
    }  # fmt: skip
    specs = tuple(ObjectiveSpec(name, kind, o, models=MODELS) for name, (kind, o) in options.items())
    worker = Worker(WorkerSpec("base", tuple(MODELS.values()), specs, threads=1))
    recipe = Recipe.build("task_arithmetic", "base", {"red": {"weight": 0.7}, "green": {"weight": 0.7}})
    outcome = worker.evaluate(Job(0, recipe, ("search", "test")))
    live = LiveModel("base")
    for spec in specs:
        alone = observed(make_objective(spec), live)
        for split in ("search", "test"):
            assert outcome.scores[split][spec.name].value == alone.score(live, split).value


def test_a_broken_reference_stops_the_worker_with_its_name(work: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file("blue/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, "blue/model.safetensors", metadata={"format": "pt"})
    spec = ObjectiveSpec("it", "entropy", {"files": FILES}, models=MODELS)
    broken = ObjectiveSpec("kl", "agreement", {"prompts": {"blue": FILES}}, models=MODELS)
    with pytest.raises(ConfigError, match="reference model blue cannot be scored"):
        Worker(WorkerSpec("base", tuple(MODELS.values()), (spec, broken), threads=1))


def test_a_study_names_objectives_inside_objectives(work: Path) -> None:
    (work / "inner").mkdir()
    Path("inner/words.yaml").write_text("kind: entropy\nfiles: {search: ../items.search.jsonl}\n")
    text = Path("study.yaml").read_text()
    text = text[: text.index("objectives:")] + (
        "objectives:\n"
        "  - kind: weakest_link\n    of:\n      - inner/words.yaml\n"
        "      - {name: other, kind: negative_flips, reference: red, of: {kind: lm_eval, file: pick.yaml}}\n"
    )
    (spec,) = parse_study(text, "study.yaml", allow_benchmark_tests=True).objectives
    words, flips = spec.options["of"]
    assert (words.name, words.kind, words.folder) == ("words", "entropy", "inner")
    assert flips.options["of"][0].options == {"file": "pick.yaml"}
    assert all(s.allow_benchmark_tests and s.models == MODELS for s in (spec, words, flips, flips.options["of"][0]))
    assert make_objective(spec).check() == []
    with pytest.raises(ConfigError, match=r"study.yaml:\d+: unknown objective kind 'ham'"):
        parse_study(text.replace("kind: negative_flips", "kind: ham"), "study.yaml")
    Path("inner/words.yaml").write_text("kind: weakest_link\nof: [inner/words.yaml, inner/words.yaml]\n")
    with pytest.raises(ConfigError, match="too deeply"):
        parse_study(text, "study.yaml")


@pytest.mark.parametrize("kind", ["entropy", "agreement", "response_length", "exact_match", "latency"])
def test_nan_logits_are_never_a_score_of_any_kind(work: Path, kind: str) -> None:
    write("words.jsonl", [{"prompt": f"word {i} of {i * i}"} for i in range(30)])
    live = LiveModel("base")
    objective = observed(make(kind, **KINDS[kind]), live)
    live.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFinite):
        objective.score(live, "search")


def test_a_study_goes_on_where_a_function_fails(work: Path) -> None:
    """And what it is told each time: the flag stands in the command that continues, never in the study."""
    from evomerge.commands import run_search
    from evomerge.config import load_study_file
    from evomerge.study import Study

    red = float(LiveModel("red").model.get_input_embeddings().weight[0, 0])
    Path("mine.py").write_text(
        "def likes(model, tokenizer, items):\n"
        f"    if float(model.get_input_embeddings().weight[0, 0]) == {red!r}:\n"
        "        raise KeyError('this is red')\n"
        "    return [len(i['prompt']) for i in items]\n"
    )
    text = Path("study.yaml").read_text().replace("evaluations: 14", "evaluations: 4")
    python = "{name: mine, kind: python, file: mine.py, function: likes, items: {search: items.search.jsonl}}"
    Path("study.yaml").write_text(text[: text.index("objectives:")] + f"objectives: [{python}]\n" +
                                  text[text.index("optimizer:"):])  # fmt: skip
    arguments: dict[str, Any] = {"resume": "auto", "inline": True, "quiet": True}
    with pytest.raises(ConfigError, match="allow-task-code"):
        run_search("study.yaml", (), allow_task_code=False, **arguments)
    assert run_search("study.yaml", (), allow_task_code=True, allow_benchmark_tests=True, **arguments) == 0
    found = Study.load(load_study_file("study.yaml").storage, "tiny").candidates()
    assert [c.state for c in found] == ["done", "failed", "done", "done"]
    assert found[1].reason == "objective"
    assert "KeyError: 'this is red'" in json.dumps(found[1].attrs)


# ---------------------------------------------------------------- splits and bad input


def test_one_file_is_divided_by_content(work: Path) -> None:
    rows = [{"prompt": f"question {i}", "id": i} for i in range(100)]
    write("all.jsonl", [*rows, {"prompt": "question 3", "id": "again"}])
    objective = make("entropy", file="all.jsonl")
    assert objective.check() == [] and objective.splits == ("search", "validation", "test")
    parts = [{i.doc["prompt"] for i in objective.items.of(s)} for s in objective.splits]
    assert sum(objective.size(s) for s in objective.splits) == 101 and len(set.union(*parts)) == 100
    assert len(parts[0]) > 45 and min(len(p) for p in parts) > 8
    assert make("entropy", file="all.jsonl", limit=7).size("search") == 7


def test_every_mistake_in_files_of_items_is_listed_with_its_line(work: Path) -> None:
    write("bad.jsonl", [{"prompt": "fine"}, "{not json", {"promt": "x"}, {"prompt": 3}, '["a"]', {"prompt": ""}])
    found = problems_of("entropy", files={"search": "bad.jsonl", "validation": "gone.jsonl", "test": FILES["test"]})
    for line, message in ((2, "not JSON"), (3, "no column 'prompt'"), (4, "must hold a text, not 3"),
                          (5, "a JSON object"), (6, "must hold a text")):  # fmt: skip
        assert any(f"bad.jsonl:{line}: " in one and message in one for one in found.splitlines()), found
    assert "gone.jsonl" in found and "no such file" in found
    assert "'promt'" in found  # what it has instead


@pytest.mark.parametrize("kind", ["entropy", "exact_match", "response_length", "python", "agreement"])
def test_empty_and_overlapping_splits_are_named(work: Path, kind: str) -> None:
    options = write_function()

    def said(source: Any) -> str:
        if kind == "python":
            return problems_of(kind, True, **{**options, "items": source})
        if kind == "agreement":
            return problems_of(kind, prompts={"red": source})
        return problems_of(kind, **{"file" if isinstance(source, str) else "files": source})

    write("empty.jsonl", [])
    assert "the test split is empty" in said({**FILES, "test": "empty.jsonl"})
    write("shared.jsonl", [*items("test"), *items("search")[2:4]])
    found = said({**FILES, "test": "shared.jsonl"})
    assert "search and test splits share 2 items" in found
    assert "items.search.jsonl:3" in found and "shared.jsonl:15" in found
    write("one.jsonl", items("search")[:1])
    assert "60/20/20" in said("one.jsonl")
    assert "search" in said({"test": FILES["test"]})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("entropy", {}, "give `file:`"),
        ("entropy", {"file": "a", "files": {"search": "b"}}, "give `file:`"),
        ("entropy", {"file": "a", "batch_size": 0}, "batch_size"),
        ("entropy", {"file": "a", "maximize": True}, "unknown key 'maximize'"),
        ("exact_match", {"file": "a", "until": []}, "until"),
        ("exact_match", {"file": "a", "max_tokens": "3"}, "max_tokens"),
        ("response_length", {"file": "a", "maximize": "up"}, "maximize"),
        ("agreement", {}, "`prompts:` is missing"),
        ("agreement", {"prompts": {"red": 3}}, "prompts"),
        ("agreement", {"prompts": {"violet": "a"}}, "'violet': no checkpoint folder"),
        ("size", {"count": "heads"}, "parameters or layers"),
        ("latency", {"runs": 2}, "3 or more"),
        ("latency", {"new_tokens": 200}, "context of 128"),
        ("python", {"file": "a.py", "function": "a b", "items": "c"}, "function"),
        ("weakest_link", {"of": "pick"}, "must hold objectives"),
        ("weakest_link", {"of": [{**PICK, "metric": 3}, {**SAY, "limit": 0}]}, "limit"),
        ("weakest_link", {"of": [{**PICK, "apply_chat_template": True}, SAY]}, "no chat template"),
    ],
    ids=str,
)
def test_bad_options_are_named(work: Path, kind: str, options: dict[str, Any], message: str) -> None:
    assert message in problems_of(kind, **options)


def test_prompts_that_do_not_fit_the_base_are_found_without_its_weights(work: Path) -> None:
    outline = Outline("base")
    write("words.jsonl", [{"prompt": f"word {i} of {i * i}"} for i in range(30)])
    fitted = {kind: made for kind, options in KINDS.items() if hasattr(made := make(kind, **options), "fit")}
    assert {*fitted} >= {"entropy", "agreement", "response_length", "exact_match", "weakest_link", "negative_flips"}
    assert {kind: made.fit(outline) for kind, made in fitted.items()} == {kind: ([], []) for kind in fitted}
    _, (note, *_) = make("entropy", files=FILES, max_tokens=3).fit(outline)
    assert "12 prompts are cut to their first 3 tokens" in note and "items.search.jsonl:1" in note
    for options, message in (
        ({"files": FILES, "apply_chat_template": True}, "no chat template"),
        ({"files": FILES, "max_tokens": 128}, "leaves no room for a prompt in a context of 128"),
    ):
        problems, _ = make("response_length", **options).fit(outline)
        assert message in str(problems[0])
        inside = [{"kind": "response_length", **options}, {"kind": "entropy", "files": FILES, "max_tokens": 3}]
        problems, notes = make("weakest_link", of=inside).fit(outline)
        assert message in str(problems[0]) and "are cut" in notes[0]
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0, "!": 1}, [])).save("base/tokenizer.json")  # no token for what it does not know
    write("odd.jsonl", [{"prompt": "a"}, {"prompt": "thing"}])
    (problem,), _ = make("agreement", prompts={"red": {"search": "odd.jsonl"}}).fit(Outline("base"))
    assert "odd.jsonl:2: the tokenizer makes no token of 'thing'" in str(problem)


def test_log_probabilities_that_need_too_much_memory_are_refused(work: Path) -> None:
    prompts = {"red": FILES, "green": FILES}
    found = problems_of("agreement", prompts=prompts, max_bytes=100_000)
    assert "log-probabilities could take" in found and "lower `limit:` or `max_tokens:`" in found
    assert problems_of("agreement", prompts=prompts, max_bytes=100_000, limit=1, max_tokens=4) == ""
    unknown = make_objective(ObjectiveSpec("it", "agreement", {"prompts": prompts, "max_bytes": 100_000}))
    with pytest.raises(ConfigError, match="log-probabilities take"):
        observed(unknown, LiveModel("base"))


def test_fingerprints_see_what_counts_and_nothing_else(work: Path) -> None:
    def print_of(kind: str, **options: Any) -> str:
        found: Objective = make(kind, kind == "python", **options)
        return found.fingerprint()

    for kind in ("entropy", "exact_match", "response_length"):
        before = print_of(kind, files=FILES)
        assert print_of(kind, files=FILES, batch_size=2) == before
        assert print_of(kind, files=FILES, max_tokens=5) != before
        assert print_of(kind, files=FILES, limit=3) != before
    options = write_function()
    before = print_of("python", **options), print_of("agreement", prompts={"red": FILES})
    assert print_of("negative_flips", of=[PICK], reference="red") != print_of(
        "negative_flips", of=[PICK], reference="base"
    )
    assert print_of("weakest_link", of=[PICK, SAY]) != print_of("weakest_link", of=[PICK, SAY], temperature=1.0)
    Path("mine.py").write_text(Path("mine.py").read_text() + "# more\n")
    assert print_of("python", **options) != before[0]
    write(FILES["test"], items("test")[1:])
    assert print_of("agreement", prompts={"red": FILES}) != before[1]


# ---------------------------------------------------------------- public benchmarks


@pytest.mark.parametrize(
    ("options", "config", "named", "refused"),
    [
        ({"task": "arc"}, {"test_split": "test"}, None, True),
        ({"task": "arc"}, {"test_split": "test"}, {"search": "train"}, False),
        ({"task": "arc"}, {"test_split": "test", "validation_split": "validation"}, {"search": "validation"}, False),
        ({"task": "hellaswag"}, {"validation_split": "validation"}, {"search": "validation"}, True),
        ({"task": "hellaswag"}, {"validation_split": "validation"}, None, True),
        ({"task": "arc"}, {"test_split": "eval"}, {"search": "test"}, True),
        ({"task": "arc"}, {"test_split": "test[:50]"}, {"search": "test[50:]"}, True),
        ({"file": "x.yaml"}, {"dataset_path": "someone/bench", "test_split": "test"}, None, True),
        ({"file": "x.yaml"}, {"dataset_path": "json", "test_split": "test"}, None, False),
        ({"file": "x.yaml"}, {"dataset_path": "base", "test_split": "test"}, None, False),
        ({}, {"test_split": "search"}, {"search": "search"}, False),
    ],
)
def test_test_sets_of_public_benchmarks_are_not_searched_on(
    work: Path, options: dict[str, Any], config: dict[str, Any], named: dict[str, str] | None, refused: bool
) -> None:
    from evomerge.objectives._public import benchmark_problems

    found = benchmark_problems(ObjectiveSpec("it", "lm_eval", options), {"training_split": "train", **config}, named)
    assert bool(found) == refused
    if refused:
        assert "splits: {search: train}" in str(found[0]) and "--allow-benchmark-tests" in str(found[0])
    allowed = ObjectiveSpec("it", "lm_eval", options, allow_benchmark_tests=True)
    assert benchmark_problems(allowed, config, named) == []


def test_the_search_on_an_installed_tasks_test_split_needs_the_flag(work: Path) -> None:
    """arc_easy as lm-eval ships it; its data set is found under its hub name, here a local folder."""
    folder = Path("allenai/ai2_arc")
    folder.mkdir(parents=True)
    head = "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n"
    splits = ("train", "validation", "test")
    (folder / "README.md").write_text(
        head + "".join(f"  - {{split: {s}, path: {s}.jsonl}}\n" for s in splits) + "---\n"
    )
    for split in splits:
        choices = {"text": ["yes", "no"], "label": ["A", "B"]}
        rows = [{"id": f"{split}{i}", "question": f"Is {i} odd, asks {split}?", "choices": choices,
                 "answerKey": "AB"[i % 2]} for i in range(20)]  # fmt: skip
        write(str(folder / f"{split}.jsonl"), rows)
    cut = ObjectiveSpec("arc", "lm_eval", {"task": "arc_easy"})
    (found,) = make_objective(cut).check()
    assert "cut out of the split 'test' of allenai/ai2_arc" in str(found)
    assert "`splits: {search: train}`" in str(found) and "--allow-benchmark-tests" in str(found)
    assert make_objective(replace(cut, allow_benchmark_tests=True)).check() == []
    for search, refused in (("test", True), ("validation", False), ("train", False)):
        options = {"task": "arc_easy", "splits": {"search": search}}
        assert bool(make_objective(replace(cut, options=options)).check()) == refused
    flips = {"of": [{"kind": "lm_eval", "task": "arc_easy"}], "reference": "red"}
    assert "cut out of" in problems_of("negative_flips", **flips)


def test_the_flag_is_passed_on_by_the_commands(work: Path) -> None:
    from evomerge.commands import _resume_command, evaluate
    from evomerge.config import load_study_file

    assert not any(o.allow_benchmark_tests for o in load_study_file("study.yaml").objectives)
    assert all(o.allow_benchmark_tests for o in load_study_file("study.yaml", allow_benchmark_tests=True).objectives)
    command = _resume_command("study.yaml", (), inline=False, allow_task_code=False, allow_benchmark_tests=True)
    assert command == "evomerge search study.yaml --allow-benchmark-tests"
    rows = evaluate("red", "study.yaml", "search", (), allow_task_code=False, allow_benchmark_tests=True)
    assert [row["objective"] for row in rows] == ["pick", "text"]


def test_the_examples_of_the_documentation_are_well_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each yaml block of docs/objectives.md is one objective of a study of the demo zoo, of every kind there is."""
    import re

    from evomerge import registry
    from evomerge.strict_yaml import load_yaml

    monkeypatch.chdir(ROOT)
    text = Path("docs/objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    blocks = [b.replace("file: mine.py", f"file: {tmp_path / 'mine.py'}") for b in blocks]
    study = load_yaml(Path("zoo/demo.yaml").read_text()).data | {"objectives": [load_yaml(b).data for b in blocks]}
    config = parse_study(json.dumps(study), "study.yaml", allow_task_code=True)
    assert {o.kind for o in config.objectives} == {*registry.names("objectives")} - {"perplexity"}
    made = {o.kind: make_objective(o) for o in config.objectives}
    assert {kind: objective.check() for kind, objective in made.items()} == {kind: [] for kind in made}
    assert all(objective.splits == ("search", "validation", "test") for objective in made.values())
    live = LiveModel("zoo/models/base")
    assert 0 < made["python"].score(live, "search", range(3)).value <= 1
