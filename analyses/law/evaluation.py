"""How well laws predict shifts and flips of facts that they were not fitted on.

Every law is fitted on some relations and predicts the others:

    relations     same model and scheme, the first dose
    all doses     same model and scheme, all doses above 0
    later doses   the fact's own shift at the first dose is known (`Law.given_first`)
    schemes       fitted under one scheme, for another one: scheme and relation are new
    models        fitted on one model, for another one: model and relation are new

R squared is 1 - sum (shift - predicted)^2 / sum (shift - mean)^2. AUC, calibration error and Brier
score are of flips among known facts (m_0 < 0). The probability that the false target wins is that
of m_k > 0, if errors are normal with the deviation of the training residuals. Each row's influence
on a measure (for AUC: DeLong 1988, Obuchowski 1997) gives its interval clustered by relation, and
that of paired differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import norm, rankdata

from analyses.law.laws import LAWS, Law, LawRecord, folds
from hijacklens.errors import InputError, whole_number
from hijacklens.progress import bar
from hijacklens.statistics import Estimate, adjust, clustered, clustered_fraction

SPLITS = ("relations", "all doses", "later doses", "schemes", "models")
CELL = ("split", "model", "scheme", "fitted_on")
"""What was predicted: `fitted_on` is the other scheme or model, if there is one."""
FACT = ("model", "scheme", "case_id", "relation_id", "dose", "prior", "shift")
BINS = 10
"""Bins of equal width of the expected calibration error."""


def predictions(
    table: pd.DataFrame,
    *,
    laws: Sequence[Law] = LAWS,
    count: int = 10,
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    quiet: bool = False,
) -> pd.DataFrame:
    """Return a row per law, split and fact: `predicted`, and the `probability` of the false target.

    Args:
        table: The columns of `analyses.law.measured`.
        laws: The laws.
        count: Folds, each of whole relations.
        seed: Seeds the folds.
        splits: Some of `SPLITS`; those without data are left out.
        quiet: Draw no progress bar.

    Raises:
        InputError: There are fewer than two folds, or relations of a model and scheme.
    """
    whole_number("folds", count, least=2)
    if table.groupby(["model", "scheme"])["relation_id"].nunique().max() < 2:
        raise InputError("a law is tested on relations that it has not seen; give at least two.")
    fold = folds(table["relation_id"].to_numpy(), count, seed=seed)
    parts: list[pd.DataFrame] = []
    with bar(fold.max() + 1, unit="folds", label="laws", quiet=quiet) as progress:
        for held in range(fold.max() + 1):
            for split, other, train, test in _splits(table[fold != held], table[fold == held]):
                if split not in splits or test.empty:
                    continue
                chosen = laws
                if split == "later doses":
                    chosen = [law.given_first() for law in laws if law.grows or not law.needs]
                parts += [_predicted(law, split, other, train, test) for law in chosen]
            progress.update(1)
    return pd.concat(parts, ignore_index=True)


def _splits(seen: Any, new: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield each split of a fold: its name, what it was fitted on, training and test rows."""
    for (model, scheme), train in seen.groupby(["model", "scheme"], sort=False):
        first, start = train["dose"].min(), new[new["dose"] == train["dose"].min()]
        at_first = train[train["dose"] == first]
        here, same = start["model"] == model, start["scheme"] == scheme
        yield "relations", "", at_first, start[here & same]
        yield "schemes", scheme, at_first, start[here & ~same]
        yield "models", model, at_first, start[~here & same]
        test = new[(new["model"] == model) & (new["scheme"] == scheme)]
        if (train["dose"] > first).any():
            yield "all doses", "", train, test
            yield "later doses", "", _with_first(train, first), _with_first(test, first)


def _with_first(rows: Any, first: int) -> pd.DataFrame:
    """Return the rows of later doses with the fact's shift at the first dose, if it has one."""
    own = rows[rows["dose"] == first].set_index("case_id")["shift"]
    later = rows[rows["dose"] > first]
    later = later.assign(first=later["case_id"].map(own), first_dose=first)
    return later.dropna(subset=["first"])


def _predicted(law: Law, split: str, other: str, train: Any, test: Any) -> pd.DataFrame:
    fitted = law.fit(train)
    shift = fitted.predict(test)
    deviation = np.sqrt(np.mean((train["shift"] - fitted.predict(train)) ** 2))
    chance = norm.cdf((test["prior"] + shift) / max(deviation, 1e-9))
    new = {"law": law.name, "split": split, "fitted_on": other}
    return test[list(FACT)].assign(**new, predicted=shift, probability=chance)


def influences(rows: pd.DataFrame) -> dict[str, Float[np.ndarray, " row"]]:
    """Return for `r2`, `auc` and `brier` a number per row, whose mean over the rows is the measure.

    To first order, the variance of that mean over relations is that of the measure. Where known
    facts all flip, or none does, AUC is `nan`.
    """
    shift, predicted, prior, chance = (
        rows[name].to_numpy(float) for name in ("shift", "predicted", "prior", "probability")
    )
    total, error = (shift - shift.mean()) ** 2, (shift - predicted) ** 2
    scale = total.mean() or np.nan
    r2 = 1 - error.mean() / scale
    known, flipped = prior < 0, prior + shift > 0
    square = np.where(known, (chance - flipped) ** 2, np.nan)
    brier = np.full(len(rows), np.nanmean(square) if known.any() else np.nan)
    brier += np.nan_to_num(square - brier) * len(rows) / max(known.sum(), 1)
    yes, no, score = known & flipped, known & ~flipped, prior + predicted
    auc = np.full(len(rows), np.nan)
    if yes.any() and no.any():
        ranks = rankdata(np.r_[score[yes], score[no]])
        above = (ranks[: yes.sum()] - rankdata(score[yes])) / no.sum()
        below = 1 - (ranks[yes.sum() :] - rankdata(score[no])) / yes.sum()
        auc[:] = above.mean()
        auc[yes] += (above - above.mean()) * len(rows) / yes.sum()
        auc[no] += (below - above.mean()) * len(rows) / no.sum()
    return {"r2": r2 + (total - error - r2 * total) / scale, "auc": auc, "brier": brier}


