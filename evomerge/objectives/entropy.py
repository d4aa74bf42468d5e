"""Objective kind `entropy`: how unsure the model is about the next token on prompts, smaller is better.

AdaMerging (arXiv 2310.02575) minimises the entropy of predictions on inputs without labels. Over a whole vocabulary a
model that always repeats itself has little of it too: use it beside other objectives.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.errors import Problem
from evomerge.objectives import ObjectiveSpec, Scores, mean_scores
from evomerge.objectives._items import Items
from evomerge.objectives._options import EntropyOptions, read_options
from evomerge.objectives._prompts import Tokens, context_of, fitting, next_token_logprobs, noted, tokens_of
from evomerge.scoring import backing_off

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


class EntropyObjective:
    """Mean next-token entropy in nats over prompts: -sum_v p(v) log p(v), no labels needed.

    Options: `file` (JSON lines, divided 60/20/20) or `files` (search, validation and test -> a file), `prompt` (the
    column, default "prompt"), `limit` (prompts per split), `max_tokens` (a longer prompt is cut to its first
    tokens; default 1024 or the model's context), `batch_size` (prompts per pass; default: as memory allows).

    An item is a prompt: the mean of the entropies after each of its tokens.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    maximize = False
    partial = True
    bounds: tuple[float | None, float | None] = (0.0, None)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.name = spec.name
        self.options = read_options(EntropyOptions, spec.options, f"objective {spec.name}")
        self.items = Items(spec, self.options.source, (self.options.prompt,), self.options.limit)
        self._rows: dict[str, list[list[int]]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are prompts for."""
        return self.items.splits

    def check(self) -> list[Problem]:
        """Files, columns and splits."""
        return self.items.check()

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """Prompts that the tokenizer has no tokens for, and notes on those that are cut."""
        return fitting(functools.partial(self._tokens, outline, split) for split in self.splits)

    def fingerprint(self) -> str:
        """Hash of the prompts and of how many tokens of them count."""
        whole = f"{self.options.prompt} {self.options.max_tokens} {self.items.fingerprint()}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def size(self, split: str) -> int:
        """The number of prompts."""
        return len(self.items.of(split))

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N,) mean entropy of each prompt, in nats."""
        if split not in self._rows:
            self._rows[split] = noted(live, self._tokens(live, split))
        rows = self._rows[split]
        chosen = rows if positions is None else [rows[i] for i in positions]
        live.forget_logits()
        found = backing_off(live, lambda: self._entropies(live, chosen))
        live.require_finite_logits()
        return self.aggregate(found)

    def aggregate(self, items: np.ndarray) -> Scores:
        """The mean over prompts."""
        return mean_scores(items)

    def _tokens(self, model: LiveModel | Outline, split: str) -> Tokens:
        longest, subject = context_of(model, self.options.max_tokens), f"objective {self.name}"
        return tokens_of(model, self.items.of(split), self.options.prompt, longest, subject)

    def _entropies(self, live: LiveModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
        found = np.zeros(len(rows))
        for i, logprobs in next_token_logprobs(live, rows, self.options.batch_size):
            found[i] = float(-(logprobs.exp() * logprobs).sum(dim=-1).double().mean())
        return found


registry.register("objectives", "entropy", EntropyObjective)
