"""The result of a search for heads: attribution of all, exact effects of the best, the chosen set.

`carried` is in logits: how much smaller the mean logit shift of the facts is without a head (or a
set), so positive where the head brings the hijack about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.prompts.schemes import Scheme
from hijacklens.renamed import renamed
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.provenance import Provenance
from hijacklens.results.result import Result
from hijacklens.results.stored import NOT_STORED, Stored
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.items import SkippedTable
from hijacklens.scoring.settings import PairSettings, ScoredModel
from hijacklens.statistics import adjust, paired_mean, signed_rank
from probes.ablation import MeanOutputs
from probes.heads.figures import search_figure
from probes.heads.held_out import Found, FoundOn, HeadTest, Overlap, run_test
from probes.heads.sets import Head

AXES = {
    "gradient": "attribution by gradient",
    "direct": "direct logit attribution",
}
"""Kind of attribution -> how a figure calls it."""
ARRAYS = Stored("search.npz")


def _read_facts(table: pd.DataFrame, record: Mapping[str, Any]) -> FactSet:
    rows: list[Any] = table.astype(object).where(table.notna(), None).to_dict("records")
    about = record["settings"]["facts"]
    return FactSet(tuple(Fact(**row) for row in rows), name=about["name"], note=about["note"])


FACTS = Stored(
    "facts.parquet",
    encode=lambda facts: facts.to_dataframe().drop(columns="prompt"),
    decode=_read_facts,
)
MEANS = Stored(
    "search.npz",
    encode=lambda means: None if means is None else means.values.numpy(),
    decode=lambda values, record: MeanOutputs(
        "z", values=torch.from_numpy(values), **record["means"]
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings(PairSettings):
    """The settings of a search for heads."""

    model: ScoredModel
    size: int
    attribution: str
    kind: str
    """What replaces the output of an ablated head: `mean` or `zero`."""
    strategy: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well attribution foretells exact effects, over the heads that were ablated.

    These are the heads with the highest attribution, so both correlations are lower than over
    all heads; they are `nan` where fewer than three heads were ablated.
    """

    pearson: float
    spearman: float
    heads: int


