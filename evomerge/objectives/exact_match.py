"""Objective kind `exact_match`: prompts and their answers from JSON lines, generated greedily and compared as texts.

The items become an lm-eval task of type generate_until in memory: stop strings and the metric are lm-eval's, and the
forward passes are those of kind `lm_eval`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from evomerge import registry
from evomerge.errors import Problem
from evomerge.objectives import ObjectiveSpec
from evomerge.objectives._items import Items
from evomerge.objectives._options import ExactMatchOptions, read_options
from evomerge.objectives.lm_eval import LmEvalObjective

EDGES = [r"^\s+", r"\s+$"]  # white space around answers does not count


class ExactMatchObjective(LmEvalObjective):
    """Share of prompts whose greedy continuation is the answer.

    Options: `file` (JSON lines, divided 60/20/20) or `files` (search, validation and test -> a file), `prompt` and
    `answer` (the columns; default "prompt" and "answer"), `until` (texts that end a response and are not part of it;
    default a line break), `max_tokens` (new tokens, default 64), `ignore_case`, `ignore_punctuation`, `limit` (items
    per split), `batch_size` (default: as memory allows), `apply_chat_template`. White space at both ends is ignored.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    def __init__(self, spec: ObjectiveSpec) -> None:
        own = read_options(ExactMatchOptions, spec.options, f"objective {spec.name}")
        self.own = own
        self.items = Items(spec, own.source, (own.prompt, own.answer), own.limit)
        options: dict[str, Any] = {
            "file": "in memory",
            "metric": "exact_match",
            "splits": {split: split for split in self.items.splits},
            "batch_size": own.batch_size,
            "apply_chat_template": own.apply_chat_template,
        }
        super().__init__(replace(spec, options=options))

    def check(self) -> list[Problem]:
        """Files, columns and splits; then what lm-eval makes of them."""
        return self.items.check() or super().check()

    def _configuration(self) -> dict[str, Any]:
        if self._config is None:
            own = self.own
            self._config = {
                "task": "exact_match",
                "custom_dataset": _documents,
                "dataset_kwargs": {"items": self.items},
                "test_split": "search",
                "output_type": "generate_until",
                "doc_to_text": own.prompt,
                "doc_to_target": own.answer,
                "num_fewshot": 0,
                "generation_kwargs": {"until": list(own.until), "max_gen_toks": own.max_tokens, "do_sample": False},
                "metric_list": [
                    {
                        "metric": "exact_match",
                        "aggregation": "mean",
                        "higher_is_better": True,
                        "ignore_case": own.ignore_case,
                        "ignore_punctuation": own.ignore_punctuation,
                        "regexes_to_ignore": copy.copy(EDGES),
                    }
                ],
            }
        return self._config


def _documents(*, items: Items, **metadata: Any) -> dict[str, Any]:
    """What lm-eval asks for the data set: split -> documents, of the columns that are used."""
    from datasets import Dataset

    rows = {split: [{c: item.doc[c] for c in items.columns} for item in items.of(split)] for split in items.splits}
    return {split: Dataset.from_list(found) for split, found in rows.items()}


registry.register("objectives", "exact_match", ExactMatchObjective)
