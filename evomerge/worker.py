"""The worker: owns the resident weights and the one live model, and evaluates candidates."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from evomerge import faults
from evomerge.fidelity import Stopped, count_at, item_order, new_items
from evomerge.intervals import Spread, spread
from evomerge.limits import Whole
from evomerge.methods import Tables
from evomerge.model import LiveModel
from evomerge.moments import Observed
from evomerge.objectives import Objective, ObjectiveSpec, Scores, make_objective, whole_kind
from evomerge.objectives._references import observe_references
from evomerge.racing import Race, Verdict, estimate
from evomerge.recipe import Recipe
from evomerge.residency import Memory, settle
from evomerge.weights import Checkpoint, Weights

AGAIN = 16  # items, at least, that are scored twice to see whether scores repeat


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs, as plain data: weights travel by path, never as tensors.

    Attributes:
        base: checkpoint folder; gives the architecture and the tokenizer.
        models: folders of all checkpoints to keep resident, base first.
        objectives: in the study's order.
        device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        threads: CPU threads for arithmetic; 0 leaves torch's default.
        dtype: name of a torch dtype for the live model; None keeps the base's.
        allowed_s: longest time for one candidate before its worker is replaced; None is no limit.
        memory: budgets for resident weights and tables.
    """

    base: str
    models: tuple[str, ...]
    objectives: tuple[ObjectiveSpec, ...]
    device: str = "cpu"
    threads: int = 0
    dtype: str | None = None
    allowed_s: float | None = None
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class Job:
    """One model to score: a candidate's number and recipe, and the splits wanted.

    Attributes:
        race: the rungs of the search split, and whom the candidate has to beat; None scores it at once.
        batch_tokens: size of a batch that the study has settled on; None leaves the worker's own.
        twice: score the search split again, to see whether scores repeat.
        parts: score only these items of each split, part after part, each in batches of its own: objective ->
            positions, ascending, or None for all. The scores are those of all the parts' items, in the split's order;
            an objective that no part names is left out.
        moments: measure what the layers read while the model is scored; see `moments.Observed`.
    """

    number: int
    recipe: Recipe
    splits: tuple[str, ...] = ("search",)
    race: Race | None = None
    batch_tokens: int | None = None
    twice: bool = False
    parts: Sequence[Mapping[str, Sequence[int] | None]] = ()
    moments: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a worker found out about one job.

    Attributes:
        scores: split -> objective -> Scores; of a stopped candidate the estimates and the seen items.
        merge_s, eval_s: wall-clock seconds of merging and of scoring.
        peak_bytes: largest memory of the worker during the job (device memory on CUDA).
        worker: which process did it.
        tables: what the worker has computed from the models alone so far: bytes, budget, seconds, counts; and of the
            hidden states that it keeps (see `prefix`): bytes, passes, those that used one, share of layers saved.
        stopped: at which rung and by whom the candidate was beaten; None if it was scored in full.
        batch_tokens: size of a batch with which it was scored: smaller than asked for where memory ran out.
        notes: what people should know of how this worker scores.
        spreads: objectives whose second score of the same model was another, if there was a second one.
        moments: of a job that asked for them: what the layers read, by kind.
    """

    number: int
    scores: dict[str, dict[str, Scores]]
    merge_s: float
    eval_s: float
    peak_bytes: int
    worker: str
    tables: Mapping[str, float] = field(default_factory=dict)
    stopped: Stopped | None = None
    batch_tokens: int = 0
    notes: tuple[str, ...] = ()
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    moments: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def attrs(self) -> dict[str, object]:
        """What the study records of the evaluation, beside scores."""
        attrs: dict[str, object] = {
            "t_merge_s": round(self.merge_s, 6),
            "t_eval_s": round(self.eval_s, 6),
            "peak_bytes": self.peak_bytes,
            "worker": self.worker,
            "tables": {k: round(v, 6) for k, v in self.tables.items()},
            "batch_tokens": self.batch_tokens,
        }
        if self.spreads:
            attrs["spreads"] = {name: {"item": s.item, "value": s.value} for name, s in self.spreads.items()}
        return attrs


@dataclass(frozen=True)
class Failed:
    """A job without scores: the reason in one word and a message for people.

    Reasons: weights, logits, scores (not finite), oom, timeout, poison, error.
    """

    number: int
    reason: str
    message: str


class Worker:
    """Weights, model and objectives in one process. A plain class; pools run it elsewhere."""

    def __init__(self, spec: WorkerSpec) -> None:
        faults.point("opening")
        self.spec = spec
        if spec.threads:
            torch.set_num_threads(spec.threads)
        dtype = getattr(torch, spec.dtype) if spec.dtype else None
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        models = {path: Checkpoint(path) for path in spec.models}
        live_bytes = Checkpoint(spec.base).bytes_as(dtype)
        self.residency = settle(spec.memory, device, models, live_bytes, measured=True)
        self.weights = Weights(spec.models, device, self.residency.place)
        self.live = LiveModel(spec.base, device, dtype, Tables(spec.memory.tables_bytes))
        self.weights.load()  # after the live model, which must fit whatever the budgets say
        self.objectives: list[Objective] = [make_objective(o) for o in spec.objectives]
        self._observed: set[str] = set()
        self._observe(("search",))  # not within the time that a candidate is allowed
        self._sizes: dict[tuple[str, str], int] = {}

    def _observe(self, splits: Sequence[str]) -> None:
        observe_references(self.objectives, self.live, self.weights, splits, self._observed)

    def evaluate(self, job: Job) -> Outcome:
        """Merge the job's recipe into the live model and score it.

        Raises:
            CandidateFailure: this candidate has no scores (non-finite weights or logits).
        """
        if job.batch_tokens is not None:
            self.live.batch_tokens = job.batch_tokens
        self._observe(job.splits)
        _reset_peak(self.live.device)
        started = time.perf_counter()
        faults.point("merging", job.number)
        self.live.install(job.recipe, self.weights)
        merged = time.perf_counter()
        with Observed(self.live) if job.moments else contextlib.nullcontext() as seen:
            scores, stopped = self._score(job)
        scored = time.perf_counter()
        with self.live.prefixes.paused():
            again = score_again(self.objectives, self.live, scores["search"], job.race) if job.twice else {}
        faults.point("reporting", job.number)
        return Outcome(
            number=job.number,
            scores=scores,
            merge_s=merged - started,
            eval_s=scored - merged,
            peak_bytes=_peak_bytes(self.live.device),
            worker=f"{os.uname().nodename}:{os.getpid()}",
            tables=self.live.tables.report() | self.live.prefixes.report(),
            stopped=stopped,
            batch_tokens=self.live.batch_tokens,
            notes=(
                *self.live.notes,
                *self._prefix_notes(),
                *(f"objective {n} is not deterministic: {apart}" for n, apart in again.items()),
            ),
            spreads=again,
            moments=seen.moments() if seen is not None else {},
        )

    def _prefix_notes(self) -> Iterator[str]:
        if self.live.prefixes.problem:
            yield f"paths do not share the states behind their first layers: {self.live.prefixes.problem}"

    def _score(self, job: Job) -> tuple[dict[str, dict[str, Scores]], Stopped | None]:
        """The live model's scores on the splits of a job, and whether it was stopped early."""
        scores: dict[str, dict[str, Scores]] = {}
        stopped: Stopped | None = None
        for split in job.splits:
            if split == "search" and job.race is not None:
                scores[split], stopped = score_in_rungs(self.objectives, self.live, split, job.race, self._sizes)
                continue
            if job.parts:
                scores[split] = score_parts(self.objectives, self.live, split, job.parts)
                continue
            scores[split] = {}
            for objective in self.objectives:
                faults.point("scoring")
                scores[split][objective.name] = objective.score(self.live, split)
        return scores, stopped


