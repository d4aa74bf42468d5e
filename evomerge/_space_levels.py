"""What an optimizer may know of a space: kinds of coordinates, the base's point, and the nested spaces inside it.

A level ties genes to each other in the unit cube, or holds them fixed. Coarse to fine:

    model      one coordinate per parameter and expert; choices, and what the start's method does not take, are fixed
    operator   the same, and every choice is free (in spaces that have choices)
    groups     one per parameter, expert, component and block of depth, of which there are at most 4
    smooth     groups, and up to 3 cosines over depth per parameter, expert and component (for more than 4 depths)
    layers     every gene (`whole` in spaces without layer groups)

A depth is a layer group, or a control point of a curve. Each level adds coordinates to the one before and takes none
away, so its points are points of all that follow. Levels that add nothing are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evomerge._space_genes import METHOD, Slot
from evomerge._space_methods import method_named
from evomerge.optimizers import Facts, Level

if TYPE_CHECKING:
    from evomerge.space import SearchSpace

Array = NDArray[np.float64]
BLOCKS = 4
WAVES = 3
SMOOTH = "smooth"
AMPLITUDE = 0.25  # of a cosine, in the unit cube
WEIGHT = "weight"
NEUTRAL = (WEIGHT, "lambda", "t")  # each of them, at 0, gives the base in every method that needs a base and has it


def space_facts(space: SearchSpace, workers: int, evaluations: int | None) -> Facts:
    """Return the facts of a space. Only weights have an expert: a density per expert concerns all."""
    weighs = [slot.expert if slot.param == WEIGHT and slot.expert is not None else -1 for slot in space.slots]
    return Facts(
        cells=np.array([gene.cells for gene in space.genes], dtype=np.intp),
        categorical=np.array([gene.categorical for gene in space.genes], dtype=np.bool_),
        zero=_zero(space),
        experts=np.array(weighs, dtype=np.intp),
        levels=_levels(space),
        workers=workers,
        evaluations=evaluations,
    )


def _zero(space: SearchSpace) -> Array | None:
    """Return the point of the unmerged base: every weight (or lambda, or t) at 0, lines flat, all else at the start."""
    method = method_named(space.methods[0])
    for neutral in NEUTRAL:
        genes = [gene for gene, slot in zip(space.genes, space.slots, strict=True) if slot.param == neutral]
        known = method.needs_base and method.parameter(neutral) is not None
        if known and genes and all(gene.holds(0.0) for gene in genes):
            zero = space.encode(space.start() | {gene.name: 0.0 for gene in genes})
            for i, rise in _flat(space).items():
                zero[i] = rise  # a line that starts bent would keep the point out of the coarsest level
            return zero
    return None


def _levels(space: SearchSpace) -> tuple[Level, ...]:
    """Return the nested levels, coarse to fine; the last is the whole cube."""
    start = dict(enumerate(space.encode(space.start()).tolist()))
    flat = _flat(space)
    taken = {METHOD, *space.parameters_of(space.methods[0])}
    closed = {
        i: start[i]
        for i, (gene, slot) in enumerate(zip(space.genes, space.slots, strict=True))
        if gene.categorical or slot.param not in taken
    }
    groups = _tied("groups", space.slots, lambda slot: _block(space, slot), {})
    found = [
        _tied("model", space.slots, lambda slot: _whole_model(space, slot), flat | closed),
        _tied("operator", space.slots, lambda slot: _whole_model(space, slot), flat),
        groups,
        _smooth(space, groups),
    ]
    sizes = [0, *(level.dim for level in found)]
    kept = [level for level, size in zip(found, sizes[:-1], strict=True) if size < level.dim]
    layered = any(slot.group is not None for slot in space.slots)
    same = [level.name for level in kept if level.dim == space.dim and level.name != SMOOTH]
    name = same[0] if same else "layers" if layered else "whole"
    whole = Level(name, np.eye(space.dim), np.zeros(space.dim))
    return (*(level for level in kept if level.dim < space.dim), whole)


def _tied(name: str, slots: Collection[Slot], key: Callable[[Slot], Hashable], fixed: Mapping[int, float]) -> Level:
    """Return a level with one coordinate per key, shared by the genes that have it, and some genes fixed."""
    keys = [None if i in fixed else key(slot) for i, slot in enumerate(slots)]
    places = {each: place for place, each in enumerate(dict.fromkeys(k for k in keys if k is not None))}
    matrix = np.zeros((len(keys), len(places)))
    origin = np.zeros(len(keys))
    for i, each in enumerate(keys):
        if each is None:
            origin[i] = fixed[i]
        else:
            matrix[i, places[each]] = 1.0
    return Level(name, matrix, origin)


def _smooth(space: SearchSpace, groups: Level) -> Level:
    """Return `groups` with cosines over depth added, each 0 at z = 0.5.

    A cosine that the blocks and the cosines before it can express already is left out: points stay unique.
    """
    families: dict[Hashable, list[int]] = {}
    for i, (gene, slot) in enumerate(zip(space.genes, space.slots, strict=True)):
        if not gene.choices and not gene.whole and _depth(space, slot) is not None:
            families.setdefault((slot.param, slot.expert, slot.component), []).append(i)
    columns = []
    for members in families.values():
        depths = np.array([_depth(space, space.slots[i]) for i in members])
        basis = groups.matrix[members][:, groups.matrix[members].any(axis=0)]
        for wave in range(1, WAVES + 1):
            cosine = np.cos(np.pi * wave * depths)
            wider = np.column_stack([basis, cosine])
            if np.linalg.matrix_rank(wider) > np.linalg.matrix_rank(basis):
                basis = wider
                column = np.zeros(space.dim)
                column[members] = 2.0 * AMPLITUDE * cosine
                columns.append(column)
    if not columns:
        return groups
    added = np.column_stack(columns)
    return Level(SMOOTH, np.hstack([groups.matrix, added]), groups.origin - 0.5 * added.sum(axis=1))


# ------------------------------------------------------------------------------------- what is tied


def _whole_model(space: SearchSpace, slot: Slot) -> Hashable:
    return slot.param, slot.expert, _rises(space, slot)


def _block(space: SearchSpace, slot: Slot) -> Hashable:
    place, count = slot.group, len(space.groups)
    if _form(space, slot) == "curve":
        place, count = slot.point, _points(space, slot)
    block = None if place is None else place * BLOCKS // count if count > BLOCKS else place
    return slot.param, slot.expert, slot.component, _rises(space, slot), block


def _depth(space: SearchSpace, slot: Slot) -> float | None:
    """Return where a gene lies between the first layer and the last, in [0, 1], if it lies anywhere."""
    if slot.group is not None:
        return sum(space.groups[slot.group]) / 2 / space.n_layers
    if slot.point is not None and _form(space, slot) == "curve":
        return slot.point / (_points(space, slot) - 1)
    return None


def _flat(space: SearchSpace) -> dict[int, float]:
    """Return the rise of every line as it is where the line is flat."""
    pairs = enumerate(zip(space.genes, space.slots, strict=True))
    return {i: gene.unit(0.0) for i, (gene, slot) in pairs if _rises(space, slot) and gene.holds(0.0)}


def _rises(space: SearchSpace, slot: Slot) -> bool:
    """True for the beta of a line."""
    return slot.point == 1 and _form(space, slot) == "line"


def _form(space: SearchSpace, slot: Slot) -> str:
    return next((how.form for how in space.searched if how.param == slot.param), "value")


def _points(space: SearchSpace, slot: Slot) -> int:
    return next(how.points for how in space.searched if how.param == slot.param)
