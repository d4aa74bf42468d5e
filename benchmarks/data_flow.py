"""Is a layer order worth searching for? Paths through the demo zoo's layers, beside searched coefficients.

    python benchmarks/data_flow.py                       # everything; studies in runs/data-flow, which are continued
    python benchmarks/data_flow.py --seeds 1 --evaluations 30
    python benchmarks/data_flow.py --only speed

Arms, with equal numbers of evaluations and one study per seed:

* identity: the base and each expert, whose layers are in their own order;
* random: the mean of random paths of each space, none of them chosen;
* choices, edits, indicators: the three spaces, searched with `evolution` and `catcma`;
* coefficients: `nested`, the weights of task arithmetic, without layer orders;
* hybrid: half of the evaluations for coefficients; their winner, exported, is the backbone of a search of edits with
  the other half.

A winner is chosen on the validation split, as `evomerge export` does, and scored on the test split once. The table has
the mean of the four tasks' test scores (2,000 items each) and its 95 % interval over items; with several seeds the mean
of the seeds' winners, whose interval joins the items' variance and that between seeds. "Lead" is paired by item, over
the winner of the coefficients with the same seed.

Speed: what a candidate's path costs before it is scored (merging into the live model, and building its modules),
against writing its checkpoint and loading that with transformers, and loading alone. The limit of a path without
scales is nothing: no weight has to be copied.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from evomerge.commands import run_search  # noqa: E402
from evomerge.config import load_study_file  # noqa: E402
from evomerge.objectives import Scores  # noqa: E402
from evomerge.prepare import open_study, prepare  # noqa: E402
from evomerge.rescore import Scorer, study_config  # noqa: E402
from evomerge.results import export_candidate  # noqa: E402
from evomerge.selection import winner  # noqa: E402
from evomerge.study import Study  # noqa: E402
from evomerge.worker import Job, Worker  # noqa: E402

TASKS = ("math", "cipher", "latin", "cross")
EXPERTS = ("math", "cipher", "latin")
SPACES = ("choices", "edits", "indicators")
OPTIMIZERS = ("evolution", "catcma")
BASELINE = "coefficients"
Z95 = 1.959964


@dataclass(frozen=True)
class Winner:
    """What an arm hands over: test scores by task, and where they came from."""

    test: dict[str, Scores]
    search: float
    depth: int
    evaluations: int
    seconds: float

    @property
    def items(self) -> np.ndarray:
        """(tasks, items): every task has as many."""
        return np.stack([self.test[task].items for task in TASKS])


def study_file(
    folder: Path, name: str, space: Any, optimizer: str | None, evaluations: int, seed: int, **more: Any
) -> str:
    """Write a study file of the demo zoo; returns its path."""
    data: dict[str, Any] = {
        "name": name,
        "base": "zoo/models/base",
        "experts": {expert: f"zoo/models/{expert}" for expert in EXPERTS},
        "space": space,
        "objectives": [f"zoo_{task}" for task in TASKS],
        "budget": {"evaluations": evaluations},
        "storage": f"sqlite:///{folder / name}/study.db",
        "workers": {"local": 1, "threads": 1},
        "seed": seed,
        **more,
    }
    if optimizer is not None:
        data["optimizer"] = optimizer
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(data, indent=1))  # JSON is YAML
    return str(path)


def searched(path: str) -> Study:
    """Search, or continue, in this process."""
    run_search(path, (), resume="auto", inline=True, quiet=True, allow_task_code=False)
    return open_study(prepare(load_study_file(path)))[0]


def winner_of(study: Study) -> Winner:
    """The winner, chosen on validation, with its test scores."""
    config = study_config(study)
    candidates = study.candidates()
    with Scorer(study, config, inline=True) as scorer:
        chosen, _ = winner(study, config, candidates, scorer=scorer)
        test = scorer.score([chosen], "test")[chosen.number]
    ended = [c for c in candidates if c.state != "running"]
    return Winner(
        test=test,
        search=float(np.mean(chosen.values or [np.nan])),
        depth=sum(piece.length(4) for piece in chosen.recipe.slices),
        evaluations=len(ended),
        seconds=max(c.attrs.get("elapsed_s", 0.0) for c in ended),
    )


def path_space(kind: str, **more: Any) -> dict[str, Any]:
    """The specification of a layer-order space."""
    return {"path": kind, **more}


def search_arm(folder: Path, arm: str, evaluations: int, seed: int) -> Winner:
    """Search one arm with one seed."""
    name = f"{arm.replace(' ', '-')}-{evaluations}-{seed}"
    if arm == BASELINE:
        return winner_of(searched(study_file(folder, name, "nested", None, evaluations, seed)))
    if arm == "hybrid":
        half = searched(study_file(folder, f"{name}-first", "nested", None, evaluations // 2, seed))
        merged = folder / f"{name}-merged"
        if not merged.exists():
            export_candidate(half, str(merged), None, weights=True, inline=True, allow_task_code=False)
        rest = evaluations - evaluations // 2
        more = {"merged": str(merged), "known_recipes": False}
        return winner_of(searched(study_file(folder, name, path_space("edits"), "evolution", rest, seed, **more)))
    kind, optimizer = arm.split()
    more = {"known_recipes": False}
    return winner_of(searched(study_file(folder, name, path_space(kind), optimizer, evaluations, seed, **more)))


# ------------------------------------------------------------------------------------- tables


def mean_and_half(items: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean over seeds of the mean over tasks, and half of its 95 % interval.

    Args:
        items: per seed, (tasks, items).
    """
    means = [float(each.mean()) for each in items]
    within = np.mean([(each.var(axis=1, ddof=1) / each.shape[1]).sum() / each.shape[0] ** 2 for each in items])
    between = np.var(means, ddof=1) / len(means) if len(means) > 1 else 0.0
    # The seeds share the test items: their variance does not shrink with the number of seeds.
    return float(np.mean(means)), Z95 * float(np.sqrt(within + between))


