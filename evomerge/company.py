"""The other controllers of a study, as one of them sees them: their results, their candidates, and their deaths.

Several processes may search one study. Each keeps its own optimizer, and tells it the results of all in the one order
in which they ended, which the database fixes. Nobody else is asked or waited for; what a dead one ran is taken over.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from evomerge.study import Candidate, Study

LOOK_S = 5.0  # between two looks at what others run
SYNC_S = 1.0  # between two looks at what they have ended, while nothing of one's own ends


class Company:
    """Reads a study on behalf of one search.

    Attributes:
        others: number -> candidate that another controller runs, as of the last look.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._arrivals = 0
        self._synced = self._looked = time.monotonic()
        self.others: dict[int, Candidate] = {}

    @property
    def is_due(self) -> bool:
        """Whether it is time to look at what has ended."""
        return time.monotonic() - self._synced >= SYNC_S

    def ended(self) -> list[Candidate]:
        """Candidates that have ended since the last call, whoever ran them, in the order of their ends."""
        found = self._study.ended_since(self._arrivals)
        self._synced = time.monotonic()
        if found:
            self._arrivals = (found[-1].arrival or 0) + 1
        for candidate in found:
            self.others.pop(candidate.number, None)
        return found

    def own(self) -> list[Candidate]:
        """The running candidates that belong to this controller: those that it took up with the study."""
        fence = self._study.lease.fence
        running = self._study.running()
        self.others = {c.number: c for c in running if c.owner != fence}
        return [c for c in running if c.owner == fence]

    def is_alone(self) -> bool:
        """Whether no other controller runs anything: all results are in the study."""
        self.own()
        return not self.others

    def adopted(self, mine: Collection[int]) -> list[Candidate]:
        """Candidates of controllers that have died since the last look, now this one's; mostly too early for a look.

        Args:
            mine: the numbers of the candidates that this controller runs.
        """
        if time.monotonic() - self._looked < LOOK_S:
            return []
        self._looked = time.monotonic()
        self.own()
        if not self.others:
            return []
        taken = self._study.adopt()
        for candidate in taken:
            self.others.pop(candidate.number, None)
        return [c for c in taken if c.number not in mine]
