"""The bridge by weights: value matrices as memories, and spectra of embeddings.

bridge-memory     memory fit (cosine, span and recall, each with two controls) of a trained W_V for
                  the Hamming-1 neighbours of equation 5.1, and of the OV circuits of language
                  models for pairs of tokens that facts associate
bridge-spectrum   singular values of embeddings, compared with those of the same embeddings with the
                  entries of each column permuted, which keep their columns but have no directions
                  that tokens share (parallel analysis, Horn 1965)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from analyses.bridge.sides import LANGUAGE, ONE_LAYER, OURS, Sides, facts_of, one_layer
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, mean, paired
from analyses.reproduction.drawing import BOUND
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.statistics import Interval
from probes import memory_fit
from probes.geometry.spectra import spectrum
from probes.memory_fit import associations
from probes.memory_fit.associations import Associations, Cue
from probes.memory_fit.outer_products import STATISTICS
from probes.memory_fit.result import LABELS

CUES: dict[Cue, str] = {"subject": "subject → target", "near": "near word → target"}
NEIGHBOURS = "Hamming-1 neighbours"
CONTROLS = (("shuffled", 0.16, "#999999"), ("rotated", -0.16, plots.COLOURS[5]))
"""Controls of the memory fit, with the vertical shift and the colour of each."""
MEASURED, PERMUTED = "measured", "permuted"
LINEAR = 0.03
"""Cosines and spans are drawn on a linear scale up to this size and a logarithmic one beyond it."""
SYMLOG_TICKS = {-0.1: "-.1", 0.0: "0", 0.1: ".1", 1.0: "1"}
LEVELS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
"""Ticks of singular values divided by their root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySides(Sides):
    """The bridge of value matrices."""

    draws: int
    """Draws of each control; the smallest possible p-value is 1 / (draws + 1)."""
    cues: tuple[Cue, ...] = tuple(CUES)
    """The part of a fact that is associated with its true target (`associations.of_facts`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumSides(Sides):
    """The bridge of embeddings; no fact is scored."""

    tokens: int | None = None
    """Number of tokens of a language model, a seeded sample; None for its vocabulary."""


def memories(settings: MemorySides, bench: Workbench) -> pd.DataFrame:
    """Return a row per matrix, associations, statistic and control (`probes.memory_fit.result`)."""
    facts = facts_of(settings, bench)

    def fitted(models: Any, pairs: Associations, side: str, label: str) -> pd.DataFrame:
        fit = memory_fit.fit(models, pairs, draws=settings.draws, seed=settings.seed)
        return fit.to_dataframe().assign(side=side, associations=label, pairs=len(pairs))

    trained = one_layer(settings, bench)
    parts = [fitted(trained, associations.neighbours(trained.task), ONE_LAYER, NEIGHBOURS)]
    for name in bench.models:
        model = bench.language_model(name)
        for cue in settings.cues:
            pairs = associations.of_facts(facts, model.tokenizer, cue=cue)
            parts.append(fitted({name: model}, pairs, LANGUAGE, CUES[cue]))
    return pd.concat(parts, ignore_index=True)


def draw_memories(table: pd.DataFrame, settings: MemorySides) -> Figure:
    """Draw a panel per statistic: every matrix as a point, and the controls averaged over a row.

    The checks compare each matrix with its own control, not with this average. Cosines and spans
    are much smaller in language models than in the one-layer model, so their axis is logarithmic
    from `LINEAR` on.
    """
    rows = _groups(table)
    width, height = plots.PAGE / len(STATISTICS), 1.5 + 0.4 * len(rows)
    with plots.canvas(1, len(STATISTICS), width=width, height=height) as (figure, axes):
        spread = np.random.default_rng(0)
        for panel, statistic in zip(axes, STATISTICS, strict=True):
            for y, group in enumerate(rows.values()):
                fits: Any = group[group["statistic"] == statistic]
                for control, shift, shade in CONTROLS:
                    chance = fits[fits["control"] == control]
                    x, error = chance["mean"].mean(), 2 * chance["std"].mean()
                    style = {"fmt": "|", "color": shade, "lw": 3, "ms": 8}
                    label = f"{control} ± 2 sd" if y == 0 else None
                    panel.errorbar(x, y + shift, xerr=error, label=label, **style)
                value = fits[fits["control"] == "shuffled"]["value"]
                height = y + spread.uniform(-0.1, 0.1, len(value))
                label = "one matrix (a head, or a seed's $W_V$)" if y == 0 else None
                panel.plot(value, height, "o", color=plots.COLOURS[1], ms=3, alpha=0.6, label=label)
            panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
            panel.invert_yaxis()
            if panel is not axes[0]:
                panel.tick_params(labelleft=False)
            scale = "" if statistic == "recall" else f"\n(log scale beyond ±{LINEAR:g})"
            panel.set_xlabel(f"{LABELS[statistic]}{scale}", fontsize=8)
            panel.tick_params(axis="x", labelsize=7)
            if statistic == "recall":
                panel.axvline(0.5, color="black", **BOUND, label="chance")
            else:
                panel.set_xscale("symlog", linthresh=LINEAR)
                panel.set_xticks(list(SYMLOG_TICKS), list(SYMLOG_TICKS.values()))
                panel.xaxis.set_minor_locator(NullLocator())
        plots.legend_below(figure, axes, columns=2)
        return figure


def _groups(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of the figure by label: the one-layer models, and each language model."""
    groups = {}
    for label, fits in table.groupby("associations", sort=False):
        if label == NEIGHBOURS:
            groups[f"one-layer $W_V$\n{label}"] = fits
        else:
            for name, rows in fits.groupby("model", sort=False):
                groups[f"{plots.escape(str(name))}\n{label}, n = {rows['pairs'].max()}"] = rows
    return groups


