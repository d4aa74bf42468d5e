"""Whether checkpoints are a family: one base and fine-tunes of it, compared tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import Problem, WeightsError
from evomerge.weights import Checkpoint

BLOCK = 1024  # neighbouring elements per block of a sample
BLOCKS = 16  # of a large tensor, evenly spaced; smaller tensors are looked at whole

# The angle between an expert's matrix and the base's. Two independent initialisations are orthogonal: their cosine
# is 0 within 1/sqrt(sample) = 0.01, their relative distance at least 1, sqrt(2) at equal scales. A change of
# relative size r in a random direction leaves cosine 1/sqrt(1 + r^2), fine-tuning has r of 0.001 to 0.1. At
# cosine 1/2 three quarters of the expert's squared norm have nothing to do with the base.
UNLIKE_COSINE = 0.5
UNLIKE_DISTANCE = 1.0  # as far from the base as zeros are
FAR_DISTANCE = 0.5  # a warning

DARE_LIMIT = 0.03  # Yu et al. 2023 (arXiv 2311.03099): where random dropping stops working
DARE_QUANTILE = 0.999


@dataclass(frozen=True)
class Change:
    """How far one expert's floating tensors are from the base's, on a fixed sample of their elements.

    Attributes:
        tensors, differing: how many were compared, and how many of them are not equal to the last bit.
        matrices: tensors of two dimensions or more where the base is not zero.
        unlike: matrices that are no fine-tune of the base's by their angle or distance.
        distance: median over the matrices of |expert - base| / |base|; over all tensors where there is no matrix.
        cosine: median over the matrices, in the same way.
        quantile: 99.9 % of the matrices' elements changed by no more than this.
    """

    tensors: int
    differing: int
    matrices: int
    unlike: int
    distance: float
    cosine: float
    quantile: float

    def __str__(self) -> str:
        if not self.differing:
            return f"equals the base in all {self.tensors} tensors"
        return (
            f"{self.differing} of {self.tensors} tensors differ, median relative distance {self.distance:.2g}, "
            f"99.9 % of changes below {self.quantile:.2g}"
        )


def measure(base: Checkpoint, expert: Checkpoint) -> Change:
    """Compare an expert with the base. Cheap: 16384 elements per tensor, always the same ones.

    Only the question whether a tensor differs at all reads the whole of it, and only where the sample is equal.
    """
    rows: list[tuple[float, float, bool]] = []  # (distance, cosine, is a matrix)
    sizes: list[np.ndarray] = []
    shares: list[np.ndarray] = []
    tensors = differing = 0
    for name, info in base.info.items():
        other = expert.info.get(name)
        if other is None or other.shape != info.shape or not info.dtype.is_floating_point:
            continue
        ours, theirs = base.tensor(name), expert.tensor(name)
        a, b = sample(ours), sample(theirs)
        tensors += 1
        differing += not (torch.equal(a, b) and torch.equal(ours, theirs.to(ours.dtype)))
        change, norm = (b - a).abs(), float(a.norm())
        if norm == 0.0 or not bool(torch.isfinite(change).all()):
            continue
        is_matrix = len(info.shape) >= 2
        cosine = float(a @ b) / max(norm * float(b.norm()), 1e-300)
        rows.append((float(change.norm()) / norm, cosine, is_matrix))
        if is_matrix:
            sizes.append(change.numpy())
            shares.append(np.full(len(change), ours.numel() / len(change)))
    matrices = [row for row in rows if row[2]]
    judged = np.array([row[:2] for row in matrices or rows] or [(0.0, 1.0)])
    unlike = [d > UNLIKE_DISTANCE or c < UNLIKE_COSINE for d, c, _ in matrices]
    return Change(
        tensors=tensors,
        differing=differing,
        matrices=len(matrices),
        unlike=sum(unlike),
        distance=float(np.median(judged[:, 0])),
        cosine=float(np.median(judged[:, 1])),
        quantile=_quantile(sizes, shares),
    )


def sample(tensor: Tensor) -> Tensor:
    """The elements of a tensor that are compared, in float64: evenly spaced blocks, the ends included.

    Blocks and not single elements: a constant step between elements would see a few columns of a matrix only.
    """
    flat = tensor.reshape(-1)
    n = flat.numel()
    if n <= BLOCK * BLOCKS:
        return flat.double()
    starts = [(n - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    return torch.cat([flat[start : start + BLOCK] for start in starts]).double()


def _quantile(sizes: list[np.ndarray], shares: list[np.ndarray]) -> float:
    """The DARE_QUANTILE of all elements, each sampled one standing for its tensor's share of them."""
    if not sizes:
        return 0.0
    values, weights = np.concatenate(sizes), np.concatenate(shares)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    at = int(np.searchsorted(reached, DARE_QUANTILE * reached[-1]))
    return float(values[order[min(at, len(order) - 1)]])


def unrelated(changes: Mapping[str, Change]) -> list[Problem]:
    """The experts that are no fine-tunes of the base: most of their matrices are strangers to it."""
    return [
        Problem(
            f"not a fine-tune of the base: {c.differing} of {c.tensors} tensors differ, median relative distance "
            f"{c.distance:.2g}, median cosine {c.cosine:.2g}; {c.unlike} of {c.matrices} matrices have nothing to do "
            "with the base's",
            where=label,
            hint="independent models have cosine 0 and distance 1.4, fine-tunes cosine near 1 and distance below 0.5",
        )
        for label, c in changes.items()
        if 2 * c.unlike > c.matrices
    ]


def suspicious(changes: Mapping[str, Change], *, drops: bool) -> list[Problem]:
    """What is worth a warning about experts that can be merged. `drops`: task vectors are thinned at random."""
    found = []
    for label, c in changes.items():
        if not c.differing:
            found.append(Problem("equals the base: all its weights do nothing", where=label))
        elif c.distance > FAR_DISTANCE and 2 * c.unlike <= c.matrices:
            message = f"far from the base: median relative distance {c.distance:.2g}, cosine {c.cosine:.2g}"
            found.append(Problem(message, where=label, hint="fine-tunes are usually below 0.1"))
        if drops and c.quantile > DARE_LIMIT:
            found.append(
                Problem(
                    f"its changes reach {c.quantile:.2g} (99.9 % quantile): dropping at random is known to degrade "
                    f"above {DARE_LIMIT:g}, as after continued pre-training",
                    where=label,
                    hint="trimming by size (ties) or a density near 1 keeps it; arXiv 2311.03099",
                )
            )
    return found


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
    both = [(name, info.shape, expert.info[name].shape) for name, info in base.info.items() if name in expert.info]
    wrong = [(name, ours, theirs) for name, ours, theirs in both if ours != theirs]
    if wrong:
        name, shape, other = wrong[0]
        more = f" (and so on in {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield Problem(f"tensor {name} has shape {other}, but {shape} in the base{more}", where=label)
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
