"""Running an analysis: its table, its checks and its figure, in memory and on disk.

>>> result = reproduce("lemma5", scale="quick")
>>> result.passed
True
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import pandas as pd
from matplotlib.figure import Figure
from pydantic import BeforeValidator, PlainSerializer, PlainValidator

from analyses.reproduction.analysis import Analysis, get_analysis
from analyses.reproduction.check import Outcome, Scale, scale_named
from analyses.reproduction.settings import RecipeSettings, change
from analyses.reproduction.workbench import DEFAULT_MODELS, Workbench
from hijacklens.facts.fact import FactSet, FactsRecord
from hijacklens.one_layer.recipe import OUR_DEFAULTS
from hijacklens.results.glance import STATE, Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored

AnalysisRecord: TypeAlias = Annotated[
    Analysis, PlainValidator(get_analysis), PlainSerializer(lambda analysis: analysis.id)
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reproduction(Result):
    """The table of one analysis and the outcomes of its checks."""

    figures: ClassVar = {"figure": {}}

    analysis: AnalysisRecord
    scale: Annotated[Scale, BeforeValidator(scale_named)]
    settings: Any
    """The settings of the run: those of the scale, with any changes."""
    table: Annotated[pd.DataFrame, Stored("table.csv")]
    outcomes: tuple[Outcome, ...]
    seconds: float
    models: tuple[str, ...]
    """Language models that were run; none for the synthetic half."""
    facts: FactsRecord | None
    """The facts that they were scored on, if any."""
    digest: str | None = None
    """SHA-256 of the checks and settings before the run (`Analysis.digest`). If it differs from
    today's, the saved table was judged again by other checks; earlier records have none."""
    provenance: Provenance

    @property
    def passed(self) -> bool:
        """Whether no check failed; open checks do not count."""
        return all(outcome.state != "fail" for outcome in self.outcomes)

    @property
    def checks(self) -> pd.DataFrame:
        """A row per check: claim, value with interval, what is allowed, state, remark."""
        return pd.DataFrame([asdict(outcome) for outcome in self.outcomes])

    def to_dataframe(self) -> pd.DataFrame:
        """The table of the analysis."""
        return self.table.copy()

    def plot(self) -> Figure:
        """The figure, in the paper's arrangement."""
        return self.analysis.draw(self.table, self.settings)

    def glance(self) -> Glance:
        """The checks with their numbers; remarks say why a check is open."""
        entry, seed = self.analysis.entry, self.provenance.seed
        drawn = f", seed {seed}" if seed is not None else ""
        default = self.analysis.settings[self.scale]
        changed = "".join(
            f", {each.name} {json.dumps(value)}"
            for each in fields(default)
            if (value := getattr(self.settings, each.name)) != getattr(default, each.name)
        )
        columns = {
            STATE: "{state}",
            "claim": "{claim}",
            "measured": "{value:.4g} [{low:.4g}, {high:.4g}]",
            "allowed": "{allowed}",
        }
        return Glance(
            f"{entry.id} · {entry.reference} · {entry.title} "
            f"(scale {self.scale}{changed}, {self.seconds:.0f} s{drawn})",
            (Grid.of(map(asdict, self.outcomes), columns),),
            tuple(dict.fromkeys(f"{c.state}: {c.remark}" for c in self.outcomes if c.remark)),
            ("checks", "to_dataframe()", "plot()", "save(folder)"),
        )

    def findings(self) -> dict[str, Any]:
        """Return title and question, which settings are ours, our defaults, and the verdict."""
        return {
            "title": self.analysis.entry.title,
            "source": self.analysis.entry.reference,
            "question": self.analysis.entry.question,
            "ours": list(self.analysis.ours),
            "our_defaults": our_defaults(self.settings),
            "passed": self.passed,
        }

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> Reproduction:
        """Read a saved reproduction.

        Raises:
            InputError: The analysis has other settings in this version.
        """
        result = super().read(folder, record)
        default = result.analysis.settings[result.scale]
        return replace(result, settings=change(default, result.settings))


def reproduce(
    name: str,
    *,
    scale: str = "quick",
    models: Sequence[str] = DEFAULT_MODELS,
    facts: FactSet | None = None,
    changes: Mapping[str, Any] | None = None,
    workbench: Workbench | None = None,
    quiet: bool = False,
) -> Reproduction:
    """Run one analysis and judge its checks.

    Args:
        name: Id of the analysis; `hijacklens reproduce --list` lists them.
        scale: `quick` (minutes for all analyses; CI runs it) or `full` (the paper's seeds and
            sizes where they are known, and all facts).
        models: Language models, for the analyses that run them.
        facts: Facts for them; by default the atlas.
        changes: Settings to change, by name; the checks do not change.
        workbench: Trained models that several calls share; its models and facts replace the
            arguments `models` and `facts`.
        quiet: Draw no progress bars.

    Raises:
        InputError: No analysis of that id, no such scale or setting.
    """
    analysis, size = get_analysis(name), scale_named(scale)
    settings = change(analysis.settings[size], changes or {})
    bench = workbench or Workbench(models=tuple(models), facts=facts, quiet=quiet)
    # Record the commit and the checks now: the checkout may change during the run.
    provenance, digest = Provenance.now(seed=_first_seed(settings)), analysis.digest(settings)
    start = time.monotonic()
    table = analysis.run(settings, bench)
    own = settings != analysis.settings[size] or bench.facts is not None
    own = own or bench.models != DEFAULT_MODELS
    return Reproduction(
        analysis=analysis,
        scale=size,
        settings=settings,
        table=table,
        outcomes=analysis.judge(table, size, settings, own=own),
        digest=digest,
        seconds=round(time.monotonic() - start, 1),
        **asked_of(name, bench),
        provenance=provenance,
    )


def _first_seed(settings: Any) -> int | None:
    """Return the seed of the settings, 0 if they count seeds, or None if nothing is random."""
    counted = 0 if hasattr(settings, "seeds") else None
    return getattr(settings, "seed", counted)


def our_defaults(settings: Any) -> dict[str, Any]:
    """Return our choices for trained models that neither the paper nor the settings state."""
    if not isinstance(settings, RecipeSettings):
        return {}
    return {name: value for name, value in OUR_DEFAULTS.items() if not hasattr(settings, name)}


def asked_of(name: str, bench: Workbench) -> dict[str, Any]:
    """Return the models and the facts of a workbench that an analysis uses."""
    entry = get_analysis(name).entry
    facts = bench.scored if entry.uses_facts else None
    return {
        "models": bench.models if entry.uses_models else (),
        "facts": facts and facts.record(),
    }
