"""On CUDA: the same masks and the same merges as on the CPU. Run with `make test-gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evomerge.methods import keep_mask
from evomerge.model import LiveModel
from evomerge.objectives import ObjectiveSpec, make_objective
from evomerge.recipe import Recipe
from evomerge.residency import Memory
from evomerge.weights import Weights
from evomerge.worker import Job, Worker, WorkerSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
EXPERTS = ("red", "green", "blue")


def recipe(method: str, *weights: float) -> Recipe:
    return Recipe.build(method, "base", {e: {"weight": w} for e, w in zip(EXPERTS, weights, strict=True)})


def test_masks_have_the_same_bits() -> None:
    args = {"seed": 3, "tensor_name": "model.layers.0.mlp.up_proj.weight", "stream": 1}
    for density in (0.0, 0.1, 0.5, 0.999, 1.0):
        on_cpu = keep_mask(100_003, density, device=torch.device("cpu"), **args)
        on_gpu = keep_mask(100_003, density, device=torch.device("cuda"), **args)
        assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.3, 0.4, 0.5)])
def test_task_arithmetic_has_the_same_bits(work: Path, weights: tuple[float, ...]) -> None:
    made = recipe("task_arithmetic", *weights)
    live = {}
    for device in ("cpu", "cuda"):
        live[device] = LiveModel("base", device)
        live[device].install(made, Weights(["base", *EXPERTS], device))
    ours = dict(live["cuda"].model.named_parameters())
    for name, parameter in live["cpu"].model.named_parameters():
        assert torch.equal(parameter, ours[name].cpu()), name


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "linear"])
def test_other_methods_agree_and_repeat_to_the_bit(work: Path, method: str) -> None:
    made = recipe(method, 0.3, 0.4, 0.5)
    on_cpu, on_gpu = LiveModel("base"), LiveModel("base", "cuda")
    weights = Weights(["base", *EXPERTS], "cuda")
    on_cpu.install(made, Weights(["base", *EXPERTS]))
    on_gpu.install(made, weights)
    first = {n: p.clone() for n, p in on_gpu.model.named_parameters()}
    on_gpu.install(made, weights)
    for name, parameter in on_gpu.model.named_parameters():
        assert torch.equal(parameter, first[name]), name
        assert torch.allclose(parameter.cpu(), dict(on_cpu.model.named_parameters())[name], atol=1e-6), name


def test_scoring_repeats_to_the_bit(work: Path) -> None:
    live = LiveModel("red", "cuda")
    objective = make_objective(ObjectiveSpec("pick", "lm_eval", {"file": "pick.yaml"}))
    first, second = objective.score(live, "search"), objective.score(live, "search")
    assert (first.items == second.items).all()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_merges_have_the_same_bits_wherever_weights_live(work: Path, method: str) -> None:
    made = recipe(method, 0.3, 0.4, 0.5)
    found = []
    for place in ("gpu", "pinned", "disk"):
        live = LiveModel("base", "cuda")
        weights = Weights(["base", *EXPERTS], "cuda", lambda model, name, place=place: place)
        weights.load()
        for _ in range(2):  # streamed again: nothing was written to
            live.install(made, weights)
        found.append({n: p.detach().clone() for n, p in live.model.named_parameters()})
    for other in found[1:]:
        assert all(torch.equal(found[0][n], p) for n, p in other.items())


def test_tensors_are_kept_where_the_plan_says(work: Path) -> None:
    name = "model.embed_tokens.weight"
    pinned = Weights(["red"], "cuda", lambda model, name: "pinned")
    first, second = pinned("red", name), pinned("red", name)
    assert first.is_cuda and first.data_ptr() != second.data_ptr()  # streamed each time
    assert pinned._resident["red", name].is_pinned() and torch.equal(first, second)
    resident = Weights(["red"], "cuda", lambda model, name: "gpu")
    assert resident("red", name) is resident("red", name)
    assert not Weights(["red"], "cuda", lambda model, name: "disk")._fetch("red", name).is_cuda


def test_a_worker_keeps_its_budget(work: Path) -> None:
    objective = ObjectiveSpec("text", "perplexity", {"files": {"search": "text.search.txt"}})
    spec = WorkerSpec("base", ("base", *EXPERTS), (objective,), device="cuda", threads=1)
    values = set()
    for memory in (Memory(), Memory(gpu_bytes=200_000, host_bytes=0), Memory(gpu_bytes=0, host_bytes=10**9)):
        worker = Worker(replace(spec, memory=memory))
        held = sum(t.numel() * t.element_size() for t in worker.weights._resident.values() if t.is_cuda)
        assert held == worker.residency.total("gpu")[1]
        assert memory.gpu_bytes is None or held <= memory.gpu_bytes
        outcome = worker.evaluate(Job(0, recipe("ties", 0.3, 0.4, 0.5)))
        values.add(outcome.scores["search"]["text"].value)
    assert len(values) == 1
