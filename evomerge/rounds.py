"""The parts in which the validation split is scored, so that most finalists are given up after a part of it.

The rounds of the final selection use growing shares of a seeded order of each objective's items. A candidate's scores
of a round are stored under that round's name, with all its items so far, and those of the last round as `validation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.fidelity import count_at, item_order, new_items, share_text
from evomerge.objectives import Objective, Scores

SHARES = (0.25, 0.5, 1.0)
FEWEST = 50  # items of every objective in the first round: fewer tell too little to give anybody up
WHOLE = "validation"
NAMES = tuple(WHOLE if share == 1.0 else f"{WHOLE}:{share_text(share)}" for share in SHARES)


@dataclass(frozen=True)
class Rounds:
    """Names of the rounds, and the items that each adds.

    Attributes:
        names: the last is `validation`; only that one if the split is too small, or nothing can be scored in parts.
        parts: per round, objective -> positions, ascending; None, in the first round, for one that has no parts.
        orders: objective -> order of its items, for those that have parts.
    """

    names: tuple[str, ...]
    parts: tuple[dict[str, list[int] | None], ...]
    orders: Mapping[str, np.ndarray]
    objectives: Mapping[str, Objective]

    @classmethod
    def of(cls, objectives: Sequence[Objective], seed: int) -> Rounds:
        """The rounds of a study."""
        sizes = {o.name: o.size(WHOLE) for o in objectives if o.partial}
        sizes = {name: n for name, n in sizes.items() if n > 1}
        shares = [s for s in SHARES if s == 1.0 or (sizes and min(sizes.values()) * s >= FEWEST)]
        orders = {name: item_order(seed, name, n) for name, n in sizes.items()}
        parts: list[dict[str, list[int] | None]] = []
        for index in range(len(shares)):
            part: dict[str, list[int] | None] = {n: new_items(o, shares, index).tolist() for n, o in orders.items()}
            part |= {o.name: None for o in objectives if o.name not in orders and index == 0}
            parts.append(part)
        names = tuple(NAMES[SHARES.index(share)] for share in shares)
        return cls(names, tuple(parts), orders, {o.name: o for o in objectives})

    def positions(self, name: str, round_name: str) -> np.ndarray:
        """Positions, ascending, of all items of an objective up to a round."""
        order = self.orders[name]
        return np.sort(order[: count_at(len(order), SHARES[NAMES.index(round_name)])])

    def part_of(self, whole: Mapping[str, Scores], round_name: str) -> dict[str, Scores]:
        """A round's scores from those of the whole split."""
        return {
            name: self.objectives[name].aggregate(scores.items[self.positions(name, round_name)])
            if name in self.orders
            else scores
            for name, scores in whole.items()
        }

    def joined(
        self, held: tuple[str, Mapping[str, Scores]], added: Mapping[str, Scores], round_name: str
    ) -> dict[str, Scores]:
        """A round's scores, from those up to an earlier round (its name and scores) and those of the items since."""
        earlier, before = held
        found = {}
        for name, scores in before.items():
            if name not in self.orders:
                found[name] = scores
                continue
            old, now = self.positions(name, earlier), self.positions(name, round_name)
            order = np.argsort(np.concatenate([old, np.setdiff1d(now, old)]), kind="stable")
            items = np.concatenate([scores.items, added[name].items])[order]
            found[name] = self.objectives[name].aggregate(items)
        return found
