"""Weights live where the plan says, within its budgets, and a merge has the same bits wherever they live."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import residency
from evomerge.config import parse_study
from evomerge.errors import EnvironmentProblem, WeightsError
from evomerge.model import LiveModel
from evomerge.objectives import ObjectiveSpec
from evomerge.prepare import prepare, worker_spec
from evomerge.recipe import Recipe, layer_index
from evomerge.residency import Memory, Residency, default_gpu_bytes, pinned_bytes, plan, settle, show_bytes
from evomerge.weights import Checkpoint, TensorInfo, Weights
from evomerge.worker import Job, Worker, WorkerSpec

EXPERTS = ("red", "green", "blue")
MODELS = ("base", *EXPERTS)
PLACES = ("gpu", "pinned", "disk")
BIG = 1 << 20  # elements of bf16: above what counts as small


@dataclass
class Sizes:
    """What a plan reads of a checkpoint."""

    info: dict[str, TensorInfo]


def sizes(layers: int, width: int = BIG, head: int = 8 * BIG, dtype: torch.dtype = torch.bfloat16) -> Any:
    shapes = {"model.embed_tokens.weight": (head,), "model.norm.weight": (64,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.mlp.weight": (width, 1), f"model.layers.{i}.norm.weight": (64,)}
    return Sizes({name: TensorInfo(Path("x"), shape, dtype) for name, shape in shapes.items()})


def family(layers: int = 4, n: int = 3) -> dict[str, Any]:
    return {f"m{i}": sizes(layers) for i in range(n)}


def whole(models: dict[str, Any]) -> int:
    return sum(info.n_bytes for c in models.values() for info in c.info.values())


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    gpu=st.integers(0, 100_000_000),
    host=st.integers(0, 100_000_000),
    layers=st.integers(0, 6),
    n=st.integers(1, 4),
    locked=st.booleans(),
)
def test_a_plan_keeps_its_budgets_and_names_every_tensor_once(
    gpu: int, host: int, layers: int, n: int, locked: bool
) -> None:
    models = family(layers, n)
    made = plan(models, gpu, host, page_locked=locked)
    assert set(made.places) == {(m, name) for m, c in models.items() for name in c.info}
    taken = {p: [made.n_bytes[k] for k, at in made.places.items() if at == p] for p in PLACES}
    assert sum(taken["gpu"]) <= gpu
    assert sum(map(pinned_bytes, taken["pinned"]) if locked else taken["pinned"]) <= host
    assert sum(made.total(p)[1] for p in PLACES) == whole(models)  # type: ignore[arg-type]
    for name in models["m0"].info:  # a merge needs base and experts together
        assert len({made.place(m, name) for m in models}) == 1
    for i in range(layers):  # and a layer is whole but for its small tensors
        big = [name for name in models["m0"].info if layer_index(name) == i and "mlp" in name]
        assert len({made.place("m0", name) for name in big}) == 1


def test_small_tensors_come_first_then_layers_in_order_then_the_rest() -> None:
    models = family(layers=4, n=3)
    layer = 3 * 2 * BIG
    small = 3 * 5 * 64 * 2
    made = plan(models, small + 2 * layer, 2 * layer)
    names = list(models["m0"].info)
    assert {made.place("m0", n) for n in names if "norm" in n} == {"gpu"}
    mlp = [made.place("m0", f"model.layers.{i}.mlp.weight") for i in range(4)]
    assert mlp == ["gpu", "gpu", "pinned", "pinned"]
    assert made.place("m0", "model.embed_tokens.weight") == "disk"
    # Room for the embedding alone, or for all layers but not for both: the layers have it.
    even = {m: sizes(layers=2, head=2 * BIG) for m in models}
    near = plan(even, 3 * 3 * 64 * 2 + 2 * layer, 0)
    assert {near.place("m0", n) for n in even["m0"].info if "mlp" in n} == {"gpu"}
    assert near.place("m0", "model.embed_tokens.weight") == "disk"
    # What is too large is passed over: the small tensors and layers behind it still get their place.
    wide = {m: Sizes(dict(reversed(c.info.items()))) for m, c in models.items()}
    assert plan(wide, small + 4 * layer, 0).total("gpu")[0] == 3 * 9  # type: ignore[arg-type]
    one = {m: sizes(layers=2, width=BIG * (1 + (m == "m1"))) for m in models}
    assert plan(one, small + 4 * layer // 3, 0).total("gpu")[0] == 3 * (3 + 1)


@pytest.mark.parametrize(("gpu", "place"), [(0, "disk"), (10**12, "gpu")])
def test_nothing_and_everything(gpu: int, place: str) -> None:
    made = plan(family(), gpu, 0)
    assert set(made.places.values()) == {place}
    assert plan({}, gpu, 0) == Residency({}, {}, False) and str(plan({}, 0, 0)) == "no weights"


def test_a_plan_in_words() -> None:
    made = plan(family(), 0, 10**9)
    assert str(made) == "75.5 MB in host memory (30 tensors)"
    assert "pinned host memory" in str(plan(family(), 0, 10**9, page_locked=True))
    both = str(plan(family(), 30_000_000, 0))
    assert "on the GPU" in both and "memory-mapped on disk" in both
    assert [show_bytes(n) for n in (0, 999, 1000, 999_600, 4.2e10, 7e15)] == [
        "0 B", "999 B", "1.0 kB", "1.0 MB", "42.0 GB", "7000.0 TB",
    ]  # fmt: skip


def test_pinned_memory_is_counted_as_the_allocator_takes_it() -> None:
    assert [pinned_bytes(n) for n in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]
    name = "model.layers.0.mlp.weight"
    one: dict[str, Any] = {"m": Sizes({name: TensorInfo(Path("x"), (3 * BIG,), torch.uint8)})}
    assert plan(one, 0, 3 * BIG).place("m", name) == "pinned"
    assert plan(one, 0, 3 * BIG, page_locked=True).place("m", name) == "disk"
    assert plan(one, 0, 4 * BIG, page_locked=True).place("m", name) == "pinned"


def test_the_default_is_the_share_minus_everything_that_must_be_there() -> None:
    memory = Memory(tables_bytes=1_000)
    assert default_gpu_bytes(100_000, 100_000, memory, 14_000, 2_000) == 80_000 - 14_000 - 1_000 - 2_000
    assert default_gpu_bytes(100_000, 100_000, replace(memory, on_device=2), 14_000, 2_000) == 40_000 - 17_000
    assert default_gpu_bytes(30_000, 100_000, memory, 14_000, 2_000) == 24_000 - 17_000  # others use the device
    assert default_gpu_bytes(10_000, 100_000, memory, 14_000, 2_000) == 0


def test_a_cpu_keeps_weights_on_disk_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    models = family()
    assert set(settle(Memory(), "cpu", models, 0, measured=True).places.values()) == {"disk"}
    assert set(settle(Memory(gpu_bytes=10**12), "cpu", models, 0, measured=True).places.values()) == {"disk"}
    assert set(settle(Memory(host_bytes=10**12), "cpu", models, 0, measured=True).places.values()) == {"pinned"}
    # On a GPU, with what the machine has made up:
    asked: list[bool] = []

    def device(name: str, *, measured: bool) -> tuple[int, int]:
        asked.append(measured)
        return 200_000_000, 300_000_000

    monkeypatch.setattr(residency, "device_bytes", device)
    monkeypatch.setattr(residency, "available_bytes", lambda: 160_000_000)
    made = settle(Memory(tables_bytes=0), "cuda:1", models, 40_000_000, measured=False)
    assert asked == [False] and made.page_locked
    # 160 MB of the device, less the live model and (3 + 2) of the largest tensor in float32: nothing is left.
    assert made.total("gpu")[1] == 0 and made.total("pinned")[1] > 70_000_000
    made = settle(Memory(tables_bytes=0, on_host=100), "cuda:1", models, 40_000_000, measured=False)
    assert 0 < made.total("pinned")[1] <= 800_000
    made = settle(Memory(gpu_bytes=10**12), "cuda", models, 0, measured=True)
    assert set(made.places.values()) == {"gpu"} and asked == [False, False]


# ---- the tensors themselves ------------------------------------------------------------------------


def recipes() -> Iterator[Recipe]:
    for method in ("task_arithmetic", "ties", "dare_ties", "linear"):
        experts = {e: {"weight": w} for e, w in zip(EXPERTS, (0.3, -0.4, 0.9), strict=True)}
        yield Recipe.build(method, "base", experts, seed=2)


@pytest.mark.parametrize("method", list(recipes()), ids=lambda r: r.method)
def test_merges_have_the_same_bits_wherever_weights_live(work: Path, method: Recipe) -> None:
    mixed: dict[tuple[str, str], str] = {}

    def anywhere(model: str, name: str) -> str:
        if (model, name) not in mixed:
            mixed[model, name] = PLACES[len(mixed) % 3]
        return mixed[model, name]

    found = []
    for place in (lambda m, n: "gpu", lambda m, n: "pinned", lambda m, n: "disk", anywhere):
        live = LiveModel("base")
        weights = Weights(MODELS, place=place)
        weights.load()
        live.install(method, weights)
        found.append({n: p.detach().clone().view(torch.uint8) for n, p in live.model.named_parameters()})
    assert len(set(mixed.values())) == 3
    for other in found[1:]:
        assert all(torch.equal(found[0][n], p) for n, p in other.items())


def mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is a file's."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return line.endswith(".safetensors")
    return False


def test_host_copies_are_copies_and_disk_tensors_are_mapped(work: Path) -> None:
    name = "model.embed_tokens.weight"
    stored = Checkpoint("red").tensor(name)
    on_disk = Weights(["red"])("red", name)
    in_memory = Weights(["red"], place=lambda m, n: "pinned")
    assert mapped(on_disk) and not mapped(in_memory("red", name))
    assert torch.equal(on_disk, stored) and torch.equal(in_memory("red", name), stored)
    assert in_memory("red", name) is in_memory("red", name)  # copied once
    in_memory.forget([("red", name)])
    assert torch.equal(in_memory("red", name), stored)


def test_loading_ahead_reads_what_belongs_near_and_nothing_else(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    true = Checkpoint.tensor

    def tensor(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return true(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    weights = Weights(["red"], place=lambda m, n: "pinned" if "mlp" in n else "disk")
    weights.load()
    assert read == [n for n in weights.checkpoints["red"].names if "mlp" in n]
    weights.load()
    weights("red", read[0])
    assert len(read) == 6
    weights("red", "model.norm.weight")
    assert read[6:] == ["model.norm.weight"]


def test_weights_that_do_not_fit_are_one_clear_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nand so on")

    weights = Weights(["red"], place=lambda m, n: "pinned")
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(WeightsError, match=r"do not fit in memory: CUDA error: out of memory") as raised:
        weights.load()
    assert "host_memory" in raised.value.hint


OBJECTIVES = (ObjectiveSpec("text", "perplexity", {"files": {"search": "text.search.txt"}}),)


def test_a_worker_follows_its_budgets_and_reports_its_tables(work: Path) -> None:
    spec = WorkerSpec("base", MODELS, OBJECTIVES, threads=1)
    job = Job(0, list(recipes())[1])
    outcomes = []
    for memory in (Memory(), Memory(host_bytes=150_000, tables_bytes=5_000), Memory(host_bytes=10**9, tables_bytes=0)):
        worker = Worker(replace(spec, memory=memory))
        outcomes.append(worker.evaluate(job))
        assert worker.live.tables.budget_bytes == memory.tables_bytes
        assert worker.residency.total("pinned")[1] <= (memory.host_bytes or 0)
        for model, name in worker.residency.places:
            assert mapped(worker.weights(model, name)) == (worker.residency.place(model, name) == "disk"), name
        assert outcomes[-1].tables["budget_bytes"] == memory.tables_bytes
        assert outcomes[-1].tables["bytes"] <= memory.tables_bytes
        assert {"bytes", "budget_bytes", "seconds", "dropped"} <= set(outcomes[-1].tables)
    values = {outcome.scores["search"]["text"].value for outcome in outcomes}
    assert len(values) == 1


def test_a_study_file_chooses_and_check_shows_it(work: Path) -> None:
    text = Path("study.yaml").read_text().replace("threads: 1}", "threads: 1, host_memory: 60kB, tables: 2MB}")
    config = parse_study(text, "study.yaml")
    assert worker_spec(config).memory == Memory(None, 60_000, 2_000_000, 1, 1)
    summary = prepare(config).summary
    assert summary["resident"].startswith("59.9 kB in host memory (32 tensors), ")
    assert summary["resident"].endswith("memory-mapped on disk (48 tensors)")
    assert "tables up to 2.0 MB" in summary["memory"]
    default = prepare(parse_study(Path("study.yaml").read_text(), "study.yaml")).summary
    assert default["resident"] == "379.4 kB memory-mapped on disk (80 tensors)"


def test_budgets_beyond_the_machine_are_refused(work: Path) -> None:
    text = Path("study.yaml").read_text().replace("threads: 1}", "threads: 1, host_memory: 900TB}")
    with pytest.raises(EnvironmentProblem, match=r"workers.host_memory`: 1 workers with 900.0 TB each"):
        worker_spec(parse_study(text, "study.yaml"))


def test_a_record_and_status_name_the_tables(work: Path) -> None:
    from evomerge.commands import find_study, run_search, status_of

    assert run_search("study.yaml", ("budget.evaluations=3",), resume="auto", inline=True, quiet=True,
                      allow_task_code=False) == 0  # fmt: skip
    study = find_study("runs/tiny", None, None)
    assert all(c.attrs["tables"]["budget_bytes"] > 0 for c in study.candidates())
    assert "in the fullest worker" in status_of(study)["tables"]
