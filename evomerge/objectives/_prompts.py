"""Prompts as tokens, and the model's next-token distributions over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.errors import ConfigError, Problem
from evomerge.objectives._items import Item

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline

Tokens = tuple[list[list[int]], list[str]]


def tokens_of(
    model: LiveModel | Outline,
    items: Sequence[Item],
    column: str,
    max_tokens: int,
    subject: str,
    *,
    chat: bool = False,
    last: bool = False,
) -> Tokens:
    """Each item's prompt as at most `max_tokens` tokens; and what people should know of that.

    Args:
        chat: put the prompt into the tokenizer's chat template, as the user's message.
        last: of a longer prompt keep the last tokens, which an answer follows, not the first.

    Raises:
        ConfigError: the tokenizer makes no token of a prompt, or has no chat template.
    """
    rows, cut = [], []
    for item in items:
        text = item.doc[column]
        if chat:
            text = _in_template(model, text, subject)
        ids = model.tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise ConfigError(f"{subject}: {item.where}: the tokenizer makes no token of {text[:60]!r}")
        if len(ids) > max_tokens:
            cut.append(item.where)
        rows.append(ids[-max_tokens:] if last else ids[:max_tokens])
    kept = "last" if last else "first"
    said = f"{subject}: {len(cut)} prompts are cut to their {kept} {max_tokens} tokens, the first at"
    return rows, [f"{said} {cut[0]}"] if cut else []


def noted(live: LiveModel, tokens: Tokens) -> list[list[int]]:
    """The rows of `tokens_of`; the live model keeps what people should know."""
    rows, notes = tokens
    for note in notes:
        live.note(note)
    return rows


def fitting(calls: Iterable[Callable[[], Tokens]]) -> tuple[list[Problem], list[str]]:
    """What is wrong with prompts, and what people should know of them, when some calls of `tokens_of` are tried."""
    problems: list[Problem] = []
    notes: list[str] = []
    for call in calls:
        try:
            notes += call()[1]
        except ConfigError as error:
            problems += error.problems
    return problems, notes


def _in_template(model: LiveModel | Outline, text: str, subject: str) -> str:
    if not model.tokenizer.chat_template:
        raise ConfigError(
            f"{subject}: the tokenizer of {model.path} has no chat template", hint="leave out `apply_chat_template:`"
        )
    messages = [{"role": "user", "content": text}]
    return str(model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def context_of(model: LiveModel | Outline, max_tokens: int) -> int:
    """`max_tokens`, or the model's context where that is shorter."""
    return min(max_tokens, int(getattr(model.model.config, "max_position_embeddings", None) or max_tokens))


@torch.no_grad()
def next_token_logprobs(
    live: LiveModel, rows: Sequence[Sequence[int]], max_rows: int | None
) -> Iterator[tuple[int, Tensor]]:
    """(row, (T, V) float32 log-probabilities of what follows each of its T tokens), longest rows first.

    Rows that share a forward pass are padded on the right, which no token before can see.

    Args:
        max_rows: largest number of rows in a pass; None: as many as the live model's batches of tokens hold.
    """
    for members in _batches([len(row) for row in rows], live.batch_tokens, max_rows):
        width = len(rows[members[0]])
        ids = torch.zeros((len(members), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(members):
            ids[b, : len(rows[i])] = torch.tensor(rows[i])
            mask[b, : len(rows[i])] = 1
        logits = live.model(input_ids=ids.to(live.device), attention_mask=mask.to(live.device)).logits
        for b, i in enumerate(members):
            yield i, torch.log_softmax(logits[b, : len(rows[i])].float(), dim=-1)


def _batches(lengths: Sequence[int], batch_tokens: int, max_rows: int | None) -> list[list[int]]:
    """Rows that share a pass, longest first: a pure function of the lengths and the sizes."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > batch_tokens
        if full or len(found[-1]) == max_rows:
            found.append([])
        found[-1].append(i)
    return found
