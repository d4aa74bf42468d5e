"""Where weights live: on the GPU, in pinned host memory, or memory-mapped on disk; a plan made from sizes alone.

The place changes how long a merge waits for its inputs, never what it computes: a tensor has the same bits
everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evomerge.methods import Tables
from evomerge.recipe import layer_index
from evomerge.weights import Checkpoint

Place = Literal["gpu", "pinned", "disk"]
Key = tuple[str, str]

TABLES_BYTES = Tables().budget_bytes
SMALL_BYTES = 1 << 20  # below this a copy to the GPU costs its start, not its bytes
SCORING_SHARE = 0.2  # of the device, kept for activations and the key-value cache: unknown before scoring
HOST_SHARE = 0.5  # of the free host memory that may be page-locked: nothing else can use those pages


@dataclass(frozen=True)
class Memory:
    """What one worker may use, in bytes; None leaves it to the machine.

    Attributes:
        gpu_bytes: device memory for resident weights; the live model comes on top.
        host_bytes: host memory for copies of weights, page-locked beside a GPU.
        tables_bytes: for what merges compute from the models alone.
        on_device, on_host: how many workers share the device, and the machine.
    """

    gpu_bytes: int | None = None
    host_bytes: int | None = None
    tables_bytes: int = TABLES_BYTES
    on_device: int = 1
    on_host: int = 1


@dataclass(frozen=True)
class Residency:
    """A place for each (model, tensor name) of a worker's checkpoints; what it does not name stays on disk.

    Attributes:
        n_bytes: of each tensor named in `places`.
        page_locked: whether copies in host memory are pinned, for a GPU; plain memory otherwise.
    """

    places: Mapping[Key, Place] = field(default_factory=dict)
    n_bytes: Mapping[Key, int] = field(default_factory=dict)
    page_locked: bool = False

    def place(self, model: str, name: str) -> Place:
        """Where that tensor lives."""
        return self.places.get((model, name), "disk")

    def total(self, place: Place) -> tuple[int, int]:
        """The number of tensors at a place, and their bytes."""
        found = [self.n_bytes[key] for key, at in self.places.items() if at == place]
        return len(found), sum(found)

    def __str__(self) -> str:
        host = "in pinned host memory" if self.page_locked else "in host memory"
        words: dict[Place, str] = {"gpu": "on the GPU", "pinned": host, "disk": "memory-mapped on disk"}
        found = {place: self.total(place) for place in words}
        parts = [f"{show_bytes(size)} {words[p]} ({count} tensors)" for p, (count, size) in found.items() if count]
        return ", ".join(parts) or "no weights"


def plan(models: Mapping[str, Checkpoint], gpu_bytes: int, host_bytes: int, *, page_locked: bool = False) -> Residency:
    """Give each tensor a place: the GPU while its budget lasts, then host memory, then the disk.

    The tensors of one name go together, base and experts alike: a merge needs all of them at once. Small tensors
    come first (a copy of one costs a start and no bytes), then whole layers from the first to the last, then what
    is outside the layers. Which layers are nearest makes no difference to the time: each is read once per
    candidate, and every byte that is at hand saves the same transfer. What does not fit is passed over, so
    that one large embedding does not keep the layers away.
    """
    places: dict[Key, Place] = {}
    sizes = {(m, n): info.n_bytes for m, checkpoint in models.items() for n, info in checkpoint.info.items()}
    left: dict[Place, int] = {"gpu": gpu_bytes, "pinned": host_bytes}
    for group in _groups(models, sizes):
        wanted = sum(sizes[key] for key in group)
        locked = sum(pinned_bytes(sizes[key]) for key in group) if page_locked else wanted
        where: Place = "disk"
        if wanted <= left["gpu"]:
            where, left["gpu"] = "gpu", left["gpu"] - wanted
        elif locked <= left["pinned"]:
            where, left["pinned"] = "pinned", left["pinned"] - locked
        places.update(dict.fromkeys(group, where))
    return Residency(places, sizes, page_locked)


def _groups(models: Mapping[str, Checkpoint], sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    by_name: dict[str, list[Key]] = {}
    for model, checkpoint in models.items():
        for name in checkpoint.info:
            by_name.setdefault(name, []).append((model, name))
    small = {name for name, keys in by_name.items() if max(sizes[key] for key in keys) < SMALL_BYTES}
    for name in by_name:
        if name in small:
            yield by_name[name]
    layers: dict[int, list[Key]] = {}
    outside = []
    for name, keys in by_name.items():
        if name in small:
            continue
        index = layer_index(name)
        if index is None:
            outside.append(keys)
        else:
            layers.setdefault(index, []).extend(keys)
    yield from (layers[index] for index in sorted(layers))
    yield from outside


def pinned_bytes(size: int) -> int:
    """What `size` bytes take when page-locked: torch's allocator rounds up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def settle(
    memory: Memory, device: str, models: Mapping[str, Checkpoint], live_bytes: int, *, measured: bool
) -> Residency:
    """The plan for a worker on `device`, whatever its budgets leave open taken from this machine.

    Args:
        live_bytes: size of the live model.
        measured: ask the device how much is free, as a worker does when it starts. Otherwise suppose that nothing
            else runs on it: asking would itself take device memory.
    """
    if not device.startswith("cuda"):
        return plan(models, 0, memory.host_bytes or 0)
    gpu = memory.gpu_bytes
    if gpu is None:
        free, total = device_bytes(device, measured=measured)
        gpu = default_gpu_bytes(free, total, memory, live_bytes, working_bytes(models))
    host = memory.host_bytes
    if host is None:
        host = int(available_bytes() * HOST_SHARE) // memory.on_host
    return plan(models, gpu, host, page_locked=True)


def default_gpu_bytes(free: int, total: int, memory: Memory, live_bytes: int, working: int) -> int:
    """What is left for weights of one worker's share of a device, after everything that must be there."""
    share = min(free, total // memory.on_device)
    return max(0, int(share * (1 - SCORING_SHARE)) - live_bytes - memory.tables_bytes - working)


def working_bytes(models: Mapping[str, Checkpoint]) -> int:
    """The temporaries of one merge: its largest tensor in float32, of every model, twice more for results."""
    largest = max((math.prod(i.shape) for c in models.values() for i in c.info.values()), default=0)
    return 4 * largest * (len(models) + 2)


def device_bytes(device: str, *, measured: bool) -> tuple[int, int]:
    """(free, total) memory of a CUDA device; unless `measured`, all of it counts as free."""
    import torch

    if measured:
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return int(free), int(total)
    total = int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return total, total


def host_bytes() -> int:
    """All memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Host memory that programs can have now, within this container's limit."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = host_bytes()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return max(0, min(free, limit - used))


def show_bytes(size: float) -> str:
    """A size for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
