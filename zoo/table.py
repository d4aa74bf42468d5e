"""Print the demo zoo's honest table: every merge on the test split, with paired intervals.

The merges here are a few plain lines each and share no code with the evomerge package, so that the
table is a second opinion on what the package searched. The test split chooses nothing but the
baselines' scales: each baseline shows its best scale *on the test split*, in its own favour.

    python -m zoo.table                        base, experts, baselines, single-expert controls
    python -m zoo.table --front FILE.json      and the searched merges of a front

FILE.json holds a list of {"label": ..., "weights": {expert: number}} (task arithmetic), of
{"label": ..., "groups": [{expert: number}, ...]} (the same, one mapping per group of layers) or of
{"label": ..., "checkpoint": folder}. The first entry is the candidate that the table compares with
every other row: it has to be chosen before, on the validation split.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from zoo import data
from zoo.score import score_all

MODELS = Path(__file__).resolve().parent / "models"
EXPERTS = ("math", "cipher", "latin")
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)

State = dict[str, Tensor]
Scores = dict[str, Tensor]  # per task, one 0.0 or 1.0 per test item


class Bench:
    """The zoo in memory: one live model, the base's tensors, the task vectors and the items."""

    def __init__(self, split: str = "test", items: int | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32)
        self.base: State = {k: v.clone() for k, v in self.model.named_parameters()}
        self.deltas: dict[str, State] = {}
        for name in EXPERTS:
            expert = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
            self.deltas[name] = {k: v - self.base[k] for k, v in expert.named_parameters()}
        self.items = {task: data.load(task, split)[:items] for task in data.TASKS}
        self._tasks = {task: rows for task, rows in self.items.items() if rows}

    @torch.no_grad()
    def scores(self, state: Mapping[str, Tensor]) -> Scores:
        """Per-item scores of a merged model on every task."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])
        return score_all(self.model, self._tasks)

    def arithmetic(self, weights: Mapping[str, float]) -> State:
        """base + sum of weight times delta (task arithmetic)."""
        return {
            k: b + sum((w * self.deltas[e][k] for e, w in weights.items()), torch.zeros(()))
            for k, b in self.base.items()
        }

    def grouped(self, groups: Sequence[Mapping[str, float]]) -> State:
        """Task arithmetic with one mapping per consecutive, equally large group of layers."""
        layers = int(self.model.config.num_hidden_layers)
        whole = [self.arithmetic(weights) for weights in groups]
        out: State = {}
        for name in self.base:
            found = re.search(r"layers\.(\d+)\.", name)
            last = 0 if "embed" in name else len(groups) - 1
            place = int(found[1]) * len(groups) // layers if found else last
            out[name] = whole[place][name]
        return out

    def ties(self, density: float, scale: float) -> State:
        """TIES (Yadav et al. 2023): trim per tensor, elect a sign, mean of those that agree."""
        out: State = {}
        for name, b in self.base.items():
            stack = torch.stack([delta[name] for delta in self.deltas.values()])
            trimmed = torch.stack([_top(d, density) for d in stack])
            agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
            mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
            out[name] = b + scale * mean
        return out

    def dare(self, density: float, scale: float, seed: int = 0) -> State:
        """DARE (Yu et al. 2023): keep each element with probability `density`, rescale, add."""
        rng = torch.Generator().manual_seed(seed)
        out = dict(self.base)
        for delta in self.deltas.values():
            for name, d in delta.items():
                keep = torch.rand(d.shape, generator=rng) < density
                out[name] = out[name] + scale * d * keep / density
        return out


def _top(delta: Tensor, density: float) -> Tensor:
    """The `density` share of elements of largest magnitude, the others zero."""
    keep = max(1, round(density * delta.numel()))
    threshold = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def mean(scores: Scores) -> float:
    """Mean over tasks of the accuracies."""
    return sum(s.mean().item() for s in scores.values()) / len(scores)


def difference(a: Scores, b: Scores, tasks: Iterable[str] = data.TASKS) -> tuple[float, float]:
    """Mean over `tasks` of a minus b and its paired normal 95 % half-width, over items only."""
    chosen = list(tasks)
    gaps = [(a[t] - b[t]).double() for t in chosen]
    variance = sum(g.var().item() / len(g) for g in gaps) / len(gaps) ** 2
    return sum(g.mean().item() for g in gaps) / len(gaps), 1.96 * variance**0.5


def best(bench: Bench, make: Callable[[float], State]) -> tuple[float, Scores]:
    """The scale with the highest mean on the bench's own split, with its scores."""
    tried = [(scale, bench.scores(make(scale))) for scale in SCALES]
    return max(tried, key=lambda pair: mean(pair[1]))


