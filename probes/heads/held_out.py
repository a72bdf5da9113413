"""The result of a held-out test: does ablating the heads undo the hijack on other facts?

Facts, relations and schemes outside the search are scored with no head ablated, with the set, and
with random sets, all on the same facts. Side effects on bare recall are reported next to it: a set
that undoes the hijack by making the model forget shows nothing. So one kind of random sets has as
many heads in the same layers, and the other harms bare recall as much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError, choice
from hijacklens.facts.fact import FactsRecord
from hijacklens.prompts.schemes import SchemeRecord
from hijacklens.results.glance import Glance, Grid, fraction, named, signed
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring import efficacy
from hijacklens.scoring.items import ITEM_COLUMNS, SkippedTable
from hijacklens.scoring.result import HijackSettings
from hijacklens.statistics import clustered, clustered_fraction, independent
from probes.heads.contrasts import CHOSEN, FRACTIONS, NONE, contrasts, side_effects

KINDS = {
    "layers": "random, in the same layers",
    "harm": "random, of equal harm to bare recall",
    "model": "random, anywhere in the model",
}
"""Kind of random sets -> its name. Results of earlier versions have `model` instead of `harm`."""
NEAREST = "random, in the same or the nearest layers"
"""The name of the kind `layers` if the same layers have too few other heads."""
RANDOM = "#9A9A9A"
FEW_SETS = 100
"""With fewer layer-matched sets than this, a table says how many there are."""
ATTEMPTS = 50
"""Draws per requested set, after which a small model is taken to have no further sets."""
ORDERS = 3
"""Random orders of the heads in which one set of equal harm is looked for."""
EQUAL, NATS = 0.2, 0.05
"""Harms are equal if they differ by at most this fraction of the chosen set's, or these nats."""
Head: TypeAlias = tuple[int, int]
"""Layer and query head, counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundOn:
    """The model, facts and prompts of the search that found the heads of a test."""

    model: str
    weights_hash: str
    facts: FactsRecord
    scheme: SchemeRecord
    dose: int
    kind: str
    relations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTestSettings(HijackSettings):
    """The settings of a held-out test."""

    heads: str
    """The set, such as `8.3+9.1`."""
    random_sets: int
    """How many of each kind."""
    search: FoundOn
    layer_sets: int | None = None
    """How many sets have as many heads in the same layers, and none of the chosen; unknown in
    results of earlier versions."""


SETS = Stored("sets.csv", dtypes={"ablation": str, "kind": str, "heads": str, "harm": float})


@dataclass(frozen=True, eq=False)
class HeadTest(Result):
    """Scores of unseen facts with a set of heads ablated, and with random sets ablated.

    `summary()` compares the hijack and `side_effects()` the bare query; scores are in nats.
    """

    items: Annotated[pd.DataFrame, Stored("items.parquet", columns=ITEM_COLUMNS)]
    """The items of `hijacklens.hijack` with the additional column `ablation`: `none`, `chosen`, or
    the name of a random set."""
    sets: Annotated[pd.DataFrame, SETS]
    """A row per ablation: its name, its kind (`none`, `chosen`, `layers`, `harm`), its heads, and
    its `harm`, how much lower the mean log p(true) of the search's bare queries is (nats; only
    `chosen` and `harm`). Sets of kind `harm` that turned out to do other harm than the chosen set
    are listed, and compared with nothing."""
    skipped: SkippedTable
    """Facts that were not tested, with the reason."""
    settings: HeadTestSettings
    provenance: Provenance
    figures: ClassVar = {"test": {}}
    derived: ClassVar = {"summary.csv": "summary", "side_effects.csv": "side_effects"}

    @property
    def kinds(self) -> dict[str, str]:
        """Name of each random set that is compared -> its kind."""
        random = self.sets[self.sets["kind"].isin(KINDS)]
        if (random["kind"] == "harm").any():
            chosen: Any = self.sets.set_index("ablation")["harm"][CHOSEN]
            same = np.array([equal(harm, chosen) for harm in random["harm"]])
            random = random.loc[same | (random["kind"] != "harm")]
        return dict(zip(random["ablation"], random["kind"], strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """The items: one row per ablation, fact, scheme and dose."""
        return self.items.copy()

    def summary(self, *, rule: efficacy.Rule = "first") -> pd.DataFrame:
        """Compare the hijack: a row per scheme, dose, group of facts and measure.

        The measures are `efficacy` and `retention` (fractions) and `shift` (nats; relative to the
        bare query under the same ablation). Columns: the value on the `bare` query, hijacked with
        `none` and with the `chosen` heads ablated; the paired `change` with its 95% interval and
        `p`, also corrected over the schemes and doses of the group (`p_holm`, `p_bh`); `recovered`,
        the fraction of the way from bare to hijacked that is undone, with its interval (`nan` if
        the hijack has no effect). `estimand` says what intervals and p are about: relations like
        these (of which there are `clusters`), or these facts if they have one relation.

        For each kind of random set: the mean, minimum and maximum over the sets; `_p`, the fraction
        of sets that undo as much, and `_least_p`, the smallest possible value of it; `beyond_`, the
        value with the chosen heads minus the mean over the sets, with its interval.

        `relations` is `all`, or `seen` and `new`: whether the search had facts of the same
        relation. The rule, `first`, `sum` or `mean`, says how targets are scored.

        Raises:
            InputError: An unknown rule.
        """
        choice("rule", rule, efficacy.RULES)
        search = self.settings.search
        return contrasts(
            self.items,
            self.kinds,
            rule=rule,
            seen_relations=search.relations,
            seen_scheme=search.scheme.name,
            reverse=[x.name for x in self.settings.schemes if x.direction == "reverse"],
        )

    def side_effects(self, *, rule: efficacy.Rule = "first") -> pd.DataFrame:
        """Compare the bare query by `retention`, `logprob_true` and `top_token`.

        `logprob_true` is the mean log-probability of the true target under the rule, in nats, and
        `top_token` the fraction of facts whose most likely next token stays the same. Columns and
        errors as for `summary`, but the `_p` of random sets counts those that do as much *harm*.
        """
        choice("rule", rule, efficacy.RULES)
        return side_effects(
            self.items,
            self.kinds,
            rule=rule,
            seen_relations=self.settings.search.relations,
        )

    def plot(self, *, rule: efficacy.Rule = "first") -> Figure:
        """Draw efficacy, shift and bare recall: no ablation, the set, and every random set."""
        choice("rule", rule, efficacy.RULES)
        settings = self.settings
        count = self.items["case_id"].nunique()
        title = (
            f"{settings.title} · {settings.facts.title}, {count} facts · "
            f"without heads {settings.heads} · rule {rule}"
        )
        margin = efficacy.margin(self.items, rule)
        keys = [self.items[name] for name in ("ablation", "scheme", "case_id")]
        bare = margin.where(self.items["dose"] == 0).groupby(keys).transform("first")
        table = self.items.assign(efficacy=margin > 0, shift=margin - bare, retention=bare < 0)
        run = table["scheme"] + "\ndose " + table["dose"].astype(str)
        hijacked = table.assign(run=run).loc[table["dose"] > 0]
        once = table.loc[~table.duplicated(subset=["ablation", "case_id"])].assign(run="bare query")
        panels = [
            (hijacked, "efficacy", "fraction\nwith false > true"),
            (hijacked, "shift", "mean,\nfrom the bare query (nats)"),
            (once, "retention", "fraction\nwith true > false"),
        ]
        about = independent(self.items["relation_id"])[1]
        layers = "same or nearest" if settings.layer_sets == 0 else "same"
        kinds = {NONE: NONE, CHOSEN: CHOSEN, **self.kinds}
        with plots.canvas(1, 3, width=4.4) as (figure, axes):
            for ax, (rows, column, label) in zip(axes, panels, strict=True):
                _dots(ax, rows, column, kinds, layers=layers)
                ax.set_ylabel(f"{column}: {label}")
                when = "bare: side effect on recall" if rows is once else f"hijacked: {column}"
                ax.set_title(when, fontsize=9)
                if column != "shift":
                    ax.set_ylim(-0.06, 1.06)
            axes[1].axhline(0, color="#888888", linewidth=0.8)
            plots.legend_below(figure, axes, columns=4, bars=f"95% intervals, about {about}")
            figure.suptitle(plots.escape(title), fontsize=10)
        return figure

    def findings(self) -> dict[str, Any]:
        """Return the counts."""
        return {"items": len(self.items), "skipped": len(self.skipped)}

    def glance(self, rule: efficacy.Rule = "first") -> Glance:
        """What the set does to the hijack and to bare recall, compared with random sets."""
        settings, counts = self.settings, Counter(self.kinds.values())
        notes = [f"intervals and p_holm: {_estimands(_printed(self.summary(rule=rule)))}"]
        kinds = [kind for kind in KINDS if kind in counts]
        if kinds:
            said = KINDS | ({"layers": NEAREST} if settings.layer_sets == 0 else {})
            sets = "; ".join(f"{kind}: {counts[kind]} {said[kind]}" for kind in kinds)
            least = ", ".join(f"{kind} {1 / (counts[kind] + 1):.2g}" for kind in kinds)
            notes.append(f"sets: {sets}; p: fraction of them that do as much, at least: {least}")
        if settings.layer_sets == 0:
            notes.append(
                "the layers of the heads have too few other heads, so no set has as many in each; "
                "random sets take the others from the nearest layers"
            )
        elif settings.layer_sets and settings.layer_sets < FEW_SETS:
            notes.append(
                f"sets with as many heads in the same layers: {settings.layer_sets} in all, so "
                f"their p is at least {1 / (settings.layer_sets + 1):.2g}, however many are drawn"
            )
        harm = self.sets.loc[self.sets["kind"] == "harm"]
        if len(harm):
            each = [
                f"{row.harm:.2f} ({row.heads.count('+') + 1} heads"
                + ("" if row.ablation in self.kinds else ", not compared")
                + ")"
                for row in harm.itertuples()
            ]
            notes.append(
                "ablation lowers log p(true) of the search's bare queries, in nats: the heads by "
                f"{self.sets.set_index('ablation')['harm'][CHOSEN]:.2f}, random sets by "
                f"{named(each, most=8)}; sets whose harm differs from that of the heads by "
                f"more than {EQUAL:.0%} (or {NATS} nats, if that is larger) are not compared"
            )
            if "harm" not in kinds:
                notes.append("no set of equal harm was found: search on more facts, or fewer heads")
        if len(self.skipped):
            reason = self.skipped["reason"].iloc[0]
            notes.append(f"skipped: {len(self.skipped)} (.skipped, skipped.csv); first: {reason}")
        return Glance(
            f"held out: {settings.facts.title}, {self.items['case_id'].nunique()} facts · "
            f"{settings.title} without heads {settings.heads} · rule {rule}",
            (
                _effects(self.summary(rule=rule), title="the hijack"),
                _effects(self.side_effects(rule=rule), title="side effects on the bare query"),
            ),
            tuple(notes),
            ("summary()", "side_effects()", "plot()", "save(folder)"),
        )


def _printed(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows to print; if all relations are new, or none is, `all` repeats them."""
    if table["relations"].nunique() == 2:
        return table.loc[table["relations"] != efficacy.ALL]
    return table


