"""A tiny family of models, tasks and studies, made once per test session. No network, no home folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine two threads wait for each other
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("EVOMERGE_STORAGE", None)
os.environ.pop("OPTUNA_STORAGE", None)

ROOT = Path(__file__).parent.parent
EXPERTS = ("red", "green", "blue")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, red, green, blue (random 2-layer Llamas), tasks and a study file."""
    root = tmp_path_factory.mktemp("family")
    make_family(root)
    return root


def make_family(root: Path) -> None:
    """Write the family into a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    tokenizer = ROOT / "tests" / "golden" / "e2e" / "models" / "base"
    for name in ("base", *EXPERTS):
        if name != "base":
            torch.manual_seed(EXPERTS.index(name) + 1)
            for parameter in base.parameters():
                parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
        base.save_pretrained(root / name)
        shutil.copy(tokenizer / "tokenizer.json", root / name / "tokenizer.json")
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "!"}
        (root / name / "tokenizer_config.json").write_text(json.dumps(special))
        if name != "base":
            base = LlamaForCausalLM.from_pretrained(root / "base")
    write_tasks(root)
    (root / "study.yaml").write_text(STUDY)


STUDY = """\
name: tiny
base: base
experts:
  red: red
  green: green
  blue: blue
space:
  method: task_arithmetic
  genes:
    weight: {low: 0.0, high: 1.2, per_expert: true}
objectives:
  - {name: pick, kind: lm_eval, file: pick.yaml, metric: acc, batch_size: 16}
  - name: text
    kind: perplexity
    files: {search: text.search.txt, validation: text.validation.txt, test: text.test.txt}
optimizer: random
budget: {evaluations: 14}
workers: {local: 1, threads: 1}
seed: 3
"""


def write_tasks(root: Path) -> None:
    """Three tasks over JSON lines, one per output type, and a text in three splits."""
    for split, start, count in (("search", 0, 12), ("validation", 40, 10), ("test", 80, 14)):
        rows = []
        for i in range(start, start + count):
            rows.append(
                {
                    "prompt": f"item {i} is",
                    "answer": f" {i % 7}",
                    "choices": [f" {(i + k) % 7}" for k in range(3)],
                    "gold": i % 3,
                }
            )
        (root / f"items.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        text = "\n\n".join(f"Document {i} talks of things like {i * 31 % 17}." for i in range(start, start + 5))
        (root / f"text.{split}.txt").write_text(text)
    files = "".join(f"    {s}: items.{s}.jsonl\n" for s in ("search", "validation", "test"))
    head = "dataset_path: json\ndataset_kwargs:\n  data_files:\n" + files + "test_split: search\ndoc_to_text: prompt\n"
    acc = "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    (root / "pick.yaml").write_text(
        "task: tiny_pick\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "target_delimiter: ''\n" + head + acc
    )
    (root / "say.yaml").write_text(
        "task: tiny_say\noutput_type: loglikelihood\ndoc_to_target: answer\ntarget_delimiter: ''\n" + head + acc
    )
    (root / "write.yaml").write_text(
        "task: tiny_write\noutput_type: generate_until\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        + head
        + "generation_kwargs: {until: ['\\n'], max_gen_toks: 3, do_sample: false}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )


@pytest.fixture
def work(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the family as the working directory."""
    target = tmp_path / "work"
    shutil.copytree(family, target)
    monkeypatch.chdir(target)
    return target


@pytest.fixture
def evomerge(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a person does, in another process."""

    def run(
        *args: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "evomerge", *args],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def study_rows(record: Any) -> list[tuple[Any, ...]]:
    """What must be equal between two runs of one study: everything but times and processes."""
    return [
        (c.number, c.state, c.label, c.fingerprint, c.params, c.values, c.stderr, c.arrival, c.reason)
        for c in record.candidates()
    ]
