"""How far a study is: counts, best scores, failures, the winner; and what running searches say of themselves."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from evomerge import front
from evomerge._study_reads import count_reasons, done_values
from evomerge.errors import StorageError
from evomerge.fidelity import share_text
from evomerge.gains import report
from evomerge.intervals import Spread
from evomerge.progress import Progress
from evomerge.rescore import feasible, floors_of, front_of, none_feasible, remarks
from evomerge.residency import show_bytes
from evomerge.search import oriented
from evomerge.selection import stored_winner
from evomerge.study import Candidate, Study

MANY = 5_000  # candidates: beyond, the status does not read them one by one
KNOWN = 256  # known recipes, on which constraints depend, are among so many first candidates
WATCH_S = 5.0  # between two glances
TELL_S = 60.0  # between two status lines in the database


class Teller:
    """Keeps a line on how a search goes in its study's database, where `evomerge status` finds it from any machine."""

    def __init__(self, study: Study, progress: Progress) -> None:
        self._study = study
        self._progress = progress
        self._told: float | None = None

    def turn(self, in_flight: int) -> None:
        """Renew the line if it is old; the next heartbeat, or the next write before it, takes it along."""
        now = time.monotonic()
        if self._told is None or now - self._told >= TELL_S:
            self._told = now
            self._study.lease.note = self._progress.status(in_flight)


def searches(study: Study) -> dict[str, str]:
    """Who searches the study now, and what each says of its search; without those who are known to have ended."""
    return {
        f"searched by {c.said(age).partition(' (')[0]}": f"{c.note or 'begins'} (seen {max(0.0, age):.0f} s ago)"
        for c, age in study.lease.controllers()
        if not c.is_gone
    }


