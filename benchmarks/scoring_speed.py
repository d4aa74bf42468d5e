"""How fast one candidate is scored: against its forward passes alone, and against lm-eval, in the same run.

    python benchmarks/scoring_speed.py                  # the demo zoo and a random Llama of 126M parameters
    python benchmarks/scoring_speed.py --only zoo
    python benchmarks/scoring_speed.py --only memory    # 1,000 candidates in one worker: does its memory grow?
    python benchmarks/scoring_speed.py --device cuda

* score: everything that scoring a candidate's search split takes in a worker that has scored one before.
* forward: the same forward passes again, on the recorded inputs, and nothing else: the limit. They compute the whole
  output layer, which scoring does only at the places that count, so a ratio may be below 1.
* evaluate: `lm_eval.evaluate` with task objects built beforehand and its model object on the same weights (batch size
  64, its metrics' bootstrap switched off).
* simple: `lm_eval.simple_evaluate` of the same task configurations and model object.

Score and forward are timed in turn, 3 times `--repeats`; then evaluate `--repeats` times, and simple a third as often.
The table has medians. Before timing, the items are compared with lm-eval's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from evomerge.model import LiveModel  # noqa: E402
from evomerge.objectives import Objective, ObjectiveSpec, make_objective  # noqa: E402

ZOO = ("math", "cipher", "latin", "cross")
LIMIT, AT_LEAST_EVALUATE, AT_LEAST_SIMPLE = 1.15, 3.0, 10.0


def zoo_objectives() -> dict[str, tuple[Path, str]]:
    """Task file and metric of each of the zoo's objectives."""
    found = {}
    for name in ZOO:
        shipped = yaml.safe_load((ROOT / "objectives" / f"zoo_{name}.yaml").read_text())
        found[name] = ((ROOT / "objectives" / shipped["file"]).resolve(), shipped["metric"])
    return found


def large_inputs(folder: Path) -> dict[str, tuple[Path, str]]:
    """A random Llama of 126M parameters, and a task of each kind with prompts of some sixty tokens."""
    import json

    from benchmarks import check_large

    check_large.PLACE = folder
    check_large.EXPERTS = ()
    check_large.make_inputs()
    rng = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join("".join(rng.choice(list("abcdefgh"), 4)) for _ in range(n))

    for split in ("search", "validation", "test"):
        rows = [
            {"prompt": words(20), "answer": " " + words(1), "choices": [" " + words(2) for _ in range(4)], "gold": 0}
            for _ in range(24)
        ]
        (folder / f"items.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "pick": (folder / "pick.yaml", "acc"),
        "say": (folder / "say.yaml", "acc"),
        "write": (folder / "write.yaml", "exact_match"),
    }


def task_config(file: Path) -> dict[str, Any]:
    """The task as lm-eval reads it, with absolute paths."""
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"] = {"data_files": {k: str((file.parent / v).resolve()) for k, v in files.items()}}
    return config


