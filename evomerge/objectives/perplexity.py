"""Objective kind `perplexity`: bits per byte on local text, smaller is better.

Bits per byte compare across tokenizers: the negative log-likelihood of the text in bits over its length
in UTF-8 bytes (Gao et al. 2020, The Pile, arXiv 2101.00027, section 3.1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evomerge import registry
from evomerge.errors import CandidateFailure, ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores, resolve_path
from evomerge.objectives._options import PerplexityOptions, read_options

if TYPE_CHECKING:
    from evomerge.model import LiveModel


class PerplexityObjective:
    """Bits per byte over documents.

    Options: `files` (search, validation and test -> a text file; documents are separated by blank lines),
    `limit` (documents per split), `max_tokens` (window; at least 2; default the model's context, at most 1024),
    `batch_size` (windows per forward pass, default 16). A document longer than the window is cut into
    windows that do not overlap; the first token of each is context only unless the tokenizer has a
    beginning-of-sequence token, so every model is charged for the same bytes.

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
        self.files: dict[str, Path] = {s: resolve_path(spec, f) for s, f in self.options.files.items()}
        self._windows: dict[str, list[tuple[int, list[int]]]] = {}

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
                problems.append(Problem(f"{path} holds no text", where))
            for text in documents:
                other = seen.setdefault(hashlib.sha256(text.encode()).hexdigest(), split)
                if other != split:
                    problems.append(Problem(f"the {other} and {split} splits share documents", where))
                    break
        return problems

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a file."""
        return tuple(s for s in SPLITS if s in self.files)

    def fingerprint(self) -> str:
        """Hash of the options and the files' contents."""
        whole = hashlib.sha256(self.options.model_dump_json(exclude={"files", "batch_size"}).encode())
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
        if split not in self._windows:
            self._windows[split] = self._cut(documents, live)
        chosen = range(len(documents)) if positions is None else positions
        place = {document: i for i, document in enumerate(chosen)}
        windows = [(place[document], ids) for document, ids in self._windows[split] if document in place]
        live.forget_logits()
        bits = self._bits(live, windows, len(chosen))
        live.require_finite_logits()
        size = np.array([len(documents[i].encode()) for i in chosen], dtype=np.float64)
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
        text = Path(self.files[split]).read_text(encoding="utf-8")
        documents = [d.strip() for d in text.split("\n\n") if d.strip()]
        return documents[: self.options.limit]

    def _cut(self, documents: list[str], live: LiveModel) -> list[tuple[int, list[int]]]:
        """(document, token ids) windows, longest first so that a batch pads little."""
        context = int(getattr(live.model.config, "max_position_embeddings", 1024))
        limit = self.options.max_tokens or min(context, 1024)
        bos = live.tokenizer.bos_token_id
        head = [bos] if bos is not None else []
        windows = []
        for index, text in enumerate(documents):
            ids = live.tokenizer(text, add_special_tokens=False)["input_ids"]
            step = max(1, limit - len(head))
            windows += [(index, head + ids[i : i + step]) for i in range(0, len(ids), step)]
        windows.sort(key=lambda w: (-len(w[1]), w[0]))
        return windows

    @torch.no_grad()
    def _bits(self, live: LiveModel, windows: list[tuple[int, list[int]]], n: int) -> np.ndarray:
        bits = np.zeros(n)
        size = self.options.batch_size
        for start in range(0, len(windows), size):
            batch = windows[start : start + size]
            width = len(batch[0][1])
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, (_, tokens) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            ids, mask = ids.to(live.device), mask.to(live.device)
            logits: Any = live.model(input_ids=ids, attention_mask=mask).logits
            logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            picked = logprobs.gather(2, ids[:, 1:, None])[:, :, 0] * mask[:, 1:]
            totals = (-picked.double().sum(dim=1) / math.log(2)).cpu().numpy()
            for (document, _), total in zip(batch, totals, strict=True):
                bits[document] += total
        return bits


registry.register("objectives", "perplexity", PerplexityObjective)
