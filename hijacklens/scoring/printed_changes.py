"""The printed changes of a comparison: each column, with a note that says what it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hijacklens.results.glance import Glance, Grid
from hijacklens.scoring.matching import AXES

FRACTIONS = ("efficacy", "retention")


def glance_of(
    changes: Any,
    labels: Iterable[str],
    facts: int,
    *,
    by: str | Sequence[str] = "relation",
    correction: str = "holm",
    equivalence: float | None = None,
) -> Glance:
    """Return what a comparison shows of its `changes` under one rule, made with these options."""
    first = changes.iloc[0]
    words = [" -> ".join(labels)]
    columns: dict[str, str] = {}
    for axis in AXES[:3]:
        if changes[axis].nunique() > 1:
            columns[axis] = f"{{{axis}}}"
        elif "->" not in str(first[axis]):  # the labels say it
            words.append(f"dose {first[axis]}" if axis == "dose" else str(first[axis]))
    columns["measure"] = "{measure}"
    columns |= {name: f"{{{name}:>}}" for name in ("first", "second", "change")}
    if (changes["measure"] == "efficacy").sum() > 1:
        columns["gained, lost"] = "{gained}, {lost}"
        turned = "gained, lost: verdicts"
    else:
        turned = f"verdicts for the false target: {first['gained']} gained, {first['lost']} lost"
    corrected = "; no p is corrected"
    interval = "[{CLAIM_low}, {CLAIM_high}] p {CLAIM_p:.2g}"
    if correction != "none":
        corrected = f", then p corrected ({correction}) over {first['tests']} tests"
        interval += " ({CLAIM_p_corrected:.2g})"
    columns["these facts"] = interval.replace("CLAIM", "facts")
    notes = [
        f"{turned}; change = second - first; margin and shift in nats",
        "these facts: 95% t interval over facts (score interval if nearly all facts change "
        f"alike), p of McNemar's exact test (nats: t){corrected}",
    ]
    clusters = int(first["clusters"])
    if clusters > 1:
        columns["relations like these"] = interval.replace("CLAIM", "clustered")
        notes.append(
            f"relations like these: 95% t interval over {clusters} clusters (by "
            f"{by if isinstance(by, str) else ' x '.join(by)}); design effect up to "
            f"{changes['design_effect'].max():.1f}"
        )
    else:
        notes.append("these facts are one cluster: they say nothing about relations like these")
    if equivalence is not None:
        within = f"within ±{equivalence:g}"
        columns[within] = "{equivalent_p:.2g}"
        notes.append(
            f"{within}: p of a change of {equivalence:g} or more in relations like these (two "
            "one-sided score tests); a small p shows that the change is smaller"
            if clusters > 1
            else f"{within}: one cluster shows no equivalence"
        )
    return Glance(
        f"{' · '.join(words)} · {facts} facts · rule {first['rule']}",
        (Grid.of(map(_texts, changes.to_dict("records")), columns),),
        tuple(notes),
        steps=("changes()", "flips", "plot()", "save(folder)"),
    )


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write the numbers of a row of `changes`: fractions with three digits, nats with two."""
    digits = 3 if row["measure"] in FRACTIONS else 2
    ends = ("facts_low", "facts_high", "clustered_low", "clustered_high")
    texts = {name: f"{row[name]:.{digits}f}" for name in ("first", "second")}
    texts |= {name: f"{row[name]:+.{digits}f}" for name in ("change", *ends)}
    if digits == 3:
        texts = {name: re.sub(r"^([+-]?)0\.", r"\1.", text) for name, text in texts.items()}
    return {**row, **texts}
