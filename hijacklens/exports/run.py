"""A run under one rule, in the parts that every kind of export is made from."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import sem

from hijacklens.files import json_text
from hijacklens.prompts.prompt import pieces
from hijacklens.scoring import efficacy
from hijacklens.scoring.efficacy import Rule
from hijacklens.scoring.result import HijackResult, ScoredModel
from hijacklens.statistics import clustered, wilson

MEASURES = {"retention": "true_wins", "efficacy": "false_wins", "shift": "shift"}
"""Measure -> the column of each item's value."""


class Score(NamedTuple):
    """A mean of the summary, with its uncertainty about these facts."""

    measure: str
    value: float
    low: float
    high: float
    """95% interval: Wilson's for a fraction, Student's t for a shift."""
    error: float
    """Standard error of the mean; `nan` for one fact."""


class Part(NamedTuple):
    """One model under one scheme at one dose, as a task of another tool."""

    task: str
    summary: dict[str, Any]
    """The row of `result.summary()`."""
    items: list[dict[str, Any]]
    """The rows of `Run.items`."""
    scores: list[Score]
    """The score of each measure; the bare query has no shift."""


@dataclass(frozen=True)
class Run:
    """A run under one rule."""

    result: HijackResult
    rule: Rule
    models: Mapping[str, ScoredModel]
    """Id on the hub, or the name if none is given -> the model."""
    dataset: str
    organization: str

    @cached_property
    def items(self) -> pd.DataFrame:
        """A row per item with its scores and verdict, and the prompt if the run has the texts."""
        result, opening = self.result, self.result.settings.facts.opening
        verdicts = efficacy.margins(result.items, self.rule)
        table = result.items.assign(
            **{column: verdicts[column].to_numpy() for column in MEASURES.values()},
            score_true=efficacy.score(result.items, self.rule, "true"),
            score_false=efficacy.score(result.items, self.rule, "false"),
        ).merge(result.prompts, on=["case_id", "scheme"], how="left", validate="many_to_one")
        if len(result.prompts):
            texts = zip(table["query"], table["sentence"], table["dose"], strict=True)
            table["prompt"] = [" ".join(pieces(q, s, dose, opening)) for q, s, dose in texts]
        return table

    def parts(self, model: ScoredModel) -> Iterator[Part]:
        """Yield the parts of a model, in the order of the summary."""
        summary: Any = self.result.summary(rule=self.rule)
        groups = dict(iter(self.items.groupby(["model", "scheme", "dose"], sort=False)))
        for row in summary[summary["model"] == model.name].to_dict("records"):
            items: Any = groups[row["model"], row["scheme"], row["dose"]]
            scores = [_score(name, row, items) for name in [*MEASURES][: 3 if row["dose"] else 2]]
            task = f"hijack_{row['scheme']}_dose{row['dose']}"
            yield Part(task, row, items.to_dict("records"), scores)

    def setup(self, model: ScoredModel) -> dict[str, str]:
        """Return what the numbers of a model depend on, as texts."""
        settings, provenance = self.result.settings, self.result.provenance
        found = {
            "rule": self.rule,
            "facts": settings.facts.title,
            "facts_hash": settings.facts.hash,
            "probes": "; ".join(settings.probes),
            "seed": str(settings.seed),
            "dtype": model.dtype,
            "revision": model.revision,
            "weights_hash": model.weights_hash,
            "command": provenance.command,
            "commit": provenance.commit,
        }
        return {name: text for name, text in found.items() if text}

    @property
    def version(self) -> str:
        """The version of hijacklens that made the run."""
        return str(self.result.provenance.versions.get("hijacklens", "unknown"))

    @property
    def created(self) -> datetime:
        """When the run was made."""
        return datetime.fromisoformat(self.result.provenance.created)


def _score(measure: str, row: dict[str, Any], items: pd.DataFrame) -> Score:
    values = items[MEASURES[measure]].to_numpy(float)
    error = float(sem(values)) if len(values) > 1 else math.nan
    value = row["mean_shift" if measure == "shift" else measure]
    if measure == "shift":
        found = clustered(values)
        low, high = found.low, found.high
    else:
        low, high = map(float, wilson(values.sum(), len(values)))  # type: ignore[arg-type]
    return Score(measure, value, low, high, error)


def digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSON Lines."""
    return "".join(f"{json_text(record, indent=None)}\n" for record in records)


def path_part(name: str) -> str:
    """Return a name as one part of a path on every system.

    >>> path_part("google/gemma-3"), path_part("..")
    ('google__gemma-3', '_')
    """
    return re.sub(r"[^\w.+-]+", "__", name).strip(".") or "_"
