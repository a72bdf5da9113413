"""The comparison of laws as a result: tables, figures, the account of one fact, surprises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.law import plots
from analyses.law.evaluation import differences, predictions, scores, selected
from analyses.law.laws import LAWS, Law, LawRecord
from analyses.law.predictors import PREDICTORS, TEXTS
from hijacklens.errors import InputError, choice, unknown, whole_number
from hijacklens.facts.fact import Fact
from hijacklens.results.exhibits import Drawing, Exhibit, Table
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.items import SkippedTable, skipped_table

ONE = "the facts of this model and scheme are of one relation."


@dataclass(frozen=True, slots=True, kw_only=True)
class LawSettings:
    """The settings of a comparison."""

    facts: str
    """The name of the facts."""
    folds: int
    seed: int
    models: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    doses: tuple[int, ...] = ()
    laws: tuple[LawRecord, ...] = LAWS
    """A saved result has no functions of them."""


@dataclass(frozen=True, eq=False)
class LawResult(Result):
    """Laws of the shift, compared on relations, schemes, models and doses that are new.

    Shifts are in nats, by the rule `first`; intervals are clustered by relation.
    """

    facts: pd.DataFrame
    """A row per model, fact, scheme and dose: predictors and the measured shift."""
    predictions: pd.DataFrame
    """A row per law, split and row of `facts`: the predicted shift and probability."""
    parameters: Annotated[pd.DataFrame, Stored("parameters.csv")]
    """A row per model, scheme, law and parameter, fitted on all facts: value, low, high."""
    settings: LawSettings
    provenance: Provenance
    skipped: SkippedTable = field(default_factory=partial(skipped_table, (), ""))
    """Facts without a shift or predictors, with the reason: model, case_id, ..., scheme, reason."""
    figures: ClassVar = {what: {"what": what} for what in plots.TITLES}
    derived: ClassVar = {f"{name}.csv": name for name in ("laws", "differences", "surprises")}

    def to_dataframe(self) -> pd.DataFrame:
        """Return the predictions."""
        return self.predictions.copy()

    @cached_property
    def laws(self) -> pd.DataFrame:
        """The table of laws (`analyses.law.evaluation.scores`)."""
        return scores(self.predictions)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """The paired differences between laws (`analyses.law.evaluation.differences`)."""
        return differences(self.predictions)

    def best(self) -> str:
        """Return the law with the highest mean R squared on new relations."""
        return str(self._new(self.laws).groupby("law")["r2"].mean().idxmax())

    def selected(self, *, model: str | None = None, scheme: str | None = None) -> str:
        """Return the simplest law that is not significantly worse than the best, on all doses."""
        rows = self._cell(self.predictions, model, scheme)
        doses = rows[rows["split"] == "all doses"]
        rows = doses if len(doses) else self._new(rows)
        if rows.empty:
            raise InputError(f"no law is tested here on a relation that is new to it; {ONE}")
        return selected(rows, self.settings.laws)

    def explain(
        self,
        fact: int | Fact,
        *,
        law: str = "ceiling",
        model: str | None = None,
        scheme: str | None = None,
        dose: int | None = None,
    ) -> pd.Series:
        """Explain the predicted shift of a fact, by a law fitted on all other relations.

        Returns:
            `predicted` and `measured` shift in nats; their `place`, the fraction of facts with a
            smaller one; and the parts of the prediction: `mean` (every predictor has its mean),
            what each predictor adds if it alone has its value, largest first, and what they add
            `together`. The name says which fact and law it is.

        Raises:
            InputError: The result lacks the fact, law, model, scheme or dose; all facts are of one
                relation; or the law is your own and the result was read from a folder.
        """
        cell: Any = self._cell(self.facts, model, scheme)
        cell = cell[cell["dose"] == (cell["dose"].min() if dose is None else dose)]
        case = fact.case_id if isinstance(fact, Fact) else fact
        row = cell[cell["case_id"] == case]
        if row.empty:
            raise InputError(
                f"case {case!r} has no shift at dose {dose or 'first'} here; the table `facts` "
                "lists the cases and doses that have one."
            )
        found = row.iloc[0]
        others = cell[cell["relation_id"] != found["relation_id"]]
        if others.empty:
            raise InputError(f"case {case!r} is explained by a law of other relations; {ONE}")
        laws = {each.name: each for each in self.settings.laws}
        fitted = laws[choice("law", law, laws)].law().fit(others)
        mean = row.assign(**others[list(PREDICTORS)].mean())
        alone = [mean.assign(**{name: found[name]}) for name in fitted.needs]
        base, predicted, *values = (fitted.predict(one)[0] for one in (mean, row, *alone))
        parts = pd.Series(np.array(values) - base, fitted.needs)
        parts = parts.sort_values(key=abs, ascending=False)
        rest = {
            "predicted": predicted,
            "place of predicted": (fitted.predict(cell) < predicted).mean(),
            "measured": found["shift"],
            "place of measured": (cell["shift"] < found["shift"]).mean(),
            "mean": base,
            **parts,
            "together": round(predicted - base - parts.sum(), 9),
        }
        of = "{model} · {scheme}, dose {dose} · case {case_id}, {subject}: {target_true} -> "
        return pd.Series(rest, name=f"{of}{{target_false}} · law {law}".format(**found))

    def surprises(self, law: str | None = None, *, count: int = 20) -> pd.DataFrame:
        """Return the facts whose shift a law predicts worst: `count` per model and scheme.

        By default it is the law with the highest R squared. `surprise` is measured minus predicted.
        """
        rows = self._of_law(law)
        rows = rows.assign(surprise=rows["shift"] - rows["predicted"])
        rows = rows.sort_values("surprise", key=abs, ascending=False, kind="stable")
        largest = rows.groupby(["model", "scheme"], sort=False).head(count)
        texts: Any = self.facts[list(TEXTS)]
        found = largest.merge(texts.drop_duplicates(TEXTS[:3]), on=list(TEXTS[:4]))
        return found[[*TEXTS, "prior", "shift", "predicted", "surprise"]]

    def plot(self, *, what: str = "laws", law: str | None = None) -> Figure:
        """Draw a figure with a panel per model and scheme, on new relations at the first dose.

        Args:
            what: `laws` (R squared of each with intervals), `predicted` (against measured),
                `calibration` (probability against frequency of flips), `residuals` (by relation).
            law: For the last three; by default the law with the highest R squared.
        """
        choice("what", what, plots.TITLES)
        rows = self._new(self.laws) if what == "laws" else self._of_law(law)
        figure = plots.draw(rows, what, law or self.best())
        if self._dose:
            figure.suptitle(self._dose, fontsize=9)
        return figure

    @property
    def _dose(self) -> str:
        """The dose that figures and the glance are about, if there are others."""
        doses = set(self.predictions["dose"])
        return f"all at dose {min(doses)}" if len(doses) > 1 else ""

    def exhibits(self) -> list[Exhibit]:
        """The figures, the table of laws, their differences and parameters, and surprises."""
        filters = ("split", "model", "scheme", "fitted_on")
        return [
            *(Drawing(title, self.plot(what=what)) for what, title in plots.TITLES.items()),
            Table("Laws", self.laws, file="laws.csv", filters=("law", *filters)),
            Table("Differences", self.differences, file="differences.csv", filters=filters),
            Table("Parameters", self.parameters, filters=("law", "model", "scheme"), folded=True),
            Table("Surprises", self.surprises(), file="surprises.csv", filters=("model", "scheme")),
            *(
                [Table("Facts that were skipped", self.skipped, file="skipped.csv", folded=True)]
                if len(self.skipped)
                else []
            ),
        ]

    def findings(self) -> dict[str, Any]:
        """Return the numbers of rows and skipped facts, and the formula and source of each law."""
        laws = {
            law.name: {"formula": law.formula, "source": law.source} for law in self.settings.laws
        }
        return {"rows": len(self.facts), "skipped": len(self.skipped), "laws": laws}

    def glance(self) -> Glance:
        """The laws on new relations, for each model and scheme."""
        forms = {
            "law": "{law}",
            "R2": "{r2:fraction} [{r2_low:fraction}, {r2_high:fraction}]",
            "AUC": "{auc:fraction} [{auc_low:fraction}, {auc_high:fraction}]",
            "ECE": "{ece:fraction}",
            "Brier": "{brier:fraction}",
        }
        cells = self._new(self.laws).groupby(["model", "scheme"], sort=False)
        tested = self._new(self.predictions)[["case_id", "relation_id"]].nunique()
        notes = ["R2 of the shift; the others of flips among known facts; intervals over relations"]
        if self._dose:
            notes.append(f"{self._dose}; .laws and laws.csv have the other doses")
        if len(self.skipped):
            notes.append(
                f"skipped: {len(self.skipped)} pairs of fact and scheme (.skipped, skipped.csv); "
                f"first: {self.skipped['reason'].iloc[0]}"
            )
        return Glance(
            f"{self.settings.facts} · laws of the shift: {tested['case_id']} facts of "
            f"{tested['relation_id']} relations, each predicted by a fit on the other folds",
            tuple(
                Grid.of(part, forms, title=f"{' · '.join(key)}, {part['n'].iloc[0]} facts")
                for key, part in cells
            ),
            tuple(notes),
            steps=("laws", "differences", "explain(case_id)", "surprises()", "plot(what=...)"),
        )

    def _of_law(self, law: str | None) -> Any:
        """Return the predictions of a law on new relations at the first dose."""
        rows = self._new(self.predictions)
        return rows[rows["law"] == choice("law", law or self.best(), set(rows["law"]))]

    @staticmethod
    def _new(table: Any) -> Any:
        return table[table["split"] == "relations"]

    @staticmethod
    def _cell(table: Any, model: str | None, scheme: str | None) -> Any:
        """Return the rows of a model and a scheme; by default the first ones."""
        for name, value in (("model", model), ("scheme", scheme)):
            known = list(table[name].unique())
            if value not in (None, *known):
                raise unknown(name, value or "", known)
            table = table[table[name] == (value or known[0])]
        return table


def compare(
    table: pd.DataFrame,
    *,
    laws: Sequence[Law] = LAWS,
    folds: int = 10,
    seed: int = 0,
    name: str = "facts",
    skipped: pd.DataFrame | None = None,
    quiet: bool = False,
) -> LawResult:
    """Fit laws of the shift and compare them on what they were not fitted on.

    Args:
        table: The columns of `analyses.law.measured`; those of several models are concatenated.
        laws: The laws, each with its own name.
        folds: Folds of the cross-validation, each of whole relations.
        seed: Seeds the folds.
        name: What the facts are called.
        skipped: The facts that the table lacks (`analyses.law.skipped`), which the result lists.
        quiet: Draw no progress bar.

    Raises:
        InputError: There are fewer than two folds, or relations of a model and scheme; or two laws
            have one name.
    """
    names = [law.name for law in laws]
    if len(set(names)) < len(names):
        raise InputError(f"laws: give every law a different name; given: {names}.")
    seed, table = whole_number("seed", seed), table.reset_index(drop=True)
    rows = [
        (*key, law.name, parameter, found.value, found.low, found.high)
        for key, cell in cast("Any", table.groupby(["model", "scheme"], sort=False))
        for law in laws
        for parameter, found in law.fit(cell).parameters.items()
    ]
    columns = ["model", "scheme", "law", "parameter", "value", "low", "high"]
    made_of = {f"{of}s": tuple(table[of].unique().tolist()) for of in ("model", "scheme", "dose")}
    return LawResult(
        facts=table,
        predictions=predictions(table, laws=laws, count=folds, seed=seed, quiet=quiet),
        parameters=pd.DataFrame(rows, columns=columns),
        settings=LawSettings(facts=name, folds=folds, seed=seed, laws=tuple(laws), **made_of),
        provenance=Provenance.now(seed=seed),
        skipped=skipped_table((), "") if skipped is None else skipped,
    )
