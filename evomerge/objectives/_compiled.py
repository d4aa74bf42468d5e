"""lm-eval's requests made ready once: tokenised by lm-eval's own code, packed into batches, answered per candidate.

What lm-eval would do otherwise than greedily and by likelihood alone (sampling, beams, penalties) is refused by
`obstacle`, and left to lm-eval itself.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evomerge.decoding import DecodingPlan
from evomerge.errors import CandidateFailure
from evomerge.objectives._vector_metrics import VectorMetric
from evomerge.scoring import Likelihoods, Pair, Plan

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline

FALLBACK_ROWS = 64
SHARE_UNKNOWN = 0.01
LOGLIKELIHOODS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
# Of a generation_config.json: what names tokens, and what greedy decoding does not look at.
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample",
    "temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "use_cache",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
}  # fmt: skip
NEUTRAL = {"repetition_penalty": 1.0, "num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
           "encoder_repetition_penalty": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0, "min_length": 0,
           "num_return_sequences": 1, "early_stopping": False}  # fmt: skip


def obstacle(instances: Iterable[Any], live: LiveModel | Outline) -> str | None:
    """Why lm-eval must answer these requests itself, or None."""
    for kwargs in {json.dumps(i.args[1], sort_keys=True) for i in instances if _generates(i)}:
        until, _, rest = _generation(live, json.loads(kwargs))
        if "" in until:
            return "an empty text among its stop strings ends every answer after one token"
        if not getattr(live, "decodes", True):
            return "this architecture's cache of keys and values is not known here"
        if rest:
            return f"its generation_kwargs ask for {', '.join(f'{k}: {v}' for k, v in sorted(rest.items()))}"
        config = live.model.generation_config.to_diff_dict()
        odd = {k: v for k, v in config.items() if not k.startswith("_") and k not in HARMLESS and v is not None}
        odd = {k: v for k, v in odd.items() if NEUTRAL.get(k) != v}
        if odd:
            return f"the model's generation_config.json has {', '.join(sorted(odd))}"
    return None


def unknown_note(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """A note if the tokenizer turns more than 1 % of these texts into its token for what it does not know."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    share = ids.count(unknown) / len(ids) if ids else 0.0
    if share <= SHARE_UNKNOWN:
        return []
    return [f"{share:.0%} of its text is unknown to the tokenizer ({tokenizer.unk_token}): scores say little"]


def misfits(instances: Sequence[Any], live: LiveModel | Outline) -> list[str]:
    """Notes on items that are longer than the model's context, without tokenising what must be shorter.

    Raises:
        CandidateFailure: an item can never be fed to the model.
    """
    room = longest_input(live) - 8  # special tokens
    suspects, kinds = [], set()
    for instance in sorted(instances, key=lambda i: -_size(i)):
        kind = (instance.request_type, json.dumps(instance.args[1:] if _generates(instance) else "", sort_keys=True))
        # A token has at least one byte. Of each kind of request one is tried; an empty prompt needs a first token.
        texts = [text for text in instance.args if isinstance(text, str)]
        if _size(instance) >= room or kind not in kinds or not all(texts):
            suspects.append(instance)
        kinds.add(kind)
    return Compiled(suspects, live, None).notes


def _generates(instance: Any) -> bool:
    return bool(instance.request_type == "generate_until")


def _size(instance: Any) -> int:
    """Bytes of what the model is fed, and of what it may add."""
    if _generates(instance):
        most = max(
            (v for v in instance.args[1].values() if isinstance(v, int) and not isinstance(v, bool)), default=256
        )
        return len(instance.args[0].encode()) + int(most)
    return sum(len(text.encode()) for text in instance.args)


