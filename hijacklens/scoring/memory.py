"""Memory: how many tokens a batch may have, and what to do when that was too many."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None

SHARE = 0.5
"""Of the free memory, for the activations of a batch."""
TRUNK_SHARE = 0.125
"""Of the free memory, for the keys and values of a trunk."""
TRUNK_BYTES = {"cpu": 2**28, "cuda": 2**33}
"""At most so much for the keys and values of a trunk, by type of device."""
COPIES = 6
"""Copies of a residual stream, a hidden layer or a score that are alive at one time."""
_FULL = re.compile(r"not enough memory|can't allocate memory|out of memory|bad_?alloc", re.I)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken on a device, or None where nothing says how much.

    On a GPU that is what the driver has free and what torch holds unused; on a CPU what the
    system can give without swapping, inside the limit of a container.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    known = [value for value in (_available(), _container()) if value is not None]
    return min(known) if known else None


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: by torch on a GPU, by this process on a CPU.

    0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux gives a process the peak of the one that started it, except here.
    held = _field(Path("/proc/self/status"), "VmHWM:")
    if held is not None or resource is None:
        return held or 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def token_bytes(config: Any, dtype: torch.dtype, *, width: int) -> int:
    """Bytes that a token of a batch needs, its scores with `width` keys included."""
    inner = config.d_mlp or 4 * config.d_model
    scores = config.n_heads * width
    return COPIES * dtype.itemsize * (2 * config.d_model + inner + scores) + 4 * scores


def state_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, all layers."""
    heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    return 2 * config.n_layers * heads * config.d_head * dtype.itemsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_FULL.search(str(error)))


def _available() -> int | None:
    free = _field(Path("/proc/meminfo"), "MemAvailable:")
    if free is not None:
        return free
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not every system has them
        return None


def _field(path: Path, name: str) -> int | None:
    """Bytes that a file of Linux states in kB, or None where there is no such line."""
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, StopIteration):
        return None


def _container() -> int | None:
    """What a control group leaves, or None where none limits memory."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            folder = Path("/sys/fs/cgroup")
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return None
