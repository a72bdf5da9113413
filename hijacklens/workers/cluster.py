"""The cluster that workers run on: Ray on this machine, or a running cluster that is joined.

Ray is an optional extra (`pip install 'hijacklens[ray]'`), imported when it is needed.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hijacklens.errors import InputError

SECONDS = 8
"""Time for a cluster to answer."""
SETTINGS = b"\x04"
"""Type of the first frame that an HTTP/2 server sends; the type is a frame's fourth byte."""
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + b"\0\0\0\0\0"
"""What an HTTP/2 client, such as one of gRPC, sends first (RFC 9113)."""
USUAL_CPUS = 4
"""Default number of cores of a worker without a GPU."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The number of workers, and the resources of each."""

    workers: int
    cpus: float | int
    gpus: float | int


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """Run the body with a connection to a cluster; an existing connection stays open.

    Args:
        address: The address of a cluster to join, such as `auto` or `10.0.0.1:6379`. None for the
            cluster that this process has joined, or else for one on this machine, which ends with
            the body.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            "the engine ray needs the package ray, which is not installed. Install it with "
            "pip install 'hijacklens[ray]', or use the engine local."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
        quiet["include_dashboard"] = False
    named = address or os.environ.get("RAY_ADDRESS")
    try:
        if named and ":" in named:
            _require_grpc(named)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if named:
            raise InputError(
                f"no Ray cluster at {named!r} could be joined: {reason}. Start one with `ray start "
                "--head`, or leave out the address (and RAY_ADDRESS) for workers on this machine."
            ) from error
        raise InputError(
            f"Ray cannot be started on this machine: {reason}. Its files are in RAY_TMPDIR, or "
            "else in TMPDIR: name a folder with a short path that this user may write to, such as "
            "RAY_TMPDIR=/tmp."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_grpc(address: str) -> None:
    """Refuse an address where no gRPC server answers; Ray itself would wait for minutes.

    Raises:
        OSError, ValueError: Nothing listens there, or something else does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            connection.sendall(GREETING)
            if connection.recv(4)[3:] != SETTINGS:
                raise ConnectionError("another service than Ray listens there")


def allocate(
    nodes: Sequence[Mapping[str, Any]],
    *,
    workers: int | None = None,
    cpus: float | int | None = None,
    gpus: float | int | None = None,
) -> Allocation:
    """Decide how many workers there are, and which resources each has.

    Args:
        nodes: The machines, as `ray.nodes()` lists them.
        workers: Number of workers; by default as many as there is room for.
        cpus: Cores of each. By default one for a worker with a GPU, otherwise an equal part of the
            machine, or `USUAL_CPUS` if the number of workers is not given either.
        gpus: GPUs of each; by default one if the cluster has any.

    Raises:
        InputError: There is no room for them.

    >>> allocate([{"Alive": True, "Resources": {"CPU": 8.0}}], workers=2)
    Allocation(workers=2, cpus=4, gpus=0)
    >>> allocate([{"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}}])
    Allocation(workers=8, cpus=1, gpus=1)
    """
    for name, value, least in (("workers", workers, 1), ("cpus", cpus, 0), ("gpus", gpus, 0)):
        if value is not None and (value < least or not math.isfinite(value)):
            raise InputError(f"{name} must be at least {least}, not {value}.")
    rooms = [node["Resources"] for node in nodes if node["Alive"]]
    if gpus is None:
        gpus = 1 if any(room.get("GPU") for room in rooms) else 0
    if cpus is None:
        most = int(max((room.get("CPU", 0) for room in rooms), default=0))
        if gpus:
            cpus = 1
        elif workers is None:
            cpus = max(1, min(USUAL_CPUS, most))
        else:
            fitting = (c for c in range(most, 0, -1) if _room(rooms, c, gpus) >= workers)
            cpus = next(fitting, 1)
    if not cpus and not gpus:
        raise InputError("a worker needs part of a core or of a GPU; both are given as 0.")
    room = _room(rooms, cpus, gpus)
    if room < max(1, workers or 0):
        raise InputError(
            f"there is no room for {workers or 1} workers of {cpus:g} cores and {gpus:g} GPUs: the "
            f"cluster has {sum(part.get('CPU', 0) for part in rooms):g} cores and "
            f"{sum(part.get('GPU', 0) for part in rooms):g} GPUs on {len(rooms)} machines, enough "
            f"for {room}. Ask for fewer or smaller ones."
        )
    return Allocation(workers or room, cpus, gpus)


def _room(rooms: Sequence[Mapping[str, Any]], cpus: float | int, gpus: float | int) -> int:
    """Return how many workers fit, none of them spread over several machines."""
    sizes = [(name, size) for name, size in (("CPU", cpus), ("GPU", gpus)) if size]
    return sum(min(int(room.get(name, 0) / size + 1e-9) for name, size in sizes) for room in rooms)
