"""The result of a search for heads: attribution of all, exact effects of some, the chosen set.

`carried` is in logits: how much smaller the mean logit shift of the facts is without a head (or a
set). It is positive for heads that bring the hijack about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, wraps
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import TypeAdapter

from hijacklens import plots
from hijacklens.errors import InputError, choice, warn
from hijacklens.facts.fact import FactSet, FactsRecord, Skipped
from hijacklens.facts.halves import shared
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.progress import bar
from hijacklens.prompts.schemes import Scheme
from hijacklens.renamed import Function, renamed
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import NOT_STORED, Stored
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.items import SkippedTable
from hijacklens.scoring.result import HijackResult, PairSettings, ScoredModel
from hijacklens.sites import choose as sites
from hijacklens.sites import numbers
from hijacklens.statistics import adjust, clustered, independent, ratio
from probes.ablation import MeanOutputs, ablate
from probes.heads.contrasts import CHOSEN, CORRECTED, NONE
from probes.heads.held_out import (
    FoundOn,
    Head,
    HeadTest,
    HeadTestSettings,
    draw,
    equal,
    equally_harmful,
    layer_sets,
)

AXES = {"gradient": "attribution by gradient", "direct": "direct logit attribution"}
"""Kind of attribution -> its name in a figure."""
MOST_BARS = 24
"""At most this many ablated heads are drawn, those with the largest effects."""
NOTHING = "no head's effect differs from 0: use more facts"
ARRAYS = Stored("search.npz")


FACTS = Stored(
    "facts.parquet",
    encode=lambda facts: facts.to_dataframe().drop(columns="prompt"),
    decode=lambda table, record: (
        TypeAdapter(FactsRecord).validate_python(record["settings"]["facts"]).fact_set(table)
    ),
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
    strategy: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well attribution predicts exact effects, over the heads that were ablated.

    These are the heads with the highest attribution, so both correlations are lower than over
    all heads. They are `nan` for fewer than three heads.
    """

    pearson: float
    spearman: float
    heads: int


def _takes_model_and_overlap(test: Function) -> Function:
    """Let `HeadSearch.test` take a model and the treatment of overlapping facts for one release."""

    @wraps(test)
    def call(
        search: HeadSearch, facts: FactSet, *, model: Any = None, overlap: str = "", **options: Any
    ) -> HeadTest:
        if model is not None or overlap:
            choice("treatment of overlap", overlap or "refuse", ("refuse", "leave-out"))
            warn(
                "model= and overlap= of test are now search.on(model) and search.unseen(facts); "
                "the next release drops them.",
                FutureWarning,
            )
            search = search if model is None else search.on(model)
            facts = search.unseen(facts) if overlap == "leave-out" else facts
        return test(search, facts, **options)

    return cast("Function", call)


