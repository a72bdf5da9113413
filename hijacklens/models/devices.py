"""The device that a model runs on, for language models and the one-layer model alike."""

from __future__ import annotations

from typing import Any

import torch

from hijacklens.errors import InputError, shown, whole_number


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


def device_of_model(device: str | torch.device | None, devices: int) -> torch.device:
    """Return the device of a model, or the first of several GPUs to spread it over.

    Raises:
        InputError: As for `choose_device`, or there are fewer GPUs.
    """
    count = torch.cuda.device_count()
    if whole_number("devices", devices, least=1) > max(count, 1):
        raise InputError(f"cannot spread the model over {devices} GPUs: this machine has {count}.")
    if device is not None and devices > 1:
        raise InputError("give either a device or a number of devices above 1, not both.")
    return choose_device(device)


def arithmetic(dtype: str | torch.dtype, device: torch.device) -> str:
    """Return the dtype and what lowers its precision: `float32`, `float32, matmul high`, ..."""
    notes = [str(dtype).removeprefix("torch.")]
    precision = _matmul_precision(device)
    if precision != "highest":
        notes.append(f"matmul {precision}")
    if torch.is_autocast_enabled(device.type):
        lower = torch.get_autocast_dtype(device.type)
        notes.append(f"autocast {str(lower).removeprefix('torch.')}")
    return ", ".join(notes)


def _matmul_precision(device: torch.device) -> str:
    """Return how float32 matrix products are rounded: `highest`, or the setting in its place."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the names of torch 2.9, which do not mix with this one
        backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        precision = str(backend.matmul.fp32_precision)
        return "highest" if precision in ("none", "ieee") else precision
