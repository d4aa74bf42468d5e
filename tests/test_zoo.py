"""The demo zoo: sound data, checkpoints that load as they are, and experts that are experts."""

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

data = importlib.import_module("zoo.data")
score = importlib.import_module("zoo.score")
train = importlib.import_module("zoo.train")

ZOO = Path(data.__file__).parent
EXPERTS = ("math", "cipher", "latin")
MODELS = ("base", *EXPERTS)


def load(name):
    return AutoModelForCausalLM.from_pretrained(ZOO / "models" / name)


def test_shipped_data_is_what_the_generator_makes_and_no_two_splits_share_an_item():
    assert data.check() == []


def test_check_names_a_changed_file(tmp_path, monkeypatch):
    for path in data.DATA.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(data, "DATA", tmp_path)
    stolen = data.load("math", "test")[0]
    path = data.path_of("math", "search")
    path.write_text(stolen.line() + path.read_text())
    problems = data.check()
    assert any("differs" in p for p in problems)
    assert any("hashes to another split" in p for p in problems)
    assert any("of math.test is also in the search split" in p for p in problems)


def test_sizes_of_the_splits():
    for task, split in itertools.product(data.TASKS, data.SIZES):
        prompts = [item.prompt for item in data.load(task, split)]
        assert len(prompts) == len(set(prompts)) == data.SIZES[split]


def test_training_streams_share_no_prompt_with_the_splits():
    stored = {data.core(i.prompt) for t in data.TASKS for s in data.SIZES for i in data.load(t, s)}
    for name, make in train.STREAMS.items():
        items = itertools.islice(data.stream(make, "train", f"test {name}"), 2000)
        assert not stored.intersection(data.core(i.prompt) for i in items)


def test_choices_hold_the_answer_once_and_differ():
    for task in ("math", "cipher"):
        for item in data.load(task, "test"):
            assert len(item.choices) == len(set(item.choices)) == 4
            assert item.choices.count(item.answer) == 1


def test_the_whole_zoo_fits_in_8_mb():
    files = [p for p in ZOO.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 8_000_000


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load_whole_and_in_float32(name):
    model, info = AutoModelForCausalLM.from_pretrained(ZOO / "models" / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.generation_config.eos_token_id == data.VOCABULARY.index("</s>")


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_round_trip_and_context_boundary(name):
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "models" / name)
    for task in data.TASKS:
        for item in data.load(task, "search"):
            text = f"{item.prompt} {item.answer}"
            ids = tokenizer(text).input_ids
            assert ids == score.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            context = tokenizer(item.prompt).input_ids
            assert ids[: len(context)] == context
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")


def test_experts_share_the_frozen_embedding_of_the_base():
    embedding = load("base").model.embed_tokens.weight
    for name in EXPERTS:
        assert torch.equal(load(name).model.embed_tokens.weight, embedding)


def test_task_files_point_at_the_data_and_search_by_default():
    for task in data.TASKS:
        path = ZOO / "tasks" / f"{task}.yaml"
        spec = yaml.safe_load(path.read_text())
        files = spec["dataset_kwargs"]["data_files"]
        assert set(files) == set(data.SIZES)
        for split, file in files.items():
            assert (path.parent / file).resolve() == data.path_of(task, split)
        assert spec["test_split"] == "search"
        assert spec["task"] == f"zoo_{task}"
        columns = set(json.loads(data.path_of(task, "search").read_text().splitlines()[0]))
        target = spec["doc_to_target"].strip(" {}")  # zoo_latin puts a space before its answer
        assert {spec["doc_to_text"], target} <= columns
        assert all("higher_is_better" in metric for metric in spec["metric_list"])


def test_every_expert_beats_the_base_at_its_own_skill():
    items = {task: data.load(task, "validation") for task in data.TASKS}
    base = score.score_all(load("base"), items)
    for name in EXPERTS:
        expert = score.score_all(load(name), {name: items[name]})
        assert expert[name].mean() > base[name].mean() + 0.03
    assert max(s.mean() for s in base.values()) < 0.9


def test_teacher_forced_exact_match_is_greedy_generation():
    model, tokenizer = load("base"), AutoTokenizer.from_pretrained(ZOO / "models" / "base")
    items = data.load("cross", "validation")[:20]
    expected = score.score(model, items).tolist()
    for item, right in zip(items, expected, strict=True):
        prompt = tokenizer(item.prompt, return_tensors="pt")
        new = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert (tokenizer.decode(new, skip_special_tokens=True) == item.answer) == bool(right)
