"""Objective kind `agreement`: how far the merged model is from each expert on that expert's own prompts.

The soft-target loss of "Expert Merging" (arXiv 2509.25712) at temperature 1, less the expert's own entropy: a score of
candidates instead of a loss for gradients.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores
from evomerge.objectives._items import Items
from evomerge.objectives._options import AgreementOptions, read_options
from evomerge.objectives._prompts import Tokens, context_of, fitting, next_token_logprobs, noted, tokens_of
from evomerge.objectives._references import folder_of, reference_identity, reference_problems
from evomerge.residency import show_bytes
from evomerge.scoring import backing_off
from evomerge.weights import Checkpoint

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


class AgreementObjective:
    """Mean KL(expert || merged) in nats over next-token distributions, each expert on its own prompts; no labels.

    Options: `prompts` (an expert's name, or a checkpoint folder -> a file of JSON lines, divided 60/20/20, or one file
    for each of search, validation and test), `prompt` (the column, default "prompt"), `limit` (prompts per expert
    and split), `max_tokens` (a longer prompt is cut to its first tokens; default 64), `batch_size` (prompts per
    pass; default: as memory allows), `max_bytes` (default 2 GB).

    An item is a prompt: the mean of the divergences after each of its tokens. Experts count alike, however many prompts
    they have. Each expert's log-probabilities are computed once per worker and kept in host memory as float32: 4 bytes
    for each token and word of the vocabulary. `check` refuses what could need more than `max_bytes`.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    maximize = False
    partial = True
    bounds: tuple[float | None, float | None] = (0.0, None)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = read_options(AgreementOptions, spec.options, f"objective {spec.name}")
        column = (self.options.prompt,)
        self.items = {
            expert: Items(spec, source if isinstance(source, str) else dict(source), column, self.options.limit)
            for expert, source in self.options.prompts.items()
        }
        self._rows: dict[tuple[str, str], list[list[int]]] = {}
        self._known: dict[tuple[str, str], list[Tensor]] = {}  # (T, V) log-probabilities of each prompt, on the CPU

    @property
    def references(self) -> tuple[str, ...]:
        """The experts' folders."""
        return tuple(dict.fromkeys(folder_of(self.spec, expert) for expert in self.items))

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that every expert has prompts for."""
        return tuple(s for s in SPLITS if all(s in items.splits for items in self.items.values()))

    def check(self) -> list[Problem]:
        """Experts, files, columns, splits, and the memory that log-probabilities could need."""
        problems = reference_problems(self.spec, self.items)
        where = f"objective {self.name}"
        if "search" not in self.splits:
            problems.append(Problem("not every expert has a search split", where, "name one under `prompts:`"))
        found = [p for items in self.items.values() for p in items.check()]
        problems += found or self._memory_problems(where)
        return problems

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """Prompts that the tokenizer has no tokens for, and notes on those that are cut."""
        pairs = [(expert, split) for expert in self.items for split in self.splits]
        return fitting(functools.partial(self._tokens, outline, *pair) for pair in pairs)

    def fingerprint(self) -> str:
        """Hash of the experts, their prompts and how many tokens of them count."""
        parts = [f"{self.options.prompt} {self.options.max_tokens}"]
        parts += [f"{reference_identity(self.spec, e)} {items.fingerprint()}" for e, items in self.items.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def size(self, split: str) -> int:
        """The number of prompts of all experts."""
        return sum(len(items.of(split)) for items in self.items.values())

    def observe(self, reference: str, live: LiveModel, split: str) -> None:
        """Keep an expert's log-probabilities on its own prompts."""
        for expert in self.items:
            if folder_of(self.spec, expert) != reference:
                continue
            rows = self._tokenized(live, expert, split)
            self._require_memory(rows, live)
            live.forget_logits()
            known = backing_off(live, functools.partial(self._logprobs, live, rows))
            live.require_finite_logits()
            self._known[expert, split] = known

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N, 2) each prompt's mean KL over n, and 1 / n, for the n prompts of its expert."""
        wanted = range(self.size(split)) if positions is None else positions
        found: list[tuple[float, float]] = []
        start = 0
        live.forget_logits()
        for expert, items in self.items.items():
            n = len(items.of(split))
            own = [i - start for i in wanted if start <= i < start + n]
            values = backing_off(live, functools.partial(self._divergences, live, expert, split, own))
            found += [(value / n, 1 / n) for value in values]
            start += n
        live.require_finite_logits()
        return self.aggregate(np.array(found))

    def aggregate(self, items: np.ndarray) -> Scores:
        """The mean over experts of their prompts' means, as a ratio of two sums over prompts."""
        top, bottom = items.T
        value = top.sum() / bottom.sum()
        # Variance by linearisation (delta method).
        residual = top - value * bottom
        n = len(items)
        stderr = math.sqrt(residual.var(ddof=1) * n) / bottom.sum() if n > 1 else 0.0
        return Scores(float(value), float(stderr), items)

    def _divergences(self, live: LiveModel, expert: str, split: str, own: Sequence[int]) -> np.ndarray:
        """(len(own),) mean KL(expert || merged) of an expert's prompts. own: positions among them."""
        if (expert, split) not in self._known:
            raise ConfigError(
                f"objective {self.name}: the expert {expert!r} was not observed on the {split} split",
                hint="a worker does that when it starts; without one, call observe() with the expert installed",
            )
        rows = self._tokenized(live, expert, split)
        found = np.zeros(len(own))
        for i, logprobs in next_token_logprobs(live, [rows[k] for k in own], self.options.batch_size):
            theirs = self._known[expert, split][own[i]].to(live.device)
            found[i] = float((theirs.exp() * (theirs - logprobs)).sum(dim=-1).double().mean())
        return found

    def _logprobs(self, live: LiveModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        found = {i: logprobs.cpu() for i, logprobs in next_token_logprobs(live, rows, self.options.batch_size)}
        return [found[i] for i in range(len(rows))]

    def _tokenized(self, live: LiveModel, expert: str, split: str) -> list[list[int]]:
        if (expert, split) not in self._rows:
            self._rows[expert, split] = noted(live, self._tokens(live, expert, split))
        return self._rows[expert, split]

    def _tokens(self, model: LiveModel | Outline, expert: str, split: str) -> Tokens:
        longest, subject = context_of(model, self.options.max_tokens), f"objective {self.name}"
        return tokens_of(model, self.items[expert].of(split), self.options.prompt, longest, subject)

    def _memory_problems(self, where: str) -> list[Problem]:
        """What all splits could need: a token is at least one byte of text, and some tokenizers add two."""
        words = _vocabulary(self.spec.models.get("base"))
        texts = [i.doc[self.options.prompt] for m in self.items.values() for s in self.splits for i in m.of(s)]
        tokens = sum(min(self.options.max_tokens, len(text.encode()) + 2) for text in texts)
        needed = 4 * tokens * words
        if needed <= self.options.max_bytes:
            return []
        message = (
            f"the experts' log-probabilities could take {show_bytes(needed)} ({tokens} tokens of {words} words each), "
            f"more than `max_bytes: {self.options.max_bytes}`"
        )
        return [Problem(message, where, "lower `limit:` or `max_tokens:`, or raise `max_bytes:`")]

    def _require_memory(self, rows: Sequence[Sequence[int]], live: LiveModel) -> None:
        kept = sum(p.nbytes for known in self._known.values() for p in known)
        words = int(live.model.get_input_embeddings().num_embeddings)
        needed = kept + 4 * words * sum(len(row) for row in rows)
        if needed > self.options.max_bytes:
            raise ConfigError(
                f"objective {self.name}: the experts' log-probabilities take {show_bytes(needed)}, more than "
                f"`max_bytes: {self.options.max_bytes}`",
                hint="lower `limit:` or `max_tokens:`, or raise `max_bytes:`",
            )


def _vocabulary(folder: str | None) -> int:
    """Words that the model at a folder predicts; 0 if its configuration does not say."""
    if folder is None:
        return 0
    config = Checkpoint(folder).config
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)


registry.register("objectives", "agreement", AgreementObjective)
