"""Provenance: when and by which command, versions and commit a result was made."""

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

PACKAGES = ("hijacklens", "transformer-lens", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result came from: when, by which command, with which versions, at which commit."""

    created: str
    """UTC, ISO 8601."""
    command: str
    """The command line; `python` for a notebook or script."""
    seed: int | None
    """The seed of the run; None if nothing was drawn."""
    commit: str | None
    """Commit of the hijacklens checkout, with a `+` if it had changes; None if installed."""
    python: str
    platform: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, *, seed: int | None = None) -> Provenance:
        """Return the provenance of a result that is made now, in this process."""
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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
