"""Trained toy worlds: a residual MLP of 12 blocks on 3 tasks, a base and 4 unequal experts, built in seconds.

Tasks are the labels of random teachers. All have Gaussian inputs; a one-hot part tells which task is meant, but not in
the conflicting world, where two tasks share inputs and disagree on some labels. The base saw little of every task; what
the experts are fine-tuned on is the kind of the world. Weights have one coefficient per expert and layer (input, 12
blocks, output). A model is a few small products of matrices: milliseconds per candidate. Items come from the generator
of the training data, as many as one wants: the truth is the score on a big pool that nobody else sees, and the oracle
follows the gradient of the coefficients on another one.

Trained worlds are kept in a folder (EVOMERGE_TOY_WORLDS, else one in the system's folder for temporary files).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from _landscapes import HIGHEST, Array, Shape
from numpy.typing import NDArray

KINDS = ("balanced", "heterogeneous", "conflicting")
WORLDS = 5  # of each kind; seed s searches world s % WORLDS with items of its own
TASKS, CLASSES, INPUTS, WIDTH, BLOCKS, EXPERTS = 3, 5, 16, 32, 12, 4
LAYERS = BLOCKS + 2
VERSION = 3  # of the recipe below; part of the file's name
BASE_STEPS, BATCH = 250, 256
TRUTH_ITEMS, ORACLE_ITEMS = 4000, 8000

Params = dict[str, np.ndarray]


@dataclass(frozen=True)
class Course:
    """What an expert is fine-tuned on: shares of the tasks, steps, learning rate, share of random labels."""

    mix: tuple[float, float, float]
    steps: int
    rate: float = 1e-3
    noise: float = 0.0


COURSES = {
    "balanced": (
        Course((0.7, 0.15, 0.15), 150, 7e-4),
        Course((0.15, 0.7, 0.15), 150, 7e-4),
        Course((0.15, 0.15, 0.7), 150, 7e-4),
        Course((0.34, 0.33, 0.33), 100, 5e-4),
    ),
    # A strong, a fair and a weak expert, and one that learned noise. Each saw a little of the other tasks: pure
    # experts forget so much that no merge is better than the base.
    "heterogeneous": (
        Course((0.86, 0.07, 0.07), 220),
        Course((0.08, 0.84, 0.08), 160),
        Course((0.1, 0.1, 0.8), 100),
        Course((0.34, 0.33, 0.33), 150, noise=1.0),
    ),
    "conflicting": (
        Course((0.85, 0.0, 0.15), 200),
        Course((0.0, 0.85, 0.15), 200),
        Course((0.05, 0.05, 0.9), 200),
        Course((0.45, 0.45, 0.1), 100),
    ),
}


class Teachers:
    """Labelled inputs of the tasks of one world."""

    def __init__(self, kind: str, world: int) -> None:
        rng = np.random.default_rng([2, KINDS.index(kind), world])
        self._first = rng.standard_normal((TASKS, INPUTS, 24)) / np.sqrt(INPUTS)
        self._second = rng.standard_normal((TASKS, 24, CLASSES))
        self.conflicting = kind == "conflicting"

    def draw(self, rng: np.random.Generator, task: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs `(n, INPUTS + TASKS)` and labels `(n,)` of a task."""
        x = rng.standard_normal((n, INPUTS))
        label = self._label(x, task)
        told = np.zeros((n, TASKS))
        if self.conflicting and task < 2:
            # Both tasks look the same; where the first input is positive, the second wants its own teacher's label.
            told[:, 0] = 1.0
            if task == 1:
                label = np.where(x[:, 0] > 0.0, label, self._label(x, 0))
        else:
            told[:, task] = 1.0
        return np.hstack([x, told]).astype(np.float32), label

    def _label(self, x: np.ndarray, task: int) -> np.ndarray:
        return np.asarray((np.maximum(x @ self._first[task] * 1.5, 0.0) @ self._second[task]).argmax(axis=1))

    def pool(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n items of every task, one task after the other."""
        drawn = [self.draw(rng, task, n) for task in range(TASKS)]
        return np.vstack([x for x, _ in drawn]), np.concatenate([y for _, y in drawn])


def forward(p: Any, x: Any) -> Any:
    """Logits; numpy or torch."""
    h = x @ p["first"]
    for block in range(BLOCKS):
        inner = h @ p["up"][block]
        h = h + inner.clip(0.0) @ p["down"][block]
    return h @ p["last"]


def _train(start: Params, teachers: Teachers, course: Course, seed: list[int]) -> Params:
    """Fine-tune by Adam on fresh items of the course."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    p = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    adam = torch.optim.Adam(p.values(), lr=course.rate)
    for step in range(course.steps):
        counts = rng.multinomial(BATCH, np.array(course.mix) / sum(course.mix))
        drawn = [teachers.draw(rng, task, int(n)) for task, n in enumerate(counts) if n]
        x, y = np.vstack([d[0] for d in drawn]), np.concatenate([d[1] for d in drawn])
        y = np.where(rng.random(BATCH) < course.noise, rng.integers(0, CLASSES, BATCH), y)
        for group in adam.param_groups:
            group["lr"] = course.rate * (1.0 - step / course.steps)
        adam.zero_grad()
        torch.nn.functional.cross_entropy(forward(p, torch.from_numpy(x)), torch.from_numpy(y)).backward()
        adam.step()
    return {name: value.detach().numpy() for name, value in p.items()}


def _start(rng: np.random.Generator) -> Params:
    def normal(scale: float, *shape: int) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {
        "first": normal(1.0 / np.sqrt(INPUTS), INPUTS + TASKS, WIDTH),
        "up": normal(1.0 / np.sqrt(WIDTH), BLOCKS, WIDTH, WIDTH),
        "down": normal(0.3 / np.sqrt(WIDTH), BLOCKS, WIDTH, WIDTH),
        "last": normal(1.0 / np.sqrt(WIDTH), WIDTH, CLASSES),
    }


@dataclass(frozen=True, eq=False)
class World:
    """A trained world: the base's parameters, the experts' deltas, the oracle's coefficients `(experts, layers)`."""

    teachers: Teachers
    base: Params
    deltas: tuple[Params, ...]
    oracle: Array

    def merge(self, weights: np.ndarray) -> Params:
        """base + sum of weight times delta, layer by layer; weights `(experts, layers)`."""
        w = weights.astype(np.float32)
        merged = {name: value.copy() for name, value in self.base.items()}
        for k, delta in enumerate(self.deltas):
            merged["first"] += w[k, 0] * delta["first"]
            merged["up"] += w[k, 1:-1, None, None] * delta["up"]
            merged["down"] += w[k, 1:-1, None, None] * delta["down"]
            merged["last"] += w[k, -1] * delta["last"]
        return merged


@lru_cache(maxsize=4)
def load_world(kind: str, world: int) -> World:
    """The trained world, from the folder if it is there."""
    file = _folder() / f"{kind}-{world}-v{VERSION}.npz"
    teachers = Teachers(kind, world)
    if not file.exists():
        _build(kind, world, teachers, file)
    with np.load(file) as stored:
        names = ("first", "up", "down", "last")
        base = {name: stored[f"base.{name}"] for name in names}
        deltas = tuple({name: stored[f"{k}.{name}"] for name in names} for k in range(EXPERTS))
        return World(teachers, base, deltas, stored["oracle"])


def _folder() -> Path:
    folder = Path(os.environ.get("EVOMERGE_TOY_WORLDS") or Path(tempfile.gettempdir()) / "evomerge-toy-worlds")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(kind: str, world: int, teachers: Teachers, file: Path) -> None:
    key = [3, KINDS.index(kind), world]
    first = _start(np.random.default_rng(key))
    base = _train(first, teachers, Course((1.0, 1.0, 1.0), BASE_STEPS), [*key, 0])
    experts = [_train(base, teachers, course, [*key, k + 1]) for k, course in enumerate(COURSES[kind])]
    deltas = [{name: e[name] - base[name] for name in base} for e in experts]
    oracle = _oracle(World(teachers, base, tuple(deltas), np.empty(0)), [*key, 9])
    arrays = {f"base.{name}": value for name, value in base.items()}
    arrays |= {f"{k}.{name}": value for k, delta in enumerate(deltas) for name, value in delta.items()}
    scratch = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(scratch, oracle=oracle, **arrays)
    scratch.replace(file)


def _oracle(world: World, seed: list[int]) -> Array:
    """The coefficients with the best score on the oracle's pool: gradients per expert, then per layer.

    What is climbed is a sigmoid of the right class's margin, whose mean is a smooth accuracy.
    """
    import torch

    x, y = world.teachers.pool(np.random.default_rng(seed), ORACLE_ITEMS)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    base = {name: torch.from_numpy(value) for name, value in world.base.items()}
    deltas = {name: torch.from_numpy(np.stack([d[name] for d in world.deltas])) for name in world.base}

    def score(w: Any, chosen: Any) -> tuple[Any, float]:
        merged = {
            "first": base["first"] + torch.einsum("k,k...->...", w[:, 0], deltas["first"]),
            "up": base["up"] + torch.einsum("kl,kl...->l...", w[:, 1:-1], deltas["up"]),
            "down": base["down"] + torch.einsum("kl,kl...->l...", w[:, 1:-1], deltas["down"]),
            "last": base["last"] + torch.einsum("k,k...->...", w[:, -1], deltas["last"]),
        }
        logits = forward(merged, inputs[chosen])
        mine = logits.gather(1, labels[chosen][:, None])
        others = logits.scatter(1, labels[chosen][:, None], -torch.inf).amax(dim=1, keepdim=True)
        return torch.sigmoid(3.0 * (mine - others)).mean(), float((mine > others).float().mean())

    rng = np.random.default_rng(seed)
    everything = torch.arange(len(y))
    best, best_score = torch.zeros(EXPERTS, LAYERS), -1.0
    for start, layers, steps, rate in ((0.2, 1, 70, 0.05), (0.5, 1, 70, 0.05), (None, LAYERS, 200, 0.02)):
        w = best.clone() if start is None else torch.full((EXPERTS, layers), start)
        w.requires_grad_()
        adam = torch.optim.Adam([w], lr=rate)
        for step in range(steps):
            adam.zero_grad()
            (-score(w.expand(EXPERTS, LAYERS), torch.from_numpy(rng.integers(0, len(y), 3000)))[0]).backward()
            adam.step()
            with torch.no_grad():
                w.clamp_(0.0, HIGHEST)
                if step % 10 == 9 and (now := score(w.expand(EXPERTS, LAYERS), everything)[1]) > best_score:
                    best, best_score = w.detach().expand(EXPERTS, LAYERS).clone(), now
    return best.numpy().astype(np.float64)


class ToyLandscape:
    """A trained world with the items of one seed."""

    n_tasks = TASKS

    def __init__(self, kind: str, seed: int, n_items: int = 400) -> None:
        self.name, self.n_items, self.plateau = f"toy {kind}", n_items, kind == "balanced"
        self.shape = Shape(EXPERTS, LAYERS)
        world = seed % WORLDS
        self._world = load_world(kind, world)
        rng = np.random.default_rng([4, KINDS.index(kind), seed])
        self._pools = {split: self._world.teachers.pool(rng, n_items) for split in ("search", "validation")}
        truth = np.random.default_rng([5, KINDS.index(kind), world])
        self._pools["truth"] = self._world.teachers.pool(truth, TRUTH_ITEMS)

    def outcomes(self, weights: Array, split: str, positions: NDArray[np.intp] | None = None) -> NDArray[np.uint8]:
        """See Landscape."""
        x, y = self._pools[split]
        if positions is not None:
            x, y = x[positions], y[positions]
        logits = forward(self._world.merge(weights[:, :, 0]), x)
        return np.asarray(logits.argmax(axis=1) == y, dtype=np.uint8)

    def truth(self, weights: Array) -> Array:
        """See Landscape."""
        return np.asarray(self.outcomes(weights, "truth").reshape(TASKS, -1).mean(axis=1))

    def optimum(self) -> Array:
        """See Landscape: by gradient on the coefficients, on items of its own."""
        return self._world.oracle[:, :, None]