def header(*columns: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)


def arms_table(found: dict[str, dict[int, Winner]]) -> Iterator[str]:
    """A row per arm."""
    yield from header(
        "arm", "seeds", "evaluations", "mean of four tasks, test", f"lead over {BASELINE}", *TASKS, "layers",
        "search minus test", "seconds",
    )  # fmt: skip
    base = found.get(BASELINE, {})
    for arm, winners in found.items():
        mean, half = mean_and_half([w.items for w in winners.values()])
        shared = [seed for seed in winners if seed in base]
        lead = "–"
        if shared and arm != BASELINE:
            gain, wide = mean_and_half([winners[s].items - base[s].items for s in shared])
            lead = f"{gain:+.3f} [{gain - wide:+.3f}, {gain + wide:+.3f}]"
        tasks = " | ".join(f"{np.mean([w.test[t].value for w in winners.values()]):.3f}" for t in TASKS)
        depths = ", ".join(str(w.depth) for w in winners.values())
        optimism = np.mean([w.search - float(w.items.mean()) for w in winners.values()])
        seconds = statistics.median(w.seconds for w in winners.values())
        evaluations = statistics.median(w.evaluations for w in winners.values())
        yield (
            f"| {arm} | {len(winners)} | {evaluations:g} | "
            f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}] | {lead} | {tasks} | {depths} | "
            f"{optimism:+.3f} | {seconds:.0f} |"
        )


def random_table(folder: Path, count: int) -> Iterator[str]:
    """Identity paths, and random paths of each space, on the test split."""
    worker: Worker | None = None
    yield from header("paths", "number", "mean of four tasks, test", "best of them", "at least the base")
    identities: dict[str, float] = {}
    for kind in SPACES:
        file = study_file(folder, f"random-{kind}", path_space(kind), "random", count, 0)
        prepared = prepare(load_study_file(file))
        worker = worker or Worker(prepared.worker)
        if not identities:
            for label, recipe in prepared.known[: 1 + len(EXPERTS)]:
                scores = worker.evaluate(Job(0, recipe, ("test",))).scores["test"]
                items = np.stack([scores[task].items for task in TASKS])
                mean, half = mean_and_half([items])
                identities[label] = mean
                yield f"| identity of {label} | 1 | {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}] | – | – |"
        study, _ = open_study(prepared, inline=True)  # its header has the sizes of hidden states
        space = prepared.space_of(study.header)
        rng = np.random.default_rng(1)
        means = []
        for number in range(count):
            recipe = space.recipe(space.decode(rng.random(space.dim)))
            scores = worker.evaluate(Job(number, recipe, ("test",))).scores["test"]
            means.append(float(np.mean([scores[task].value for task in TASKS])))
        half = Z95 * float(np.std(means, ddof=1)) / count**0.5
        share = np.mean([m >= identities["base"] for m in means])
        mean = float(np.mean(means))
        yield (
            f"| random {kind}, each scale matched times s in [0.5, 2] | {count} | "
            f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}] | {max(means):.3f} | {share:.0%} |"
        )