def spectra(settings: SpectrumSides, bench: Workbench) -> pd.DataFrame:
    """Return singular values over their root mean square, per model, measured and permuted.

    Embeddings are centred: in a language model the singular value of their mean, which is a feature
    of no token, would dwarf all others.
    """
    parts = []
    for side, name, W_E in _embeddings(settings, bench):
        centred = W_E.cpu().double()
        centred -= centred.mean(0)
        singular = spectrum({MEASURED: centred, PERMUTED: permuted(centred, settings.seed)})
        rank = singular.summary().set_index("model")["effective_rank"]
        values = singular.to_dataframe().rename(columns={"model": "matrix"})
        size = values.groupby("matrix")["value"].transform(lambda s: (s**2).mean() ** 0.5)
        part = values[["matrix", "index"]].assign(
            value=values["value"] / size,
            effective_rank=values["matrix"].map(rank),
            bits=settings.bits,
        )
        part.insert(0, "model", name)
        part.insert(0, "side", side)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _embeddings(settings: SpectrumSides, bench: Workbench) -> Iterator[tuple[str, str, Tensor]]:
    for seed, model in enumerate(one_layer(settings, bench).best()):
        yield ONE_LAYER, f"seed {seed}", model.W_E.detach()
    for name in bench.models:
        W_E = bench.language_model(name).W_E.detach().cpu()
        if settings.tokens is not None and settings.tokens < len(W_E):
            draw = torch.Generator().manual_seed(settings.seed)
            W_E = W_E[torch.randperm(len(W_E), generator=draw)[: settings.tokens]]
        yield LANGUAGE, name, W_E


def permuted(W_E: Tensor, seed: int) -> Tensor:
    """Permute the entries of each column, independently of the other columns."""
    return torch.from_numpy(np.random.default_rng(seed).permuted(W_E.numpy(), axis=0))


def draw_spectra(table: pd.DataFrame, settings: SpectrumSides) -> Figure:
    """Draw singular values by index: one-layer models left, language models right.

    Dashed: permuted. The index of language models is on a logarithmic axis. The two panels share no
    colour.
    """
    with plots.panels(2, height=3.1, share_y=True) as (figure, axes):
        for panel, side in zip(axes, (ONE_LAYER, LANGUAGE), strict=True):
            models = table[table["side"] == side].groupby("model", sort=False)
            first = 0 if side == ONE_LAYER else settings.seeds
            for i, (name, rows) in enumerate(models, start=first):
                colour, marker = plots.series(i)
                solid, dashed = (rows[rows["matrix"] == each] for each in (MEASURED, PERMUTED))
                style = {"color": colour, "ms": 3.5, "lw": 1.2}
                marker = marker if side == ONE_LAYER else None
                label = plots.escape(str(name))
                panel.plot(solid["index"], solid["value"], marker=marker, label=label, **style)
                panel.plot(dashed["index"], dashed["value"], "--", **style)
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            levels = [level for level in LEVELS if low <= level <= high]
            panel.set_yticks(levels, [f"{level:g}" for level in levels])
            panel.yaxis.set_minor_locator(NullLocator())
        axes[0].plot([], [], "--", color="black", lw=1.2, label="columns permuted")
        axes[0].axvline(settings.bits + 0.5, color="#666666", **BOUND, label="after index m")
        axes[0].set_title(f"one-layer, m = {settings.bits}, d = {settings.d_model}", fontsize=9)
        axes[1].set_title("language models", fontsize=9)
        axes[1].set_xscale("log")
        value = "singular value of centred $W_E$\nover their root mean square"
        plots.label_outer(axes, x="index", y=value)
        plots.legend_below(figure, axes, columns=4)
        return figure


