"""Score one model on the zoo's items with plain batched forward passes.

Independent of the evomerge package and of lm-eval: it is the yardstick for both. One teacher-forced
pass per batch gives the exact match of greedy generation too, because the whole answer must match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.data import VOCABULARY, Item

IDS = {word: number for number, word in enumerate(VOCABULARY)}
PAD = IDS["<pad>"]


def encode(text: str) -> list[int]:
    """Token ids of words separated by single spaces."""
    return [IDS[word] for word in text.split()]


def pad(rows: Sequence[Sequence[int]], fill: int = PAD) -> Tensor:
    """Rows padded on the right to one length: `(n, longest)` int64."""
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for place, row in enumerate(rows):
        out[place, : len(row)] = torch.tensor(row)
    return out


def _choice_scores(model: PreTrainedModel, prompts: Tensor, choices: Tensor) -> Tensor:
    """Sum of log-probabilities of each choice: `(n, length)` and `(n, C, T)` give `(n, C)`."""
    n, c, t = choices.shape
    start = prompts.shape[1] - 1
    rows = torch.cat([prompts.repeat_interleave(c, 0), choices.reshape(n * c, t)], 1)
    if t == 1:
        logits = model(prompts, use_cache=False).logits[:, -1:]
        return logits.log_softmax(-1)[:, 0].gather(1, choices[:, :, 0])
    logits = model(rows[:, :-1], use_cache=False).logits[:, start:]
    found = logits.log_softmax(-1).gather(2, choices.reshape(n * c, t, 1))
    return found.sum((1, 2)).reshape(n, c)


def _score_batch(model: PreTrainedModel, items: Sequence[Item]) -> Tensor:
    """Items of one prompt length, and of one answer length within a task with choices."""
    prompts = [encode(item.prompt) for item in items]
    if items[0].choices:
        choices = torch.tensor([[encode(c) for c in item.choices] for item in items])
        gold = torch.tensor([item.choices.index(item.answer) for item in items])
        return _choice_scores(model, torch.tensor(prompts), choices).argmax(1) == gold
    answers = [encode(item.answer) for item in items]
    inputs = pad([p + a[:-1] for p, a in zip(prompts, answers, strict=True)])
    labels = pad([[-1] * (len(p) - 1) + a for p, a in zip(prompts, answers, strict=True)], -1)
    guess = model(inputs, use_cache=False).logits.argmax(-1)
    return ((guess == labels) | (labels == -1)).all(1)


@torch.inference_mode()
def score(model: PreTrainedModel, items: Sequence[Item], batch: int = 256) -> Tensor:
    """Which items the model gets right: `(n,)` of 0.0 and 1.0, in the order of `items`."""
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(len(item.prompt.split()), []).append(place)
    out = torch.zeros(len(items))
    for places in groups.values():
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            out[chosen] = _score_batch(model, [items[i] for i in chosen]).float()
    return out


def score_all(model: PreTrainedModel, items: Mapping[str, Sequence[Item]]) -> dict[str, Tensor]:
    """`score` for every task of a mapping."""
    model.eval()
    return {task: score(model, rows) for task, rows in items.items()}
