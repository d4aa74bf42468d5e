"""lm-eval's per-item metrics of likelihoods, for all items at once.

Only what its own `process_results` computes from a task without code or filters of its own; the objective compares
the two on the first model that it scores, and goes on with lm-eval's if they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.scoring import Likelihoods

VectorMetric = Callable[[Likelihoods], NDArray[np.float64]]

SIZES: dict[str, Callable[[str], float]] = {
    "acc": lambda choice: 1.0,
    "acc_norm": lambda choice: float(len(choice)),
    "acc_bytes": lambda choice: float(len(choice.encode("utf-8"))),
}
ACCURACIES = (*SIZES, "acc_mutual_info")


def guessing(task: Any, docs: Sequence[Any], metric: str) -> float | None:
    """The expected share of right answers of a model that picks any choice; None where choices are not what counts.

    For accuracies of multiple-choice tasks with one right choice, without results or filters of the task's own.

    Args:
        docs: what is scored.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or metric not in ACCURACIES or task.multiple_target or not _is_plain(task):
        return None
    counts = [len(task.doc_to_choice(doc)) for doc in docs]
    return float(np.mean([1.0 / count for count in counts])) if counts and all(counts) else None


def vector_metric(
    task: Any, docs: Sequence[tuple[int, Any]], instances: Sequence[Any], metric: str
) -> VectorMetric | None:
    """The metric as a function of all likelihoods, or None if there is no such form.

    Args:
        docs: (id, document) of each item, in order.
        instances: lm-eval's requests, in the order of the likelihoods.
    """
    if not _is_plain(task) or any(i.repeats != 1 for i in instances):
        return None
    rows = {doc_id: row for row, (doc_id, _) in enumerate(docs)}
    at = np.array([rows[i.doc_id] for i in instances]), np.array([i.idx for i in instances])
    if task.OUTPUT_TYPE == "loglikelihood" and len(instances) == len(docs):
        order = np.argsort(at[0])
        columns = {"acc": lambda found: found.greedy, "perplexity": lambda found: found.total}
        column = columns.get(metric)
        return None if column is None else lambda found: column(found)[order].astype(np.float64)
    if task.OUTPUT_TYPE == "multiple_choice" and metric in SIZES and not task.multiple_target:
        return _choice(task, docs, at, SIZES[metric])
    return None


def _choice(
    task: Any,
    docs: Sequence[tuple[int, Any]],
    at: tuple[NDArray[np.int64], NDArray[np.int64]],
    size: Callable[[str], float],
) -> VectorMetric | None:
    choices = [task.doc_to_choice(doc) for _, doc in docs]
    widest = max(map(len, choices))
    if sum(map(len, choices)) != len(at[0]):
        return None  # unconditional likelihoods too: acc_mutual_info
    golds = [_gold(task, doc, c) for (_, doc), c in zip(docs, choices, strict=True)]
    if None in golds:
        return None
    gold = np.array(golds)
    divisors = np.ones((len(docs), widest))
    for row, texts in enumerate(choices):
        divisors[row, : len(texts)] = [size(text) for text in texts]

    def items(found: Likelihoods) -> NDArray[np.float64]:
        logs = np.full((len(docs), widest), -np.inf)
        logs[at] = found.total
        with np.errstate(divide="ignore", invalid="ignore"):  # an empty choice has no length, as in lm-eval
            best = np.argmax(logs / divisors, axis=1)
        return np.asarray(best == gold, dtype=np.float64)

    return items


def _gold(task: Any, doc: Any, choices: list[str]) -> int | None:
    """Index of the right choice; -100 for none; None for what lm-eval compares in a way of its own."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else -100
    if type(gold) is not int:
        return None
    return gold if gold < len(choices) else -100


def _is_plain(task: Any) -> bool:
    """Whether results go from the model to lm-eval's own metric unchanged."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.filters.selection import TakeFirstFilter

    own = type(task).process_results is ConfigurableTask.process_results and not callable(task.config.process_results)
    filters = getattr(task, "_filters", [])
    plain = [
        [type(f()) if callable(f) else type(f) for f in ensemble.filters] == [TakeFirstFilter] for ensemble in filters
    ]
    return own and plain == [True]
