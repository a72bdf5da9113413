"""The logit lens: what the model would answer if it stopped after a layer, at every position.

The residual stream after each layer goes through the model's own final norm (with the scale of
that stream, not a frozen one), its unembedding, and what it does with its logits. At the last
position this shows in which layers the answer changes from o* to o_; at other positions, where a
target is first written.
(nostalgebraist, "interpreting GPT: the logit lens", 2020.)

    pairs = hl.pairs(model, facts, scheme="do-not-think", dose=1)
    lens = logit_lens.trace(model, pairs[0])
    lens.to_dataframe()                  # layer, position, ..., difference, logprob_true, ...
    lens.plot()

Layers count from 0; the row of layer -1 is the stream before layer 0. The last layer's row at the
last position is the model's own answer. The one-layer model has no residual stream: its layer -1
is an embedding that does not reach the output.

Cost: a forward pass that keeps the stream [layer, pos, d_model] and unembeds all layers; several if
[layer, pos, vocab] logits are too many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hijacklens import plots
from hijacklens.engine.batch_size import read_values
from hijacklens.errors import InputError, whole_number
from hijacklens.facts.fact import Fact
from hijacklens.models.agreement import require_agreement, require_agreement_on
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, NamedHook, device_of
from hijacklens.models.identity import identify
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at, spans_of
from hijacklens.prompts.correspondence import Unit, units
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.prompt import DOSE, MOST_SENTENCES
from hijacklens.results.glance import Glance, Grid, Shown
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.pairs import Pair, Pairs, only, takes_facts
from hijacklens.scoring.result import ProbedSettings
from probes.rounding import rounding

TAIL = ("ln_final", "project_out")
"""The parts between the stream and the unembedding."""


@dataclass(frozen=True, slots=True, eq=False)
class Depths(Shown):
    """Two tokens read through the lens in a batch of prompts; row 0 is before the first layer.

    Log-probabilities are in nats.
    """

    logprob_plus: Float[np.ndarray, "depth batch pos"]
    logprob_minus: Float[np.ndarray, "depth batch pos"]
    rank_plus: Int[np.ndarray, "depth batch pos"]
    """How many tokens are more likely; 0 for the most likely token."""
    rank_minus: Int[np.ndarray, "depth batch pos"]

    @property
    def difference(self) -> Float[np.ndarray, "depth batch pos"]:
        """Logit of the first token minus logit of the second; the normaliser cancels."""
        return self.logprob_plus - self.logprob_minus

    def glance(self) -> Glance:
        """How many prompts, depths and positions."""
        depths, batch, pos = self.logprob_plus.shape
        steps = ("difference", "logprob_plus", "rank_plus")
        return Glance(f"{batch} prompts, {depths} depths, {pos} positions", steps=steps)


@exclusively
def through(
    model: HookedModel,
    layout: Layout,
    plus: Sequence[int],
    minus: Sequence[int],
    *,
    probes: Sequence[Probe] = (),
) -> Depths:
    """Read two tokens for each row of a batch (right-padded or not) at every layer and position.

    The model is any hooked one, including the one-layer model. Probes act in their order; the
    layout has their spans.

    Raises:
        InputError: The model is in training mode, the rows and tokens differ in number, hooks do
            not show every layer's stream, or more than a norm is between the last one and the
            unembedding.
    """
    require_agreement(model, operation="the logit lens")
    require_agreement_on(model, layout.tokens[0])
    rows, pos = layout.tokens.shape
    if len(plus) != rows or len(minus) != rows:
        raise InputError(f"give a token per row: {rows} rows, {len(plus)} and {len(minus)} tokens.")
    depths, active = int(model.cfg.n_layers) + 1, check_probes(probes)
    pair = torch.tensor([list(plus), list(minus)]).repeat(1, depths)
    at_once = max(1, read_values(layout.tokens.device) // (pos * int(model.cfg.d_vocab)))
    logprobs, ranks = [], []
    for read in torch.arange(depths * rows).split(at_once):
        at_row = torch.arange(len(read)).repeat_interleave(pos)
        at_position = torch.arange(pos).repeat(len(read))
        lens = HookProbe("lens", _hooks(model, read), packs=True)
        logits = logits_at(model, layout, at_row, at_position, probes=[*active, lens])
        for one, tokens in zip(logits.split(pos), pair.T[read], strict=True):
            values = one.float()
            two = values[:, tokens.to(values.device)]  # [pos, 2]
            logprobs.append((two - values.logsumexp(-1, keepdim=True)).T.cpu().double())
            ranks.append(torch.stack([(values > x[:, None]).sum(-1) for x in two.T]).cpu())
    p, r = (torch.stack(x).reshape(depths, rows, 2, pos).numpy() for x in (logprobs, ranks))
    return Depths(p[:, :, 0], p[:, :, 1], r[:, :, 0], r[:, :, 1])


def _hooks(model: HookedModel, read: Int[Tensor, " read"]) -> list[NamedHook]:
    """Return hooks that let a pass unembed some of its streams, numbered by depth and row.

    What the model does after its last norm (adapters, multipliers, soft-caps) is done to all.
    """
    untyped: Any = model
    tail = [getattr(untyped, part) for part in TAIL if f"{part}.hook_out" in model.hook_dict]
    layers = range(int(model.cfg.n_layers))
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in layers)]
    streams: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor, hook: Any) -> None:
        streams[name] = value

    def unembed(value: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        if len(streams) < len(names):
            raise _refused(model, "its hooks do not show the stream after every layer")
        ends = []
        for name in names:
            end = streams[name].to(streams[names[-1]].device)
            for part in tail:
                end = part(end)
            ends.append(end.to(value))
        tolerance = rounding(value.dtype)
        same = ends[-1].shape == value.shape
        if not same or (ends[-1] - value).norm() > tolerance * value.norm():
            raise _refused(model, "it does more than a norm between its layers and its unembedding")
        return torch.cat(ends)[read.to(value.device)]

    return [*((name, partial(keep, name)) for name in names), ("unembed.hook_in", unembed)]


def _refused(model: HookedModel, reason: str) -> InputError:
    return InputError(
        f"the logit lens cannot read {model.cfg.model_name!r}: {reason}, so its last row would not "
        "be the model's answer. Patch activations (probes.patching) instead."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LensSettings(ProbedSettings):
    """The settings of a logit lens."""

    fact: Fact
    doses: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LogitLens(Result):
    """What every layer and position of a fact's prompts would answer; made by `trace`."""

    table: Annotated[pd.DataFrame, Stored("lens.parquet")]
    """See `to_dataframe`."""
    settings: LensSettings
    provenance: Provenance

    figures: ClassVar = {"lens": {}}

    def to_dataframe(self) -> pd.DataFrame:
        """A row per dose, layer and position.

        `dose, layer, position, token, span`; `difference`, logit o_ - logit o*; `logprob_true`
        and `logprob_false` in nats; `rank_true` and `rank_false`, 0 for the most likely token.
        Layer -1 is before the first one. Spans are `hijacklens.prompts.correspondence.SPANS`.
        """
        return self.table.copy()

    def at_last(self) -> pd.DataFrame:
        """Return the rows of the last position of each prompt, where the answer is read."""
        ends = self.table.groupby("dose")["position"].transform("max")
        return self.table.loc[self.table["position"] == ends].reset_index(drop=True)

    def plot(self, *, dose: int | None = None) -> Figure:
        """Draw the difference at the last position, and a map of it at a dose (the highest).

        Raises:
            InputError: A dose that was not read.
        """
        doses = sorted(self.table["dose"].unique())
        shown = doses[-1] if dose is None else dose
        if shown not in doses:
            raise InputError(f"dose {dose} was not read; there are {', '.join(map(str, doses))}.")
        rows = self.table.loc[self.table["dose"] == shown]
        grid = rows.pivot_table(index="position", columns="layer", values="difference")
        tokens = rows.groupby("position")["token"].first()
        last, fact = self.at_last(), self.settings.fact
        what = f"logit {fact.target_false!r} - logit {fact.target_true!r}"
        width, height = max(4.4, 1.8 + 0.2 * len(grid.columns)), max(3.2, 1.4 + 0.22 * len(grid))
        with plots.canvas(1, 2, width=width, height=height) as (figure, (lines, ax)):
            for i, one in enumerate(doses):
                at = last[last["dose"] == one]
                style: Any = plots.line(i) | {"markersize": 3.5}
                lines.plot(at["layer"], at["difference"], label=f"dose {one}", **style)
            lines.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
            lines.xaxis.set_major_locator(MaxNLocator(integer=True))
            lines.set_xlabel("after layer (-1: before the first)")
            lines.set_ylabel(plots.escape(f"{what}\nat the last token"))
            title = f"{self.settings.title}, {self.settings.scheme.name}"
            figure.suptitle(plots.escape(title))
            plots.legend_below(figure, [lines], columns=6)
            # With tied embeddings a target's own embedding would dominate the colour scale.
            values = grid.to_numpy()
            top = float(np.abs(values[:, 1:]).max())
            plots.heat_map(ax, values, rows=tokens, columns=grid.columns, label=what, limit=top)
            ax.set(xlabel="after layer", title=f"dose {shown}, every token")
        return figure

    def findings(self) -> dict[str, Any]:
        """Return the differences at the last position of the last layer, by dose."""
        last = self.at_last()
        final = last[last["layer"] == last["layer"].max()]
        by_dose = {str(row.dose): float(row.difference) for row in final.itertuples()}
        return {"unit": "logits", "difference": by_dose}

    def glance(self) -> Glance:
        """The difference at the last token, by dose, at five depths."""
        fact = self.settings.fact
        by_depth = self.at_last().pivot_table(index="dose", columns="layer", values="difference")
        picked = np.unique(np.linspace(0, len(by_depth.columns) - 1, 5).round().astype(int))
        layers = by_depth.columns[picked]
        rows = by_depth[layers].add_prefix("at").reset_index()
        columns = {f"layer {layer}": f"{{at{layer}:signed}}" for layer in layers}
        return Glance(
            f"{self.settings.title} · case {fact.case_id}, logit "
            f"{fact.target_false!r} - {fact.target_true!r} at the last token · "
            f"{self.settings.scheme.name}",
            (Grid.of(rows, {"dose": "{dose:d}", **columns}),),
            steps=("at_last()", "to_dataframe()", "plot()", "save(folder)"),
        )


