"""TODO."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

PACKAGES = ("hijacklens", "transformer-lens", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result came from: when, by which command, with which versions, at which commit."""

    created: str
    """UTC, ISO 8601."""
    command: str
    """The command line, or `python` for a notebook or script."""
    seed: int | None
    """The seed that the run was given, or None where nothing was drawn."""
    commit: str | None
    """Commit of the hijacklens checkout (`+` when it had changes), None when installed."""
    python: str
    platform: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, *, seed: int | None = None) -> Provenance:
        """The provenance of a result that is being made now, in this process."""
        program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        command = shlex.join([program, *sys.argv[1:]]) if program == "hijacklens" else "python"
        return cls(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command,
            seed=seed,
            commit=_commit(),
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            versions={name: _version(name) for name in PACKAGES},
        )


def provenance_from(record: Mapping[str, Any]) -> Provenance:
    """The provenance in the record of a saved result."""
    return Provenance(**record["provenance"])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