@dataclass(frozen=True, eq=False)
class HeadSearch(Result):
    """The heads that carry the hijack's logit shift, found on some facts.

    p-values and intervals describe the facts of the search. The heads were chosen on the same
    facts, so that whether they matter is decided by `test`, on facts that are new.
    """

    facts: Annotated[FactSet, FACTS]
    """The facts that the search used."""
    shift: Annotated[Float[np.ndarray, " fact"], ARRAYS]
    """The logit shift of each with no head ablated, in logits."""
    attribution: Annotated[Float[np.ndarray, "fact layer head"], ARRAYS]
    """How much of it each query head carries by attribution, in logits."""
    candidates: tuple[Head, ...]
    """The heads ablated one by one, by falling mean attribution."""
    carried: Annotated[Float[np.ndarray, "fact candidate"], ARRAYS]
    """How much of the shift goes with each of them, in logits."""
    heads: tuple[Head, ...]
    """The chosen set, in the order of choice."""
    carried_by_set: Annotated[Float[np.ndarray, "fact size"], ARRAYS]
    """How much of the shift goes with the first, the first two, ... of `heads`."""
    skipped: SkippedTable
    """Facts that were not used, with the reason."""
    settings: SearchSettings
    provenance: Provenance
    means: Annotated[MeanOutputs | None, MEANS] = None
    """What replaced the outputs of ablated heads; None for zero."""
    model: Annotated[HookedLanguageModel | None, NOT_STORED] = field(default=None, repr=False)
    """The model searched, for `test`; a search that was read from a folder has none."""
    figures: ClassVar = {"heads": {}}
    derived: ClassVar = {"heads.csv": "table", "growth.csv": "growth"}

    @property
    def scheme(self) -> Scheme:
        """The scheme of the hijacked prompts."""
        return self.settings.scheme.scheme()

    @cached_property
    def table(self) -> pd.DataFrame:
        """What `to_dataframe` copies."""
        mean = self.attribution.mean(0)
        layers, heads = mean.shape
        index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
        table = pd.DataFrame({"attribution": mean.reshape(-1)}, index=index)
        # A reverse scheme shifts towards the true target, and so do the heads that carry it.
        helps = table["attribution"] * (-1 if self.scheme.direction == "reverse" else 1)
        table["rank"] = helps.rank(ascending=False, method="first").astype(int)
        p = np.array([signed_rank(values) for values in self.carried.T])
        rows: dict[str, Any] = {"carried": [], "low": [], "high": []}
        for values in self.carried.T:
            interval = paired_mean(values, seed=self.settings.seed)
            for name, value in zip(
                rows, (interval.value, interval.low, interval.high), strict=True
            ):
                rows[name].append(value)
        rows["share"] = self.carried.mean(0) / self.shift.mean()
        rows["p"] = p
        rows["p_holm"] = adjust(p, correction="holm", tests=len(table))
        rows["p_bh"] = adjust(p, correction="benjamini-hochberg", tests=len(table))
        for name, values in rows.items():
            table[name] = np.nan
            table.loc[list(self.candidates), name] = values
        table["chosen"] = table.index.isin(self.heads)
        return table.reset_index()

    @cached_property
    def growth(self) -> pd.DataFrame:
        """The chosen set as it grows: `size`, the head added, what all so far carry, its share."""
        rows = []
        for size, (head, values) in enumerate(
            zip(self.heads, self.carried_by_set.T, strict=True), start=1
        ):
            found = paired_mean(values, seed=self.settings.seed)
            share = found.value / self.shift.mean()
            rows.append((size, *head, found.value, found.low, found.high, share))
        columns = ["size", "layer", "head", "carried", "low", "high", "share"]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def agreement(self) -> Agreement:
        """Correlation of attribution and exact effects over the candidates."""
        from scipy.stats import pearsonr, spearmanr

        guessed = np.array([self.attribution[:, at, head].mean() for at, head in self.candidates])
        exact = self.carried.mean(0)
        flat = np.ptp(guessed) == 0 or np.ptp(exact) == 0
        if len(guessed) < 3 or flat:
            return Agreement(np.nan, np.nan, len(guessed))
        found: list[Any] = [pearsonr(guessed, exact), spearmanr(guessed, exact)]
        return Agreement(float(found[0][0]), float(found[1][0]), len(guessed))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and query head.

        `attribution` (mean, logits) and its `rank`; for the heads ablated one by one `carried`
        (mean, logits) with its 95% bootstrap interval `low`, `high`, its `share` of the mean
        shift, and `p` of Wilcoxon's signed-rank test, also corrected for *all* heads of the model
        (`p_holm`, `p_bh`), as attribution has looked at all; `chosen`.
        """
        return self.table.copy()

    def plot(self) -> Figure:
        """Attribution by layer and head, and the exact effects of the best with intervals."""
        settings = self.settings
        axis = AXES[settings.attribution]
        title = (
            f"{settings.model.name} · {settings.facts.name}, "
            f"{len(self.facts)} facts · {self.scheme.name}, dose {settings.dose} · "
            f"mean shift {self.shift.mean():+.2f}"
        )
        return search_figure(self.table, self.attribution.mean(0), title=title, axis=axis)

    @renamed(store="execution.store", batch_tokens="execution.batch_tokens")
    def test(
        self,
        facts: FactSet,
        *,
        schemes: str | Scheme | Sequence[str | Scheme] | None = None,
        doses: Iterable[int] | None = None,
        random_sets: int = 20,
        overlap: Overlap = "refuse",
        seed: int | None = None,
        model: HookedLanguageModel | None = None,
        execution: Execution = Execution(),
        quiet: bool = False,
    ) -> HeadTest:
        """Ablate the set on facts that it was not chosen on, and random sets of its size.

        Args:
            facts: Facts that the search has not seen.
            schemes: One or several; by default that of the search.
            doses: By default that of the search; 0 is always among them.
            random_sets: How many random sets of each kind: as many heads in each layer as the set
                has (`layers`), and from anywhere (`model`); none holds a head of the set.
            overlap: What to do with facts of the search among them: `refuse` all, or `leave-out`
                and list them in `skipped`.
            seed: Seeds the random sets, the bootstrap, and what a scheme draws; by default that
                of the search.
            model: The model to test on, where it is not that of the search: a search that was
                read from a folder has none, and another checkpoint may be of interest.
            execution: The engine, store, sharing and batch size, as for `hijacklens.hijack`.
            quiet: Draw no progress bar.

        Returns:
            The test; `summary()`, `side_effects()` and `plot()` show it.

        Raises:
            InputError: Facts of the search are among these, there is no model, the model has no
                such heads or too few others for random sets, or what `hijacklens.hijack` refuses.

        Note:
            Costs `2 + 2 * random_sets` runs of `hijacklens.hijack` over the facts.
        """
        used = model if model is not None else self.model
        if used is None:
            raise InputError("this search was read from a folder; pass model=... to test on.")
        found = Found(
            heads=self.heads,
            means=self.means,
            facts=self.facts,
            settings=FoundOn(
                model=self.settings.model.name,
                weights_hash=self.settings.model.weights_hash,
                facts=self.settings.facts,
                scheme=self.settings.scheme,
                dose=self.settings.dose,
                kind=self.settings.kind,
                relations=tuple(self.facts.relations()),
            ),
        )
        return run_test(
            used,
            found,
            facts,
            schemes=self.scheme if schemes is None else schemes,
            doses=[self.settings.dose] if doses is None else doses,
            random_sets=random_sets,
            overlap=overlap,
            seed=self.settings.seed if seed is None else seed,
            execution=execution,
            quiet=quiet,
        )

    def findings(self) -> dict[str, Any]:
        """Return what the chosen heads carry, and how well attribution predicted it."""
        return {
            "mean_shift": float(self.shift.mean()),
            "carried": float(self.carried_by_set[:, -1].mean()),
            "agreement": asdict(self.agreement),
            "means": self.means and {"span": self.means.span, "count": self.means.count},
            "skipped": len(self.skipped),
        }

    def glance(self) -> Glance:
        """The heads that were ablated one by one, and the set as it grows."""
        settings, agreement = self.settings, self.agreement
        table = self.to_dataframe().dropna(subset=["carried"])
        table = table.sort_values("carried", ascending=False, key=abs)
        carried = "{carried:+.3f} [{low:+.3f}, {high:+.3f}]"
        columns = {
            "head": "{layer:.0f}.{head:.0f}",
            "attribution": "{attribution:+.3f}",
            "carried": carried,
            "of shift": "{share:.0%}",
            "p_holm": "{p_holm:.2g}",
            "p_bh": "{p_bh:.2g}",
            "chosen": "{chosen}",
        }
        growth = {
            "with head": "{layer:.0f}.{head:.0f}",
            "carried": carried,
            "of shift": "{share:.0%}",
        }
        chosen = table["chosen"].map({True: "yes", False: ""})
        return Glance(
            f"{settings.model.name} · {settings.facts.name}, search on "
            f"{len(self.facts)} facts · {self.scheme.name}, dose {settings.dose}",
            (
                Grid.of(table.assign(chosen=chosen), columns),
                Grid.of(self.growth, growth, title="the set as it grows"),
            ),
            (
                f"mean shift {self.shift.mean():+.2f} logits · {settings.attribution}, "
                f"{settings.kind} · seed {settings.seed}",
                f"attribution and ablation correlate by {agreement.pearson:.2f} (rank "
                f"{agreement.spearman:.2f}) over the {agreement.heads} heads ablated",
            ),
            ("test(other_facts)", "to_dataframe()", "plot()", "save(folder)"),
        )
