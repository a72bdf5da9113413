"""The device that a model runs on, for language models and the one-layer model alike."""

from __future__ import annotations

import torch

from hijacklens.errors import InputError, shown


def choose_device(device: torch.device | str | None) -> torch.device:
    """Return the device of a name; by default a GPU if there is one, and the CPU otherwise.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or another that torch has here; None to choose.

    Raises:
        InputError: The name is not a device's, or this machine has no such device.
    """
    count = torch.cuda.device_count()
    if device is None:
        return torch.device("cuda" if count else "cpu")
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"unknown device {shown(device)}; allowed: cpu, cuda, cuda:N, mps, or no device to "
            "use a GPU if there is one."
        ) from error
    if result.type == "cuda" and (result.index or 0) >= count:
        raise InputError(
            f"device {str(result)!r} does not exist: this machine has {count} GPUs. Give cpu, or "
            "no device to use a GPU if there is one."
        )
    try:
        torch.empty(1, device=result).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # Keep the first sentence: torch may add a page about its builds.
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"device {str(result)!r} cannot be used here ({reason}). Give cpu, or no device "
            "to use a GPU if there is one."
        ) from error
    return result
