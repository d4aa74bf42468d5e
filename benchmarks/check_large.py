"""The same commands on a 125M-parameter random Llama: base and three experts, sharded bf16, 20 candidates.

Prints time and peak memory per candidate, what the memory floor is, and every file that the commands changed
outside the study's folder (there should be none). Run with `make check-large`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "runs" / "check-large-inputs"
STUDY = ROOT / "runs" / "check-large"
CANDIDATES = 20
EXPERTS = ("red", "green", "blue")

STUDY_FILE = """\
name: check-large
base: runs/check-large-inputs/base
experts:
  red: runs/check-large-inputs/red
  green: runs/check-large-inputs/green
  blue: runs/check-large-inputs/blue
space: task_arithmetic_layers
objectives:
  - {name: pick, kind: lm_eval, file: runs/check-large-inputs/pick.yaml, batch_size: 16}
  - name: text
    kind: perplexity
    files:
      search: runs/check-large-inputs/text.search.txt
      validation: runs/check-large-inputs/text.validation.txt
      test: runs/check-large-inputs/text.test.txt
optimizer: map
budget: {evaluations: 20}
workers: 1
"""


def make_inputs() -> None:
    """Base and experts (base plus noise), a byte-level tokenizer, a task and a text in three splits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT))
    from tests.conftest import write_tasks

    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    for index, name in enumerate(("base", *EXPERTS)):
        torch.manual_seed(index)
        for key, parameter in model.named_parameters():
            noise = 0.0 if name == "base" else 0.05 * original[key].float().std()
            parameter.data = (original[key].float() + noise * torch.randn(parameter.shape)).to(torch.bfloat16)
        model.save_pretrained(PLACE / name, max_shard_size="60MB")
        shutil.copy(ROOT / "tests/golden/e2e/models/base/tokenizer.json", PLACE / name)
        special = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "!"}\n'
        (PLACE / name / "tokenizer_config.json").write_text(special)
    write_tasks(PLACE)
    (PLACE / "study.yaml").write_text(STUDY_FILE)


def run(*args: str, home: Path) -> float:
    """One evomerge command as a person runs it, with an empty home and temporary folder; its seconds."""
    env = {**os.environ, "HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HOME", None)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "evomerge", *args], check=True, cwd=ROOT, env=env)
    return time.perf_counter() - started


def changed_since(marker: float, places: list[Path]) -> list[Path]:
    """Files below these places that were made or written after the marker, outside the study's folder."""
    found = []
    for place in places:
        for folder, _, names in os.walk(place, onerror=None):
            for name in names:
                path = Path(folder, name)
                try:
                    late = path.lstat().st_mtime > marker
                except OSError:
                    continue
                if late and STUDY not in path.parents:
                    found.append(path)
    return found


def main() -> None:
    for folder in (PLACE, STUDY):
        shutil.rmtree(folder, ignore_errors=True)
    PLACE.mkdir(parents=True)
    print("making base and experts ...", flush=True)
    make_inputs()
    watched = PLACE / "watched"
    for name in ("home", "tmp"):
        (watched / name).mkdir(parents=True)
    study = str((PLACE / "study.yaml").relative_to(ROOT))
    subprocess.run([sys.executable, "-m", "evomerge", "--help"], check=True, capture_output=True, cwd=ROOT)
    time.sleep(0.1)
    marker = time.time()
    seconds = {
        "check": run("check", study, home=watched),
        "search": run("search", study, home=watched),
        "status": run("status", "runs/check-large", home=watched),
        "front --split test": run("front", "runs/check-large", "--split", "test", home=watched),
        "export": run("export", "runs/check-large", "runs/check-large/best", home=watched),
    }
    places = [ROOT, watched, Path("/dev/shm"), Path("/var/tmp")]
    outside = [p for p in changed_since(marker, places) if "__pycache__" not in p.parts]
    report(seconds, outside)


def report(seconds: dict[str, float], outside: list[Path]) -> None:
    import torch

    from evomerge import Study
    from evomerge.weights import Checkpoint

    frame = Study.load(f"sqlite:///{STUDY / 'ledger.db'}", "check-large").frame()
    done = frame[frame["state"] == "done"]
    one = Checkpoint(str(PLACE / "base")).n_bytes
    print(f"\n{os.cpu_count()} cores, torch {torch.__version__}; one model is {one / 1e6:.0f} MB in bf16, 4 are mapped")
    print(f"candidates: {len(done)} done of {len(frame)}\n")
    print("candidate              merge s  score s  peak MB")
    for _, row in done.iterrows():
        label = row["label"] if isinstance(row["label"], str) else ""
        print(
            f"#{row['number']:<3} {label:<18} {row['t_merge_s']:>7.2f}  {row['t_eval_s']:>7.2f}  "
            f"{row['peak_bytes'] / 1e6:>7.0f}"
        )
    for column, unit in (("t_merge_s", "s"), ("t_eval_s", "s")):
        print(f"median {column}: {statistics.median(done[column].dropna()):.2f} {unit}")
    print(
        f"largest peak: {done['peak_bytes'].max() / 1e6:.0f} MB; live model and mapped inputs: {5 * one / 1e6:.0f} MB"
    )
    for name, value in seconds.items():
        print(f"evomerge {name}: {value:.1f} s")
    print(f"\nfiles changed outside {STUDY.relative_to(ROOT)}: {len(outside)}")
    for path in outside:
        print(f"  {path}")
    if outside or len(done) != CANDIDATES:
        sys.exit(1)


if __name__ == "__main__":
    main()