@takes_facts
def trace(
    model: HookedLanguageModel,
    pairs: Pair | Pairs,
    *,
    hijacked: bool = True,
    probes: Sequence[Probe] = (),
) -> LogitLens:
    """Read every layer and position of the bare query of a fact and of its hijacked prompt.

    The fact is given by one pair of `hl.pairs(model, facts)`. The first token of each target is
    read, as it is tokenised in context. Without `hijacked` only the bare query is read. Probes act
    on both runs, in their order.

    Raises:
        InputError: Several pairs, a fact without a pair, two targets that start with the same
            token, or as `Item.first_tokens`.
    """
    pair, active = only(pairs, operation="logit_lens.trace"), check_probes(probes)
    spans = spans_of(active)
    # The bare query needs separate labels: its first word may be tokenised differently.
    labels = (units(pair.bare, pair.bare, model.tokenizer), pair.units)
    sides = list(zip(pair.marked(spans), labels, strict=True))[: 1 + hijacked]
    tables = []
    for item, of_prompt in sides:
        layout = Layout.of_symbols(torch.tensor([item.ids], device=device_of(model)), spans)
        true, false = item.first_tokens
        depths = through(model, layout, [false], [true], probes=active)
        tables.append(_table(item.prompt.dose, depths, of_prompt))
    return LogitLens(
        table=pd.concat(tables, ignore_index=True),
        settings=LensSettings(
            model=identify(model),
            fact=pair.fact,
            scheme=pair.scheme.record(),
            doses=tuple(item.prompt.dose for item, _ in sides),
            probes=tuple(probe.key for probe in active),
            seed=pair.seed,
        ),
        provenance=Provenance.now(seed=pair.seed),
    )


