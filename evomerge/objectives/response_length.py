"""Objective kind `response_length`: how many tokens the model answers with, smaller is better by default.

The cost beside accuracy when long and short reasoners are merged ("Unlocking Efficient Long-to-Short LLM Reasoning with
Model Merging").
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.decoding import DecodingPlan
from evomerge.errors import ConfigError, Problem
from evomerge.objectives import ObjectiveSpec, Scores, mean_scores
from evomerge.objectives._items import Items
from evomerge.objectives._options import ResponseLengthOptions, read_options
from evomerge.objectives._prompts import Tokens, context_of, fitting, noted, tokens_of
from evomerge.scoring import backing_off

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


LONGEST = 1 << 30  # a context for models without a limit


class ResponseLengthObjective:
    """Mean number of tokens of the greedy responses to prompts.

    Options: `file` (JSON lines, divided 60/20/20) or `files` (search, validation and test -> a file), `prompt` (the
    column, default "prompt"), `until` (texts that end a response; default a line break), `max_tokens` (new tokens,
    default 64), `maximize` (default false), `limit` (prompts per split), `batch_size` (prompts per pass; default: as
    memory allows), `apply_chat_template`.

    Tokens are counted as they are generated, the one that completes a text of `until` included and the end-of-sequence
    token left out. A response that does not end counts `max_tokens`: choose it larger than answers should be.
    A model that says nothing is the shortest: use it beside an objective of quality.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    partial = True

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.name = spec.name
        self.options = read_options(ResponseLengthOptions, spec.options, f"objective {spec.name}")
        self.maximize = self.options.maximize
        self.bounds: tuple[float | None, float | None] = (0.0, float(self.options.max_tokens))
        self.items = Items(spec, self.options.source, (self.options.prompt,), self.options.limit)
        self._prompts: dict[str, list[list[int]]] = {}

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
        """Hash of the prompts and of what ends a response."""
        options = self.options.model_dump_json(exclude={"file", "files", "batch_size", "limit"})
        return hashlib.sha256(f"{options} {self.items.fingerprint()}".encode()).hexdigest()

    def size(self, split: str) -> int:
        """The number of prompts."""
        return len(self.items.of(split))

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N,) tokens of each response."""
        if split not in self._prompts:
            self._prompts[split] = noted(live, self._tokens(live, split))
        prompts = self._prompts[split]
        chosen = prompts if positions is None else [prompts[i] for i in positions]
        live.forget_logits()
        responses = backing_off(live, lambda: self._responses(live, chosen))
        live.require_finite_logits()
        return self.aggregate(np.array([float(len(tokens)) for tokens in responses]))

    def aggregate(self, items: np.ndarray) -> Scores:
        """The mean over prompts."""
        return mean_scores(items)

    def _responses(self, live: LiveModel, prompts: list[list[int]]) -> list[list[int]]:
        rows = self.options.batch_size
        plan = DecodingPlan(prompts, self.options.max_tokens, batch_tokens=live.batch_tokens, max_rows=rows)
        found = live.model.generation_config.eos_token_id
        ends = {found} if isinstance(found, int) else set(found or ())
        return plan.run(live, ends, lambda tokens: self._stopped(live, tokens))

    def _tokens(self, model: LiveModel | Outline, split: str) -> Tokens:
        subject, context = f"objective {self.name}", context_of(model, LONGEST)
        room = context - self.options.max_tokens
        if room <= 0:
            message = f"`max_tokens: {self.options.max_tokens}` leaves no room for a prompt in a context of {context}"
            raise ConfigError.of([Problem(message, subject, "lower it")])
        items, chat = self.items.of(split), self.options.apply_chat_template
        return tokens_of(model, items, self.options.prompt, room, subject, chat=chat, last=True)

    def _stopped(self, live: LiveModel, tokens: list[int]) -> bool:
        text = live.tokenizer.decode(tokens)
        return any(stop in text for stop in self.options.until)


registry.register("objectives", "response_length", ResponseLengthObjective)