# ------------------------------------------------------------------------------------- speed


def speed_table(repeats: int) -> Iterator[str]:
    """Seconds from a recipe to a model that can be scored."""
    yield from header(
        "model", "path", "install s", "tensors with a scale", "load s", "write and load s", "load / install"
    )
    with tempfile.TemporaryDirectory() as scratch:
        yield from speed_rows("demo zoo", ["zoo/models/base", "zoo/models/math"], Path(scratch), repeats)
        yield from speed_rows("126M-parameter Llama, bf16", large_models(Path(scratch)), Path(scratch), repeats)


def large_models(folder: Path) -> list[str]:
    """A random Llama of 126M parameters in bf16, and a neighbour of it."""
    from benchmarks import check_large

    check_large.PLACE = folder / "large"
    check_large.PLACE.mkdir()
    check_large.make_inputs()
    return [str(check_large.PLACE / name) for name in ("base", "red")]


def speed_rows(label: str, models: list[str], folder: Path, repeats: int) -> Iterator[str]:
    from evomerge.export import merge
    from evomerge.model import LiveModel
    from evomerge.recipe import Recipe, Slice, Source
    from evomerge.scale_folding import fold_scales
    from evomerge.weights import Weights

    live, weights = LiveModel(models[0]), Weights(models, "cpu")
    weights.load()
    n = live.checkpoint.n_layers
    kind = live.model.config.model_type

    def recipe(number: int, *, scaled: bool) -> Recipe:
        a = 1 + number % (n - 2)
        pieces = [(models[0], 0, a + 1), (models[1], a, a + 1), (models[0], a + 1, n)]
        plain = Recipe("passthrough", tuple(Slice((Source(m, (f, p)),)) for m, f, p in pieces))
        scales = [1.0] * (n + 1)
        scales[a + 1] = 0.9 + 0.01 * number if scaled else 1.0
        return fold_scales(plain, scales, kind)

    for name, scaled in (("repeat a layer of another model", False), ("the same, scaled", True)):
        installs, loads, rebuilds = [], [], []
        for number in range(repeats + 1):
            made = recipe(number, scaled=scaled)
            start = time.perf_counter()
            live.install(made, weights)
            installed = time.perf_counter()
            out = folder / "checkpoint"
            shutil.rmtree(out, ignore_errors=True)
            begun = time.perf_counter()
            merge(made, str(out))
            merged = time.perf_counter()
            LiveModel(str(out))
            loaded = time.perf_counter()
            if number:  # the first one makes the modules and warms caches
                installs.append(installed - start)
                loads.append(loaded - merged)
                rebuilds.append(loaded - begun)
        written = scaled_tensors(recipe(1, scaled=scaled), live.checkpoint.names, n)
        middle, load, rebuild = (statistics.median(each) for each in (installs, loads, rebuilds))
        ratio = statistics.median(a / b for a, b in zip(loads, installs, strict=True))
        yield f"| {label} | {name} | {middle:.4f} | {written} | {load:.3f} | {rebuild:.3f} | {ratio:.0f} |"


def scaled_tensors(recipe: Any, names: Sequence[str], n_layers: int) -> int:
    """How many output tensors carry a folded scale."""
    return sum(plan.per_input[0].get("scale", 1.0) != 1.0 for plan in recipe.plan(names, n_layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", type=int, default=12, help="random paths of each space")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=("arms", "random", "speed"))
    parser.add_argument("--arm", action="append", help="one arm, such as 'edits evolution'; may be repeated")
    parser.add_argument("--seed", type=int, action="append", help="one seed; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("runs/data-flow"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(
        f"torch {torch.__version__}, one thread; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; no GPU used\n"
    )
    if options.only in (None, "speed"):
        print("\n".join(speed_table(options.repeats)), end="\n\n", flush=True)
    if options.only in (None, "random"):
        print("\n".join(random_table(options.folder, options.random)), end="\n\n", flush=True)
    if options.only in (None, "arms"):
        arms = options.arm or [BASELINE, *(f"{s} {o}" for s in SPACES for o in OPTIMIZERS), "hybrid"]
        seeds = options.seed or list(range(options.seeds))
        found = {
            arm: {seed: search_arm(options.folder, arm, options.evaluations, seed) for seed in seeds} for arm in arms
        }
        print("\n".join(arms_table(found)))


if __name__ == "__main__":
    main()