def _verdicts(table: Any, side: str, statistic: str, label: str | None = None) -> Any:
    """Return the value of each matrix with the mean, z and p of the control nearer to it."""
    rows = table[(table.side == side) & (table.statistic == statistic)]
    rows = rows if label is None else rows[rows.associations == label]
    return (
        rows.groupby(["model", "associations", "layer", "head"])
        .agg(
            value=("value", "first"),
            chance=("mean", "max"),
            z=("z", "min"),
            p_family=("p_family", "max"),
        )
        .reset_index()
    )


def _least_certain(table: Any, cue: Any) -> Interval:
    """Return the largest over models of the best head's p-value, corrected for all heads."""
    heads = _verdicts(table, LANGUAGE, "recall", CUES[cue])
    return exact(heads.groupby("model").p_family.min().max())


def _purity(table: Any) -> Interval:
    """Return the excess of cosine over the control: trained W_V minus the best head."""
    one, heads = (_verdicts(table, side, "cosine") for side in (ONE_LAYER, LANGUAGE))
    return mean(one.value - one.chance - (heads.value - heads.chance).max())


def _fewest(table: Any) -> Interval:
    """Count the leading singular values above the permuted ones; return the smallest count."""
    language = table[table.side == LANGUAGE]
    excess = paired(language, "value", ["model", "index"], matrix=(MEASURED, PERMUTED))
    leading = (excess > 0).astype(int).groupby("model").cummin()
    return exact(leading.groupby("model").sum().min())


def _gap(table: Any) -> Interval:
    """Return the smallest s_m / s_(m+1) of the one-layer models."""
    rows = table[(table.side == ONE_LAYER) & (table.matrix == MEASURED)]
    wide = rows.pivot(index="model", columns="index", values="value")
    bits = rows.bits.iloc[0]
    return exact((wide[bits] / wide[bits + 1]).min())


def _spared(table: Any) -> Interval:
    """Return how far every language model's relative effective rank exceeds the one-layer's.

    The relative rank is the effective rank divided by the rank of the permuted embeddings.
    """
    rank = table.groupby(["side", "model", "matrix"]).effective_rank.first().unstack("matrix")
    ratio = rank[MEASURED] / rank[PERMUTED]
    return exact(ratio[LANGUAGE].min() - ratio[ONE_LAYER].max())


ANALYSES = (
    Analysis(
        id="bridge-memory",
        settings=scales(
            MemorySides(bits=7, d_model=128, limit=200, draws=199),
            bits=6,
            d_model=64,
            seeds=3,
            steps=1500,
            limit=40,
            draws=39,
        ),
        ours=(*OURS, "draws", "cues"),
        run=memories,
        draw=draw_memories,
        checks=(
            above(
                "a trained W_V recalls neighbours above both controls (z against the nearer one, "
                "mean over seeds)",
                lambda t: mean(_verdicts(t, ONE_LAYER, "recall").z),
                2.0,
            ),
            above(
                "a trained W_V is closer to its memory than any head is to the memory of facts "
                "(cosine minus that of the control)",
                _purity,
                0.0,
            ),
            *(
                below(
                    f"{cues}: in every model some head recalls targets (best head's corrected p)",
                    lambda t, cue=cue: _least_certain(t, cue),
                    0.05,
                )
                for cue, cues in (("near", "near words"), ("subject", "subjects"))
            ),
        ),
    ),
    Analysis(
        id="bridge-spectrum",
        settings=scales(
            SpectrumSides(bits=8, d_model=64, seeds=4),
            bits=7,
            d_model=32,
            seeds=2,
            steps=2500,
            tokens=4096,
        ),
        ours=(*OURS, "tokens"),
        run=spectra,
        draw=draw_spectra,
        checks=(
            above(
                "one-layer: singular value m is above 1.2 times the next one, in every model",
                _gap,
                1.2,
            ),
            above(
                "language models: some leading singular values exceed permuted ones (fewest)",
                _fewest,
                0.0,
            ),
            above(
                "one-layer embeddings use a smaller fraction of their directions (effective rank "
                "over permuted: language minus one-layer)",
                _spared,
                0.05,
            ),
        ),
    ),
)