def baselines(bench: Bench) -> dict[str, Scores]:
    """Label -> scores of everything that needs no search."""
    rows = {"base": bench.scores(bench.base)}
    for name in EXPERTS:
        rows[f"{name} expert"] = bench.scores(bench.arithmetic({name: 1.0}))
    rows["uniform soup (1/3 each)"] = bench.scores(bench.arithmetic(dict.fromkeys(EXPERTS, 1 / 3)))
    makers: dict[str, Callable[[float], State]] = {
        "task arithmetic, one scale": lambda s: bench.arithmetic(dict.fromkeys(EXPERTS, s)),
        "TIES, density 0.2": lambda s: bench.ties(0.2, 2 * s),
        "TIES, density 0.5": lambda s: bench.ties(0.5, 2 * s),
        "DARE, density 0.5": lambda s: bench.dare(0.5, s),
        "DARE, density 0.8": lambda s: bench.dare(0.8, s),
    }
    for label, make in makers.items():
        scale, scores = best(bench, make)
        shown = 2 * scale if label.startswith("TIES") else scale
        rows[f"{label} (best: {shown:g})"] = scores
    return rows


def controls(bench: Bench) -> dict[str, Scores]:
    """Each expert alone at the scale that is best for the cross task on the test split."""
    rows = {}
    for name in EXPERTS:
        tried = [(s, bench.scores(bench.arithmetic({name: s}))) for s in SCALES]
        scale, scores = max(tried, key=lambda pair: pair[1]["cross"].mean().item())
        rows[f"{name} expert alone at {scale:g} (best for cross)"] = scores
    return rows


def merged(bench: Bench, entry: Mapping[str, Any]) -> State:
    """The tensors that one entry of a front file describes."""
    if "weights" in entry:
        return bench.arithmetic(entry["weights"])
    if "groups" in entry:
        return bench.grouped(entry["groups"])
    model = AutoModelForCausalLM.from_pretrained(entry["checkpoint"], dtype=torch.float32)
    return dict(model.named_parameters())


def separated(a: Scores, b: Scores) -> bool:
    """Whether each beats the other on some task beyond the paired interval."""
    wins = [difference(a, b, [task]) for task in data.TASKS]
    return any(d > h for d, h in wins) and any(d < -h for d, h in wins)


def largest_separated(front: Sequence[Scores]) -> tuple[int, ...]:
    """A large set of points that are pairwise `separated`: the best of one greedy pass from each point.

    The largest such set may be larger; finding it takes exponential time.
    """
    n = len(front)
    apart = {frozenset(p): separated(front[p[0]], front[p[1]]) for p in itertools.combinations(range(n), 2)}
    top: tuple[int, ...] = ()
    for first in range(n):
        chosen = [first]
        for j in (*range(first + 1, n), *range(first)):
            if all(apart[frozenset((i, j))] for i in chosen):
                chosen.append(j)
        top = max(top, tuple(sorted(chosen)), key=len)
    return top


def non_dominated(front: Sequence[Scores]) -> list[int]:
    """Indices of points that no other point equals or beats on every task."""
    points = [[s[t].mean().item() for t in data.TASKS] for s in front]

    def beaten(i: int) -> bool:
        return any(
            all(q >= p for q, p in zip(points[j], points[i], strict=True)) and points[j] != points[i]
            for j in range(len(points))
        )

    return [i for i in range(len(points)) if not beaten(i)]


def show(rows: Mapping[str, Scores], reference: Scores | None) -> str:
    """A Markdown table; the last column is the reference's lead on the mean, with its interval."""
    head = ["merge", *data.TASKS, "mean", "searched merge's lead on the mean"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for label, scores in rows.items():
        cells = [f"{scores[t].mean().item():.3f}" for t in data.TASKS] + [f"{mean(scores):.3f}"]
        lead = "-"
        if reference is not None and reference is not scores:
            d, h = difference(reference, scores)
            lead = f"{d:+.3f} [{d - h:+.3f}, {d + h:+.3f}]"
        lines.append(" | ".join([label, *cells, lead]))
    return "\n".join(f"| {line} |" for line in lines)


def gains(rows: Mapping[str, Scores]) -> str:
    """Each expert minus base per task, with paired intervals."""
    lines = ["| expert minus base | " + " | ".join(data.TASKS) + " |", "|" + " --- |" * 5]
    for name in EXPERTS:
        cells = []
        for task in data.TASKS:
            d, h = difference(rows[f"{name} expert"], rows["base"], [task])
            cells.append(f"{d:+.3f} [{d - h:+.3f}, {d + h:+.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the whole report as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--front", type=Path, help="JSON list of searched merges")
    parser.add_argument("--split", default="test", choices=list(data.SIZES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.split)
    rows = baselines(bench)
    front: dict[str, Scores] = {}
    if args.front:
        for entry in json.loads(args.front.read_text()):
            front[entry["label"]] = bench.scores(merged(bench, entry))
    reference = next(iter(front.values()), None)
    print(gains(rows) + "\n")
    print(show({**rows, **controls(bench), **front}, reference))
    if front:
        scores = list(front.values())
        kept = non_dominated(scores)
        apart = largest_separated([scores[i] for i in kept])
        print(
            f"\n{len(scores)} front points, {len(kept)} of them non-dominated on this split, "
            f"at least {len(apart)} pairwise separated beyond their paired 95 % intervals."
        )


if __name__ == "__main__":
    main()
