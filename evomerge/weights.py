"""Checkpoints on disk as tensors by name: safetensors only, opened read-only, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.errors import Problem, WeightsError
from evomerge.recipe import layer_index

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """One Hugging Face checkpoint folder with safetensors weights.

    Raises:
        WeightsError: the folder, its config.json or one of its weight files is missing,
            unreadable or truncated, or the weights are not safetensors.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = Path(path)
        try:
            found = self.folder.is_dir()
        except (OSError, ValueError):
            found = False
        if not found:
            raise WeightsError(
                f"no checkpoint folder at {path}",
                hint="paths in study files and recipes are relative to the working directory",
            )
        self.config = self._read_json("config.json")
        self._handles: dict[Path, Any] = {}
        self.info = self._read_headers()
        if self.config.get("tie_word_embeddings"):
            # A tied head is the embedding; a stored copy of it must not be merged a second time.
            self.info = {n: i for n, i in self.info.items() if not n.endswith("lm_head.weight")}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the layers they belong to."""
        return tuple(self.info)

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks, counted from the tensor names."""
        indices = [i for i in (layer_index(n) for n in self.info) if i is not None]
        return max(indices) + 1 if indices else 0

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in memory, in bytes."""
        return sum(_numel(i.shape) * i.dtype.itemsize for i in self.info.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of most tensors: config.json may say another."""
        found = [i.dtype for i in self.info.values() if i.dtype.is_floating_point]
        return max(dict.fromkeys(found), key=found.count) if found else torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted by name."""
        return tuple(sorted({i.file for i in self.info.values()}))

    def tensor(self, name: str) -> Tensor:
        """The named tensor, memory-mapped: pages are shared by all processes that read it."""
        info = self.info.get(name)
        if info is None:
            raise WeightsError(f"{self.path} has no tensor {name}")
        try:
            tensor: Tensor = self._handle(info.file).get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(f"{info.file}: cannot read tensor {name}: {error}") from None
        return tensor

    def digest(self) -> str:
        """SHA-256 over weight files, config.json and tokenizer files (hex)."""
        whole = hashlib.sha256()
        others = [self.folder / name for name in ("config.json", *TOKENIZER_FILES)]
        for file in (*(f for f in others if f.is_file()), *self.files):
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise WeightsError(f"{self.path} has no {name}: not a Hugging Face checkpoint") from None
        except (OSError, ValueError) as error:
            raise WeightsError(f"{file}: not readable as JSON: {error}") from None
        if not isinstance(data, dict):
            raise WeightsError(f"{file}: expected a JSON object")
        return data

    def _read_headers(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for file in self._weight_files():
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118
                piece = handle.get_slice(name)
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise WeightsError(
                        f"{file}: tensor {name} has dtype {piece.get_dtype()}, which cannot be merged",
                        hint="quantised checkpoints must be dequantised first",
                    )
                if name in found:
                    raise WeightsError(f"{file}: tensor {name} is also in {found[name].file.name}")
                found[name] = TensorInfo(file, tuple(piece.get_shape()), dtype)
        return dict(sorted(found.items(), key=lambda item: _order(item[0])))

    def _weight_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            names = self._read_json(index.name).get("weight_map", {})
            if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
                raise WeightsError(f"{index}: `weight_map` must map tensor names to files")
            files = [self.folder / f for f in sorted(set(names.values()))]
            if any(Path(f).name != f for f in names.values()):
                raise WeightsError(f"{index}: a shard lies outside the checkpoint folder")
            missing = [f.name for f in files if not f.exists()]
            if missing or not files:
                raise WeightsError(f"{index}: missing weight files: {', '.join(missing) or 'all'}")
            return files
        if single.exists():
            return [single]
        if list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pt")):
            raise WeightsError(
                f"{self.path}: only pickled weights (.bin, .pt), which can run code when read",
                hint="convert it with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`",
            )
        raise WeightsError(f"{self.path} has no model.safetensors and no index of shards")

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                size = file.stat().st_size if file.exists() else 0
                raise WeightsError(
                    f"{file}: not a complete safetensors file ({size} bytes): {error}",
                    hint="download or copy it again",
                ) from None
        return self._handles[file]


class Weights:
    """Base and experts resident for a worker: memory-mapped on CPU, copied once to a GPU.

    Args:
        paths: the checkpoints' folders, base first.
        device: where tensors are handed out.
    """

    def __init__(self, paths: Iterable[str], device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.checkpoints = {path: Checkpoint(path) for path in paths}
        self._resident: dict[tuple[str, str], Tensor] = {}

    def __call__(self, model: str, name: str) -> Tensor:
        """The tensor `name` of the checkpoint at `model`, on this device. Never write to it."""
        key = (model, name)
        if key not in self._resident:
            if model not in self.checkpoints:
                self.checkpoints[model] = Checkpoint(model)
            self._resident[key] = self.checkpoints[model].tensor(name).to(self.device)
        return self._resident[key]

    def forget(self, keys: Iterable[tuple[str, str]]) -> None:
        """Let go of tensors that are not needed again."""
        for key in keys:
            self._resident.pop(key, None)


def has_chat_template(folder: str) -> bool:
    """Whether the checkpoint's tokenizer brings a chat template."""
    place = Path(folder)
    try:
        config = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return bool(config.get("chat_template")) or (place / "chat_template.jinja").is_file()