def _unsteady(name: str, apart: Spread) -> str:
    return f"objective {name} is not deterministic: {apart}"


def score_again(
    objectives: Sequence[Objective], live: LiveModel, first: Mapping[str, Scores], race: Race | None
) -> dict[str, Spread]:
    """How far a second search score of the same model is from the first; objectives that repeat are left out.

    In a study with rungs the items of the first rung are scored again, in the batches that they were in. Without
    rungs an eighth of the items is scored twice, and all of them where an objective has no parts.
    """
    found = {}
    for objective in objectives:
        before = first[objective.name]
        n = len(before.items)
        positions: list[int] | None = None
        if race is not None and not whole_kind(objective):
            positions = new_items(item_order(race.seed, objective.name, n), race.rungs, 0).tolist()
            before = objective.aggregate(before.items[positions])
        elif objective.partial:
            positions = list(range(min(n, max(AGAIN, n // 8))))
            before = objective.score(live, "search", positions)
        apart = spread(before, objective.score(live, "search", positions))
        if apart is not None:
            found[objective.name] = apart
    return found


def score_parts(
    objectives: Sequence[Objective], live: LiveModel, split: str, parts: Sequence[Mapping[str, Sequence[int] | None]]
) -> dict[str, Scores]:
    """The scores of parts of a split; see `Job.parts`."""
    found = {}
    for objective in objectives:
        faults.point("scoring")
        wanted = [part[objective.name] for part in parts if objective.name in part]
        some = [np.asarray(positions) for positions in wanted if positions is not None]
        if len(some) < len(wanted):
            found[objective.name] = objective.score(live, split)
        elif some:
            items = np.concatenate([objective.score(live, split, positions.tolist()).items for positions in some])
            found[objective.name] = objective.aggregate(items[np.argsort(np.concatenate(some), kind="stable")])
    return found


def score_in_rungs(
    objectives: Sequence[Objective], live: LiveModel, split: str, race: Race, known_sizes: dict[tuple[str, str], int]
) -> tuple[dict[str, Scores], Stopped | None]:
    """Score the live model on growing parts of a split, until it is stopped or every item is scored.

    Objectives that are scored whole are scored once: exact ones first, measured ones beside the first part.

    Args:
        known_sizes: (objective, split) -> number of items; filled here, since counting may read the data.

    Returns:
        Scores in the split's order and None; or estimates with the items seen, and where it was stopped. Those of an
        objective without any seen item are NaN.

    Raises:
        CandidateFailure: this model cannot be scored.
    """
    whole = {j: o.score(live, split) for j, o in enumerate(objectives) if whole_kind(o) == "exact"}
    found = race.missed(_known(whole))
    if found is not None:
        return _stopped(objectives, found, 0.0, whole, {})
    raced = [j for j, o in enumerate(objectives) if not whole_kind(o)]
    sizes = _sizes(objectives, split, raced, known_sizes)
    orders = {j: item_order(race.seed, objectives[j].name, sizes[j]) for j in raced}
    items: dict[int, np.ndarray] = {}
    for index, share in enumerate(race.rungs):
        for j in raced:
            faults.point("scoring")
            positions = new_items(orders[j], race.rungs, index)
            if len(positions) == 0:
                continue  # so few items that two rungs are the same
            part = objectives[j].score(live, split, positions.tolist()).items
            if index == 0:
                items[j] = np.full((sizes[j], *part.shape[1:]), np.nan)
            items[j][positions] = part
        if index == 0:
            whole |= {j: o.score(live, split) for j, o in enumerate(objectives) if whole_kind(o) == "measured"}
        if share < 1.0:
            orders_now = {j: order[: count_at(sizes[j], share)] for j, order in orders.items()}
            seen = [items[j][orders_now[j]] if j in items else np.empty(0) for j in range(len(objectives))]
            found = race.verdict(seen, sizes, share, _known(whole))
            if found is not None:
                return _stopped(objectives, found, share, whole, {j: (items[j], o) for j, o in orders_now.items()})
    return {o.name: whole[j] if j in whole else o.aggregate(items[j]) for j, o in enumerate(objectives)}, None


def _known(whole: Mapping[int, Scores]) -> dict[int, Whole]:
    return {j: Whole(score.value, score.stderr, len(score.items)) for j, score in whole.items()}


def _sizes(
    objectives: Sequence[Objective], split: str, raced: Sequence[int], known: dict[tuple[str, str], int]
) -> list[int]:
    """The number of items of each objective that has some; 1 of those that are scored whole."""
    for j in raced:
        if (objectives[j].name, split) not in known:
            known[objectives[j].name, split] = objectives[j].size(split)
    return [known.get((o.name, split), 1) for o in objectives]


def _stopped(
    objectives: Sequence[Objective],
    verdict: Verdict,
    share: float,
    whole: Mapping[int, Scores],
    parts: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> tuple[dict[str, Scores], Stopped]:
    """What a stopped candidate would have scored, inside each objective's bounds, with the items seen.

    Args:
        parts: index of an objective -> its items in the split's order, and the positions of the seen ones in the
            race's.
    """
    found: dict[str, Scores] = {}
    positions: dict[str, np.ndarray] = {}
    for j, objective in enumerate(objectives):
        name = objective.name
        if j in whole:
            found[name], positions[name] = whole[j], np.arange(len(whole[j].items))
        elif j in parts:
            items, order = parts[j]
            positions[name] = np.sort(order)
            plain = objective.aggregate(items[positions[name]])
            value, stderr = estimate(plain.value, plain.stderr, items[order], verdict.rival, j, len(items))
            found[name] = Scores(float(np.clip(value, *_limits(objective))), stderr, plain.items)
        else:
            found[name], positions[name] = Scores(np.nan, np.nan, np.empty(0)), np.empty(0, dtype=np.intp)
    blamed = "" if verdict.objective is None else objectives[verdict.objective].name
    return found, Stopped(share, verdict.rival.number, positions, verdict.rule, blamed)


def _limits(objective: Objective) -> tuple[float, float]:
    low, high = objective.bounds
    return -np.inf if low is None else low, np.inf if high is None else high


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