def calibration(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per bin of the predicted probability over known facts.

    Columns: the mean `probability`, the fraction that `flipped`, and the number `n`.
    """
    known: Any = rows[rows["prior"] < 0]
    bins = np.minimum((known["probability"] * BINS).astype(int), BINS - 1)
    flipped = (known["prior"] + known["shift"] > 0).astype(float)
    grouped: Any = known.assign(flipped=flipped).groupby(bins)[["probability", "flipped"]]
    return grouped.mean().assign(n=grouped.size()).reset_index(drop=True)


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of laws: a row per law and cell (`CELL`).

    Columns: `n` rows, their `relations`, how many are `known`; `r2` and `auc` with 95% intervals
    clustered by relation, within what they can be; `ece` (expected calibration error) and `brier`
    of flips; `bias`, the predicted minus the measured fraction of facts whose false target wins.
    """
    found = []
    for key, rows in _cells(table, ("law", *CELL)):
        influence, relation, bins = (
            influences(rows),
            rows["relation_id"].to_numpy(),
            calibration(rows),
        )
        wins = [(rows["prior"] + rows[name] > 0).mean() for name in ("predicted", "shift")]
        off = (bins["n"] * (bins["probability"] - bins["flipped"]).abs()).sum()
        sizes = {"n": len(rows), "relations": len(set(relation)), "known": int(bins["n"].sum())}
        sizes |= clustered(influence["r2"], relation).within(-np.inf, 1.0).columns("r2")
        sizes |= _auc(rows, influence["auc"]).columns("auc")
        known = sizes["known"] or np.nan  # without a known fact there is no measure of flips
        rest = {"ece": off / known, "brier": influence["brier"].mean()}
        found.append(key | sizes | rest | {"bias": wins[0] - wins[1]})
    return pd.DataFrame(found)


def _auc(rows: pd.DataFrame, influence: np.ndarray) -> Estimate:
    """Return AUC with its interval, within 0..1.

    At 0 or 1 no fact has an influence. Then it is the interval of a fraction of the rarer facts,
    those that flip or those that do not.
    """
    found = clustered(influence, rows["relation_id"].to_numpy())
    if found.error:
        return found.within(0.0, 1.0)
    known: Any = rows[rows["prior"] < 0]
    flipped = known["prior"] + known["shift"] > 0
    rarer = known[flipped == (flipped.mean() <= 0.5)]
    return clustered_fraction(np.full(len(rarer), found.value), rarer["relation_id"].to_numpy())


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per cell, measure and pair of laws: `other` minus `reference`.

    Columns: the `difference` with its paired 95% interval clustered by relation, within what it can
    be, and `p`, corrected by Holm over the pairs of a cell and measure.
    """
    found: list[dict[str, Any]] = []
    for key, rows in _cells(table, CELL):
        parts = {law: part.sort_values(["case_id", "dose"]) for law, part in rows.groupby("law")}
        values = {law: influences(part) for law, part in parts.items()}
        relation = next(iter(parts.values()))["relation_id"].to_numpy()
        pairs = list(combinations(rows["law"].unique(), 2))
        for measure, most in (("r2", np.inf), ("auc", 1.0), ("brier", 1.0)) if pairs else ():
            changes = [
                clustered(values[b][measure] - values[a][measure], relation).within(-most, most)
                for a, b in pairs
            ]
            corrected = adjust(
                np.nan_to_num([each.p for each in changes], nan=1.0), correction="holm"
            )
            for (a, b), change, p in zip(pairs, changes, corrected, strict=True):
                names = {"measure": measure, "reference": a, "other": b}
                found.append(key | names | change.columns("difference") | {"p": p})
    return pd.DataFrame(found)


def selected(table: pd.DataFrame, laws: Sequence[LawRecord] = LAWS) -> str:
    """Return the simplest law whose R squared in one cell is not significantly below the best.

    Simple means few parameters, for the ceiling few predictors; significant, corrected p < .05.
    """
    sizes = {law.name: len(law.start or law.needs) for law in laws}
    r2 = {key["law"]: influences(rows)["r2"].mean() for key, rows in _cells(table, ("law",))}
    best, pairs = max(r2, key=lambda law: r2[law]), differences(table).query("measure == 'r2'")
    with_best = pairs[(pairs[["reference", "other"]] == best).any(axis=1) & (pairs["p"] < 0.05)]
    worse = {*with_best["reference"], *with_best["other"]} - {best}
    return min(set(r2) - worse, key=lambda law: (sizes[law], -r2[law]))


def _cells(table: Any, names: Sequence[str]) -> Iterator[tuple[dict[str, str], Any]]:
    for key, rows in table.groupby(list(names), sort=False):
        yield dict(zip(names, key, strict=True)), rows
