"""The model card of an exported candidate: Markdown with the Hub's metadata, scores with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge import registry
from evomerge.methods import Method
from evomerge.objectives import Scores
from evomerge.study import Candidate, Study

Z95 = 1.959964  # of the standard normal distribution


def model_card(study: Study, candidate: Candidate, scores: Mapping[str, Mapping[str, Scores]], lost: list[str]) -> str:
    """Text of README.md.

    Args:
        scores: split -> objective -> Scores, for the splits that were scored.
        lost: what mergekit's form of the recipe cannot express.
    """
    recipe = candidate.recipe
    parents = "\n".join(f"- {m}" for m in recipe.models)
    digests = study.header.identity["weights"]
    paths = {"base": study.header.identity["base"], **study.header.identity["experts"]}
    hashes = "\n".join(f"| {n} | `{paths[n]}` | `{digests[n][:16]}` |" for n in paths)
    versions = ", ".join(f"{k} {v}" for k, v in study.header.versions.items())
    note = "".join(f"\n- {line}" for line in lost)
    mergekit = (
        "`mergekit_config.yml` is the same recipe in mergekit's form."
        if not lost
        else f"`mergekit_config.yml` is the nearest recipe in mergekit's form; it cannot express:{note}"
    )
    method: Method = registry.get("methods", recipe.method)
    compatible = "- mergekit-compatible\n" if method.mergekit else ""
    return f"""---
base_model:
{parents}
base_model_relation: merge
library_name: transformers
tags:
- merge
- evomerge
{compatible}---

# {study.name}, candidate {candidate.number}

A merge of language models, found by [evomerge](https://github.com/evomerge/evomerge) in the study
`{study.name}`. Method: **{recipe.method}**, definitions: `{recipe.compat}`, recipe `{recipe.fingerprint[:16]}`.

## Scores

Means with 95 % intervals over items (normal approximation, value ± 1.96 standard errors).
{_table(study, scores)}
The *search* split drove the optimizer: its scores are optimistic. The *validation* split chose among the
candidates of the front, by the mean over objectives, each scaled to its range over the front. The *test* split
influenced nothing, and was scored once for this candidate.

## Recipe

```yaml
{recipe.to_yaml().strip()}
```

`evomerge merge recipe.yaml OUT` writes the same bytes again, run in a folder where the parents lie at the paths
that the recipe names (or with those paths changed). {mergekit}

## Parents

| role | checkpoint | sha256 (start) |
|---|---|---|
{hashes}

{_licences(paths)}

## Made with

Seed {study.header.identity["seed"]}; {versions}.
"""


def _table(study: Study, scores: Mapping[str, Mapping[str, Scores]]) -> str:
    splits = [s for s in ("search", "validation", "test") if s in scores]
    head = "| objective | better | " + " | ".join(splits) + " |"
    rule = "|---|---|" + "---|" * len(splits)
    rows = []
    for name, maximize in study.header.objectives.items():
        cells = [interval(scores[s][name]) for s in splits]
        rows.append(f"| {name} | {'higher' if maximize else 'lower'} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{s} {len(next(iter(scores[s].values())).items)} items" for s in splits)
    return "\n".join(["", head, rule, *rows, "", f"Sizes (first objective): {counts}.", ""])


def interval(score: Scores) -> str:
    """ "0.612 ± 0.021": the value and the half-width of its 95 % interval."""
    return f"{score.value:.4f} ± {Z95 * score.stderr:.4f}"


def _licences(paths: Mapping[str, Any]) -> str:
    """What the parents' own cards say about their licences."""
    found = []
    for name, path in paths.items():
        card = Path(path) / "README.md"
        if card.is_file():
            for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
                if line.startswith("license:"):
                    found.append(f"{name}: {line.removeprefix('license:').strip()}")
    said = "; ".join(found) if found else "the parents' folders name none"
    return f"Licences of the parents, as their model cards say: {said}."
