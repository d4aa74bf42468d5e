"""What a worker takes of a Ray node, and why a cluster cannot be joined, in words. Does not import ray."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import EnvironmentProblem

if TYPE_CHECKING:
    from evomerge.worker import WorkerSpec

REACH_S = 5.0  # how long a head's port may take to answer; Ray itself tries for two minutes, and then exits
GREET_S = 20.0  # ... and how long the head may take to say that it speaks HTTP/2, as gRPC does, on a busy machine
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, section 3.4: a client's first bytes, then its settings
SETTINGS = 4  # the type of that frame, in byte 3 of a frame's 9 bytes of header
STEPS = 10_000  # Ray counts shares of a GPU in this many parts


@dataclass(frozen=True)
class Need:
    """What one worker takes of its node: whole GPUs or a share of one, or else CPUs."""

    cpus: float
    gpus: float

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many workers a node with these resources has room for."""
        if self.gpus:
            gpus = int(resources.get("GPU", 0))
            # Shares of one GPU do not add up over two.
            return gpus * int(1 / self.gpus + 1e-9) if self.gpus < 1 else int(gpus / self.gpus)
        return int(resources.get("CPU", 0) / self.cpus)

    def __str__(self) -> str:
        count, unit = (self.gpus, "GPU") if self.gpus else (self.cpus, "CPU")
        return f"{count:.4g} {unit}" + ("s" if count > 1 else "")


def need_of(spec: WorkerSpec, nodes: Sequence[Mapping[str, float]], per_gpu: float) -> Need:
    """What a worker takes: a GPU if it is to have one, or if it may and the cluster has some; else its threads.

    Args:
        nodes: the resources of each node.
        per_gpu: workers per GPU; below 1, each has several.
    """
    if spec.device.startswith("cuda") or (spec.device == "auto" and any(n.get("GPU", 0) >= 1 for n in nodes)):
        gpus = math.floor(STEPS / per_gpu) / STEPS if per_gpu > 1 else float(round(1 / per_gpu))
        return Need(0.0, gpus)  # its one busy CPU waits for the GPU most of the time
    return Need(float(max(1, spec.threads)), 0.0)


def require_reachable(address: str) -> None:
    """Raise EnvironmentProblem if nothing answers at a cluster's address, or something that cannot be Ray's head.

    "auto" is what RAY_ADDRESS says, or else the cluster that was started last on this machine.
    """
    _require_token_file()
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _latest()
    if address.startswith("ray://"):
        raise EnvironmentProblem(
            f"{address} is an address of the Ray client, which evomerge does not use",
            hint="start the search on a node of the cluster, with `address: auto`",
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # Ray's own words for an address that is none will do
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S) as connection:
            greeted = _greets(connection)
    except (OSError, OverflowError) as error:
        raise EnvironmentProblem(
            f"cannot reach Ray at {address}: {error}",
            hint="is the head node up (`ray start --head`), and is this the address that it printed?",
        ) from None
    if not greeted:
        raise EnvironmentProblem(
            f"something answers at {address}, but not as the head of a Ray cluster",
            hint="is this the address that `ray start --head` printed? its port is 6379 if none was given",
        )


def _require_token_file() -> None:
    """Raise EnvironmentProblem for a token file that is not there: Ray would abort this process over it."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN") or not path:
        return
    try:
        empty = not Path(path).expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"RAY_AUTH_TOKEN_PATH is {path}, which cannot be read: {error}",
            hint="copy the cluster's token there, or leave the variable out: Ray then reads ~/.ray/auth_token",
        ) from None
    if empty:
        raise EnvironmentProblem(
            f"RAY_AUTH_TOKEN_PATH is {path}, which is empty", hint="copy the cluster's token there"
        )


def _greets(connection: socket.socket) -> bool:
    """Whether the other side answers a client of HTTP/2: Ray itself would wait minutes for one that does not."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return True  # it waits for a handshake first
    connection.settimeout(GREET_S)
    header = b""
    try:
        connection.sendall(PREFACE + bytes((0, 0, 0, SETTINGS, 0, 0, 0, 0, 0)))
        while len(header) < 9 and (more := connection.recv(9 - len(header))):
            header += more
    except OSError:  # it hung up, or said nothing
        return False
    return len(header) == 9 and header[3] == SETTINGS


def _latest() -> str:
    with contextlib.suppress(OSError):
        return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
    return ""


def explain(address: str, error: BaseException) -> EnvironmentProblem:
    """Ray's refusal of a connection as one message with the way out."""
    text = " ".join(str(error).split())
    if error.__cause__ is not None:  # Ray's last word is often no more than "failed to connect"
        text += ": " + " ".join(str(error.__cause__).split())
    low = text.lower()
    where = "on this machine" if address == "local" else f"at {address}"
    if "version mismatch" in low:
        hint = "install the same Ray and Python here as on the cluster (`ray --version`, `python --version`)"
        return EnvironmentProblem(f"Ray {where} has another version: {text[:500]}", hint)
    if "uthenticat" in low or "token" in low:
        hint = "give this process the cluster's token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
        return EnvironmentProblem(f"the Ray cluster {where} refused this process's token: {text[:300]}", hint)
    if "could not find any running ray" in low:
        hint = "start one with `ray start --head`, or leave out `address:` for Ray on this machine alone"
        return EnvironmentProblem("no Ray cluster is running that this machine knows of", hint)
    if isinstance(error, SystemExit):
        text = "its head did not come up in time" if address == "local" else "what answers there is no head that works"
    return EnvironmentProblem(f"cannot start Ray {where}: {text[:500]}", "does `ray status` work from here?")
