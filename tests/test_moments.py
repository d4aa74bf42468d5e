"""Moments of the hidden state: what they are, what they do not depend on, and what is said where there are none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.config import load_study_file
from evomerge.errors import EnvironmentProblem, NonFinite, StudyConflict
from evomerge.model import LiveModel
from evomerge.moments import ITEMS, Moments, Observed, measure, whole_model
from evomerge.pool import InlinePool, Pool, make_pool
from evomerge.prepare import open_study, prepare
from evomerge.study import Header, Study
from evomerge.weights import Weights
from evomerge.worker import Job, Outcome, Worker, WorkerSpec
from tests.path_studies import make_family, write_study
from tests.test_layer_path import IDS, N, make

SOURCES = [("red", "red"), ("blue", "blue"), ("base", "base")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("paths"))


@pytest.fixture
def paths(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the family as the working directory."""
    target = tmp_path / "paths"
    shutil.copytree(made, target)
    monkeypatch.chdir(target)
    return target


def spec(*objectives: str) -> WorkerSpec:
    """What a worker of the study loads, with some of its objectives or all."""
    whole = prepare(load_study_file("study.yaml")).worker
    kept = tuple(o for o in whole.objectives if not objectives or o.name in objectives)
    return WorkerSpec(whole.base, whole.models, kept, threads=1)


def measured(of: WorkerSpec, start: Callable[[WorkerSpec], Pool] = InlinePool) -> tuple[Moments, list[str]]:
    notes: list[str] = []
    return measure(of, SOURCES, N, start, notes.append), notes


def spoil(name: str) -> None:
    """Make what the second layer of a model writes larger than float32 can hold; its weights are finite."""
    file = f"{name}/model.safetensors"
    tensors = load_file(file)
    for part in ("post_attention_layernorm", "mlp.down_proj"):
        tensors[f"model.layers.1.{part}.weight"].fill_(1e38)
    save_file(tensors, file, metadata={"format": "pt"})


