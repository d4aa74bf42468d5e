"""Inputs of merge_speed.py: synthetic Llama checkpoints, their loading, and the peak of memory.

Both sides of the comparison import this file, evomerge's and mergekit's environment: torch and safetensors only.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BASE = "base"
EXPERTS = ("red", "green", "blue")
SHARD_BYTES = 60_000_000


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name in a Hugging Face checkpoint."""
        h, m = self.hidden, self.inner
        block = {
            "input_layernorm": (h,),
            "mlp.down_proj": (h, m),
            "mlp.gate_proj": (m, h),
            "mlp.up_proj": (m, h),
            "post_attention_layernorm": (h,),
            **{f"self_attn.{name}_proj": (h, h) for name in "koqv"},
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return found | {"model.norm.weight": (h,)}


LARGE = Shape(16384, 768, 3072, 12)  # 126M parameters
SMALL = Shape(64, 24, 48, 2)


def write_models(folder: Path, shape: Shape) -> None:
    """Write base and experts, bf16, in shards. Weights are normal; task vectors are a tenth as large and heavy-tailed.

    The tails are those of a normal variable times the exponential of another one.
    """
    writers = {name: _Shards(folder / name) for name in (BASE, *EXPERTS)}
    generator = torch.Generator().manual_seed(0)
    for name, size in shape.tensors().items():
        base = torch.randn(size, generator=generator).mul_(0.02)
        if len(size) == 1:
            base.add_(1.0)  # the gain of a norm
        base = base.bfloat16()
        writers[BASE].add(name, base)
        for expert in EXPERTS:
            delta = torch.randn(size, generator=generator).exp_().mul_(torch.randn(size, generator=generator))
            writers[expert].add(name, delta.mul_(0.001).add_(base).bfloat16())
    for writer in writers.values():
        writer.close()


class _Shards:
    """A sharded safetensors checkpoint in the Hugging Face layout, written as it grows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.waiting: dict[str, Tensor] = {}
        self.files: dict[str, str] = {}
        self.n_shards = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor
        if sum(t.nbytes for t in self.waiting.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.n_shards += 1
            file = f"model-{self.n_shards:05}.safetensors"
            save_file(self.waiting, self.folder / file, metadata={"format": "pt"})
            self.files |= dict.fromkeys(self.waiting, file)
            self.waiting = {}

    def close(self) -> None:
        self.flush()
        index = {"metadata": {}, "weight_map": self.files}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_models(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of base and experts by name, each in memory of its own (not mapped)."""
    found = {}
    for model in (BASE, *EXPERTS):
        index = json.loads((folder / model / "model.safetensors.index.json").read_text())
        shards = {file: load_file(folder / model / file) for file in dict.fromkeys(index["weight_map"].values())}
        found[model] = {name: shards[file][name].clone() for name, file in index["weight_map"].items()}
    return found


def checked(names: Iterable[str]) -> list[str]:
    """The weights by which both sides' results are compared: those of the first block."""
    return [name for name in names if ".layers.0." in name]


def distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the L1 distance of the pairs, all together."""
    return sum(float((a.double() - b.double()).abs().sum()) for a, b in pairs)


class Peak:
    """The largest memory of this process above that at the start of the block, in bytes (None: not known).

    Linux keeps the peak of resident memory and lets a process reset it.
    """

    def __init__(self) -> None:
        self.n_bytes: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide new use
            Path("/proc/self/clear_refs").write_text("5")
            self._before: int | None = _status("VmRSS")
        except (OSError, AttributeError):
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.n_bytes = max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
