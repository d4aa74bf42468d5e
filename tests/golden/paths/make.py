"""Makes this folder again: two experts per family, a path with scales through both, and mergekit 0.1.5's tensors.

Run it from the repository as `python -m tests.golden.paths.make`, after `make bench-setup`. test_mergekit_paths.py
takes the recipe and the call of mergekit from here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.export import mergekit_form
from evomerge.recipe import Recipe
from evomerge.scale_folding import fold_scales
from evomerge.strict_yaml import dump_yaml

HERE = Path(__file__).parent
MERGEKIT = HERE.parents[2] / ".venv-mergekit" / "bin" / "python"
COMMAND = "from mergekit.scripts.run_yaml import main; main()"
# Of a configuration whose `layer_types` are not as many as its layers, which mergekit makes and transformers refuses.
LENIENT = "".join(
    f"from transformers import {name}Config; {name}Config.validate = lambda self: None; " for name in ("Qwen2", "Qwen3")
)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FROZEN: dict[str, tuple[str, torch.dtype]] = {
    "llama": ("Llama", torch.bfloat16),
    "gpt_neox": ("GPTNeoX", torch.float32),
}
# A run, two layers of the other model in between (2 of them once more later), and the last two of the first swapped.
PATH = (("red", 0, 2), ("blue", 1, 3), ("blue", 2, 4), ("red", 3, 4), ("red", 2, 3))
SCALES = (1.0, 1.0, 0.8, 1.0, 1.375, 1.0, 0.7, 1.21)
LEGACY = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


def recipe(model_type: str, path: Any = PATH, folder: str = "") -> Recipe:
    """The path through two experts, with its scales folded."""
    slices = [{"sources": [{"model": f"{folder}{model}", "layer_range": [first, past]}]} for model, first, past in path]
    plain = Recipe.from_dict({"merge_method": "passthrough", "slices": slices, "compat": "paper"})
    return fold_scales(plain, SCALES, model_type)


def run_mergekit(config: Path, out: Path, cwd: Path, *, lenient: bool = False) -> dict[str, Tensor]:
    """The tensors that mergekit's own command makes of a recipe, on the CPU and without network.

    With `lenient` it may write a config.json that transformers refuses.

    Raises:
        RuntimeError: mergekit fails, with its last words.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    code = LENIENT + COMMAND if lenient else COMMAND
    command = [str(MERGEKIT), "-c", code, str(config), str(out), "--no-write-model-card", "--quiet"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return {name: t for name, t in load_file(out / "model.safetensors").items() if not name.endswith(LEGACY)}


def add_legacy_buffers(folder: Path) -> None:
    """Give a GPT-NeoX checkpoint the buffers that mergekit asks for; transformers has not stored them for long."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(4):
        made = (torch.ones(1, 1, 4, 4), torch.tensor(-1e9), torch.ones(4))
        tensors |= {f"gpt_neox.layers.{layer}.{name}": t for name, t in zip(LEGACY, made, strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})


def _models(family: str, folder: Path) -> None:
    """Write two random experts, `red` and `blue`."""
    import transformers

    name, dtype = FROZEN[family]
    tokenizer = HERE.parent / "e2e" / "models" / "base"
    for seed, label in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(folder / label)
        (folder / label / "generation_config.json").unlink(missing_ok=True)
        (folder / label / "model.safetensors").chmod(0o644)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder / label / file)


def main() -> None:
    """Write the families' experts, the recipe in both forms and mergekit's tensors."""
    for family in FROZEN:
        target = HERE / family
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        _models(family, target)
        previous = Path.cwd()
        os.chdir(target)  # the recipe's paths are relative
        data, lost = mergekit_form(recipe(family))
        os.chdir(previous)
        if data is None or lost:
            raise SystemExit(f"mergekit cannot express {lost}")
        (target / "recipe.yaml").write_text(recipe(family).to_yaml(), encoding="utf-8")
        (target / "mergekit.yml").write_text(dump_yaml(data), encoding="utf-8")
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            shutil.copytree(target, work / "in")
            for label in ("red", "blue") if family == "gpt_neox" else ():
                add_legacy_buffers(work / "in" / label)
            tensors = run_mergekit(target / "mergekit.yml", work / "out", work / "in")
            save_file(tensors, target / "expected.safetensors", metadata={"format": "pt"})
            (target / "expected.safetensors").chmod(0o644)
            shutil.copy(work / "out" / "config.json", target / "expected.config.json")


if __name__ == "__main__":
    main()