class Compiled:
    """The requests of some items.

    Args:
        instances: lm-eval's requests; their answers go into `resps`.
        live: gives the tokenizer and the longest input.
        max_rows: largest number of rows in a batch.

    Raises:
        CandidateFailure: a continuation alone is longer than the model's context.
    """

    def __init__(self, instances: Sequence[Any], live: LiveModel | Outline, max_rows: int | None) -> None:
        self._max_rows = max_rows
        self.likely = [i for i in instances if i.request_type in LOGLIKELIHOODS]
        self._pairs, self._owners = _pairs(self.likely, live)
        groups: dict[str, list[Any]] = defaultdict(list)
        for instance in instances:
            if _generates(instance):
                groups[json.dumps(instance.args[1], sort_keys=True)].append(instance)
        self._groups = [_Group(members, live) for members in groups.values()]
        self.notes: list[str] = []
        self._note_cuts(live)
        self._plan: Plan | None = None
        self._batch_tokens = 0

    def answer(self, live: LiveModel) -> Likelihoods | None:
        """Fill in every request's answers; returns the likelihoods, in the order of the requests that have them."""
        if self._batch_tokens != live.batch_tokens:
            self._batch_tokens = live.batch_tokens
            self._plan = self._planned(live) if self.likely else None
            for group in self._groups:
                group.make_plan(live.batch_tokens, self._max_rows)
        found = None
        if self._plan is not None:
            found = self._plan.run(live)
            totals, greedy = found.total.tolist(), found.greedy.tolist()
            for instance, total, hit in zip(self.likely, totals, greedy, strict=True):
                rolling = instance.request_type == "loglikelihood_rolling"
                instance.resps = [total if rolling else (total, hit)] * instance.repeats
        for group in self._groups:
            group.answer(live)
        return found

    def _note_cuts(self, live: LiveModel | Outline) -> None:
        """Name the items that are longer than the context."""
        longest = longest_input(live)
        cut = {
            self.likely[owner].doc_id
            for (before, after), owner in zip(self._pairs, self._owners, strict=True)
            if len(before) + len(after) - 1 > longest
        }
        cut |= {doc_id for group in self._groups for doc_id in group.cut}
        if cut:
            shown = ", ".join(map(str, sorted(cut)[:10])) + (", ..." if len(cut) > 10 else "")
            self.notes.append(
                f"{len(cut)} items are longer than the model's context of {longest} tokens and lose tokens on the left "
                f"of their prompts, as in lm-eval: documents {shown}"
            )

    def _planned(self, live: LiveModel) -> Plan:
        return Plan(
            self._pairs,
            owners=self._owners,
            n=len(self.likely),
            max_length=longest_input(live),
            batch_tokens=live.batch_tokens,
            share=live.shareable,
            max_rows=self._max_rows,
        )


class _Group:
    """Prompts with the same generation arguments."""

    def __init__(self, members: Sequence[Any], live: LiveModel | Outline) -> None:
        harness = tokens_of(live)
        until, self.max_new, _ = _generation(live, members[0].args[1])
        self.until = until
        room = harness.max_length - self.max_new
        if room <= 0:
            raise CandidateFailure(
                f"max_gen_toks is {self.max_new}, but the model's context has {harness.max_length} tokens",
                hint="lower max_gen_toks in the task's generation_kwargs",
                reason="too_long",
            )
        self.members = members
        texts = [m.args[0] for m in members]
        whole = [harness.tok_batch_encode([text])[0][0].tolist() for text in texts]
        self.prompts = [tokens[-room:] for tokens in whole]
        self.cut = [m.doc_id for m, tokens in zip(members, whole, strict=True) if len(tokens) > room]
        config = live.model.generation_config.eos_token_id
        ends = [config] if isinstance(config, int) else list(config or [])
        self.ends = frozenset(ends)
        self._watched = _may_end(live.tokenizer, [u for u in until if u])
        self._decode = harness.tok_decode
        self._plan: DecodingPlan | None = None

    def make_plan(self, batch_tokens: int, max_rows: int | None) -> None:
        self._plan = DecodingPlan(self.prompts, self.max_new, batch_tokens=batch_tokens, max_rows=max_rows)

    def answer(self, live: LiveModel) -> None:
        assert self._plan is not None
        for instance, tokens in zip(self.members, self._plan.run(live, self.ends, self._stopped), strict=True):
            text = self._decode(tokens)
            for stop in self.until:
                text = text.split(stop)[0] if stop else text
            instance.resps = [text] * instance.repeats

    def _stopped(self, tokens: list[int]) -> bool:
        if tokens[-1] not in self._watched:
            return False
        text = self._decode(tokens)
        return any(stop in text for stop in self.until if stop)


