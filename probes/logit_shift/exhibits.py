"""What a report shows of a traced fact, and of the average over many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hijacklens.results.exhibits import Drawing, Exhibit, Table, Text, Views

if TYPE_CHECKING:
    from probes.logit_shift.average import AverageShift
    from probes.logit_shift.result import ShiftAccount

VALUES = {"bare": "bare (logits)", "hijacked": "hijacked (logits)", "shift": "shift (logits)"}
MEANS = {"shift": "mean shift (logits)", "low": "95% low", "high": "95% high"}
HEADS = 8
"""That fit beside each other."""
READING = (
    "Parts above zero (red) push the answer towards the false target, those below (blue) towards "
    "the true one. The parts sum to the shift; the residual is what they miss."
)


def account_exhibits(account: ShiftAccount) -> list[Exhibit]:
    """The prompts, both maps, the attention of the heads that wrote most, and the parts."""
    fact = account.settings["fact"]
    asked = (
        f"“{account.prompt.text}” was asked of {account.settings['model']['name']}. Logit "
        f"{fact['target_false']!r} - {fact['target_true']!r} is {account.bare:+.3f} on the bare "
        f"query and {account.hijacked:+.3f} here: a shift of {account.shift:+.3f}, of which the "
        f"parts leave {account.residual:.1e}."
    )
    shown: list[Exhibit] = [
        Text("What was asked", (asked, READING)),
        Drawing("Shift by token and layer", account.plot(by=("token", "layer"))),
        Drawing("Shift by layer and head", account.plot(by=("layer", "head"))),
    ]
    if account.patterns is not None:
        from probes.attention.page import attention_views

        shown.append(
            Views(
                "Where the heads look",
                attention_views(account, top=HEADS),
                note="Rows attend to columns. Choose a head to see its pattern in full; numbers "
                "beside heads are their parts of the shift, in logits.",
            )
        )
    shown.append(
        Table("Parts by kind", account.summary(), file="account-summary.csv", labels=VALUES)
    )
    shown.append(
        Table(
            "Every part",
            account.table.sort_values("shift", key=abs, ascending=False, kind="stable"),
            note="The largest come first.",
            file="account.csv",
            filters=("kind", "span", "layer", "head"),
            labels=VALUES,
        )
    )
    return shown


def average_exhibits(average: AverageShift) -> list[Exhibit]:
    """Both maps, the sums by kind and span, every part, the facts and what was skipped."""
    shown: list[Exhibit] = [
        Text("How to read it", (READING, "Intervals are from a bootstrap over the facts.")),
        Drawing("Mean shift by span and layer", average.plot(by=("span", "layer"))),
        Drawing("Mean shift by layer and head", average.plot(by=("layer", "head"))),
        Table("Parts by kind", average.summary(), file="average-summary.csv", labels=MEANS),
        Table(
            "Every part",
            average.to_dataframe(),
            file="averages.csv",
            filters=("kind", "span", "layer", "head"),
            labels=MEANS,
        ),
        Table(
            "Facts",
            average.facts,
            note="Logit of the false target minus that of the true one; the residual is what the "
            "parts miss.",
            file="facts.csv",
            filters=("relation_id",),
            labels=VALUES,
            folded=True,
        ),
    ]
    if len(average.skipped):
        shown.append(
            Table("Facts that were skipped", average.skipped, file="skipped.csv", folded=True)
        )
    return shown
