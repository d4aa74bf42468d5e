"""Checkpoints on disk as tensors by name: safetensors only, opened read-only, checked before use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
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

    @property
    def n_bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


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
        return sum(i.n_bytes for i in self.info.values())

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Size of all tensors once the floating ones have `dtype`; None: the checkpoint's own."""
        own = dtype or self.dtype
        return sum(
            math.prod(i.shape) * own.itemsize if i.dtype.is_floating_point else i.n_bytes for i in self.info.values()
        )

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
    """Base and experts resident for a worker, each tensor where the plan puts it.

    A tensor on the GPU is copied there once. One in host memory is copied there once (page-locked beside a GPU) and
    streamed to the GPU at each use; one on disk is memory-mapped, so that its pages are shared by all processes
    that read it, and streamed in the same way. On a CPU nothing is streamed: tensors are handed out as they lie.

    Args:
        paths: the checkpoints' folders, base first.
        device: where tensors are handed out.
        place: (model, tensor name) -> "gpu", "pinned" or "disk"; absent: the GPU if there is one, else the disk.
    """

    def __init__(
        self, paths: Iterable[str], device: str = "cpu", place: Callable[[str, str], str] | None = None
    ) -> None:
        self.device = torch.device(device)
        self.checkpoints = {path: Checkpoint(path) for path in paths}
        on_gpu = self.device.type == "cuda"
        self._place = place or (lambda model, name: "gpu" if on_gpu else "disk")
        self._resident: dict[tuple[str, str], Tensor] = {}

    def __call__(self, model: str, name: str) -> Tensor:
        """The tensor `name` of the checkpoint at `model`, on this device. Never write to it."""
        tensor = self._resident.get((model, name))
        if tensor is None:
            tensor = self._fetch(model, name)
        # Safe without waiting: the copy and everything that reads it are on one stream, in this order.
        return tensor.to(self.device, non_blocking=True)

    def load(self) -> None:
        """Copy now what belongs on the GPU or in host memory, instead of at its first use.

        Raises:
            WeightsError: it does not fit.
        """
        try:
            for model, checkpoint in self.checkpoints.items():
                for name in checkpoint.names:
                    if self._place(model, name) != "disk" and (model, name) not in self._resident:
                        self._fetch(model, name)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise WeightsError(
                f"the resident weights do not fit in memory: {str(error).splitlines()[0][:300]}",
                hint="lower `gpu_memory:` or `host_memory:` under `workers:`",
            ) from error

    def forget(self, keys: Iterable[tuple[str, str]]) -> None:
        """Let go of tensors that are not needed again."""
        for key in keys:
            self._resident.pop(key, None)

    def _fetch(self, model: str, name: str) -> Tensor:
        """The tensor at its place, and kept there."""
        if model not in self.checkpoints:
            self.checkpoints[model] = Checkpoint(model)
        stored = self.checkpoints[model].tensor(name)
        place = self._place(model, name)
        if place == "gpu":
            stored = stored.to(self.device)
        elif place == "pinned":
            pin = self.device.type == "cuda"
            stored = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pin).copy_(stored)
        self._resident[model, name] = stored
        return stored


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


def _order(name: str) -> tuple[int, int, str]:
    layer = layer_index(name)
    if layer is not None:
        return (1, layer, name)
    return (0 if "emb" in name or "wte" in name or "wpe" in name else 2, 0, name)