@dataclass(frozen=True, eq=False)
class HeadSearch(Result):
    """The heads that carry the hijack's logit shift, found on some facts.

    p-values and intervals are corrected for all heads. Since the set was chosen on the same facts,
    what it carries is too large: only `test`, on new facts, shows whether it matters.
    """

    facts: Annotated[FactSet, FACTS]
    """The facts that the search used."""
    shift: Annotated[Float[np.ndarray, " fact"], ARRAYS]
    """The logit shift of each with no head ablated, in logits."""
    attribution: Annotated[Float[np.ndarray, "fact layer head"], ARRAYS]
    """How much of the shift each query head carries by attribution, in logits; NaN in a layer of a
    hybrid that has no heads."""
    candidates: tuple[Head, ...]
    """The heads ablated one by one, by falling mean attribution."""
    carried: Annotated[Float[np.ndarray, "fact candidate"], ARRAYS]
    """How much of the shift vanishes with each candidate, in logits."""
    heads: tuple[Head, ...]
    """The chosen set, in the order of choice."""
    carried_by_set: Annotated[Float[np.ndarray, "fact size"], ARRAYS]
    """How much of the shift vanishes with the first, the first two, ... of `heads`."""
    skipped: SkippedTable
    """Facts that were not used, with the reason."""
    settings: SearchSettings
    provenance: Provenance
    means: Annotated[MeanOutputs | None, MEANS] = None
    """What replaced the outputs of ablated heads; None for zero."""
    model: Annotated[HookedLanguageModel | None, NOT_STORED] = field(default=None, repr=False)
    """The model, for `test`; a search that was loaded from a folder has none."""
    figures: ClassVar = {"heads": {}}
    derived: ClassVar = {"heads.csv": "table", "growth.csv": "growth"}

    @property
    def scheme(self) -> Scheme:
        """The scheme of the hijacked prompts."""
        return self.settings.scheme.scheme()

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table that `to_dataframe` copies."""
        mean = self.attribution.mean(0)
        index = pd.MultiIndex.from_product([range(n) for n in mean.shape], names=["layer", "head"])
        table = pd.DataFrame({"attribution": mean.ravel()}, index=index).dropna()
        # A reverse scheme shifts towards the true target, and so do the heads that carry it.
        carrying = table["attribution"] * (-1 if self.settings.scheme.direction == "reverse" else 1)
        table["rank"] = carrying.rank(ascending=False, method="first").astype(int)
        confidence = 1 - 0.05 / len(table)
        found = [clustered(of, self._clusters, confidence=confidence) for of in self.carried.T]
        effects = pd.DataFrame(
            [
                {**self._effect(values), "low": each.low, "high": each.high}
                for values, each in zip(self.carried.T, found, strict=True)
            ],
            index=pd.MultiIndex.from_tuples(self.candidates, names=index.names),
        )
        p_values = np.array([each.p for each in found])
        for name, correction in CORRECTED.items():
            effects[name] = adjust(p_values, correction=correction, tests=len(table))
        table = table.join(effects)
        table["chosen"] = table.index.isin(self.heads)
        return table.reset_index()

    @cached_property
    def growth(self) -> pd.DataFrame:
        """The growing set: `size`, the added head, what the set carries, and its fraction.

        The heads were chosen on the same facts, so these numbers have no interval; see `test`.
        """
        sets = zip(self.heads, self.carried_by_set.T, strict=True)
        return pd.DataFrame(
            {"size": size, "layer": layer, "head": head, **self._effect(values)}
            for size, ((layer, head), values) in enumerate(sets, start=1)
        )

    def _effect(self, values: Float[np.ndarray, " fact"]) -> dict[str, float]:
        """Return the mean effect, and its fraction of the mean shift."""
        mean = float(values.mean())
        return {"carried": mean, "share": ratio(mean, float(self.shift.mean()))}

    @property
    def _clusters(self) -> np.ndarray:
        return independent([fact.relation_id for fact in self.facts])[0]

    @property
    def estimand(self) -> str:
        """What intervals and p-values are about: relations like these, or these facts."""
        return independent([fact.relation_id for fact in self.facts])[1]

    @property
    def nothing(self) -> bool:
        """Whether no effect of a head differs from 0 (p_holm at most 0.05)."""
        return not (self.table["p_holm"] <= 0.05).any()

    @cached_property
    def agreement(self) -> Agreement:
        """Correlation of attribution and exact effects over the candidates."""
        tested = self.table.dropna(subset="carried")
        attribution, carried = tested["attribution"], tested["carried"]
        with np.errstate(invalid="ignore", divide="ignore"):
            pearson = float(attribution.corr(carried, min_periods=3))
            spearman = float(attribution.corr(carried, method="spearman", min_periods=3))
        return Agreement(pearson, spearman, len(tested))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and query head.

        `attribution` (mean, logits) and its `rank`; for the heads ablated one by one `carried`
        (mean, logits), its `share` of the mean shift, and its interval `low`, `high` and p-values
        `p_holm`, `p_bh`, corrected for *all* heads of the model (the interval by Bonferroni), since
        attribution considers all; `chosen`. Intervals and p-values are about `estimand`.
        """
        return self.table.copy()

    def plot(self) -> Figure:
        """Draw attribution by layer and head, and the largest exact effects with intervals."""
        settings = self.settings
        title = (
            f"{settings.title} · {settings.facts.title}, {len(self.facts)} facts · "
            f"{settings.scheme.name}, dose {settings.dose} · mean shift {self.shift.mean():+.2f}"
        )
        axis, table, values = AXES[settings.attribution], self.table, self.attribution.mean(0)
        tested = table.dropna(subset="carried").sort_values("carried", ascending=False)
        with plots.canvas(1, 2, width=5.6, height=max(3.6, 0.15 * len(values))) as (figure, axes):
            layers = [i for i, row in enumerate(values) if np.isfinite(row).any()]
            values, heads, label = values[layers], range(values.shape[1]), f"{axis} (logits)"
            plots.heat_map(axes[0], values, rows=layers, columns=heads, label=label, cmap="PuOr_r")
            for layer, head in self.heads:
                corner = (head - 0.5, layers.index(layer) - 0.5)
                frame = Rectangle(corner, 1, 1, fill=False, linewidth=1.6)
                axes[0].add_patch(frame)
            axes[0].set(xlabel="head", ylabel="layer")
            axes[0].set_title("attribution; chosen heads framed", fontsize=9)
            _bars(axes[1], tested.head(MOST_BARS), axis, NOTHING if self.nothing else "")
            plots.legend_below(figure, axes[1:])
            figure.suptitle(plots.escape(title), fontsize=10)
        return figure

    def on(self, model: HookedLanguageModel) -> HeadSearch:
        """Return the search with a model to test on, such as another checkpoint."""
        return replace(self, model=model)

    def unseen(self, facts: FactSet) -> FactSet:
        """Return facts without those of the search, which `skipped` then lists."""
        overlap = set(shared(facts, self.facts))
        reason = "the heads were found on this fact"
        skipped = tuple(
            Skipped(fact.case_id, fact.relation_id, fact.subject, reason)
            for fact in facts
            if fact.case_id in overlap
        )
        others = tuple(fact for fact in facts if fact.case_id not in overlap)
        return replace(facts, facts=others, skipped=(*facts.skipped, *skipped))

    @_takes_model_and_overlap
    @renamed(store="execution.store", batch_tokens="execution.batch_tokens")
    def test(
        self,
        facts: FactSet,
        *,
        schemes: str | Scheme | Sequence[str | Scheme] | None = None,
        doses: int | Iterable[int] | None = None,
        random_sets: int = 20,
        seed: int | None = None,
        execution: Execution = Execution(),
        quiet: bool = False,
    ) -> HeadTest:
        """Ablate the set on facts that it was not chosen on, and random sets to compare it with.

        Args:
            facts: Facts that the search has not seen; `unseen` removes the others.
            schemes: One or several; by default the scheme of the search.
            doses: By default the dose of the search; 0 is always included.
            random_sets: How many random sets of each kind; none has a head of the set. Sets of the
                kind `layers` have as many heads in each layer, or in the nearest ones if a layer
                has too few others. Those of the kind `harm` come from anywhere and have as many
                heads as it takes to lower log p(true) of the search's bare queries as much as the
                set does, to within 20% or 0.05 nats; sets that do not are listed in `sets` and not
                compared.
            seed: Seeds the random sets and what a scheme draws; by default that of the search.
            execution: The engine, store, sharing and batch size, as for `hijacklens.hijack`.
            quiet: Draw no progress bar.

        Raises:
            InputError: Facts of the search are among these, there is no model, the model lacks
                these heads or has too few others for random sets, or what `hijacklens.hijack`
                refuses.

        Note:
            Costs `2 + 2 * random_sets` runs of `hijacklens.hijack` over the facts, and for each
            set of kind `harm` about log2(number of heads) runs over the search's bare queries, or
            up to three times as many if sets of equal harm are hard to find.
        """
        model, settings = self.model, self.settings
        if model is None:
            raise InputError("this search has no model to test on; give it one: search.on(model).")
        if random_sets < 0:
            raise InputError(f"random_sets counts sets: 0, 1, 2, ...; {random_sets} is not one.")
        overlap = shared(facts, self.facts)
        if overlap:
            raise InputError(
                f"{len(overlap)} of the {len(facts)} facts of {facts.name} are among those that "
                f"the heads were found on, such as case {min(overlap)}; a test on them is not held "
                "out. Give other facts (heads.halves splits a set), or search.unseen(facts)."
            )
        seed = settings.seed if seed is None else seed
        ablations: dict[str, tuple[str, tuple[Head, ...]]] = {
            NONE: (NONE, ()),
            CHOSEN: (CHOSEN, self.heads),
        }
        others = [site for site in sites(model).pairs if site not in self.heads]
        results: dict[str, HijackResult] = {}
        tested_on = (
            facts,
            self.scheme if schemes is None else schemes,
            settings.dose if doses is None else doses,
        )

        def score(heads: Sequence[Head], of: FactSet, schemes: Any, doses: Any) -> HijackResult:
            probe = ablate(heads=heads, kind="mean" if self.means else "zero", means=self.means)
            return hijack(
                model,
                of,
                schemes=schemes,
                doses=doses,
                probes=[probe] if heads else [],
                seed=seed,
                execution=held,
                quiet=True,
            )

        @cache
        def recall(heads: tuple[Head, ...]) -> float:
            return float(score(heads, self.facts, self.scheme, [0]).items["first_true"].mean())

        def harm(heads: Iterable[Head]) -> float:
            return recall(()) - recall(tuple(sorted(heads)))

        measured = ("chosen", "harm") if random_sets else ()
        total, label = 2 + 3 * random_sets, settings.model.name
        with (
            execution.held(model) as held,
            bar(total=total, unit="sets", label=label, quiet=quiet) as progress,
        ):
            for name, (_, heads) in ablations.items():
                results[name] = score(heads, *tested_on)
                progress.update(1)
            if random_sets:
                layered = draw(self.heads, others, count=random_sets, seed=seed)
                ablations |= {f"layers-{i}": ("layers", heads) for i, heads in enumerate(layered)}
                grown = equally_harmful(self.heads, others, harm, count=random_sets, seed=seed)
                ablations |= {f"harm-{i}": ("harm", heads) for i, heads in enumerate(grown)}
                progress.update(random_sets)
            for name, (kind, heads) in list(ablations.items())[2:]:
                if kind != "harm" or equal(harm(heads), harm(self.heads)):
                    results[name] = score(heads, *tested_on)
                progress.update(1)
            sets = pd.DataFrame(
                [
                    (name, kind, numbers(heads), harm(heads) if kind in measured else np.nan)
                    for name, (kind, heads) in ablations.items()
                ],
                columns=["ablation", "kind", "heads", "harm"],
            )
        items = pd.concat(
            [result.items.assign(ablation=name) for name, result in results.items()],
            ignore_index=True,
        )
        # A fact without a finite score under one ablation is compared under none.
        runs = items.groupby(["scheme", "case_id"])["ablation"].transform("nunique")
        skipped = pd.concat([result.skipped for result in results.values()]).drop_duplicates()
        scored = results[NONE].settings
        return HeadTest(
            items=items.loc[runs == len(results)].reset_index(drop=True),
            sets=sets,
            skipped=skipped.reset_index(drop=True),
            settings=HeadTestSettings(
                **{field.name: getattr(scored, field.name) for field in fields(scored)},
                heads=numbers(self.heads),
                random_sets=random_sets,
                layer_sets=layer_sets(self.heads, others),
                search=FoundOn(
                    model=settings.model.name,
                    weights_hash=settings.model.weights_hash,
                    facts=settings.facts,
                    scheme=settings.scheme,
                    dose=settings.dose,
                    kind=settings.kind,
                    relations=tuple(self.facts.relations()),
                ),
            ),
            provenance=Provenance.now(seed=seed),
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
        table = self.table.dropna(subset=["carried"])
        table = table.sort_values("carried", ascending=False, key=abs)
        chosen = table["chosen"].map({True: "yes", False: ""})
        head = "{layer:.0f}.{head:.0f}"
        carried = {"carried": "{carried:+.3f}", "of shift": "{share:.0%}"}
        columns = {"head": head, "attribution": "{attribution:+.3f}", **carried}
        columns |= {
            "interval": "[{low:+.3f}, {high:+.3f}]",
            "p_holm": "{p_holm:.2g}",
            "p_bh": "{p_bh:.2g}",
            "chosen": "{chosen}",
        }
        return Glance(
            f"{settings.title} · {settings.facts.title}, search on "
            f"{len(self.facts)} facts · {settings.scheme.name}, dose {settings.dose}",
            (
                Grid.of(table.assign(chosen=chosen), columns),
                Grid.of(
                    self.growth,
                    {"with head": head, **carried},
                    title="the set as it grows, on the facts that it was chosen on",
                ),
            ),
            (
                *([NOTHING] if self.nothing else ()),
                f"intervals and p: {self.estimand}, corrected for all {len(self.table)} heads; "
                "test the set on other facts",
                f"mean shift {self.shift.mean():+.2f} logits · {settings.attribution}, "
                f"{settings.kind} · seed {settings.seed}",
                f"attribution and ablation correlate by {agreement.pearson:.2f} (rank "
                f"{agreement.spearman:.2f}) over the {agreement.heads} heads ablated",
            ),
            ("test(other_facts)", "to_dataframe()", "plot()", "save(folder)"),
        )


def _bars(ax: Axes, rows: pd.DataFrame, axis: str, note: str) -> None:
    places = np.arange(len(rows))
    colours = [plots.COLOURS[1] if chosen else "#C8C8C8" for chosen in rows["chosen"]]
    drawn = np.append(rows[["carried", "attribution"]].to_numpy(), 0.0)
    least, most, room = drawn.min(), drawn.max(), 0.5 * float(np.ptp(drawn)) or 1.0
    left, right = least - room, most + room
    low, high = rows["low"], rows["high"]
    ends = np.stack([rows["carried"] - low.clip(left), high.clip(upper=right) - rows["carried"]])
    ax.barh(places, rows["carried"], color=colours, height=0.75)
    ax.errorbar(
        rows["carried"], places, xerr=ends, fmt="none", ecolor="#444444", elinewidth=0.9, capsize=2
    )
    inside = 0.015 * (right - left)
    for marker, x, out in (("<", left + inside, low < left), (">", right - inside, high > right)):
        ax.plot([x] * int(out.sum()), places[out], marker, color="#444444", ms=4)
    ax.plot(rows["attribution"], places, "D", color=plots.COLOURS[0], ms=4, label=axis)
    names = [f"{layer}.{head}" for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="#444444", linewidth=0.8)
    ax.set(
        xlabel="shift carried by the head (logits)",
        ylabel="layer.head",
        # A corrected interval over few relations can be many times as wide as the bars.
        xlim=(left, right),
        title="ablated one by one, chosen heads coloured; 95% intervals\n"
        f"corrected for all heads (arrow: beyond the axis)\n{note}".strip(),
    )
    ax.title.set_fontsize(9)
