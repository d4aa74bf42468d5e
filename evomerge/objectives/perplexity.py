"""Objective kind `perplexity`: bits per byte on local text, smaller is better.

Bits per byte compare across tokenizers: the negative log-likelihood of the text in bits over its length
in UTF-8 bytes (Gao et al. 2020, The Pile, arXiv 2101.00027, section 3.1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.errors import CandidateFailure, ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores, resolve_path
from evomerge.objectives._compiled import unknown_note
from evomerge.objectives._items import split_of
from evomerge.objectives._options import PerplexityOptions, read_options
from evomerge.scoring import Plan, backing_off

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


class PerplexityObjective:
    """Bits per byte over documents.

    Options: `files` (search, validation and test -> a text file; documents are separated by blank lines), or
    one `file` whose documents are divided 60/20/20 by the hash of their content,
    `limit` (documents per split), `max_tokens` (window; at least 2; default the model's context, at most 1024),
    `batch_size` (the most windows in a forward pass; default: as memory allows). A document longer than
    the window is cut into windows that do not overlap; the first token of each is context only unless the
    tokenizer has a beginning-of-sequence token, so every model is charged for the same bytes.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    maximize = False
    partial = True
    bounds: tuple[float | None, float | None] = (0.0, None)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = read_options(PerplexityOptions, spec.options, f"objective {spec.name}")
        named = {str(s): f for s, f in (self.options.files or {}).items()}
        named = named or dict.fromkeys(SPLITS, self.options.file or "")
        self.files: dict[str, Path] = {s: resolve_path(spec, f) for s, f in named.items()}
        self._texts: dict[str, list[str]] = {}
        self._plans: dict[tuple[str, tuple[int, ...] | None], tuple[int, Plan]] = {}

    def check(self) -> list[Problem]:
        """Files exist, hold documents and share none."""
        where = f"objective {self.name}"
        problems: list[Problem] = []
        seen: dict[str, str] = {}
        for split, path in self.files.items():
            try:
                documents = self._documents(split)
            except (OSError, UnicodeDecodeError) as error:
                problems.append(Problem(f"cannot read {path}: {error}", where))
                continue
            if not documents:
                problems.append(Problem(f"{path} holds no text for the {split} split", where))
            for text in documents:
                other = seen.setdefault(hashlib.sha256(text.encode()).hexdigest(), split)
                if other != split:
                    problems.append(Problem(f"the {other} and {split} splits share documents", where))
                    break
        return problems

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """Text that the tokenizer does not know compresses well and says nothing."""
        lines = unknown_note(outline.tokenizer, self._documents("search"))
        return [], [f"objective {self.name}, search split: {line}" for line in lines]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a file."""
        return tuple(s for s in SPLITS if s in self.files)

    def fingerprint(self) -> str:
        """Hash of the options and the files' contents."""
        whole = hashlib.sha256(self.options.model_dump_json(exclude={"file", "files", "batch_size"}).encode())
        for split in self.splits:
            whole.update(self.files[split].read_bytes())
        return whole.hexdigest()

    def size(self, split: str) -> int:
        """The number of documents."""
        return len(self._documents(split))

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N, 2) bits and bytes of each document."""
        if split not in self.files:
            raise ConfigError(f"objective {self.name} has no {split} split")
        documents = self._documents(split)
        chosen = documents if positions is None else [documents[i] for i in positions]
        live.forget_logits()
        nats = backing_off(live, lambda: self._planned(split, positions, live).run(live)).total
        live.require_finite_logits()
        bits = -nats / math.log(2)
        size = np.array([len(d.encode()) for d in chosen], dtype=np.float64)
        if not np.isfinite(bits).all():
            raise CandidateFailure(f"{self.name}: non-finite likelihood", reason="scores")
        return self.aggregate(np.stack([bits, size], axis=1))

    def aggregate(self, items: np.ndarray) -> Scores:
        """Bits over bytes, all documents together."""
        bits, size = items.T
        value = bits.sum() / size.sum()
        # The ratio of two sums over documents: variance by linearisation (delta method).
        residual = bits - value * size
        n = len(items)
        stderr = math.sqrt(residual.var(ddof=1) * n) / size.sum() if n > 1 else 0.0
        return Scores(float(value), float(stderr), items)

    def _documents(self, split: str) -> list[str]:
        if split not in self._texts:
            text = Path(self.files[split]).read_text(encoding="utf-8")
            documents = [d.strip() for d in text.split("\n\n") if d.strip()]
            if self.options.files is None:
                documents = [d for d in documents if split_of(hashlib.sha256(d.encode()).hexdigest()) == split]
            self._texts[split] = documents[: self.options.limit]
        return self._texts[split]

    def _planned(self, split: str, positions: Sequence[int] | None, live: LiveModel) -> Plan:
        """The documents' windows in batches, kept for the next candidates."""
        key = (split, None if positions is None else tuple(positions))
        if key not in self._plans or self._plans[key][0] != live.batch_tokens:
            documents = self._documents(split)
            chosen = range(len(documents)) if positions is None else positions
            windows = [(i, w) for i, at in enumerate(chosen) for w in self._windows(documents[at], live)]
            plan = Plan(
                [(window[:1], window[1:]) for _, window in windows],
                owners=[i for i, _ in windows],
                n=len(chosen),
                max_length=max((len(w) for _, w in windows), default=1),
                batch_tokens=live.batch_tokens,
                share=0,
                max_rows=self.options.batch_size,
            )
            self._plans[key] = live.batch_tokens, plan
        return self._plans[key][1]

    def _windows(self, text: str, live: LiveModel) -> list[list[int]]:
        """Token ids of each window; one of a single token has nothing to predict and is left out."""
        context = int(getattr(live.model.config, "max_position_embeddings", 1024))
        limit = self.options.max_tokens or min(context, 1024)
        bos = live.tokenizer.bos_token_id
        head = [bos] if bos is not None else []
        ids = live.tokenizer(text, add_special_tokens=False)["input_ids"]
        step = max(1, limit - len(head))
        windows = [head + ids[i : i + step] for i in range(0, len(ids), step)]
        return [window for window in windows if len(window) > 1]


registry.register("objectives", "perplexity", PerplexityObjective)
