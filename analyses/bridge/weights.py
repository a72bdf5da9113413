"""The bridge by weights: value matrices as memories and embedding spectra, side by side.

bridge-memory     memory fit (cosine, span, recall, each beside its two controls) of a trained W_V
                  for the Hamming-1 neighbours of equation 5.1, and of the OV circuits of language
                  models for pairs of tokens that facts associate
bridge-spectrum   singular values of embeddings, beside those of the same embeddings with the
                  entries of each column permuted, which have the same columns and no directions
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
from analyses.reproduction.check import above, below, exact, mean
from analyses.reproduction.drawing import BOUND
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
"""Of the memory fit: where and in which colour each is drawn."""
MEASURED, PERMUTED = "measured", "permuted"
SYMLOG_TICKS = {-0.1: "-.1", 0.0: "0", 0.1: ".1", 1.0: "1"}
LEVELS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
"""Ticks of singular values over their root mean square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySides(Sides):
    """The bridge of value matrices."""

    draws: int
    """Draws of either control; the smallest p-value is 1 / (draws + 1)."""
    cues: tuple[Cue, ...] = tuple(CUES)
    """What of a fact looks its true target up, as for `probes.memory_fit.associations.of_facts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumSides(Sides):
    """The bridge of embeddings; no fact is scored."""

    tokens: int | None
    """Tokens of a language model, a seeded sample; None for its vocabulary."""


def memories(settings: MemorySides, bench: Workbench) -> pd.DataFrame:
    """A row per matrix, associations, statistic and control (`probes.memory_fit.result`)."""
    facts = facts_of(settings, bench)

    def fitted(source: Any, pairs: Associations, side: str, label: str) -> pd.DataFrame:
        found = memory_fit.fit(source, pairs, draws=settings.draws, seed=settings.seed)
        return found.to_dataframe().assign(side=side, associations=label, pairs=len(pairs))

    trained = one_layer(settings, bench)
    parts = [fitted(trained, associations.neighbours(trained.task), ONE_LAYER, NEIGHBOURS)]
    for name in bench.models:
        model = bench.language_model(name)
        for cue in settings.cues:
            pairs = associations.of_facts(facts, model.tokenizer, cue=cue)
            parts.append(fitted({name: model}, pairs, LANGUAGE, CUES[cue]))
    return pd.concat(parts, ignore_index=True)


def draw_memories(table: pd.DataFrame, settings: MemorySides) -> Figure:
    """A panel per statistic: every matrix as a point, lines what the controls give on average.

    The mean control is that of a row; a matrix outside of it need not lie outside of its own, which
    the checks are about. Cosines and spans of language models are small beside the one-layer's, so
    that their axis is logarithmic from .03 on.
    """
    rows = _groups(table)
    width, height = plots.PAGE / len(STATISTICS), 1.5 + 0.4 * len(rows)
    with plots.canvas(1, len(STATISTICS), width=width, height=height) as (figure, axes):
        spread = np.random.default_rng(0)
        for panel, statistic in zip(axes, STATISTICS, strict=True):
            for y, own in enumerate(rows.values()):
                of: Any = own[own["statistic"] == statistic]
                for control, shift, shade in CONTROLS:
                    at = of[of["control"] == control]
                    panel.errorbar(
                        at["mean"].mean(),
                        y + shift,
                        xerr=2 * at["std"].mean(),
                        fmt="|",
                        color=shade,
                        lw=3,
                        ms=8,
                        label=f"{control} ± 2 sd" if y == 0 else None,
                    )
                value = of[of["control"] == "shuffled"]["value"]
                height = y + spread.uniform(-0.1, 0.1, len(value))
                label = "one matrix (a head, or a seed's $W_V$)" if y == 0 else None
                panel.plot(value, height, "o", color=plots.COLOURS[1], ms=3, alpha=0.6, label=label)
            panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
            panel.invert_yaxis()
            if panel is not axes[0]:
                panel.tick_params(labelleft=False)
            panel.set_xlabel(LABELS[statistic], fontsize=8)
            panel.tick_params(axis="x", labelsize=7)
            if statistic == "recall":
                panel.axvline(0.5, color="black", **BOUND, label="chance")
            else:
                panel.set_xscale("symlog", linthresh=0.03)
                panel.set_xticks(list(SYMLOG_TICKS), list(SYMLOG_TICKS.values()))
                panel.xaxis.set_minor_locator(NullLocator())
        plots.legend_below(figure, axes, columns=2)
        return figure


def _groups(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    found = {}
    for label, of in table.groupby("associations", sort=False):
        if label == NEIGHBOURS:
            found[f"one-layer $W_V$\n{label}"] = of
        else:
            models = of.groupby("model", sort=False)
            found |= {f"{name}\n{label}, n = {own['pairs'].max()}": own for name, own in models}
    return found


def spectra(settings: SpectrumSides, bench: Workbench) -> pd.DataFrame:
    """Singular values over their root mean square, per model, measured and permuted.

    Embeddings are centred: that of the constant direction, which is no feature of any token, would
    outshine all others in a language model.
    """
    parts = []
    for side, name, W_E in _embeddings(settings, bench):
        centred = W_E.cpu().double()
        centred -= centred.mean(0)
        matrices = {MEASURED: centred, PERMUTED: _permuted(centred, settings.seed)}
        found = spectrum(matrices)
        rank = found.summary().set_index("model")["effective_rank"]
        values = found.to_dataframe().rename(columns={"model": "matrix"})
        size = values.groupby("matrix")["value"].transform(lambda s: (s**2).mean() ** 0.5)
        parts.append(
            pd.DataFrame(
                {
                    "side": side,
                    "model": name,
                    "matrix": values["matrix"],
                    "index": values["index"],
                    "value": values["value"] / size,
                    "effective_rank": values["matrix"].map(rank),
                    "bits": settings.bits,
                }
            )
        )
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


def _permuted(W_E: Tensor, seed: int) -> Tensor:
    """The entries of each column in an order of its own."""
    return torch.from_numpy(np.random.default_rng(seed).permuted(W_E.numpy(), axis=0))


def draw_spectra(table: pd.DataFrame, settings: SpectrumSides) -> Figure:
    """Singular values by index, one-layer models left, language models right; dashed: permuted.

    The index of language models is on a logarithmic axis. No colour stands on both sides.
    """
    with plots.panels(2, height=3.1, share_y=True) as (figure, axes):
        for panel, side in zip(axes, (ONE_LAYER, LANGUAGE), strict=True):
            of_side = table[table["side"] == side]
            first = 0 if side == ONE_LAYER else settings.seeds
            for i, (name, own) in enumerate(of_side.groupby("model", sort=False), start=first):
                colour, marker = plots.series(i)
                for matrix, style in ((MEASURED, "-"), (PERMUTED, "--")):
                    of = own[own["matrix"] == matrix]
                    panel.plot(
                        of["index"],
                        of["value"],
                        style,
                        color=colour,
                        marker=marker if side == ONE_LAYER and matrix == MEASURED else None,
                        ms=3.5,
                        lw=1.2,
                        label=name if matrix == MEASURED else None,
                    )
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
    """A row per matrix: its value, and the mean, z and p of the control that it clears by less."""
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


def _least_certain(table: Any, cue: Cue) -> Interval:
    """The p-value, corrected for all heads, of a model's best head; the largest of the models."""
    found = _verdicts(table, LANGUAGE, "recall", CUES[cue])
    return exact(found.groupby("model").p_family.min().max())