def _estimands(table: pd.DataFrame) -> str:
    """Say what intervals are about and, if that differs, in which rows."""
    rows = table["relations"]
    if table["scheme"].nunique() > 1:
        rows = table["scheme"] + " " + rows
    about = {of: list(part.unique()) for of, part in rows.groupby(table["estimand"], sort=False)}
    if len(about) == 1:
        return str(next(iter(about)))
    return "; ".join(f"{of} in rows {', '.join(names)}" for of, names in about.items())


def _effects(table: pd.DataFrame, *, title: str) -> Grid:
    """A row per measure. Side effects have no scheme, and no hijack that could be undone."""
    table = _printed(table)
    numbers = table.columns.intersection(["bare", "none", "chosen", *(f"{x}_mean" for x in KINDS)])
    rows = [
        row | {x: (fraction if row["measure"] in FRACTIONS else signed)(row[x]) for x in numbers}
        for row in table.to_dict("records")
    ]
    columns = {
        "scheme": "{scheme}",
        "dose": "{dose:d}",
        "relations": "{relations} ({n})",
        "measure": "{measure}",
        "bare": "{bare:>}",
        "none": "{none:>}",
        "chosen": "{chosen:>}",
        "change": "{change:+.3f} [{change_low:+.3f}, {change_high:+.3f}]",
        "p_holm": "{p_holm:.2g}",
        "recovered": "{recovered:.0%}",
        **{f"{kind}_mean": f"{{{kind}_mean}} (p {{{kind}_p:.2g}})" for kind in KINDS},
        "beyond_harm": "{beyond_harm:+.3f} [{beyond_harm_low:+.3f}, {beyond_harm_high:+.3f}]",
    }
    return Grid.of(
        rows, {name: form for name, form in columns.items() if name in table}, title=title
    )


