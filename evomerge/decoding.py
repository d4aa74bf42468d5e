"""Greedy decoding in batches, with a cache of keys and values: what a prompt continues with.

A batch ends when each of its rows has: at an end-of-sequence token, at a stop string, or at its longest length. Which
prompts share a batch is a pure function of the prompts and of the size of a batch, as in `scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from evomerge.model import LiveModel

Ended = Callable[[list[int]], bool]


class DecodingPlan:
    """Prompts made ready: build once, `run` for every candidate.

    Args:
        prompts: tokens of each; none empty.
        max_new: largest number of new tokens.
        batch_tokens: size of a batch with its new tokens, padding included; a longer prompt is a batch of its own.
        max_rows: largest number of rows in a batch.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, batch_tokens: int, max_rows: int | None = None
    ) -> None:
        self.n = len(prompts)
        self.max_new = max_new
        self.batches: list[list[int]] = []
        self._prompts = prompts
        for i in sorted(range(self.n), key=lambda i: (-len(prompts[i]), i)):
            current = self.batches[-1] if self.batches else []
            width = len(prompts[current[0]]) + max_new if current else 0
            if current and (len(current) + 1) * width <= batch_tokens and (max_rows is None or len(current) < max_rows):
                current.append(i)
            else:
                self.batches.append([i])

    @torch.no_grad()
    def run(self, live: LiveModel, ends: Collection[int], stopped: Ended) -> list[list[int]]:
        """The new tokens of each prompt, the end-of-sequence token left out.

        Args:
            ends: token ids that end a sequence.
            stopped: whether the new tokens so far hold a stop string; asked after every token.
        """
        result: list[list[int]] = [[] for _ in range(self.n)]
        for members in self.batches:
            for i, tokens in zip(members, self._decode(live, members, ends, stopped), strict=True):
                result[i] = tokens
        return result

    def _decode(self, live: LiveModel, members: list[int], ends: Collection[int], stopped: Ended) -> list[list[int]]:
        prompts = [self._prompts[i] for i in members]
        rows, width = len(prompts), max(len(p) for p in prompts)
        ids = np.zeros((rows, width), dtype=np.int64)
        mask = np.zeros((rows, width), dtype=np.int64)
        for b, prompt in enumerate(prompts):  # padded on the left: all rows go on at the same place
            ids[b, width - len(prompt) :] = prompt
            mask[b, width - len(prompt) :] = 1
        tokens, seen = torch.from_numpy(ids).to(live.device), torch.from_numpy(mask).to(live.device)
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)
        last = torch.arange(1, rows + 1, device=live.device)
        one = torch.ones((rows, 1), dtype=seen.dtype, device=live.device)
        new: list[list[int]] = [[] for _ in prompts]
        going = set(range(rows))
        cache = None
        for step in range(self.max_new):
            logits, cache = live.logits_at(
                last * tokens.shape[1] - 1, tokens, seen, positions, cache, keep_cache=step + 1 < self.max_new
            )
            best = logits.float().argmax(dim=-1)
            for b, token in enumerate(best.tolist()):
                if b not in going:
                    continue
                if token in ends:
                    going.discard(b)
                    continue
                new[b].append(token)
                if stopped(new[b]):
                    going.discard(b)
            if not going:
                break
            tokens, seen, positions = best[:, None], torch.cat([seen, one], dim=1), positions[:, -1:] + 1
        return new