def _purity(table: Any) -> Interval:
    """Cosine to the memory beyond a matrix's own control: trained W_V minus the best head's."""
    one, heads = (_verdicts(table, side, "cosine") for side in (ONE_LAYER, LANGUAGE))
    return mean(one.value - one.chance - (heads.value - heads.chance).max())


def _leading(own: Any) -> int:
    """How many leading singular values lie above the permuted ones of the same index."""
    wide = own.pivot(index="index", columns="matrix", values="value")
    larger = (wide[MEASURED] > wide[PERMUTED]).to_numpy()
    return int(np.argmin(larger)) if not larger.all() else len(larger)


def _fewest(table: Any) -> Interval:
    groups = table[table.side == LANGUAGE].groupby("model")
    return exact(min(_leading(own) for _, own in groups))


def _gap(table: Any) -> Interval:
    """s_m over s_(m+1) of one-layer models; the least of them."""
    rows = table[(table.side == ONE_LAYER) & (table.matrix == MEASURED)]
    wide = rows.pivot(index="model", columns="index", values="value")
    bits = rows.bits.iloc[0]
    return exact((wide[bits] / wide[bits + 1]).min())


def _spared(table: Any) -> Interval:
    """Effective rank over that of permuted embeddings: least language model - most one-layer."""
    rank = table.groupby(["side", "model", "matrix"]).effective_rank.first().unstack("matrix")
    ratio = rank[MEASURED] / rank[PERMUTED]
    return exact(ratio[LANGUAGE].min() - ratio[ONE_LAYER].max())


ANALYSES = (
    Analysis(
        id="bridge-memory",
        settings={
            "quick": MemorySides(
                bits=6,
                d_model=64,
                length=256,
                seeds=3,
                steps=1500,
                learning_rates=(0.01,),
                limit=40,
                draws=39,
            ),
            "paper": MemorySides(
                bits=7, d_model=128, length=256, seeds=5, steps=4000, limit=200, draws=199
            ),
        },
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
                "a trained W_V is closer to its memory than any head to that of facts (cosines, "
                "each beyond its own control)",
                _purity,
                0.0,
            ),
            below(
                "near words: in every model some head recalls targets (p of the best, corrected)",
                lambda t: _least_certain(t, "near"),
                0.05,
            ),
            below(
                "subjects: in every model some head recalls targets (p of the best, corrected)",
                lambda t: _least_certain(t, "subject"),
                0.05,
            ),
        ),
    ),
    Analysis(
        id="bridge-spectrum",
        settings={
            "quick": SpectrumSides(
                bits=7,
                d_model=32,
                length=256,
                seeds=2,
                steps=2500,
                learning_rates=(0.01,),
                limit=None,
                tokens=4096,
            ),
            "paper": SpectrumSides(
                bits=8, d_model=64, length=256, seeds=4, steps=4000, limit=None, tokens=None
            ),
        },
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
                "language models: some leading singular values lie above permuted ones (fewest)",
                _fewest,
                0.0,
            ),
            above(
                "one-layer embeddings use fewer of their directions (effective rank to permuted)",
                _spared,
                0.05,
            ),
        ),
    ),
)