def _generation(live: LiveModel | Outline, kwargs: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Stop strings, largest number of new tokens, and what else lm-eval would hand to `generate`."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    harness = tokens_of(live)
    if harness.eot_token_id is None:
        raise CandidateFailure(
            "the tokenizer has no end-of-sequence token, which lm-eval needs to generate",
            hint="name one as `eos_token` in tokenizer_config.json",
            reason="tokenizer",
        )
    given: dict[str, Any] = dict(normalize_gen_kwargs(copy.deepcopy(kwargs), harness.max_gen_toks))
    until = handle_stop_sequences(
        given.pop("until", None), eos=harness.tok_decode(harness.eot_token_id, skip_special_tokens=False)
    )
    max_new = int(given.pop("max_gen_toks"))
    if not given.get("do_sample"):
        for key in ("do_sample", "temperature", "top_p", "top_k"):
            given.pop(key, None)
    return until, max_new, given


def _may_end(tokenizer: Any, stops: Sequence[str]) -> frozenset[int]:
    """Tokens that can complete a stop string: those whose text has a last character of one, or no text of its own."""
    ends = {stop[-1] for stop in stops}
    size = len(tokenizer)
    if any(ord(end) > 127 for end in ends):  # may be spread over several tokens
        return frozenset(range(size))
    texts = tokenizer.batch_decode([[i] for i in range(size)])
    # A byte-level piece without a complete character shows as U+FFFD: it cannot complete an ASCII string.
    return frozenset(i for i, text in enumerate(texts) if not text or any(end in text for end in ends))


def _pairs(instances: Sequence[Any], live: LiveModel | Outline) -> tuple[list[Pair], list[int]]:
    """Tokens of contexts and continuations as lm-eval cuts them, and the request that each belongs to."""
    harness = tokens_of(live)
    if instances and harness.prefix_token_id is None:
        raise CandidateFailure(
            "the tokenizer has neither a beginning- nor an end-of-sequence token, of which lm-eval needs one",
            hint="name one in tokenizer_config.json",
            reason="tokenizer",
        )
    pairs: list[Pair] = []
    owners: list[int] = []
    for number, instance in enumerate(instances):
        if instance.request_type == "loglikelihood_rolling":
            harness.loglikelihood_rolling([instance], disable_tqdm=True)
        else:
            harness.loglikelihood([instance], disable_tqdm=True)
        taken = harness.take()
        if any(not after for _, after in taken):
            raise CandidateFailure(
                f"document {instance.doc_id} has a choice or answer without any token: it has no likelihood",
                hint="leave the item out, or give it a text",
                reason="empty",
            )
        pairs += taken
        owners += [number] * len(taken)
    longest = max((len(after) for _, after in pairs), default=0)
    if longest > harness.max_length:
        raise CandidateFailure(
            f"a continuation has {longest} tokens, but the model's context {harness.max_length}",
            hint="leave the item out, or shorten its choices",
            reason="too_long",
        )
    return pairs, owners


@dataclass
class Prepared:
    """One split made ready: lm-eval's task object, the chosen documents and their requests."""

    task: Any
    docs: list[tuple[int, Any]]
    instances: list[Any]
    known: dict[tuple[int, tuple[str, ...]], Any] = field(default_factory=dict)  # item of a document's answers


@dataclass
class Part:
    """Some items of a split, ready to be scored.

    Attributes:
        batch_size: rows in a batch; None settles it by memory.
        compiled: None where lm-eval answers the requests itself.
        vector: the metric for all items at once, where there is such a form.
        proved: `vector` has been found equal to lm-eval's own items.
    """

    split: Prepared
    batch_size: int | None
    compiled: Compiled | None = None
    vector: VectorMetric | None = None
    proved: bool = False

    def answer(self, live: LiveModel) -> Likelihoods | None:
        for instance in self.split.instances:
            instance.resps, instance.filtered_resps = [], {}
        if self.compiled is not None:
            return self.compiled.answer(live)
        rows = min(self.batch_size or FALLBACK_ROWS, live.batch_tokens // 32)  # fewer where memory ran out
        answer_by_lm_eval(live, self.split.instances, max(1, rows))
        return None


def answer_by_lm_eval(live: LiveModel, instances: Sequence[Any], rows: int) -> None:
    """Let lm-eval's own loop answer every request, as its evaluator does."""
    harness = _harness(live, rows)
    by_type: dict[str, list[Any]] = defaultdict(list)
    for instance in instances:
        by_type[instance.request_type] += [instance] * instance.repeats
    for request_type, requests in by_type.items():
        answers = getattr(harness, request_type)(requests, disable_tqdm=True)
        for answer, request in zip(answers, requests, strict=True):
            request.resps.append(answer)


def _harness(live: LiveModel, batch_size: int) -> Any:
    """lm-eval's view of the live model. The batch size must be given: its default is 1."""
    key = f"lm_eval:{batch_size}"
    if key not in live.adapters:
        quiet()
        from lm_eval.models.huggingface import HFLM

        live.adapters[key] = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=batch_size)
    return live.adapters[key]


def quiet() -> None:
    """lm-eval reports its progress at INFO and on tqdm bars; ours is elsewhere."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def longest_input(live: LiveModel | Outline) -> int:
    """The model's context in tokens, as lm-eval finds it."""
    return int(tokens_of(live).max_length)


def tokens_of(live: LiveModel | Outline) -> Any:
    """lm-eval's own class for this model, with the forward pass replaced by a list of what it would compute."""
    if "lm_eval:tokens" not in live.adapters:
        quiet()
        from lm_eval.models.huggingface import HFLM

        class Tokens(HFLM):  # type: ignore[misc]
            seen: list[Pair]

            def _loglikelihood_tokens(self, requests: Any, **ignored: Any) -> list[tuple[float, bool]]:
                self.seen += [(context, continuation) for _, context, continuation in requests]
                return [(0.0, False)] * len(requests)

            def take(self) -> list[Pair]:
                taken, self.seen = self.seen, []
                return taken

        live.adapters["lm_eval:tokens"] = Tokens(pretrained=live.model, tokenizer=live.tokenizer, batch_size=1)
        live.adapters["lm_eval:tokens"].seen = []
    return live.adapters["lm_eval:tokens"]