def open_all(paths: Mapping[str, str]) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """Open checkpoints by label; those that cannot be opened come back as problems."""
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for label, path in paths.items():
        try:
            opened[label] = Checkpoint(path)
        except WeightsError as error:
            problems.append(Problem(error.message, where=label, hint=error.hint))
    return opened, problems


def check_family(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[Problem]:
    """Everything that makes these experts unfit to merge with this base; empty when all is well.

    Reads every weight once, to find NaN and infinity.
    """
    problems: list[Problem] = []
    for label, expert in experts.items():
        problems += _compare(base, expert, label)
    for label, checkpoint in {"base": base, **experts}.items():
        problems += _non_finite(checkpoint, label)
    return problems


def _compare(base: Checkpoint, expert: Checkpoint, label: str) -> Iterator[Problem]:
    missing = [n for n in base.info if n not in expert.info]
    extra = [n for n in expert.info if n not in base.info]
    for kind, names in (("has no tensor", missing), ("has a tensor that the base lacks:", extra)):
        if names:
            more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
            yield Problem(f"{kind} {', '.join(names[:3])}{more}", where=label)
    for name, info in base.info.items():
        other = expert.info.get(name)
        if other is not None and other.shape != info.shape:
            yield Problem(f"tensor {name} has shape {other.shape}, but {info.shape} in the base", where=label)
    ours_vocab, theirs_vocab = _vocabulary(base.folder), _vocabulary(expert.folder)
    if ours_vocab and theirs_vocab and ours_vocab != theirs_vocab:
        differing = sum(ours_vocab.get(t) != i for t, i in theirs_vocab.items()) + sum(
            t not in theirs_vocab for t in ours_vocab
        )
        yield Problem(
            f"the tokenizer gives other ids than the base's to {differing} tokens",
            where=label,
            hint="merging rows of embeddings that mean different tokens gives nonsense",
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id from tokenizer.json; empty when the folder has none."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    try:
        vocab = data.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # unigram models list [token, score] pairs
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        return dict(vocab) | {t["content"]: t["id"] for t in data.get("added_tokens", [])}
    except (AttributeError, TypeError, KeyError, ValueError, IndexError):
        return {}  # transformers says what is wrong with it when the base's tokenizer is loaded


def _non_finite(checkpoint: Checkpoint, label: str) -> Iterator[Problem]:
    for name, info in checkpoint.info.items():
        if not info.dtype.is_floating_point:
            continue
        try:
            finite = torch.isfinite(checkpoint.tensor(name))
        except WeightsError as error:
            yield Problem(error.message, where=label, hint=error.hint)
            return
        if not bool(finite.all()):
            count = finite.numel() - int(finite.sum())
            yield Problem(f"tensor {name} holds {count} values that are NaN or infinite", where=label)


def _order(name: str) -> tuple[int, int, str]:
    layer = layer_index(name)
    if layer is not None:
        return (1, layer, name)
    return (0 if "emb" in name or "wte" in name or "wpe" in name else 2, 0, name)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
