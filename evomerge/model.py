"""The one live transformers model of a worker: recipes are written into its parameters in place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import ConfigError, NonFinite, Problem, WeightsError
from evomerge.layer_path import LayerStack, check_length, refused, source_layers, stacked, stacking_problem
from evomerge.methods import Merge, Tables
from evomerge.prefix import Prefixes
from evomerge.recipe import Recipe, TensorPlan
from evomerge.scoring import LONGEST_SHARED, Row, default_batch_tokens, make_batch
from evomerge.weights import Checkpoint


def check_architecture(checkpoint: Checkpoint) -> list[Problem]:
    """Whether transformers knows the architecture and holds its tensors one to one; loads no weight."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name, what in (("quantization_config", "quantised weights"), ("peft_type", "an adapter")):
        if checkpoint.config.get(name) is not None:
            return [Problem(f"config.json has `{name}`: {what} cannot be merged", where="base")]
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a wrong config.json makes the model's own code raise
        return [Problem(f"transformers cannot build the model: {_line(error)}", where="base")]
    try:
        AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        return [Problem(f"transformers cannot load the tokenizer: {_line(error)}", where="base")]
    live = {n: tuple(p.shape) for n, p in _as_stored(model.named_parameters(remove_duplicate=True), checkpoint).items()}
    stored = {n: i.shape for n, i in checkpoint.info.items() if i.dtype.is_floating_point}
    buffers = {n for n, _ in model.named_buffers()}
    differing = sorted(n for n in live.keys() | stored.keys() if live.get(n) != stored.get(n) and n not in buffers)
    if not differing:
        return []
    return [
        Problem(
            f"the file and the model in memory differ in {len(differing)} tensors, such as {', '.join(differing[:3])}",
            where="base",
            hint="is the config.json of another model? Architectures whose tensors are fused on loading "
            "(mixtures of experts) are not supported yet",
        )
    ]


RENAMED = {"lm_head.weight": "embed_out.weight"}  # in memory and in the file: GPT-NeoX