# -------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen2"])
def test_moments_are_those_of_transformers_own_hidden_states(family: str, tmp_path: Path) -> None:
    live = LiveModel(str(make(family, tmp_path) / "red"))
    with Observed(live) as seen, torch.no_grad():
        for row in IDS.tile(2, 1)[:, :9], IDS:
            live.model(input_ids=row)
    found = seen.moments()
    states: list[list[np.ndarray]] = [[] for _ in range(N + 1)]
    last: list[np.ndarray] = []
    handle = live.layers.modules[-1].register_forward_hook(lambda m, a, out: last.append(first(out)))
    for row in IDS.tile(2, 1)[:, :9], IDS:
        with torch.no_grad():
            out = live.model(input_ids=row, output_hidden_states=True)
        for k in range(N):
            states[k] += [out.hidden_states[k].double().numpy()]
        states[N] += [last.pop()]
    handle.remove()
    tokens = [np.concatenate([s.reshape(-1, s.shape[-1]) for s in of]) for of in states]
    assert len(found["rms"]) == N + 1 and len(found["influence"]) == N
    for k, state in enumerate(tokens):
        sizes = np.sort(np.sqrt((state**2).mean(axis=1)))
        assert sizes[(len(sizes) - 1) // 2] == pytest.approx(found["rms"][k], rel=1e-12)
    for k in range(N):
        a, b = tokens[k], tokens[k + 1]
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert found["influence"][k] == pytest.approx(1 - cosine.mean(), abs=1e-12)


def first(out: Any) -> np.ndarray:
    state: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return state.double().numpy()


def test_a_few_huge_tokens_do_not_hide_the_others(tmp_path: Path) -> None:
    live = LiveModel(str(make("llama", tmp_path) / "base"))

    def moments(ids: torch.Tensor) -> dict[str, tuple[float, ...]]:
        with Observed(live) as seen, torch.no_grad():
            live.model(input_ids=ids)
        return seen.moments()

    plain = moments(IDS)
    live.model.get_input_embeddings().weight[IDS[0, -1]] *= 1000  # the last token: no other sees it
    assert moments(IDS)["rms"] == pytest.approx(plain["rms"], rel=0.2)
    assert moments(IDS[:, -1:])["rms"][0] > 100 * plain["rms"][0]


def test_hooks_go_whatever_happens_and_scores_stay(paths: Path) -> None:
    worker = Worker(spec())
    recipe = whole_model("red", N)
    before = worker.evaluate(Job(0, recipe))
    watched = worker.evaluate(Job(1, recipe, moments=True))
    assert not before.moments and len(watched.moments["rms"]) == N + 1
    for name, scores in before.scores["search"].items():
        assert watched.scores["search"][name].items.tolist() == scores.items.tolist()
    with pytest.raises(KeyError), Observed(worker.live):
        raise KeyError
    assert not any(layer._forward_hooks for layer in worker.live.layers.modules)


def test_states_that_are_not_finite_or_all_zero_have_no_moments(tmp_path: Path) -> None:
    live = LiveModel(str(make("llama", tmp_path) / "base"))
    for value, said in ((float("inf"), "layer 0 holds NaN"), (0.0, "layer 0 is 0")):
        live.model.get_input_embeddings().weight.fill_(value)
        with Observed(live) as seen, torch.no_grad():
            live.model(input_ids=IDS)
        with pytest.raises(NonFinite, match=said):
            seen.moments()


# -------------------------------------------------------------------- measuring


def test_each_source_has_the_moments_of_its_own_scoring(paths: Path) -> None:
    found, notes = measured(spec())
    assert list(found) == ["red", "blue", "base"] and not notes
    assert len({tuple(m["rms"]) for m in found.values()}) == 3
    worker = Worker(spec())
    parts = [{"pick": [i]} for i in range(12)] + [{"text": [i]} for i in range(5)]
    worker.live.install(whole_model("blue", N), Weights(("blue",), "cpu"))
    with Observed(worker.live) as seen:
        for part in parts:
            for objective in worker.objectives:
                if objective.name in part:
                    objective.score(worker.live, "search", part[objective.name])
    assert found["blue"] == {key: list(values) for key, values in seen.moments().items()}


def test_a_process_of_its_own_measures_the_same(paths: Path) -> None:
    def start(of: WorkerSpec) -> Pool:
        return make_pool(of, local=1, ray=None, address=None, inline=False)

    assert measured(spec("pick"), start)[0] == measured(spec("pick"))[0]


def test_at_most_so_many_items_are_scored_and_whole_objectives_only_if_there_are_no_others(paths: Path) -> None:
    long = "\n\n".join(f"Text number {i} has words." for i in range(3 * ITEMS))
    Path("text.search.txt").write_text(long)
    objectives = [
        {"name": "text", "kind": "perplexity", "files": {"search": "text.search.txt"}},
        {"name": "depth", "kind": "size", "count": "layers"},
    ]
    write_study(paths, objectives=objectives)
    jobs: list[Job] = []

    class Counted(InlinePool):
        def submit(self, job: Job) -> None:
            assert [o.name for o in self._worker.objectives] == ["text"]
            jobs.append(job)
            super().submit(job)

    assert measured(spec(), Counted)[0]
    assert [job.parts for job in jobs] == [[{"text": [i]} for i in range(ITEMS)]] * 3
    assert measured(spec("depth")) == ({}, ["no objective runs the models' layers: scales start at 1, without moment "
                                            "matching"])  # fmt: skip


def test_a_model_that_cannot_be_measured_is_named_and_no_study_is_made(paths: Path) -> None:
    spoil("blue")
    with pytest.raises(EnvironmentProblem, match=r"hidden states of blue \(blue\) cannot be measured \(.*NaN"):
        measured(spec())
    prepared = prepare(load_study_file("study.yaml"))
    with pytest.raises(EnvironmentProblem, match="match: false"):
        open_study(prepared, inline=True)
    assert not Study.exists(prepared.config.storage, "tiny") and not Path("runs").exists()
    left_out = write_study(paths, space={"path": "edits", "sources": ["red"]})
    assert list(open_study(prepare(load_study_file(str(left_out))), inline=True)[0].header.moments) == ["red"]


# -------------------------------------------------------------------- in the study


def test_a_study_keeps_its_moments_and_is_not_measured_again(paths: Path) -> None:
    prepared = prepare(load_study_file("study.yaml"))
    notes: list[str] = []
    study, existed = open_study(prepared, inline=True, on_note=notes.append)
    assert not existed and notes == ["measuring the hidden states of 2 models, once for this study"]
    again, existed = open_study(prepared, on_note=notes.append)
    assert existed and len(notes) == 1
    assert again.header == study.header and list(again.header.moments) == ["red", "blue"]
    space = prepared.space_of(again.header)
    assert space != prepared.space and dict(space.moments) == {  # type: ignore[attr-defined]
        name: tuple(moments["rms"]) for name, moments in again.header.moments.items()
    }


def test_a_study_that_another_search_makes_during_the_measurement_is_joined(paths: Path) -> None:
    made_up = {name: {"rms": [1.0, 2.0, 3.0, 4.0, 5.0]} for name in ("red", "blue")}

    def meanwhile(note: str) -> None:
        Study.create(prepared.config.storage, prepared.config.name, replace(prepared.header, moments=made_up))

    prepared = prepare(load_study_file("study.yaml"))
    study, existed = open_study(prepared, inline=True, on_note=meanwhile)
    assert existed and study.header.moments == made_up  # the first one's: both make the same recipes
    prepared = prepare(load_study_file(str(write_study(paths, name="new"))))
    with pytest.raises(StudyConflict, match="new"):
        open_study(prepared, "never", inline=True, on_note=meanwhile)


@pytest.mark.parametrize("change", [{"scales": "off"}, {"match": False}])
def test_nothing_is_measured_where_no_scale_is_matched(paths: Path, change: dict[str, Any]) -> None:
    write_study(paths, space={"path": "edits", **change})
    prepared = prepare(load_study_file("study.yaml"))
    study, _ = open_study(prepared, on_note=lambda note: pytest.fail(note))
    assert study.header.moments == {} and prepared.space_of(study.header) is prepared.space


def test_headers_of_older_studies_have_no_moments(paths: Path) -> None:
    study, _ = open_study(prepare(load_study_file("study.yaml")), inline=True)
    old = {key: value for key, value in vars(study.header).items() if key != "moments"}
    assert Header(**old).moments == {}


def test_outcomes_without_moments_say_so() -> None:
    assert Outcome(0, {}, 0.0, 0.0, 0, "here").moments == {}