def glance(study: Study) -> dict[str, Any]:
    """What `evomerge status --watch` shows; no candidate is read, however many there are."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"study": study.name, "at": now, **study.counts(), **(searches(study) or {"searched by": "nobody"})}


def watch_study(study: Study, show: Callable[[dict[str, Any]], None], every_s: float = WATCH_S) -> None:
    """Show a glance at the study again and again, until Ctrl-C; a database that is away for a while is waited for."""
    clear = sys.stdout.isatty()
    try:
        while True:
            try:
                shown = glance(study)
            except StorageError as error:
                print(f"note: {error.message}", file=sys.stderr)
            else:
                if clear:
                    print("\x1b[H\x1b[2J", end="")
                show(shown)
                sys.stdout.flush()
            time.sleep(every_s)
    except KeyboardInterrupt:
        return


def brief(study: Study, counts: dict[str, int]) -> dict[str, Any]:
    """The status of a study of very many candidates, from their values alone: what has to know them all is left out.

    The front's size is that of its distinct points.
    """
    numbers, own = study.look(done_values)
    status: dict[str, Any] = {"study": study.name, "candidates": sum(counts.values()), **counts}
    if len(numbers):
        ups = list(study.header.objectives.values())
        values = oriented(own, ups)
        able = front.at_least(values, floors_of(study, study.candidates(range(KNOWN))))
        kept = np.flatnonzero(able)
        points = values[kept][front.non_dominated(values[kept])] if len(kept) else values[kept]
        status["front"] = len(np.unique(points, axis=0))
        limits = study.header.identity.get("constraints")
        if limits:
            status["constraints"] = f"{'; '.join(limits)}: {len(kept)} of {len(numbers)} candidates meet them"
        among = kept if len(kept) else np.arange(len(numbers))
        for j, name in enumerate(study.header.objectives):
            best = among[np.argmax(values[among, j])]
            status[f"best {name}"] = f"{own[best, j]:.4f} (#{numbers[best]})"
    status |= {f"failed: {reason}": count for reason, count in study.look(count_reasons).items()}
    status["winner"] = f"not looked for among more than {MANY} candidates: `evomerge front` does"
    return status | searches(study)


def status_of(study: Study) -> dict[str, Any]:
    """Counts, best scores and the share of failures by reason; less of it for a study of very many candidates."""
    counts = study.counts()
    if sum(counts.values()) > MANY:
        return brief(study, counts)
    candidates = study.candidates()
    states = Counter(c.state for c in candidates)
    reasons = Counter(c.reason for c in candidates if c.state == "failed")
    able = {c.fingerprint for c in feasible(study, candidates)}
    scored = [c for c in candidates if c.values is not None]
    done = [c for c in scored if c.fingerprint in able] or scored
    status: dict[str, Any] = {
        "study": study.name,
        "candidates": len(candidates),
        **{state: states.get(state, 0) for state in ("done", "stopped", "running", "failed")},
        "front": len(front_of(study, candidates)),
    }
    limits = study.header.identity.get("constraints")
    if limits:
        kept = sum(c.fingerprint in able for c in scored)
        status["constraints"] = f"{'; '.join(limits)}: {kept} of {len(scored)} candidates meet them"
    status["duplicates"] = sum("same_as" in c.attrs for c in candidates)
    stops = Counter(share_text(c.attrs["share"]) for c in candidates if c.state == "stopped")
    for share, count in sorted(stops.items()):
        status[f"stopped at {share}"] = count
    rules = Counter(c.attrs.get("stop_rule") for c in candidates if c.state == "stopped")
    for rule in ("infeasible", "hopeless"):
        if rules[rule]:
            status[rule] = f"{rules[rule]} of those that were stopped"
    for reason, count in reasons.items():
        status[f"failed: {reason}"] = count
    for name, apart in (candidates[0].attrs.get("spreads", {}) if candidates else {}).items():
        status[f"not deterministic: {name}"] = str(Spread(**apart))
    for index, (name, up) in enumerate(study.header.objectives.items()):
        if done:
            best = (max if up else min)(done, key=lambda c: c.values[index] if c.values else 0.0)
            assert best.values is not None
            status[f"best {name}"] = f"{best.values[index]:.4f} (#{best.number})"
    if done:
        times = [c.attrs["t_merge_s"] + c.attrs["t_eval_s"] for c in done if "t_merge_s" in c.attrs]
        status["median seconds per candidate"] = round(sorted(times)[len(times) // 2], 3) if times else None
        latest = {c.attrs["worker"]: c.attrs["tables"] for c in done if c.attrs.get("tables")}
        if latest:
            status["tables"] = _tables(list(latest.values()))
            shared = [report for report in latest.values() if "prefix_saved" in report]
            if shared:
                saved = sum(r["prefix_saved"] * r["prefix_passes"] for r in shared)
                share = saved / max(1.0, sum(r["prefix_passes"] for r in shared))
                status["shared first layers"] = f"{share:.0%} of the layers not computed again"
    for number, remark in enumerate(remarks(study, candidates), start=1):
        status[f"note {number}"] = remark
    gains = _gains(study, candidates)
    first = {"verdict": gains.pop("verdict")} if "verdict" in gains else {}
    return first | status | searches(study) | gains


def _gains(study: Study, candidates: list[Candidate]) -> dict[str, Any]:
    """What the search added, the winner, and how much of its gain survived, as far as the stored scores say.

    The verdict comes first. Nothing is scored.
    """
    found = stored_winner(study, candidates)
    if found is None:
        none = none_feasible(study, candidates)
        if none:
            return {"verdict": none}
        waiting = "not known: finalists have no validation scores (`evomerge front --split test` makes them)"
        return {"winner": waiting} if any(c.state == "done" for c in candidates) else {}
    chosen, how = found
    gained = report(study, candidates, chosen)
    said: dict[str, Any] = {}
    if gained is not None and gained.verdict is not None:
        said["verdict"] = gained.verdict
    said["winner"] = f"#{chosen.number}, {how}"
    if gained is not None and not gained.is_baseline:
        said["best known recipe on search"] = gained.named_baseline
        said |= {f"gain, {row.name}": str(row) for row in gained.rows}
        said |= {f"test against {t.baseline.label}, {t.name}": str(t) for t in gained.tests}
    return said


def _tables(reports: list[dict[str, float]]) -> str:
    """What the workers' tables hold and cost, as of each worker's latest candidate."""
    fullest = max(reports, key=lambda report: report["bytes"])
    seconds, dropped = sum(r["seconds"] for r in reports), sum(r["dropped"] for r in reports)
    held, budget = show_bytes(fullest["bytes"]), show_bytes(fullest["budget_bytes"])
    return f"{held} of {budget} in the fullest worker; {seconds:.1f} s to make, {dropped:.0f} given up, all workers"
