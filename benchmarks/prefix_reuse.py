"""What it saves to start a path where a known prefix ends: seconds per candidate with and without, in the same run.

    python benchmarks/prefix_reuse.py               # the demo zoo (4 layers) and a random Llama of 126M parameters (12)
    python benchmarks/prefix_reuse.py --only zoo
    python benchmarks/prefix_reuse.py --device cuda

Candidates are single random edits of the base's own path (repeat, skip, swap, and splice from an expert where there are
any) behind the first tenth of the layers, so that they branch at random depths. Each is installed and scored on the
search split in turn by every arm, in an order that rotates; the items must be equal. Arms: without reuse; with it in
the default budget; and in a budget of two states for each batch.

* s: median seconds of scoring a candidate; on a CPU those of the process, so that other work does not count.
* ratio: of the sum over all candidates to that of the arm without reuse.
* saved: share of layers that were not computed. limit: share of layers that some earlier candidate had already computed
  for the same batch with the same prefix, which is the most that any store of states could save.
* outside: share of the forward pass that is not in layers (embeddings, masks, head), measured without reuse.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.scoring_speed import large_inputs, zoo_objectives  # noqa: E402
from evomerge.methods import Tables  # noqa: E402
from evomerge.model import LiveModel  # noqa: E402
from evomerge.objectives import Objective, ObjectiveSpec, make_objective  # noqa: E402
from evomerge.prefix import Prefixes  # noqa: E402
from evomerge.recipe import Recipe  # noqa: E402
from evomerge.residency import show_bytes  # noqa: E402
from evomerge.weights import Weights  # noqa: E402

Step = tuple[str, int]


@dataclass
class Arm:
    """One way of scoring, and its seconds per candidate."""

    name: str
    prefixes: Prefixes
    seconds: list[float] = field(default_factory=list)
    most_bytes: int = 0


def edited(rng: np.random.Generator, models: list[str], n_layers: int) -> list[Step]:
    """One random edit of the first model's own path behind the first tenth of it."""
    steps = [(models[0], layer) for layer in range(n_layers)]
    at = int(rng.integers(max(1, n_layers // 10), n_layers))
    kinds = ["repeat", "skip", *(["swap"] if at + 1 < n_layers else []), *(["splice"] if models[1:] else [])]
    kind = str(rng.choice(kinds))
    if kind == "repeat":
        return [*steps[: at + 1], *steps[at:]]
    if kind == "skip":
        return [*steps[:at], *steps[at + 1 :]]
    if kind == "swap":
        return [*steps[:at], steps[at + 1], steps[at], *steps[at + 2 :]]
    return [*steps[:at], (str(rng.choice(models[1:])), at), *steps[at + 1 :]]


def recipe_of(steps: list[Step]) -> Recipe:
    slices = [{"sources": [{"model": model, "layer_range": [layer, layer + 1]}]} for model, layer in steps]
    return Recipe.from_dict({"merge_method": "passthrough", "slices": slices, "compat": "paper"})


def measure(title: str, models: list[str], objectives: list[Objective], device: str, candidates: int) -> list[str]:
    """The rows of one model."""
    live, weights = LiveModel(models[0], device), Weights(models, device)

    def score() -> list[np.ndarray]:
        return [objective.score(live, "search").items for objective in objectives]

    rng = np.random.default_rng(0)
    paths = [[(models[0], layer) for layer in range(live.checkpoint.n_layers)]]
    paths += [edited(rng, models, live.checkpoint.n_layers) for _ in range(candidates)]
    live.install(recipe_of(paths[1]), weights)
    score()  # builds the requests, and tries the architecture
    off = Prefixes(Tables())
    off.problem = "switched off"
    arms = [Arm("without", off), Arm("default budget", Prefixes(Tables()))]
    live.prefixes = arms[1].prefixes
    live.install(recipe_of(paths[1]), weights)
    score()
    two = Prefixes(Tables(2 * live.prefixes._one_each))
    arms = [arms[0], Arm("default budget", Prefixes(Tables())), Arm("two states", two)]
    seen: set[tuple[Step, ...]] = set()
    could = total = 0
    for number, steps in enumerate(paths):
        items: list[list[np.ndarray]] = []
        for arm in [*arms[number % 3 :], *arms[: number % 3]]:
            live.prefixes = arm.prefixes
            live.install(recipe_of(steps), weights)
            started = now(live.device)
            items.append(score())
            arm.seconds.append(now(live.device) - started)
            arm.most_bytes = max(arm.most_bytes, arm.prefixes.n_bytes)
        for other in items[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(items[0], other, strict=True)), steps
        heads = [tuple(steps[: d + 1]) for d in range(len(steps))]
        could, total = could + sum(head in seen for head in heads), total + len(heads)
        seen.update(heads)
    assert not any(arm.prefixes.problem for arm in arms[1:])
    outside = share_outside(live, score)
    return [row(title, arm, arms[0], could / total, outside) for arm in arms]


def share_outside(live: LiveModel, score: Callable[[], object]) -> float:
    """The share of a forward pass's time that is not in its layers."""
    spent = {"model": 0.0, "layers": 0.0}
    started: list[float] = []
    handles = []
    for key, modules in (("model", [live.model]), ("layers", list(live.layers.modules))):
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_: started.append(now(live.device))))

            def stop(*_: object, key: str = key) -> None:
                spent[key] += now(live.device) - started.pop()

            handles.append(module.register_forward_hook(stop))
    score()
    for handle in handles:
        handle.remove()
    return 1.0 - spent["layers"] / spent["model"]


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def row(title: str, arm: Arm, plain: Arm, limit: float, outside: float) -> str:
    p = arm.prefixes
    saved = p.saved / p.layers if p.layers else 0.0
    ratio = sum(arm.seconds) / sum(plain.seconds)
    cells = [title, arm.name, f"{statistics.median(arm.seconds):.3f}", f"{ratio:.2f}"]
    cells += [f"{saved:.2f}", f"{limit:.2f}", f"{outside:.2f}", show_bytes(arm.most_bytes)]
    return "| " + " | ".join(cells) + " |"


def tasks(found: dict[str, tuple[Path, str]], names: tuple[str, ...], items: int | None) -> list[Objective]:
    """Objectives that are answered by log-likelihoods alone."""
    options = [{"file": str(found[n][0]), "metric": found[n][1], **({"limit": items} if items else {})} for n in names]
    return [make_objective(ObjectiveSpec(n, "lm_eval", o)) for n, o in zip(names, options, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("zoo", "large"), default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--items", type=int, default=None, help="of each task; all without it")
    options = parser.parse_args()
    print("| model | arm | s | ratio | saved | limit | outside | states |\n" + "|---" * 8 + "|", flush=True)
    if options.only != "large":
        models = [str(ROOT / "zoo" / "models" / name) for name in ("base", "math", "cipher", "latin")]
        found = tasks(zoo_objectives(), ("math", "cipher", "latin"), options.items)
        for line in measure("demo zoo, 4 layers", models, found, options.device, options.candidates):
            print(line, flush=True)
    if options.only != "zoo":
        with tempfile.TemporaryDirectory() as folder:
            found = tasks(large_inputs(Path(folder)), ("pick", "say"), options.items)
            models = [str(Path(folder) / "base")]
            for line in measure("Llama 126M, 12 layers", models, found, options.device, options.candidates):
                print(line, flush=True)


if __name__ == "__main__":
    main()
