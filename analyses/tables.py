"""Tables for a terminal: plain text, aligned, numbers to the digits that matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from hijacklens.scoring.efficacy import Rule
    from hijacklens.scoring.result import HijackResult


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: str = "") -> str:
    """Rows under a header, columns two spaces apart.

    Args:
        header: Column titles.
        rows: Cells as text.
        left: For each column `l` or `r`; all columns are left-aligned by default.
    """
    sides = left or "l" * len(header)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = (
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(cells, widths, sides, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in [header, *rows])


def share(value: float) -> str:
    """A share between 0 and 1 to three digits, without the zero in front.

    >>> share(0.25), share(1.0)
    ('.250', '1.000')
    """
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else f"{value:.3f}"


def hijack_tables(result: HijackResult, *, rule: Rule, known_only: bool = False) -> str:
    """The tables of a hijack run: one per model and scheme, a row per dose."""
    summary = result.summary(rule=rule, known_only=known_only)
    blocks = []
    source = result.settings["facts"]["name"]
    for key, group in summary.groupby(["model", "scheme"], sort=False):
        model, scheme = cast("tuple[str, str]", key)
        n = int(group["n"].iloc[0])
        what = "known facts" if known_only else "facts"
        title = f"{model} · {source}, {n} {what} · {scheme} · rule {rule}"
        rows = [
            (
                str(row["dose"]),
                f"{share(row['efficacy'])} "
                f"[{share(row['efficacy_low'])}, {share(row['efficacy_high'])}]",
                share(row["retention"]),
                str(row["ties"]),
                f"{row['mean_shift']:+.2f}" if row["dose"] else "0.00",
            )
            for row in group.to_dict("records")
        ]
        header = ("dose", "efficacy", "retention", "ties", "mean shift")
        blocks.append(f"{title}\n{table(header, rows, left='rllrr')}")
    return "\n\n".join(blocks)
