"""Tables for a terminal: plain text, aligned, numbers to the digits that matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hijacklens.results.glance import interval, share, table

if TYPE_CHECKING:
    from hijacklens.scoring.efficacy import Rule
    from hijacklens.scoring.result import HijackResult


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
                interval(row["efficacy"], row["efficacy_low"], row["efficacy_high"]),
                share(row["retention"]),
                str(row["ties"]),
                f"{row['mean_shift']:+.2f}" if row["dose"] else "0.00",
            )
            for row in group.to_dict("records")
        ]
        header = ("dose", "efficacy", "retention", "ties", "mean shift")
        blocks.append(f"{title}\n{table(header, rows, left='rllrr')}")
    return "\n\n".join(blocks)
