"""Objective kind `latency`: measured milliseconds per generated token, smaller is better.

A measurement: it depends on the machine and on what else runs there, and never repeats to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evomerge import registry
from evomerge.errors import Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores
from evomerge.objectives._options import LatencyOptions, read_options
from evomerge.weights import Checkpoint

if TYPE_CHECKING:
    from evomerge.model import LiveModel

# Standard error of a median over that of a mean, for many samples of a normal distribution.
MEDIAN_FACTOR = math.sqrt(math.pi / 2)


class LatencyObjective:
    """Measured time per generated token in milliseconds: the median of several runs.

    Options: `prompt_tokens` (default 32), `new_tokens` (default 32), `batch_size` (sequences at once, default 1),
    `runs` (default 5, after one that does not count). The prompts are fixed tokens and the continuation is greedy,
    with a cache of keys and values; reading the prompt is not timed. The same on every split.

    `measured` says that two scores of one model differ. Use it where the search changes what is computed (the
    order or number of layers): models of one shape take the same time, whatever their weights.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    maximize = False
    partial = False
    measured = True
    splits = SPLITS
    bounds: tuple[float | None, float | None] = (0.0, None)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = read_options(LatencyOptions, spec.options, f"objective {spec.name}")

    def check(self) -> list[Problem]:
        """Whether the tokens fit into the base's context."""
        folder = self.spec.models.get("base")
        context = Checkpoint(folder).config.get("max_position_embeddings") if folder else None
        tokens = self.options.prompt_tokens + self.options.new_tokens
        if not context or tokens <= context:
            return []
        message = f"`prompt_tokens:` and `new_tokens:` are {tokens}, more than the model's context of {context}"
        return [Problem(message, f"objective {self.name}", "lower them")]

    def fingerprint(self) -> str:
        """The options: what is measured."""
        return f"latency {self.options.model_dump_json()}"

    def size(self, split: str) -> int:
        """The number of runs."""
        return self.options.runs

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (runs,) milliseconds per token of each run."""
        live.forget_logits()
        self._run_s(live)
        seconds = [self._run_s(live) for _ in range(self.options.runs)]
        live.require_finite_logits()
        return self.aggregate(1000 * np.array(seconds) / self.options.new_tokens)

    def aggregate(self, items: np.ndarray) -> Scores:
        """The median of the runs."""
        stderr = MEDIAN_FACTOR * items.std(ddof=1) / math.sqrt(len(items))
        return Scores(float(np.median(items)), float(stderr), items)

    @torch.no_grad()
    def _run_s(self, live: LiveModel) -> float:
        """Seconds that all new tokens take, the first one from the prompt's own pass left out."""
        o = self.options
        words = int(live.model.get_input_embeddings().num_embeddings)
        ids = (torch.arange(o.batch_size * o.prompt_tokens, device=live.device) * 7919 % words).view(o.batch_size, -1)
        out = live.model(input_ids=ids, use_cache=True)
        _finish(live)
        start = time.perf_counter()
        for _ in range(o.new_tokens):
            chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            out = live.model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
        _finish(live)
        return time.perf_counter() - start


def _finish(live: LiveModel) -> None:
    """Wait for the GPU, which works behind the program's back."""
    if live.device.type == "cuda":
        torch.cuda.synchronize(live.device)


registry.register("objectives", "latency", LatencyObjective)