def read(model: HookedLanguageModel, fact: Fact, *, dose: int = 1, **options: Any) -> LogitLens:
    """Call `trace` by its old name, with the scheme, dose and seed of the pair; for one release."""
    bare = whole_number(DOSE, dose, most=MOST_SENTENCES) == 0
    return trace(model, fact, dose=1 if bare else dose, hijacked=not bare, **options)  # pyright: ignore


def _table(dose: int, depths: Depths, of_prompt: Sequence[Unit]) -> pd.DataFrame:
    labels = {position: unit for unit in of_prompt for position in unit.hijacked}
    n_depths, _, length = depths.difference.shape
    layer, position = map(np.ravel, np.indices((n_depths, length)))
    return pd.DataFrame(
        {
            "dose": dose,
            "layer": layer - 1,
            "position": position,
            "token": [labels[i].token for i in range(length)] * n_depths,
            "span": [labels[i].span for i in range(length)] * n_depths,
            "difference": depths.difference[:, 0].ravel(),
            "logprob_true": depths.logprob_minus[:, 0].ravel(),
            "logprob_false": depths.logprob_plus[:, 0].ravel(),
            "rank_true": depths.rank_minus[:, 0].ravel(),
            "rank_false": depths.rank_plus[:, 0].ravel(),
        }
    )