def _dots(
    ax: Axes, items: pd.DataFrame, column: str, kinds: Mapping[str, str], *, layers: str
) -> None:
    """Draw the means of every run: random sets in grey; no ablation and the set with intervals."""
    runs = list(dict.fromkeys(items["run"]))
    looks: dict[str, tuple[str, float, str, str, int]] = {
        "layers": (f"random sets, {layers} layers", -0.24, "o", RANDOM, 4),
        "harm": ("random sets, equal harm", 0.24, "x", RANDOM, 4),
        "model": ("random sets, any layer", 0.24, "x", RANDOM, 4),
        "none": ("no ablation", -0.08, "s", "#000000", 6),
        "chosen": ("found heads ablated", 0.08, "D", plots.COLOURS[1], 6),
    }
    of_kind = items["ablation"].map(kinds)
    for kind, (label, offset, marker, colour, size) in looks.items():
        groups: Any = items[of_kind == kind].groupby(["ablation", "run"], sort=False)
        if not groups.ngroups:
            continue
        style = {"marker": marker, "color": colour, "markersize": size, "label": label}
        places = [runs.index(run) + offset for _, run in groups.groups]
        if kind in (NONE, CHOSEN):
            of = clustered if column == "shift" else clustered_fraction
            found = [
                of(rows[column].to_numpy(float), independent(rows["relation_id"])[0])
                for _, rows in groups
            ]
            values, ends = [one.value for one in found], plots.whiskers(found)
            ax.errorbar(places, values, yerr=ends, linestyle="none", **style)
        else:
            ax.plot(places, groups[column].mean(), linestyle="none", **style)
    ax.set_xticks(range(len(runs)), runs, fontsize=8)
    ax.set_xlim(-0.6, len(runs) - 0.4)


