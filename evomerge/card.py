"""The model card of an exported candidate: Markdown with the Hub's metadata, scores with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge import registry
from evomerge._recipe_write import no_mergekit_form
from evomerge.gains import Report, signed
from evomerge.intervals import interval
from evomerge.methods import Method
from evomerge.objectives import Scores
from evomerge.recipe import Recipe
from evomerge.study import Candidate, Study


def model_card(
    study: Study,
    candidate: Candidate,
    scores: Mapping[str, Mapping[str, Scores]],
    lost: list[str],
    gained: Report | None = None,
    *,
    by_hand: bool = False,
) -> str:
    """Text of README.md.

    Args:
        scores: split -> objective -> Scores, for the splits that were scored.
        lost: what mergekit's form of the recipe cannot express.
        gained: how the candidate compares with the best known recipe.
        by_hand: a person named the candidate; no split chose it.
    """
    recipe = candidate.recipe
    parents = "\n".join(f"- {m}" for m in recipe.models)
    digests = study.header.identity["weights"]
    identity = study.header.identity
    paths = {"base": identity["base"], **identity["experts"]}
    paths |= {"merged": identity["merged"]} if "merged" in identity else {}
    hashes = "\n".join(f"| {n} | `{paths[n]}` | `{digests[n][:16]}` |" for n in paths)
    versions = ", ".join(f"{k} {v}" for k, v in study.header.versions.items())
    method: Method = registry.get("methods", recipe.method)
    compatible = "- mergekit-compatible\n" if method.mergekit and not no_mergekit_form(recipe) else ""
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

{_verdict(gained)}A merge of language models, found by [evomerge](https://github.com/evomerge/evomerge) in the study
`{study.name}`. Method: **{recipe.method}**, definitions: `{recipe.compat}`, recipe `{recipe.fingerprint[:16]}`.

## Scores

Values with 95 % intervals over items. {_methods(scores)}
{_table(study, scores)}
The *search* split drove the optimizer: its scores are optimistic. {_choice(scores, by_hand)} The *test* split
influenced nothing, and was scored once for this candidate.

{_gains(gained)}
## Recipe

{_layers(recipe)}```yaml
{recipe.to_yaml().strip()}
```

`evomerge merge recipe.yaml OUT` writes the same bytes again, run in a folder where the parents lie at the paths
that the recipe names (or with those paths changed). {_mergekit(recipe, lost)}

## Parents

| role | checkpoint | sha256 (start) |
|---|---|---|
{hashes}

{_licences(paths)}

## Made with

Seed {study.header.identity["seed"]}; {versions}.
"""


def _mergekit(recipe: Recipe, lost: Sequence[str]) -> str:
    """What the recipe is in mergekit's form, if it has one."""
    if why := no_mergekit_form(recipe):
        return f"There is no form of it for mergekit: {why}."
    if lost:
        note = "".join(f"\n- {line}" for line in lost)
        return f"`mergekit_config.yml` is the nearest recipe in mergekit's form; it cannot express:{note}"
    return "`mergekit_config.yml` is the same recipe in mergekit's form."


def _table(study: Study, scores: Mapping[str, Mapping[str, Scores]]) -> str:
    splits = [s for s in ("search", "validation", "test") if s in scores]
    head = "| objective | better | " + " | ".join(splits) + " |"
    rule = "|---|---|" + "---|" * len(splits)
    rows = []
    for name, maximize in study.header.objectives.items():
        cells = [str(interval(scores[s][name])) for s in splits]
        rows.append(f"| {name} | {'higher' if maximize else 'lower'} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{s} {len(next(iter(scores[s].values())).items)} items" for s in splits)
    return "\n".join(["", head, rule, *rows, "", f"Sizes (first objective): {counts}.", ""])


def _choice(scores: Mapping[str, Mapping[str, Scores]], by_hand: bool) -> str:
    """How the candidate came to be this one."""
    if by_hand:
        return "This candidate was named by hand: no split chose it."
    if "validation" not in scores:
        return "There is no validation split: the search split chose this candidate too."
    return (
        "The *validation* split chose among the candidates\nthat are statistically tied at the top of the search "
        "split, those that were recommended and known recipes,\nby the mean over objectives, each scaled to "
        "its range over the front: the simplest within one standard error\nof the best."
    )


