"""A family of four-layer models with tasks and a study file, for tests of layer-order studies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import write_tasks
from tests.test_layer_path import make

STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": "base",
    "experts": {"red": "red", "blue": "blue"},
    "space": {"path": "edits"},
    "objectives": [
        {"name": "pick", "kind": "lm_eval", "file": "pick.yaml", "metric": "acc", "batch_size": 16},
        {
            "name": "text",
            "kind": "perplexity",
            "files": {split: f"text.{split}.txt" for split in ("search", "validation", "test")},
        },
    ],
    "budget": {"evaluations": 14},
    "workers": {"local": 1, "threads": 1},
    "seed": 3,
}


def make_family(root: Path, family: str = "llama") -> Path:
    """base, red, blue and merged: random models of four layers, the last three near the first; tasks; study.yaml."""
    make(family, root, vocab_size=256, max_position_embeddings=128)
    merge(root)
    write_tasks(root)
    write_study(root)
    return root


def merge(root: Path) -> None:
    """Write the mean of red and blue as the checkpoint `merged`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(root / "red", root / "merged")
    red, blue = (load_file(root / name / "model.safetensors") for name in ("red", "blue"))
    mean = {name: ((red[name] + blue[name]) / 2).contiguous() for name in red}
    save_file(mean, root / "merged" / "model.safetensors", metadata={"format": "pt"})


def write_study(root: Path, **changes: Any) -> Path:
    """Write study.yaml with some keys changed; None leaves a key out."""
    data = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    (root / "study.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return root / "study.yaml"