def draw(
    chosen: Sequence[Head], others: Sequence[Head], *, count: int, seed: int
) -> tuple[tuple[Head, ...], ...]:
    """Draw distinct random sets with as many heads in each layer as a chosen set, among `others`.

    A small model may have fewer than `count` sets. If a layer has too few other heads, the nearest
    layers with free heads provide the rest.

    Raises:
        InputError: Fewer heads remain than the chosen set has.
    """
    if len(others) < len(chosen):
        raise InputError(
            f"a random set of {len(chosen)} heads cannot be drawn from the {len(others)} that are "
            f"not chosen; choose fewer of the model's {len(others) + len(chosen)} heads, or "
            "random_sets=0."
        )
    rng = np.random.default_rng([seed, 1])
    sets: dict[tuple[Head, ...], None] = {}
    for _ in range(ATTEMPTS * count):
        if len(sets) == count:
            break
        free = list(others)
        for i in rng.permutation(len(chosen)):
            distances = [abs(layer - chosen[i][0]) for layer, _ in free]
            nearest = min(distances)
            pool = [x for x, far in zip(free, distances, strict=True) if far == nearest]
            free.remove(pool[rng.integers(len(pool))])
        sets.setdefault(tuple(head for head in others if head not in free))
    return tuple(sets)


def layer_sets(chosen: Sequence[Head], others: Sequence[Head]) -> int:
    """Return how many sets of other heads have as many in each layer as the chosen set."""
    here, there = (Counter(layer for layer, _ in heads) for heads in (chosen, others))
    return math.prod(math.comb(there[layer], size) for layer, size in here.items())


def equally_harmful(
    chosen: Sequence[Head],
    others: Sequence[Head],
    harm: Callable[[Sequence[Head]], float],
    *,
    count: int,
    seed: int,
) -> dict[tuple[Head, ...], float]:
    """Return random sets of other heads whose harm is that of the chosen set, with their harm.

    Each set is the start of a random order of the heads, and has at least as many heads as the
    chosen set. Its size is found by bisection, as if each further head did harm; of the sizes that
    were tried, the nearest in harm is used. If its harm is not `equal` to that of the chosen set,
    further orders are tried, `ORDERS` in all, and the nearest set is returned.
    Costs about log2(number of heads) calls for each order.
    """
    target, rng = harm(chosen), np.random.default_rng([seed, 2])
    sets: dict[tuple[Head, ...], float] = {}
    for _ in range(count):
        tried: dict[tuple[Head, ...], float] = {}
        nearest: tuple[Head, ...] = ()
        for _ in range(ORDERS):
            order = [others[i] for i in rng.permutation(len(others))]
            low, high = len(chosen), len(others)
            while low <= high:
                size = (low + high) // 2
                heads = tuple(sorted(order[:size]))
                tried[heads] = harm(heads)
                low, high = (size + 1, high) if tried[heads] < target else (low, size - 1)
            nearest = min(tried, key=lambda heads: abs(tried[heads] - target))
            if equal(tried[nearest], target):
                break
        sets[nearest] = tried[nearest]
    return sets


def equal(harm: float, target: float) -> bool:
    """Return whether a harm to bare recall counts as equal to that of the chosen set, in nats."""
    return abs(harm - target) <= max(EQUAL * abs(target), NATS)
