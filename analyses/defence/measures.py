"""The measures of methods, from the scores of prompts: what they undo, and what they cost.

With v = 1 where the false target wins, and r = 1 where the true one does:

    undone     sum of (v hijacked - v hijacked with the method) / sum of (v hijacked - v bare)
    bare       mean of (r bare with the method - r bare)
    reverse    the same under schemes that lead to the true target, over facts and schemes
    answers    the same under a sentence that states the answer, over facts that are not known bare

A verdict with the method is compared with the verdict of the same fact without it. Intervals are
clustered by relation, except that of `answers`, whose few facts are the sample: it is about these
facts. Those of costs are score intervals (Tango 1998), within -1..1. `helpful` is the lesser of
`reverse` and `answers`; it is unknown if one of them is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from analyses.defence.decoding import PLACEBO
from hijacklens.errors import InputError
from hijacklens.statistics import (
    Interval,
    adjust,
    clustered,
    clustered_change,
    clustered_ratio,
    independent,
)

HELPFUL = ("do-not-think-true", "relation-true")
"""Schemes whose sentences help; the last one states the answer."""
LIMIT = 0.02
"""The largest loss of bare retention, and of the use of helpful contexts, that is accepted."""
HALF = 0.5
"""A method helps if it undoes at least this fraction of the rise in efficacy."""
BASELINES = ("nothing", "oracle")
"""Always run: what the other methods are measured against."""
COSTS = ("bare", "reverse", "answers")
LOSSES = ("bare_retention_change", "reverse", "answers")
"""The changes by which a method is judged: none may be a loss above `LIMIT`."""


def accepted(loss: Any) -> Any:
    """Return whether a loss is at most `LIMIT`, but for rounding."""
    return loss <= LIMIT + 1e-9


def measures(items: pd.DataFrame, schemes: Iterable[str]) -> pd.DataFrame:
    """Return a row per scheme and method of one model, on the facts that all methods have.

    Columns: `undone`, that of the `placebo`, and `p`; the change of `bare_retention` and of
    `helpful` contexts, each of `COSTS` with its interval and number of facts, and the tokens.
    A cost over less than two facts is missing.

    Raises:
        InputError: No fact has scores under a scheme.
    """
    index = ["scheme", "relation_id", "case_id"]
    margins = items.assign(margin=items["first_false"] - items["first_true"])
    margins = margins.pivot(index=index, columns=["dose", "method"], values="margin").dropna()
    bare, dosed = (margins[dose] for dose in sorted(items["dose"].unique()))
    costs = _costs(bare, dosed)
    tokens = items[items["dose"] > 0].pivot(index=index, columns="method", values="tokens")
    rows = []
    for scheme in schemes:
        if scheme not in margins.index:
            raise InputError(f"no fact can be scored with every method under the scheme {scheme}.")
        wins, before = dosed.loc[scheme] > 0, bare.loc[scheme]
        relations = independent(wins.index.get_level_values("relation_id"))[0]
        rise = wins["nothing"].astype(float) - (before["nothing"] > 0)
        total: Any = tokens.loc[scheme].loc[wins.index].sum()
        tested = []
        for method in items["method"].unique():
            undone = (wins["nothing"].astype(float) - wins[method]).to_numpy()
            retention = (before[method] < 0).mean()
            row = {"scheme": scheme, "method": method}
            found = clustered_ratio(undone, rise.to_numpy(), relations)
            if method in BASELINES:  # 0 and 1 by definition, whatever the facts are
                found = Interval(found.value, found.value, found.value)
            row |= found.columns("undone")
            row |= {
                "bare_retention": retention,
                "bare_retention_change": retention - (before["nothing"] < 0).mean(),
                "helpful_change": np.minimum(costs[method]["reverse"], costs[method]["answers"]),
                "tokens_ratio": total[method] / total["nothing"],
                "p": np.nan,
                "n": len(wins),
                "relations": wins.index.get_level_values("relation_id").nunique(),
                **costs[method],
            }
            if (placebo := f"{PLACEBO}{method}") in wins:
                gain = wins[placebo].astype(float) - wins[method]
                row["p"] = clustered(gain.to_numpy(), relations).p
            tested.append(row)
        table = pd.DataFrame(tested)
        table["placebo"] = (PLACEBO + table["method"]).map(table.set_index("method")["undone"])
        p = table["p"].dropna()
        table["p_corrected"] = pd.Series(adjust(p.to_numpy(), correction="holm"), index=p.index)
        rows.append(table)
    return pd.concat(rows, ignore_index=True)


def _costs(bare: Any, dosed: Any) -> dict[str, dict[str, float]]:
    """Return the costs of each method under the helpful schemes."""
    helpful = bare.index.get_level_values("scheme").isin(HELPFUL)
    bare, dosed = bare[helpful], dosed[helpful]
    stated = bare.index.get_level_values("scheme") == HELPFUL[-1]
    fact = ["relation_id", "case_id"]
    changes: dict[str, Any] = {
        name: (margins < 0).astype(float).sub((margins["nothing"] < 0).astype(float), axis=0)
        for name, margins in (("bare", bare), ("reverse", dosed))
    }
    changes["answers"] = changes["reverse"][stated & (bare["nothing"] >= 0)]
    changes = {name: change.groupby(fact).mean() for name, change in changes.items()}
    costs: dict[str, dict[str, float]] = {}
    for method in bare.columns:
        row = costs.setdefault(str(method), {})
        for name, change in changes.items():
            row |= {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
            if len(change) > 1:  # one fact bounds nothing
                # Unknown facts are few, of fewer relations: they are the sample themselves.
                relations = independent(change.index.get_level_values("relation_id"))[0]
                relations = np.arange(len(change)) if name == "answers" else relations
                row |= clustered_change(change[method].to_numpy(), relations).columns(name)
            row[f"{name}_n"] = len(change)
    return costs


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per model and method that is no baseline or placebo, the nearest ones first.

    `undone` is the least over the schemes, `loss` the largest of `LOSSES`; both are missing if a
    part of them is `unmeasured`. A method `fails` what was measured: to undo at least `HALF`, to
    lose at most `LIMIT`, to undo significantly more than its placebo, under every scheme. It
    `helps` if everything was measured and it fails nothing.
    """
    rows = []
    groups: Any = table.groupby(["model", "method"], sort=False)
    for (model, method), own in groups:
        if method in BASELINES or method.startswith(PLACEBO):
            continue
        known = np.isfinite(own["undone_low"])
        changes = own[[*LOSSES]].min()
        missing = _unmeasured(own)
        undone, loss = own["undone"].where(known), max(0.0, -changes.min())
        beaten = (own["undone"] > own["placebo"]) & (own["p_corrected"] < 0.05)
        failed = {
            "half": (undone < HALF).any(),
            "loss": not accepted(loss),
            "placebo": (known & ~beaten).any(),
        }
        least = undone.min(skipna=False)
        short = max(HALF - least, 0) + max(loss - LIMIT, 0) if least == least else np.inf
        row = {"short": short, "model": model, "method": method, "undone": least}
        row |= {
            "loss": loss if changes.notna().all() else np.nan,
            "placebo_beaten": f"{beaten.sum()}/{len(own)}",
            "fails": ", ".join(name for name, each in failed.items() if each),
            "unmeasured": missing,
        }
        rows.append(row | {"helps": not row["fails"] and not missing})
    columns = ["short", "model", "method", "undone", "loss", "placebo_beaten", "fails"]
    found = pd.DataFrame(rows, columns=[*columns, "unmeasured", "helps"])
    found = found.sort_values("short", kind="stable")
    return found.drop(columns="short").reset_index(drop=True)


def _unmeasured(own: pd.DataFrame) -> str:
    """Return which measures of a method have too few facts, or no rise, and how many facts."""
    open_ends = own[~np.isfinite(own["undone_low"])]
    parts = [f"undone under {row.scheme} ({row.n} facts)" for row in open_ends.itertuples()]
    first = own.iloc[0]
    parts += [f"{name} ({first[f'{name}_n']} facts)" for name in COSTS[1:] if np.isnan(first[name])]
    return ", ".join(parts)
