"""Checkpoints are opened completely or refused with a reason; families are compared tensor by tensor."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import WeightsError
from evomerge.family import check_family
from evomerge.model import check_architecture, check_siblings
from evomerge.weights import Checkpoint, Weights, open_all

EXPERTS = ("red", "green", "blue")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def problems() -> list[str]:
    opened, broken = open_all({n: n for n in ("base", *EXPERTS)})
    found = list(broken)
    if "base" in opened:
        experts = {n: c for n, c in opened.items() if n != "base"}
        found += [*check_siblings(opened["base"], experts), *check_family(opened["base"], experts)]
    return [str(p) for p in found]


def test_a_good_family_has_no_problems(work: Path) -> None:
    assert problems() == []
    base = Checkpoint("base")
    assert base.n_layers == 2
    assert base.names[0] == "model.embed_tokens.weight"
    assert base.names[-1] == "model.norm.weight"
    assert check_architecture(base) == []


def test_tensors_are_memory_mapped_and_equal_to_the_file(work: Path) -> None:
    stored = load_file("red/model.safetensors")
    weights = Weights(["base", "red"])
    for name in Checkpoint("red").names:
        assert torch.equal(weights("red", name), stored[name])
    assert weights("red", "model.norm.weight") is weights("red", "model.norm.weight")


def test_a_stored_copy_of_a_tied_head_is_not_a_tensor_of_its_own(work: Path) -> None:
    edit(work / "red", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in Checkpoint("red").names
    assert problems() == []


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_files_are_refused(work: Path, keep: float) -> None:
    file = work / "green" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        Checkpoint("green")


def test_missing_folder_config_and_weights(work: Path) -> None:
    with pytest.raises(WeightsError, match="no checkpoint folder"):
        Checkpoint("nowhere")
    (work / "red" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        Checkpoint("red")
    (work / "red" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not readable as JSON"):
        Checkpoint("red")


def test_pickled_weights_are_refused_and_never_opened(work: Path) -> None:
    canary = work / "canary"
    (work / "red" / "model.safetensors").unlink()
    (work / "red" / "pytorch_model.bin").write_bytes(pickle.dumps(_TouchOnLoad(str(canary))))
    with pytest.raises(WeightsError, match="pickled"):
        Checkpoint("red")
    assert not canary.exists()
    pickle.loads((work / "red" / "pytorch_model.bin").read_bytes())
    assert canary.exists(), "the canary itself must work"


class _TouchOnLoad:
    """A pickle that leaves a trace when anything loads it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (Path.touch, (Path(self.path),))  # type: ignore[return-value]


def test_a_missing_shard_and_a_shard_outside_the_folder(work: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (work / "red" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="missing weight files"):
        Checkpoint("red")
    index["weight_map"]["a"] = "../green/model.safetensors"
    (work / "red" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside"):
        Checkpoint("red")


def test_missing_extra_and_misshapen_tensors_are_named(work: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        del t["model.layers.0.mlp.up_proj.weight"]
        t["model.layers.0.mlp.side.weight"] = torch.zeros(1)
        t["model.norm.weight"] = torch.zeros(31)

    edit(work / "blue", change)
    found = problems()
    assert any("has no tensor model.layers.0.mlp.up_proj.weight" in p for p in found)
    assert any("the base lacks: model.layers.0.mlp.side.weight" in p for p in found)
    assert any("model.norm.weight has shape (31,), but (32,)" in p for p in found)
    assert all(p.startswith("blue") for p in found)


def test_non_finite_values_are_named_with_their_expert(work: Path) -> None:
    edit(work / "green", lambda t: t["model.norm.weight"].__setitem__(3, float("nan")))
    edit(work / "blue", lambda t: t["model.norm.weight"].__setitem__(slice(0, 2), float("inf")))
    assert [p for p in problems() if "green" in p and "model.norm.weight holds 1 values" in p]
    assert [p for p in problems() if "blue" in p and "model.norm.weight holds 2 values" in p]


def test_other_configurations_and_vocabularies_are_no_siblings(work: Path) -> None:
    config = json.loads((work / "red" / "config.json").read_text())
    config["num_key_value_heads"] = 4
    (work / "red" / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((work / "blue" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (work / "blue" / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = problems()
    assert any("red: config.json: num_key_value_heads is 4, but 2 in the base" in p for p in found)
    assert any("blue: the tokenizer gives other ids" in p and "to 2 tokens" in p for p in found)


def test_older_spellings_of_the_same_configuration_are_siblings(work: Path) -> None:
    config = json.loads((work / "red" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config.pop("head_dim", None)
    (work / "red" / "config.json").write_text(
        json.dumps(config | {"rope_theta": rope["rope_theta"], "use_cache": False})
    )
    assert problems() == []
    config["rope_theta"] = 5e5
    (work / "red" / "config.json").write_text(json.dumps(config))
    assert any("rope_parameters" in p for p in problems())


def test_a_config_of_another_model_is_found_without_loading(work: Path) -> None:
    config = json.loads((work / "base" / "config.json").read_text())
    config["intermediate_size"] = 64
    (work / "base" / "config.json").write_text(json.dumps(config))
    found = check_architecture(Checkpoint("base"))
    assert "differ in 6 tensors" in str(found[0])


def test_the_digest_sees_every_bit(work: Path) -> None:
    before = Checkpoint("red").digest()
    file = work / "red" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert Checkpoint("red").digest() != before