def _methods(scores: Mapping[str, Mapping[str, Scores]]) -> str:
    """Which intervals are which."""
    said = {
        "wilson": "Wilson's interval for shares of right answers ({})",
        "bootstrap": "bootstrap over items for other means and ratios ({})",
        "normal": "value ± 1.96 standard errors for metrics of the whole split ({})",
        "none": "none for single numbers ({})",
    }
    names: dict[str, list[str]] = {}
    for name in next(iter(scores.values())):
        method = interval(next(iter(scores.values()))[name]).method
        names.setdefault(method, []).append(name)
    text = "; ".join(said[method].format(", ".join(names[method])) for method in said if method in names)
    return text[:1].upper() + text[1:] + "."


def _verdict(gained: Report | None) -> str:
    """Whether the search added anything, as the first paragraph."""
    verdict = None if gained is None else gained.verdict
    return "" if verdict is None else f"**{verdict[:1].upper()}{verdict[1:]}.**\n\n"


def _gains(gained: Report | None) -> str:
    """The section on what survived, or nothing."""
    if gained is None:
        return ""
    head = "## Gain over the best known recipe\n\n"
    if gained.is_baseline:
        return f"{head}None: this candidate is the best known recipe on the search split, {gained.baseline.label}.\n"
    splits = list(gained.rows[0].gains)
    lines = [
        "| objective | " + " | ".join(splits) + " | survived | optimism |",
        "|---|" + "---|" * (len(splits) + 2),
    ]
    for row in gained.rows:
        cells = [signed(row.gains[s]) for s in splits]
        cells.append("-" if row.survived is None else f"{row.survived:.0%}")
        cells.append("-" if row.optimism is None else f"{row.optimism:+.4f}")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return f"""{head}Lead over {gained.named_baseline}, the best of the recipes that need no search (best on the search
split), on the same items, with 95 % paired bootstrap intervals; positive is better. *Survived* is the gain on test as a
share of the gain on search, where that one is beyond its interval; *optimism* is how much better the
search split made this model look than the test split does.

{table}
{_tests(gained)}"""


def _tests(gained: Report) -> str:
    """The tests on the test split."""
    if not gained.tests:
        return ""
    rows = [
        f"| {t.kind}: {t.baseline.label} | {t.name} | {signed(t.test.lead)} | {t.test.method} | {t.p_value:.2g} |"
        for t in gained.tests
    ]
    table = "\n".join(["| against | objective | lead | test | p |", "|---|---|---|---|---|", *rows])
    return f"\nOn the test split, {gained.corrected}:\n\n{table}\n"


def _layers(recipe: Recipe) -> str:
    """A path in one line: which layers of which model stand where; nothing for other recipes."""
    said = path_line(recipe, {})
    if not said:
        return ""
    sources = [source for piece in recipe.slices for source in piece.sources]
    spans = [source.layers for source in sources if source.layers is not None]
    scaled = any(name in ("scale", "shift") for s in sources for name, _ in s.parameters)
    fold = " Where the path scales the hidden state, the factors are folded into the weights." if scaled else ""
    total = sum(b - a for a, b in spans)
    return f"A path of {total} layers: {said}.{fold} The checkpoint is a plain one, and needs no code.\n\n"


def path_line(recipe: Recipe, names: Mapping[str, str]) -> str:
    """ "latin 0, cipher 1-2, latin 3": which layers stand where; "" for recipes that are no path.

    `names` are short names of models by their paths.
    """
    sources = [source for piece in recipe.slices for source in piece.sources]
    spans = [(names.get(s.model, s.model), s.layers) for s in sources if s.layers is not None]
    if recipe.method != "passthrough" or len(spans) < len(sources):
        return ""
    return ", ".join(f"{model} {a}" if b - a == 1 else f"{model} {a}-{b - 1}" for model, (a, b) in spans)


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
