"""Memory of a device: what is free, what was used, and whether an error says that it ran out."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows does not have it
    resource = None

_OUT_OF_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|out of memory|bad_?alloc", re.I
)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, or None if it is unknown.

    On a GPU it is what the driver has free and what torch holds unused; on a CPU what the system
    can provide without swapping, within the limit of a container.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [value for value in (_available(), _container()) if value is not None]
    return min(known) if known else None


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of torch on a GPU, of this process on a CPU; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux, getrusage reports the peak of the parent process if that was higher.
    peak = _field(Path("/proc/self/status"), "VmHWM:")
    if peak is not None or resource is None:
        return peak or 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _available() -> int | None:
    free = _field(Path("/proc/meminfo"), "MemAvailable:")
    if free is not None:
        return free
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not every system has them
        return None


def _field(path: Path, name: str) -> int | None:
    """Return the bytes that a file of Linux states in kB, or None if it has no such line."""
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, StopIteration):
        return None


def _container() -> int | None:
    """Return what the control group leaves, or None if it does not limit memory."""
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return None
