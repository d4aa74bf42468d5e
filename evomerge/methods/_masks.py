"""Which elements of a task vector are kept: by a counter-based hash, or by magnitude.

Both are integer or comparison arithmetic only, so that every device, chunk and thread count
gives the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_CHUNK = 1 << 20  # elements hashed at a time: int64 temporaries of 8 MB


def keep_mask(
    shape: int | Sequence[int],
    density: float,
    *,
    seed: int,
    tensor_name: str,
    stream: int,
    device: torch.device | str = "cpu",
    offset: int = 0,
) -> Tensor:
    """Returns a bool mask of `shape` that is True with probability `density`.

    Element i (row-major, counted from `offset`) is kept when a 32-bit hash of (seed, tensor_name,
    stream, i) is below floor(density * 2^32). So a chunk is the slice of the whole mask, and the
    mask of a lower density is contained in that of a higher one. No random generator is involved.
    """
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(dims)
    threshold = math.floor(min(max(density, 0.0), 1.0) * 2**32)
    mask = torch.empty(numel, dtype=torch.bool, device=device)
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        bits = hash_bits(offset + start, offset + stop, seed, tensor_name, stream, device)
        torch.lt(bits, threshold, out=mask[start:stop])
    return mask.reshape(dims)


def tensor_key(seed: int, tensor_name: str) -> int:
    """Returns the key of the first round, which all streams of a tensor share: 32 bits."""
    return _digest(f"{seed}|{tensor_name}")[0]


def stream_keys(seed: int, tensor_name: str, stream: int) -> tuple[int, int]:
    """Returns what a stream adds and xors between the two rounds: 32 bits each."""
    # The integers at both ends cannot hold a "|", so two different triples never read the same.
    return _digest(f"{seed}|{tensor_name}|{stream}")


def _digest(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"evomerge mask").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def hash_bits(
    start: int, stop: int, seed: int, tensor_name: str, stream: int, device: torch.device | str
) -> Tensor:  # fmt: skip
    """Returns the hashes (int64 in [0, 2^32)) of the element indices start ... stop-1.

    Two keyed rounds of murmur3's 32-bit finaliser over the low and the high word of the index; the first has one key
    per tensor, so that several experts' masks share it. One round would not do: two streams would then see one
    permutation, shifted by an xor.
    """
    add, xor = stream_keys(seed, tensor_name, stream)
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    high = index >> 32
    h = index.bitwise_and_(_LOW_32).bitwise_xor_(tensor_key(seed, tensor_name))
    h = _finalise(h).add_(add).add_(high.mul_(0x9E3779B9)).bitwise_and_(_LOW_32)
    return _finalise(h.bitwise_xor_(xor))


def _finalise(h: Tensor) -> Tensor:
    """Murmur3's fmix32, in place; int64 products wrap, and only their low 32 bits are kept."""
    h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(_LOW_32)
    h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(_LOW_32)
    return h.bitwise_xor_(h >> 16)


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Returns the bool mask of the k = max(1, floor(density * numel)) largest magnitudes.

    Exactly k entries, equal magnitudes by lowest index; entries that are zero never count as
    kept, so a delta with fewer than k non-zeros keeps those. Density 0 keeps none.
    """
    magnitude = delta.detach().abs().float().flatten()
    n = magnitude.numel()
    if density >= 1.0:
        return (magnitude > 0).reshape(delta.shape)
    if density <= 0.0 or n == 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    k = max(1, math.floor(density * n))
    cutoff = torch.kthvalue(magnitude, n - k + 1).values
    mask = magnitude > cutoff
    at_cutoff = ((magnitude == cutoff) & (magnitude > 0)).nonzero().squeeze(1)
    mask[at_cutoff[: k - int(mask.sum())]] = True
    return mask.reshape(delta.shape)