class Recorder:
    """Records the inputs of forward passes, and repeats them."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self.calls: list[dict[str, Any]] = []

    def record(self, run: Callable[[], object]) -> None:
        hook = self.live.model.register_forward_pre_hook(self._note, with_kwargs=True)
        run()
        hook.remove()

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        continued = kwargs.get("past_key_values") is not None
        self.calls.append({**kwargs, "past_key_values": continued})

    @torch.no_grad()
    def repeat(self) -> None:
        cache = None
        for call in self.calls:
            given = {**call, "past_key_values": cache if call["past_key_values"] else None}
            cache = self.live.model(**given).past_key_values


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(title: str, model: Path, tasks: dict[str, tuple[Path, str]], device: str, repeats: int) -> None:
    """Print the rows of one model."""
    from lm_eval.models.huggingface import HFLM

    live = LiveModel(str(model), device)
    harness = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=64)
    totals: dict[str, list[float]] = {}
    for name, (file, metric) in tasks.items():
        items, differing, seconds = measure_task(live, harness, file, metric, repeats)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        for key, value in medians.items():
            totals.setdefault(key, []).append(value)
        print(row(f"{title}: {name}", items, differing, medians), flush=True)
    print(row(f"**{title}: all**", None, None, {key: sum(values) for key, values in totals.items()}), flush=True)


def measure_task(
    live: LiveModel, harness: Any, file: Path, metric: str, repeats: int
) -> tuple[int, int, dict[str, list[float]]]:
    """Number of items, how many of them differ from lm-eval's, and seconds by what was run."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    objective: Objective = make_objective(ObjectiveSpec("it", "lm_eval", {"file": str(file), "metric": metric}))
    config = task_config(file) | {"test_split": "search"}
    built = manager.load([config])
    theirs = lm_eval.evaluate(harness, built, bootstrap_iters=0, log_samples=True)["samples"][config["task"]]
    items = [s[metric] for s in sorted(theirs, key=lambda s: s["doc_id"])]
    differing = int((objective.score(live, "search").items != np.array(items)).sum())
    recorder = Recorder(live)
    recorder.record(lambda: objective.score(live, "search"))
    runs: dict[str, Callable[[], object]] = {
        "score": lambda: objective.score(live, "search"),
        "forward": recorder.repeat,
        "evaluate": lambda: lm_eval.evaluate(harness, built, bootstrap_iters=0),
        "simple": lambda: lm_eval.simple_evaluate(
            model=harness, tasks=[config], task_manager=manager, bootstrap_iters=0, log_samples=False
        ),
    }
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    # Close relatives in turn; the first of each group only warms up what the run before has pushed out of the caches.
    for keys, times in (
        (("score", "forward"), 3 * repeats),
        (("evaluate",), repeats),
        (("simple",), max(2, repeats // 3)),
    ):
        for round_ in range(-1, times):
            for key in keys:
                spent = timed(runs[key], live.device)
                if round_ >= 0:
                    seconds[key].append(spent)
    return len(items), differing, seconds


def row(title: str, items: int | None, differing: int | None, s: dict[str, float]) -> str:
    over, evaluate, simple = s["score"] / s["forward"], s["evaluate"] / s["score"], s["simple"] / s["score"]
    cells = [
        title,
        "" if items is None else str(items),
        "" if differing is None else str(differing),
        *(f"{s[key] * 1e3:.0f}" for key in ("score", "forward", "evaluate", "simple")),
        f"{over:.2f} ({LIMIT})",
        f"{evaluate:.1f} ({AT_LEAST_EVALUATE:.0f})",
        f"{simple:.1f} ({AT_LEAST_SIMPLE:.0f})",
    ]
    return "| " + " | ".join(cells) + " |"


def memory(candidates: int, device: str) -> None:
    """Resident memory of one worker over many candidates of the zoo."""
    from evomerge.recipe import Recipe
    from evomerge.worker import Job, Worker, WorkerSpec

    base, experts = str(ROOT / "zoo/models/base"), [str(ROOT / "zoo/models" / n) for n in ("math", "cipher", "latin")]
    specs = tuple(
        ObjectiveSpec(name, "lm_eval", {"file": str(file), "metric": metric, "limit": 40})
        for name, (file, metric) in zoo_objectives().items()
    )
    worker = Worker(WorkerSpec(base, (base, *experts), specs, device=device, threads=1))
    rng = np.random.default_rng(0)
    print("| after candidates | resident MB |\n|---|---|")
    for number in range(1, candidates + 1):
        weights = {path: {"weight": float(w)} for path, w in zip(experts, rng.uniform(0, 1, 3), strict=True)}
        worker.evaluate(Job(number, Recipe.build("task_arithmetic", base, weights)))
        if number in (10, 100, candidates // 2, candidates):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"| {number} | {pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("zoo", "large", "memory"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--candidates", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown processor",
    )
    if options.device != "cpu":
        processor = torch.cuda.get_device_name(options.device)
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    print(f"{processor}, torch {torch.__version__}, {options.threads} thread(s), {load}.\n")
    if options.only in (None, "zoo", "large"):
        print("| model and task | items | items that differ | score ms | forward ms | evaluate ms | simple ms |"
              " over forward (at most) | evaluate over score (at least) | simple over score (at least) |")  # fmt: skip
        print("|---" * 10 + "|")
        if options.only != "large":
            measure("zoo", ROOT / "zoo/models/math", zoo_objectives(), options.device, options.repeats)
        if options.only != "zoo":
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                measure("126M", place / "base", large_inputs(place), options.device, max(3, options.repeats // 3))
    if options.only in (None, "memory"):
        print()
        memory(options.candidates, options.device)


if __name__ == "__main__":
    main()
