"""How fast one candidate is merged: against a plain copy of the same bytes, and against mergekit, in the same run.

    python benchmarks/merge_speed.py                        # every method, one thread, 126M parameters
    python benchmarks/merge_speed.py --methods ties,sce --threads 2
    python benchmarks/merge_speed.py --small --no-mergekit  # a few seconds: does it run?

Synthetic Llama checkpoints (base and three experts, bf16) are made in a temporary folder and read into memory. Every
candidate has new weights, densities, scales and a new mask seed; other parameters stay at their defaults.

* candidate: planning, merging and writing one model into live bf16 tensors, as a search does it. The first one, which
  fills the per-worker tables, is timed apart; the table's time is the median of the others.
* floor: a plain copy, on the same threads, of as many bytes as the method must read and write (half of them read, half
  written). It moves between models of this size, so nothing stays in a cache. Timed before every candidate.
* mergekit: the same recipes by mergekit in its own environment (`make bench-setup`), weight by weight on resident
  tensors; see _mergekit_side.py. Its planning and the copy of results into a model are left out.
* peak: the largest memory above inputs, live model and tables while one candidate is merged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from _merge_report import Result, print_report

ROOT = Path(__file__).parent.parent
MERGEKIT_PYTHON = ROOT / ".venv-mergekit" / "bin" / "python"

# What changes from candidate to candidate; where a method searches a narrower range, that.
VARIED = {
    "weight": (0.2, 1.0), "density": (0.2, 0.8), "lambda": (0.5, 1.5), "t": (0.05, 0.95), "select_topk": (0.1, 0.8),
}  # fmt: skip
FIXED = {"epsilon": 0.1}  # of della: leaves densities from 0.1 to 0.9 feasible
GOLDEN = 0.6180339887498949

DISTANCE_TOLERANCE = 0.05
MERGEKIT_SECONDS = 20.0  # after so many seconds of one method, mergekit is not asked again


def main() -> None:
    options = read_options()
    # Before torch and numba are imported: both read these once.
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(options.threads)
    sys.path.insert(0, str(ROOT))
    import torch
    from _merge_inputs import LARGE, SMALL, load_models, write_models

    from evomerge import registry
    from evomerge.errors import EvomergeError
    from evomerge.methods._tables import BUDGET_BYTES

    torch.set_num_threads(options.threads)
    names = options.methods.split(",") if options.methods else list(registry.names("methods"))
    try:
        methods = [registry.get("methods", name) for name in names]
    except EvomergeError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory(prefix="merge-speed-") as place, torch.no_grad():
        say("making and reading the checkpoints ...")
        write_models(Path(place) / "models", SMALL if options.small else LARGE)
        models = load_models(Path(place) / "models")
        bench = Bench(models, options.repeats, options.mergekit_dtype)
        results = []
        with mergekit_side(Path(place) / "models", options) as ask:
            for method in methods:
                say(f"{method.name} ...")
                results.append(bench.measure(method, ask if method.mergekit else None))
    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "threads": options.threads,
        "repeats": options.repeats,
        "mergekit_dtype": options.mergekit_dtype,
        "small": options.small,
        "model_bytes": bench.model_bytes,
        "table_budget_bytes": BUDGET_BYTES,
    }
    if options.json:
        print(json.dumps({"run": about, "methods": [r.row() for r in results]}, indent=2))
    else:
        print_report(about, results)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help="names separated by commas; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="candidates to time, beside the first (at least 3)")
    parser.add_argument("--no-mergekit", dest="mergekit", action="store_false")
    parser.add_argument(
        "--mergekit-dtype",
        choices=("stored", "float32"),
        default="stored",
        help="mergekit computes in the tensors' own dtype (its default) or, like evomerge, in float32",
    )
    parser.add_argument("--small", action="store_true", help="tiny models: only shows that everything runs")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error("--repeats: a median of fewer than 3 says little")
    if options.mergekit and not MERGEKIT_PYTHON.exists():
        parser.error("mergekit is not installed: run `make bench-setup`, or give --no-mergekit")
    return options


class Bench:
    """Resident models and one live model, and the measurements on them."""

    def __init__(self, models: dict[str, Any], repeats: int, mergekit_dtype: str) -> None:
        import torch
        from _merge_inputs import BASE, EXPERTS

        self.models, self.base, self.experts = models, BASE, EXPERTS
        self.repeats = repeats
        self.mergekit_dtype = None if mergekit_dtype == "stored" else mergekit_dtype
        self.names = list(models[BASE])
        self.live = {name: torch.full_like(tensor, 0.0) for name, tensor in models[BASE].items()}
        self.model_bytes = sum(tensor.nbytes for tensor in self.live.values())
        self.largest = max(tensor.numel() for tensor in self.live.values())
        self.n_layers = 1 + max(int(name.split(".")[2]) for name in self.names if ".layers." in name)

    def measure(self, method: Any, ask: Any) -> Result:
        """One method's line; whatever goes wrong is a note in it."""
        from evomerge.methods import Tables

        result = Result(method.name)
        try:
            experts = self._experts(method)
            n_inputs = len(experts) + method.needs_base
            result.moved_bytes = (n_inputs + 1) * self.model_bytes
            # One tensor's working set: its inputs and its result, once each in float32.
            result.allowed_bytes = 4 * (n_inputs + 1) * self.largest
            pairs = self._copies(method, experts, result.moved_bytes // 2)
            with Factorisations():  # whatever is compiled or imported at a first call
                self.merge(self.recipe(method, experts, 0), Tables(), self.names[-10:])
            self._measure(method, experts, pairs, result, ask)
        except Exception as error:
            result.notes.append(f"{type(error).__name__}: {error}".splitlines()[0])
        return result

    def _measure(self, method: Any, experts: tuple[str, ...], pairs: list[Any], result: Result, ask: Any) -> None:
        from _merge_inputs import Peak

        from evomerge.methods import Tables

        tables = Tables()
        recipe = self.recipe(method, experts, 0)
        with Factorisations() as first:
            result.first_s = timed(lambda: self.merge(recipe, tables))
        result.table_s, result.table_bytes = tables.seconds, int(tables.report()["bytes"])
        copy(pairs)  # the first copy of a process is slower
        floors, candidates, others = [], [], []
        for number in range(1, self.repeats + 1):
            recipe = self.recipe(method, experts, number)
            result.candidates.append(candidate_parameters(method, len(experts), number))
            floors.append(timed(lambda: copy(pairs)))
            candidates.append(timed(lambda recipe=recipe: self.merge(recipe, tables)))
            if ask is not None and sum(others) < MERGEKIT_SECONDS:
                answer = ask(self._job(method, experts, number))
                if "error" in answer:
                    result.notes.append(f"mergekit: {answer['error']}")
                    ask = None
                else:
                    others.append(answer["seconds"])
                    result.mergekit_peak_bytes = answer["peak_bytes"]
                    self._compare(answer["distance"], experts, result)
        # Not timed: the memory that is handed back for the measurement must be fetched again.
        recipe = self.recipe(method, experts, self.repeats + 1)
        with Peak() as peak, Factorisations() as later:
            self.merge(recipe, tables)
        result.floor_s, result.candidate_s = statistics.median(floors), statistics.median(candidates)
        result.mergekit_s = statistics.median(others) if others else None
        result.peak_bytes = peak.n_bytes
        result.factorisations = (first.count, later.count)
        report = tables.report()
        result.late_table_s = report["seconds"] - result.table_s
        if report["dropped"]:
            result.notes.append(f"{report['dropped']} tables given up for lack of room")

    def _compare(self, theirs: float, experts: tuple[str, ...], result: Result) -> None:
        """Notes it when mergekit's model lies elsewhere than the live one: then the recipes were not the same.

        Random masks differ and so does the rounding, but over a block's weights the distance hardly.
        """
        from _merge_inputs import checked, distance

        ours = distance((self.live[name], self.models[experts[0]][name]) for name in checked(self.names))
        said = any("lies elsewhere" in note for note in result.notes)
        if not said and abs(ours - theirs) > DISTANCE_TOLERANCE * max(ours, theirs):
            result.notes.append(
                f"mergekit's model lies elsewhere: {theirs:.4g} from the first expert, not {ours:.4g} (L1, first block)"
            )

    def merge(self, recipe: Any, tables: Any, names: list[str] | None = None) -> None:
        """One candidate, as a worker merges it."""
        from evomerge.methods import Merge

        plans = recipe.plan(self.names if names is None else names, self.n_layers)
        merge = Merge(recipe, plans, lambda model, name: self.models[model][name], tables)
        for plan in plans:
            if not merge.write(plan, self.live[plan.name]):
                raise ValueError(f"{recipe.method}: {plan.name} is not finite")

    def recipe(self, method: Any, experts: tuple[str, ...], number: int) -> Any:
        """The recipe of candidate `number`."""
        from evomerge.recipe import Recipe

        values = candidate_parameters(method, len(experts), number)
        own = [
            {name: value[i] for name, value in values.items() if isinstance(value, list)} for i in range(len(experts))
        ]
        shared = {name: value for name, value in values.items() if not isinstance(value, list)}
        base = self.base if method.needs_base else None
        return Recipe.build(method.name, base, dict(zip(experts, own, strict=True)), parameters=shared, seed=number)

    def _job(self, method: Any, experts: tuple[str, ...], number: int) -> dict[str, Any]:
        return {
            "method": method.name,
            "base": self.base if method.needs_base else None,
            "experts": experts,
            "parameters": candidate_parameters(method, len(experts), number),
            "dtype": self.mergekit_dtype,
            "seed": number,
        }

    def _experts(self, method: Any) -> tuple[str, ...]:
        low, high = method.n_experts
        count = len(self.experts) if high is None else min(high, len(self.experts))
        if low > count:
            raise ValueError(f"merges at least {low} models, there are {count}")
        return self.experts[:count]

    def _copies(self, method: Any, experts: tuple[str, ...], n_bytes: int) -> list[Any]:
        """Pairs (to, from) of flat tensors that hold `n_bytes` together: the inputs one after another."""
        pairs, left = [], n_bytes // 2  # elements of bf16
        for model in (*([self.base] if method.needs_base else []), *experts):
            for name, live in self.live.items():
                count = min(left, live.numel())
                if count:
                    pairs.append((live.view(-1)[:count], self.models[model][name].view(-1)[:count]))
                left -= count
        return pairs


def candidate_parameters(method: Any, k: int, number: int) -> dict[str, Any]:
    """Settings of candidate `number`: a low-discrepancy sequence over the ranges in VARIED; lists count experts."""
    found: dict[str, Any] = {}
    varied = varied_parameters(method)
    for place, param in enumerate(method.parameters):
        if param.name in FIXED and method.name.startswith("della"):
            found[param.name] = [FIXED[param.name]] * k if param.per_expert else FIXED[param.name]
        if param.name not in varied and not param.required:
            continue
        low, high = VARIED.get(param.name, (0.0, 1.0))
        if param.low is not None:
            low, high = max(low, param.low), min(high, param.high)
            if low >= high:
                low, high = param.low, param.high
        steps = [(0.5 + number * GOLDEN + place * 0.29 + i * 0.37) % 1.0 for i in range(k)]
        values = [round(low + (high - low) * step, 4) for step in steps]
        found[param.name] = values if param.per_expert else values[0]
    return found


def varied_parameters(method: Any) -> set[str]:
    """Names of the parameters that change from candidate to candidate.

    Those that mergekit's method of this name lacks keep their defaults, so that both merge the same recipe, unless
    nothing else would change.
    """
    every = {param.name for param in method.parameters if param.name in VARIED}
    shared = {param.name for param in method.parameters if param.name in every and not param.extension}
    return shared if method.mergekit and shared else every


class Factorisations:
    """Counts the SVDs and eigendecompositions that torch and numpy do inside the block, whoever asks for them."""

    def __enter__(self) -> Factorisations:
        import numpy as np
        from torch.utils._python_dispatch import TorchDispatchMode

        owner = self
        self.count = 0

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func._schema.name
                owner.count += any(part in name for part in ("svd", "eigh", "linalg_eig"))
                return func(*args, **(kwargs or {}))

        def counted(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                owner.count += 1
                return original(*args, **kwargs)

            return call

        self._originals = {name: getattr(np.linalg, name) for name in ("svd", "eigh", "eig")}
        for name, original in self._originals.items():
            setattr(np.linalg, name, counted(original))
        self._mode = Mode()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        import numpy as np

        self._mode.__exit__(*error)
        for name, original in self._originals.items():
            setattr(np.linalg, name, original)


@contextmanager
def mergekit_side(folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """A function that has mergekit do one job and returns its answer; None without mergekit."""
    if not options.mergekit:
        yield None
        return
    command = [str(MERGEKIT_PYTHON), str(Path(__file__).with_name("_mergekit_side.py")), str(folder)]
    with subprocess.Popen(
        [*command, str(options.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(job: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps(job), file=process.stdin, flush=True)
            return read()

        def read() -> dict[str, Any]:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise RuntimeError(f"mergekit's process ended with code {process.wait()}")
            answer: dict[str, Any] = json.loads(line)
            return answer

        read()
        try:
            yield ask
        finally:
            process.stdin.close()


def copy(pairs: list[Any]) -> None:
    for target, source in pairs:
        target.copy_(source)


def timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_name() -> str:
    """The processor as Linux calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown processor"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
