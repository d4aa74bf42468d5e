"""Few-shot examples never come from held-out items: a prompt that quotes a test item would give its answer away."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from evomerge.errors import Problem

HINT = "set `fewshot_split:` in the task file to documents that no split scores, or `num_fewshot: 0`"


def content_hash(doc: Any) -> str:
    """Equal for documents of equal content, whatever the order of their keys."""
    text = json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def shots(task: Any) -> int:
    """The number of examples in each prompt."""
    return int(task.config.num_fewshot or 0)


def example_hashes(task: Any) -> list[str]:
    """Contents of the documents that examples are drawn from; none if the task shows no examples."""
    return [content_hash(doc) for doc in task.sampler.df] if shots(task) and hasattr(task, "sampler") else []


def keep_examples_apart(task: Any, held_out: set[str]) -> None:
    """Let lm-eval's sampler draw from what is not held out, and never the item that is being asked."""
    if not shots(task) or not hasattr(task, "sampler"):
        return
    task.sampler.replace_df([doc for doc in task.sampler.df if content_hash(doc) not in held_out])
    asked = {content_hash(doc) for doc in task.eval_docs}
    if asked & set(example_hashes(task)):
        # lm-eval leaves the asked item out of its own examples only if the two splits have one name.
        task.fewshot_cfg.split = task.config.test_split


def fewshot_problems(task: Any, held_out: dict[str, str], where: str) -> list[Problem]:
    """What is wrong with the examples of a task. held_out: content -> its split."""
    wanted = shots(task)
    if not wanted:
        return []
    if not hasattr(task, "sampler"):
        return [Problem("the task does not say where its few-shot examples come from", where, HINT)]
    examples = example_hashes(task)
    leaks = sorted({held_out[e] for e in examples if e in held_out})
    problems = [Problem(f"few-shot examples share items with the {' and '.join(leaks)} split", where, HINT)] * bool(
        leaks
    )
    if wanted > len(examples):
        problems.append(
            Problem(f"`num_fewshot:` is {wanted}, but there are {len(examples)} documents to take examples from", where)
        )
    return problems
