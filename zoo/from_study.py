"""Write a demo study's winner and front as the file that `zoo.table --front` reads.

    python -m zoo.from_study runs/demo front.json

The winner, which the table compares with every other row, is chosen on the validation split.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from evomerge.commands import find_study
from evomerge.rescore import front_of, study_config
from evomerge.selection import winner
from evomerge.study import Candidate


def entry(candidate: Candidate, label: str, paths: dict[str, str]) -> dict[str, Any] | None:
    """Label and weight per expert; None for a recipe that is not plain task arithmetic over whole models."""
    recipe = candidate.recipe
    if recipe.method != "task_arithmetic" or len(recipe.slices) != 1:
        return None
    weights = {source.model: dict(source.parameters)["weight"] for source in recipe.slices[0].sources}
    return {"label": label, "weights": {name: weights[path] for name, path in paths.items()}}


def main() -> None:
    study = find_study(sys.argv[1], None, None)
    paths = study.header.identity["experts"]
    candidates = study.candidates()
    best, _ = winner(study, study_config(study), candidates)
    front = [c for c in front_of(study, candidates) if c.number != best.number]
    entries = [entry(best, f"searched, #{best.number} (winner)", paths)]
    entries += [entry(c, f"searched, #{c.number}", paths) for c in front if c.label is None]
    Path(sys.argv[2]).write_text(json.dumps([e for e in entries if e], indent=1) + "\n")
    print(f"{sys.argv[2]}: winner #{best.number}, {len(front)} more on the front")


if __name__ == "__main__":
    main()
