"""The state of a long run on disk, in one file that names the run it belongs to.

A checkpoint is a safetensors file with the tensors of the state and, in its header, the
configuration of the run as JSON. It is written under another name and then renamed, so that a kill
at any moment leaves the last complete state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.files import write_whole

FILE = "checkpoint.safetensors"
KIND = "hijacklens checkpoint"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The checkpoint of a run in a folder that exists."""

    folder: Path
    configuration: Mapping[str, Any]
    """The settings of the run, ready for JSON: only a run with the same settings resumes."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.folder / FILE

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the last state by this one."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        header = {"kind": KIND, "configuration": json.dumps(self.configuration)}
        write_whole(self.path, lambda part: part.write_bytes(save(tensors, metadata=header)))

    def load(self) -> dict[str, Tensor] | None:
        """Return the last state, on the CPU; None if there is none.

        Raises:
            InputError: The file cannot be read, or belongs to a run with another configuration.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            other = json.loads(header["configuration"])
            if header["kind"] != KIND:
                raise ValueError(f"it says it is {header['kind']!r}")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.path} is not a checkpoint that can be read ({error}). Delete it or pass "
                "overwrite=True (--overwrite on the command line) to start from scratch."
            ) from error
        # Through JSON, so that tuples and lists compare equal.
        here = json.loads(json.dumps(self.configuration))
        differ = sorted(k for k in {*here, *other} if here.get(k) != other.get(k))
        if differ:
            changes = "; ".join(f"{k} is {here.get(k)!r}, there {other.get(k)!r}" for k in differ)
            raise InputError(
                f"{str(self.folder)!r} contains the unfinished run of another command "
                f"({changes}). Repeat that command to resume it, choose another folder, or pass "
                "overwrite=True (--overwrite on the command line) to start from scratch."
            )
        return state

    def remove(self) -> None:
        """Delete the checkpoint and any file that a kill left half-written."""
        for path in [self.path, *self.folder.glob(f".part*-{FILE}")]:
            path.unlink(missing_ok=True)
