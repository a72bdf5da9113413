"""Progress bars of long work: the amount done, the rate, and the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def bar(total: float | int, *, unit: str, label: str, quiet: bool = False) -> tqdm[Any]:
    """Return a progress bar for a terminal or a notebook; use it as a context manager.

    It shows the rate in `unit` per second and the time left. It writes to standard error, so that
    standard output holds only results. In a log or pipe it writes a line every half minute. `unit`
    is a plural, such as `"facts"`; `update` takes fractions of a unit.
    """
    rarely = {"mininterval": 30, "delay": 30, "leave": False, "file": Lines()}
    drawing: Any = {"mininterval": 0.2} if watched() else rarely
    # Not `total_fmt`: whole units are easier to read than "37.25/412".
    count = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} "
    return Bar(
        total=total,
        unit=f" {unit}",
        desc=label,
        disable=quiet,
        bar_format=f"{count}{unit} [{{elapsed}}<{{remaining}}, {{rate_noinv_fmt}}{{postfix}}]",
        **drawing,
    )


class Bar(tqdm):
    """A progress bar that ends at its total, although fractions do not sum to it exactly."""

    def update(self, n: float | None = 1) -> bool | None:
        """Add an amount, up to the total."""
        return super().update(min(n or 0, self.total - self.n))


class Lines:
    """Standard error for a progress bar in a log: every state of the bar is a line."""

    def write(self, text: str) -> None:
        """Write a state of the bar, without the codes that move a cursor."""
        if state := text.replace("\x1b[A", "").strip():
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        """Write what is buffered."""
        sys.stderr.flush()


def watched() -> bool:
    """Return whether standard error is shown in a terminal or in the cell of a notebook."""
    shell = sys.modules.get("IPython")
    kernel = getattr(shell.get_ipython(), "kernel", None) if shell else None
    return kernel is not None or sys.stderr.isatty()
