"""PathSpace: layer orders as a search space. A point is a path through the layers of several models, with scales.

Every point is a valid path: never empty (some layer is frozen), never longer than `longest`. Its recipe is a plain
passthrough recipe, with the scales folded into the weights; equal paths are equal recipes, whatever genes that do not
matter say.

Where a path does not go on with the next layer of the same source, the hidden state is multiplied by

    rms[b][j] / rms[a][i + 1]  *  s

from the output of layer i of source a to the input of layer j of source b: rms[x][k] is the root mean square of what
layer k of source x reads in its own model (L + 1 of them: the last is what the final norm reads), measured once, and
s is a gene, 1 at the start. So a gene says how far the scale is from the one that gives each layer a state of the
size that it was trained on.

The three encodings are `_path_choices`, `_path_edits` and `_path_indicators`; reading the YAML form is `_path_form`'s
work. Source: Akiba et al. 2024, arXiv 2403.13187, section 3.2 (data flow space).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge._path_steps import BACKBONE, Encoding, Ground, Layer, Params, Step, is_seam, named
from evomerge._space_genes import Gene, Natural, check_values, natural_values
from evomerge.errors import ConfigError, Problem
from evomerge.optimizers import Facts, Level
from evomerge.recipe import Recipe, Slice, Source
from evomerge.scale_folding import MOST, fold_scales

__all__ = ["PathSpace", "Step", "is_path_spec"]

Array = NDArray[np.float64]
FARTHEST = MOST / 10  # the scales of a path multiply to at most this, and at least its inverse


def is_path_spec(spec: object) -> bool:
    """True for the YAML form of a layer-order space: it has the key `path`."""
    return isinstance(spec, Mapping) and "path" in spec


@dataclass(frozen=True)
class PathSpace:
    """Paths through the layers of several models. Make one with `from_dict`.

    `sources` are (short name, checkpoint path) of the models whose layers a path may use; `experts` are all of the
    study, which its known recipes name. `moments` are (source, rms of the hidden state (L + 1,)) pairs, () before
    they are measured. `out_dtype` is of every recipe, None where all models have the base's.
    """

    base: str
    experts: tuple[tuple[str, str], ...]
    sources: tuple[tuple[str, str], ...]
    ground: Ground
    encoding: Encoding
    match: bool
    model_type: str
    seed: int = 0
    description: str = ""
    moments: tuple[tuple[str, tuple[float, ...]], ...] = ()
    out_dtype: str | None = None

    @classmethod
    def from_dict(
        cls,
        spec: Mapping[str, Any],
        base: str,
        experts: Mapping[str, str],
        n_layers: int,
        *,
        model_type: str,
        merged: str | None = None,
        seed: int = 0,
    ) -> PathSpace:
        """Read the YAML form of a layer-order space for these models.

        `experts` maps short names to paths, `merged` is the path of the study's merged model, `model_type` is of the
        base's config.json.

        Raises:
            ConfigError: with every problem; each names its key, such as "kinds" or "scales".
        """
        from evomerge._path_form import read_path_space

        return read_path_space(spec, base, experts, n_layers, model_type, merged, seed)

    # ---------------------------------------------------------------- genes and points

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods of its recipes."""
        return ("passthrough",)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The backbone if it is searched, then the encoding's genes."""
        names = self.ground.backbones
        backbone = (named(BACKBONE, names, names[0]),) if self.ground.searched else ()
        return (*backbone, *self.encoding.genes)

    @property
    def dim(self) -> int:
        """The number of genes."""
        return len(self.genes)

    @property
    def n_layers(self) -> int:
        """The number of layers of every source."""
        return self.ground.n_layers

    @property
    def wants_moments(self) -> bool:
        """True if scales are searched around the matched ones, which need measured moments."""
        return self.match and self.ground.scales is not None

    def start(self) -> dict[str, Natural]:
        """Return the natural values where a search starts: the identity path of the first backbone."""
        return {gene.name: gene.start for gene in self.genes}

    def starts(self) -> list[dict[str, Natural]]:
        """Return the natural values of each backbone's identity path."""
        return [self._identity(backbone) for backbone in self.ground.backbones]

    def _identity(self, backbone: str) -> Params:
        return self._with_backbone(self.encoding.start(backbone), backbone)

    def _with_backbone(self, params: Params, backbone: str) -> Params:
        return {BACKBONE: backbone, **params} if self.ground.searched else params

    def facts(self, workers: int = 1, evaluations: int | None = None) -> Facts:
        """Return what an optimizer may know of the cube: kinds of coordinates, and which belong together."""
        place = {gene.name: i for i, gene in enumerate(self.genes)}
        backbone = ((BACKBONE,),) if self.ground.searched else ()
        return Facts(
            cells=np.array([gene.cells for gene in self.genes], dtype=np.intp),
            categorical=np.array([gene.categorical for gene in self.genes], dtype=np.bool_),
            zero=None,
            experts=np.full(self.dim, -1, dtype=np.intp),
            levels=(Level("whole", np.eye(self.dim), np.zeros(self.dim)),),
            workers=workers,
            evaluations=evaluations,
            parts=tuple(tuple(place[name] for name in part) for part in (*backbone, *self.encoding.parts)),
            neutral=self.encode(self.start()),
            meaning=lambda x: self.path(self.decode(x)),
        )

    def decode(self, x: ArrayLike) -> dict[str, Natural]:
        """Return the natural values of a point `(dim,)`; coordinates outside [0, 1] are clipped.

        Raises:
            ValueError: a wrong shape or a NaN.
        """
        return natural_values(self.genes, x)

    def encode(self, params: Mapping[str, Natural]) -> Array:
        """Return the point `(dim,)` of natural values; decoding it gives the values back, rounded.

        Raises:
            ConfigError: missing or unknown genes, or values that the gene does not have.
        """
        check_values(self.genes, params)
        return np.array([gene.unit(params[gene.name]) for gene in self.genes])

    # ---------------------------------------------------------------- to a recipe

    def with_moments(self, moments: Mapping[str, Sequence[float]]) -> PathSpace:
        """Return the space with matched scales; `moments` has for each source (L + 1,) root mean squares.

        Raises:
            ConfigError: a source without moments, too few or too many, or some that are not positive numbers.
        """
        problems = []
        for name, _ in self.sources:
            found = moments.get(name, ())
            if len(found) != self.n_layers + 1:
                what = f"{len(found)} moments of the hidden state, not {self.n_layers + 1}"
                problems.append(Problem(what, name, "one before each layer, and one behind the last"))
            elif bad := [k for k, value in enumerate(found) if not (math.isfinite(value) and value > 0.0)]:
                what = f"the hidden state before layer {bad[0]} has the root mean square {found[bad[0]]!r}"
                problems.append(Problem(what, name, "`match: false` searches scales without measuring"))
        if problems:
            raise ConfigError.of(problems, "the moments")
        kept = tuple((name, tuple(float(v) for v in moments[name])) for name, _ in self.sources)
        return replace(self, moments=kept)

    def path(self, params: Mapping[str, Natural]) -> tuple[Step, ...]:
        """Return the path of natural values, with its final scales: 1 but at seams, where they have 6 digits.

        Raises:
            ConfigError: as `encode`.
        """
        check_values(self.genes, params)
        backbone = str(params.get(BACKBONE, self.ground.backbones[0]))
        found: list[Step] = []
        factor = 1.0
        for step in self.encoding.steps(params, backbone):
            before = found[-1] if found else None
            scale = 1.0
            if self.ground.scales is not None and is_seam(before, step):
                wanted = self._matched(before, step) * step.scale
                scale = float(f"{min(max(wanted, 1.0 / FARTHEST / factor), FARTHEST / factor):.5e}")
            factor *= scale
            found.append(replace(step, scale=scale))
        return tuple(found)

    def _matched(self, before: Step | None, step: Step) -> float:
        """Return the scale that gives a layer a state of the size that it reads in its own model."""
        moments = self._moments
        if not moments or not self.match:
            return 1.0
        given = moments[step.source][0] if before is None else moments[before.source][before.layer + 1]
        return moments[step.source][step.layer] / given

    @cached_property
    def _moments(self) -> dict[str, tuple[float, ...]]:
        return dict(self.moments)

    def recipe(self, params: Mapping[str, Natural]) -> Recipe:
        """Return the recipe of natural values.

        Raises:
            ConfigError: as `encode`.
        """
        where = dict(self.sources)
        path = self.path(params)
        slices = tuple(Slice((Source(where[step.source], (step.layer, step.layer + 1)),)) for step in path)
        # The base gives no weights here, but the tokenizer and the configuration, with which candidates are scored.
        plain = Recipe("passthrough", slices, self.base, out_dtype=self.out_dtype, compat="paper", seed=self.seed)
        return fold_scales(plain, [step.scale for step in path], self.model_type)

    # ---------------------------------------------------------------- from a recipe

    def point_of(self, recipe: Recipe) -> dict[str, Natural] | None:
        """Return natural values that make the model of `recipe`, or None if none are found.

        Found are paths without scales, but for edits that swap or share; and the known recipe of a source, task
        arithmetic with it alone at weight 1, which gives its identity path.
        """
        path = self._path_of(recipe)
        if path is None or (recipe.dtype, recipe.compat) != (None, "paper"):
            return None
        if recipe.out_dtype not in (None, self.out_dtype):
            return None
        for backbone in self.ground.backbones:
            read = self.encoding.read(path, backbone)
            if read is not None:
                params = self._with_backbone(read, backbone)
                mine = self.path(params)
                if [step.of for step in mine] == path and all(step.scale == 1.0 for step in mine):
                    return params
        return None

    def _path_of(self, recipe: Recipe) -> list[Layer] | None:
        """Return the layers of a passthrough recipe without scales, or of the source that a known recipe stands for."""
        names = {path: name for name, path in self.sources}
        sources = [piece.sources[0] for piece in recipe.slices]
        plain = not recipe.parameters and not any(piece.parameters for piece in recipe.slices)
        if recipe.method == "passthrough" and plain and not any(source.parameters for source in sources):
            ranges = [(names.get(s.model), range(*(s.layers or (0, self.n_layers)))) for s in sources]
            return [(name, d) for name, layers in ranges if name for d in layers] if all(n for n, _ in ranges) else None
        alone = self._alone(recipe) if recipe.method == "task_arithmetic" else None
        return None if alone not in dict(self.sources) else [(str(alone), d) for d in range(self.n_layers)]

    def _alone(self, recipe: Recipe) -> str | None:
        """Return the model that task arithmetic gives unchanged: an expert at weight 1, or the base."""
        fingerprint = recipe.fingerprint
        for name in ("base", *(name for name, _ in self.experts)):
            weights = {path: {"weight": float(expert == name)} for expert, path in self.experts}
            if Recipe.build("task_arithmetic", self.base, weights, seed=recipe.seed).fingerprint == fingerprint:
                return name
        return None