def _as_stored(named: Iterable[tuple[str, Tensor]], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameters by the names that they have in the checkpoint's files."""
    found = dict(named)
    for ours, theirs in RENAMED.items():
        if ours in found and ours not in checkpoint.info and theirs in checkpoint.info:
            found[theirs] = found.pop(ours)
    return found


# What two fine-tunes of one base may differ in: everything else changes what the weights compute.
FREE_KEYS = re.compile(
    r"(token_id|dropout|drop$|initializer|label|version|cache|dtype|name_or_path|architectures|task_specific"
    r"|max_position|max_length|return_dict|output_|problem_type|chunk_size|is_decoder|prun|finetuning|summary)"
)


def check_siblings(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[Problem]:
    """Whether the experts' configurations, as transformers understands them, are the base's."""
    from transformers import AutoConfig

    def read(checkpoint: Checkpoint) -> dict[str, Any]:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
        return {k: v for k, v in config.to_dict().items() if not FREE_KEYS.search(k)}

    problems: list[Problem] = []
    try:
        ours = read(base)
    except Exception:  # check_architecture says what is wrong with the base
        return []
    for label, expert in experts.items():
        try:
            theirs = read(expert)
        except Exception as error:
            problems.append(Problem(f"transformers cannot read its config.json: {_line(error)}", where=label))
            continue
        for key in dict.fromkeys([*ours, *theirs]):
            if ours.get(key) != theirs.get(key):
                problems.append(
                    Problem(
                        f"config.json: {key} is {theirs.get(key)!r}, but {ours.get(key)!r} in the base",
                        where=label,
                        hint="experts must be fine-tunes of the base",
                    )
                )
    return problems


def stacked_config(path: str, plans: Sequence[TensorPlan], n_layers: int) -> dict[str, Any]:
    """What changes in a checkpoint's config.json when its layers are those of the plans; {} in their own order.

    Raises:
        CandidateFailure: layers of different types meet at one position.
        ConfigError: the number of layers is not where it could be changed.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    changes = stacked(config, plans, n_layers)
    if changes and config.get_text_config(decoder=True) is not config:
        raise ConfigError(f"{path}: the layers of a {config.model_type} model cannot be stacked")
    names = dict(config.attribute_map)
    return {names.get(key, key): value for key, value in changes.items()}


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


GetTensor = Callable[[str, str], Tensor]


class LiveModel:
    """A causal language model on a device whose weights can be replaced by any recipe's.

    Args:
        path: a checkpoint folder; gives the architecture, the tokenizer and the first weights.
        device: "cpu" or a CUDA device.
        dtype: of parameters and arithmetic in the forward pass; None keeps the checkpoint's.
        tables: the worker's memory of what depends on the models alone; None starts one with the default budget.

    Raises:
        WeightsError: the folder does not load completely: no layer is ever left at random.
    """

    def __init__(
        self, path: str, device: str = "cpu", dtype: torch.dtype | None = None, tables: Tables | None = None
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.path = path
        self.checkpoint = Checkpoint(path)
        self.device = torch.device(device)
        try:
            self.model, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype or self.checkpoint.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise WeightsError(f"transformers cannot load {path}: {error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loaded.get(kind):
                raise WeightsError(f"{path}: {kind.replace('_', ' ')}: {sorted(loaded[kind])[:5]}")
        self.model.to(self.device).eval().requires_grad_(False)
        self.adapters: dict[str, Any] = {}  # outside libraries' wrappers of this model, by name
        self.tables = Tables() if tables is None else tables
        self._live = self._tensors_by_name()
        self.layers = LayerStack(self.model, self._live, self.checkpoint.n_layers)
        self.prefixes = Prefixes(self.tables)
        self._stackable = False  # not known yet: see `_try_stacks`
        self._sized = {path}
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.model.register_forward_hook(self._watch_logits)
        self._outputs: Tensor | None = None
        head = self.model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._pick_outputs)
        self.batch_tokens = default_batch_tokens(self.device, self.model.config)
        self.notes: list[str] = []
        self.shareable = _shareable(self)
        self.decodes = _decodes(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and of the forward pass."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The model's own tensors, by the checkpoint's names; a path may take further ones for its layers."""
        return self._live

    @torch.no_grad()
    def install(self, recipe: Recipe, get: GetTensor) -> None:
        """Make the live model the recipe's, one tensor at a time; one with other layers is put together of shared ones.

        Args:
            recipe: models are named as `get` knows them.
            get: (model, tensor name) -> resident tensor.

        Raises:
            NonFinite: a merged tensor holds NaN or infinity. The live weights are then a mixture,
                and the next call replaces all of them.
            CandidateFailure: the model cannot have these layers, or the models' sizes differ.
        """
        checkpoint = self.checkpoint
        self.prefixes.leave()
        check_length(recipe, checkpoint.n_layers)
        plans = recipe.plan(checkpoint.names, checkpoint.n_layers)
        if source_layers(plans) != tuple(range(checkpoint.n_layers)):
            self._try_stacks()
            self._require_sizes(plans, get)
        merge = Merge(recipe, plans, get, self.tables)
        for plan, slot, content in self.layers.place(recipe, plans):
            slot.holds = None
            if not merge.write(plan, slot.tensor):
                raise NonFinite(f"merged tensor {plan.name} holds NaN or infinity", reason="weights")
            slot.holds = content
        self.prefixes.enter(self, recipe, plans)

    def _require_sizes(self, plans: Sequence[TensorPlan], get: GetTensor) -> None:
        """A path may take any layer of its models: all of each must have the base's sizes."""
        for model in dict.fromkeys(m for p in plans for m, _ in (*p.inputs, *((p.base,) if p.base else ()))):
            for name, tensor in self._live.items() if model not in self._sized else ():
                shape = tuple(get(model, name).shape)
                if shape != tuple(tensor.shape):
                    raise refused(
                        f"{model}: {name} has the shape {shape}, but {tuple(tensor.shape)} in {self.path}",
                        "the layers of a path come from fine-tunes of one base",
                    )
            self._sized.add(model)

    def _try_stacks(self) -> None:
        """Find out once whether the architecture can be stacked; see `stacking_problem`.

        The live weights become the checkpoint's: those of a merge that failed may not be finite.
        """
        self.layers.require()
        if self._stackable:
            return
        self.layers.restore()
        for name, tensor in self._live.items():
            tensor.copy_(self.checkpoint.tensor(name))
        self.layers.forget()
        self.layers.problem = stacking_problem(self)
        self.layers.require()
        self._stackable = True

    def note(self, text: str) -> None:
        """Keep something that people should know of how this model is scored, once."""
        if text not in self.notes:
            self.notes.append(text)

    @torch.no_grad()
    def logits_at(
        self,
        outputs: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        *,
        keep_cache: bool = False,
        key: bytes | None = None,
    ) -> tuple[Tensor, Any]:
        """One forward pass whose output layer runs at the asked-for places only.

        Args:
            outputs: (T,) flat places b * L + l, ascending.
            ids: (B, L) tokens.
            mask: (B, L) of what is a token, or (B, 1, L, L) added to the attention scores; None is plain causal.
            positions: (B, L), None counts from 0.
            cache: keys and values of the tokens before.
            key: names ids, mask and positions: layers that another candidate had too are then not computed again.

        Returns:
            (T, V) logits, and the cache with these tokens' keys and values (None without `keep_cache`).
        """
        extra = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        given = {k: v for k, v in extra.items() if v is not None}
        self._outputs = outputs
        try:
            if key is None or cache is not None or keep_cache:
                out = self.model(input_ids=ids, use_cache=keep_cache, **given)
            else:
                out = self.prefixes.forward(key, lambda: self.model(input_ids=ids, use_cache=False, **given))
        finally:
            self._outputs = None
        logits: Tensor = out.logits
        if logits.shape[:2] != (1, len(outputs)):  # this architecture does not call its output layer as a module
            logits = logits.reshape(1, -1, logits.shape[-1])[:, outputs]
        return logits[0], out.past_key_values if keep_cache else None

    def _pick_outputs(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._outputs is None:
            return None
        hidden: Tensor = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self._outputs].unsqueeze(0), *args[1:])

    def forget_logits(self) -> None:
        """Start watching for non-finite logits anew."""
        self._finite.fill_(True)

    def require_finite_logits(self) -> None:
        """Raise NonFinite if any logits since `forget_logits` were NaN or infinite."""
        if not bool(self._finite):
            raise NonFinite("the merged model's logits hold NaN or infinity", reason="logits")

    def _watch_logits(self, module: Any, inputs: Any, output: Any) -> None:
        # A NaN in the logits can still give a plausible accuracy (argmax of NaN is 0). The flag
        # stays on the device: no synchronisation per forward pass.
        self._finite &= torch.isfinite(output.logits).all()

    def _tensors_by_name(self) -> dict[str, Tensor]:
        live = _as_stored(self.model.named_parameters(remove_duplicate=True), self.checkpoint)
        live |= {n: b for n, b in self.model.named_buffers() if n in self.checkpoint.info}
        names = set(self.checkpoint.names)
        if set(live) != names:
            raise ConfigError(
                f"{self.path}: the model in memory does not hold the checkpoint's tensors one to one: "
                f"{len(names - set(live))} only in the file, {len(set(live) - names)} only in memory, "
                f"such as {sorted(names ^ set(live))[:3]}",
                hint="architectures whose tensors are fused on loading (mixtures of experts) are not supported yet",
            )
        return live


class Outline:
    """A model without weights: what checks need of its tokenizer, its longest input and its way of generating."""

    def __init__(self, path: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        with contextlib.suppress(OSError):  # the file is optional
            self.model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        self.path = path
        self.adapters: dict[str, Any] = {}


WINDOW_KEYS = re.compile(r"(window|window_size|chunk_size|local_attention|block_size)$")


def _shareable(live: LiveModel) -> int:
    """The longest row in which several continuations may share a context, 0 for none: found by trying some.

    Architectures that ignore positions or masks of this form (ALiBi, recurrent layers, some attention kernels) give
    other logits than separate rows. The error is measured against that of a row whose second continuation sees the
    first. A mask of ours replaces that of a sliding window, so no row may be longer than any window of the
    configuration; a window counted along the row instead is found by trying long rows.
    """
    config = getattr(live.model.config, "text_config", live.model.config)
    windows = [v for k, v in config.to_dict().items() if WINDOW_KEYS.search(k) and isinstance(v, int) and v > 1]
    context = getattr(config, "max_position_embeddings", None) or LONGEST_SHARED
    longest = min([LONGEST_SHARED, int(context), *windows])
    for length in (longest, 256, 64, _PROBE):
        if _PROBE <= length <= longest and _branches_agree(live, length):
            return length
    return 0


_PROBE = 14


def _branches_agree(live: LiveModel, length: int) -> bool:
    """Whether a row of this length gives its last continuation the logits that it has alone."""
    vocabulary = int(live.model.get_input_embeddings().weight.shape[0])
    tokens = tuple((7 * i + 3 + i * i) % vocabulary for i in range(length))
    context, first, second = tokens[:6], tokens[6:-4], tokens[-4:]
    last = length - 1
    shared = Row(tokens, len(context), (len(context) + len(first),), ((last, 0, 0),))
    alone = Row(context + second, len(context), (), ((len(context) + len(second) - 1, 0, 0),))
    wrong = Row(tokens, len(context), (), ((last, 0, 0),))
    try:
        found = [_last_logits(live, row) for row in (shared, alone, wrong)]
    except Exception:  # an attention that takes no mask of four dimensions raises whatever it likes
        return False
    error, scale = float((found[0] - found[1]).abs().max()), float((found[2] - found[1]).abs().max())
    return error <= 0.05 * scale


def _last_logits(live: LiveModel, row: Row) -> Tensor:
    batch = make_batch([row], live.device)
    logits, _ = live.logits_at(batch.outputs, batch.ids, batch.mask(live.dtype), batch.positions)
    return logits[0].double()


def _decodes(live: LiveModel) -> bool:
    """Whether prompts of unequal lengths, padded on the left, go on with a cache as they would without."""
    vocabulary = int(live.model.get_input_embeddings().weight.shape[0])
    short, long, token = [3 % vocabulary, 8 % vocabulary], [5 % vocabulary, 1, 9 % vocabulary, 2], 4 % vocabulary
    device = live.device
    ids, mask = (
        torch.tensor([[0, 0, *short], long], device=device),
        torch.tensor([[0, 0, 1, 1], [1] * 4], device=device),
    )
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    one, ends = torch.ones((2, 1), dtype=torch.long, device=device), torch.tensor([0, 1], device=device)
    try:
        _, cache = live.logits_at(4 * ends + 3, ids, mask, positions, keep_cache=True)
        new, _ = live.logits_at(ends, token * one, torch.cat([mask, one], 1), positions[:, -1:] + 1, cache)
        whole = [torch.tensor([[*prompt, token]], device=device) for prompt in (short, long)]
        plain = [live.logits_at(torch.tensor([row.shape[1] - 1], device=device), row)[0][0] for row in whole]
    except Exception:  # recurrent models have another cache, or none
        return False
    error = max(float((a.double() - b.double()).abs().max()) for a, b in zip(new, plain, strict=True))
    return error <= 0.05 * float((plain[0].double() - plain[1].double()).abs().max())
