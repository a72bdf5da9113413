"""Ablation: what a model says without some of its heads, attention layers or MLPs.

A head's output is z [batch, pos, head, d_head], before the output matrix; heads are query heads.
Replacing it by zero equals zeroing the head's rows of that matrix in the weights. `attn_out` and
`mlp_out` [batch, pos, d_model] are what a layer adds to the residual stream: with the bias of the
output matrix, and behind the norm that Gemma-2 and -3 put there. Zero is far from anything the
model has seen; the mean over reference prompts keeps what a head says on all of them alike and
takes away only what it says about this one.

    ablate(heads=[(8, 3), (9, 1)])                          # two heads, at every token
    ablate(layers=range(8, 12), site="mlp_out")             # four MLPs
    ablate(heads=[(8, 3)], kind="mean", means=mean_outputs(model, facts), span="last")

Cost: one masked copy of the output of each layer concerned.

>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> from hijacklens.probe import probed
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> layout = Layout(torch.arange(4)[None], {})
>>> with probed(model, [ablate(heads=[(0, 0)])], layout):
...     float(model(layout.tokens).detach().abs().max())  # it has no other part
0.0
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import batches
from hijacklens.errors import InputError, unknown
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import (
    HookedLanguageModel,
    HookedModel,
    HookFunction,
    NamedHook,
    device_of,
    require_eval,
)
from hijacklens.probe import HookProbe, logits_at
from hijacklens.progress import bar
from hijacklens.prompts.layout import Layout, mark
from hijacklens.prompts.prompt import Prompt, make_prompt
from hijacklens.prompts.spans import EVERYWHERE, placed_atoms
from hijacklens.prompts.tokens import LocatedPrompt, locate
from hijacklens.results.glance import Glance, Shown
from hijacklens.sites import Heads, Layers, choose, describe, kept

OutputSite: TypeAlias = Literal["z", "attn_out", "mlp_out"]
Kind: TypeAlias = Literal["zero", "mean"]
_HOOKS = {
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
}


@dataclass(frozen=True, slots=True, eq=False)
class MeanOutputs(Shown):
    """The mean output of every head (`z`) or layer (`attn_out`, `mlp_out`) over chosen tokens."""

    site: OutputSite
    span: str
    """The tokens that the mean is over."""
    count: int
    """How many tokens these were."""
    values: Float[Tensor, "layer ... width"]
    """[layer, head, d_head] for `z`, [layer, d_model] otherwise; float32, on the CPU."""

    @property
    def hash(self) -> str:
        """Twelve hex digits that stand for the values."""
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()[:12]

    def glance(self) -> Glance:
        """Where and over what the means were taken."""
        shape = " x ".join(map(str, self.values.shape))
        return Glance(
            f"{self.site}, mean over {self.count:,} tokens of {self.span} · {shape} · {self.hash}",
            steps=("values", "hash"),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ablation:
    """A probe that replaces outputs of heads or layers; `ablate` makes one."""

    site: OutputSite
    layers: Layers
    heads: Heads
    means: MeanOutputs | None
    """What the outputs are replaced by; None for zero."""
    span: str
    """The tokens at which they are."""

    @property
    def key(self) -> str:
        """What is replaced, by what, and where; a mean by a hash of its values."""
        chosen = describe(layers=self.layers, heads=self.heads) or "layers=all"
        kind = f"mean[{self.means.span},{self.means.hash}]" if self.means else "zero"
        return f"ablate:site={self.site},{chosen},kind={kind},span={self.span}"

    @property
    def spans(self) -> Sequence[str]:
        """The one span whose tokens are concerned."""
        return (self.span,)

    @property
    def packs(self) -> bool:
        """True: a token's output is replaced whatever stands beside it."""
        return True

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """One hook per layer concerned.

        Raises:
            InputError: The model has no such layer or head, no such output (the one-layer model
                has no MLP), the means are those of another shape of model, or the span is unknown.
        """
        chosen = choose(model, layers=self.layers, heads=self.heads).by_layer
        tokens = layout.query(self.span)  # [batch, pos]
        named: list[NamedHook] = []
        for layer, heads in chosen.items():
            name = _hook_name(model, self.site, layer)
            where = None
            if self.site == "z":
                where = torch.zeros(int(model.cfg.n_heads), dtype=torch.bool)
                where[list(heads)] = True
            named.append((name, _replace(tokens, where, self._mean(model, layer))))
        return named

    def _mean(self, model: HookedModel, layer: int) -> Tensor | None:
        if self.means is None:
            return None
        config = model.cfg
        place = (config.n_heads, config.d_head) if self.site == "z" else (config.d_model,)
        wanted, given = (int(config.n_layers), *map(int, place)), tuple(self.means.values.shape)
        if wanted != given:
            raise InputError(
                f"the means are those of another model: their shape is {given}, and this model's "
                f"{self.site} needs {wanted}. Make them with mean_outputs(model, ...)."
            )
        return self.means.values[layer]


def ablate(
    *,
    heads: Heads = None,
    layers: Layers = None,
    site: OutputSite = "z",
    kind: Kind = "zero",
    means: MeanOutputs | None = None,
    span: str = EVERYWHERE,
) -> Ablation:
    """Replace the outputs of heads, or of whole attention layers or MLPs, by zero or by a mean.

    Args:
        heads: Query heads of each of the layers, or pairs (layer, head); None for all heads. Only
            with the site `z`.
        layers: One layer, several, or None for all.
        site: `z` for head outputs, `attn_out` or `mlp_out` for what a layer adds to the residual
            stream. Ablating all heads of a layer leaves the bias of its output matrix (GPT-2) and
            what a norm behind it makes of that; ablating `attn_out` leaves nothing.
        kind: `zero` or `mean`.
        means: With `mean`, the values, as `mean_outputs` gives them.
        span: The tokens at which outputs are replaced.

    Returns:
        A probe; it packs.

    Raises:
        InputError: An unknown site or kind, heads with a site that has none, or means that are
            missing, of another site, or not asked for. What the model lacks shows when the probe
            is put on it.
    """
    if site not in _HOOKS:
        raise unknown("site", site, _HOOKS)
    if kind not in get_args(Kind):
        raise unknown("kind of ablation", kind, get_args(Kind))
    if heads is not None and site != "z":
        raise InputError(f"{site} is not split into heads; leave heads out, or use site='z'.")
    if (kind == "mean") != (means is not None):
        raise InputError(
            "an ablation of kind 'mean' needs means=mean_outputs(model, facts), and one of kind "
            "'zero' takes none."
        )
    if means is not None and means.site != site:
        raise InputError(f"the means are of {means.site}, not of {site}; make them for this site.")
    placed_atoms([span])  # what cannot be read is refused here and not in the middle of a run
    return Ablation(site=site, layers=kept(layers), heads=kept(heads), means=means, span=span)


def mean_outputs(
    model: HookedModel,
    reference: FactSet | Sequence[Prompt | LocatedPrompt] | Layout,
    *,
    site: OutputSite = "z",
    span: str = EVERYWHERE,
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> MeanOutputs:
    """The mean output of every head or layer over the tokens of reference prompts.

    Args:
        model: Any hooked model.
        reference: Facts, for their bare queries (dose 0); or prompts; or a layout, which is run
            as it stands, e.g. `hijacklens.one_layer.spans.layout(task, tokens)`.
        site: `z`, `attn_out` or `mlp_out`.
        span: The tokens that the mean is over, each counted once: by default all of them, a BOS
            included; `last` gives the mean where the answer is read.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Raises:
        InputError: No prompt, no token in the span, an unknown site or span, an output that the
            model does not have, or a model in training mode.

    Note:
        Costs one forward pass over the prompts. Sums are kept in float64.
    """
    require_eval(model, operation="the mean of outputs")
    if site not in _HOOKS:
        raise unknown("site", site, _HOOKS)
    n_layers = int(model.cfg.n_layers)
    totals: dict[int, Tensor] = {}
    count = 0

    def add(layer: int, tokens: Tensor) -> HookFunction:
        def hook_function(output: Tensor, hook: Any) -> None:
            total = output[tokens.to(output.device)].sum(0, dtype=torch.float64).cpu()
            totals[layer] = totals[layer] + total if layer in totals else total

        return hook_function

    rows = len(reference.tokens) if isinstance(reference, Layout) else len(reference)
    with bar(rows, unit="prompts", label=f"mean {site}", quiet=quiet) as progress:
        for layout, real in _layouts(model, reference, span, batch_tokens):
            tokens = layout.query(span) & real
            count += int(tokens.sum())
            recorder = HookProbe(
                "mean", [(_hook_name(model, site, at), add(at, tokens)) for at in range(n_layers)]
            )
            one = torch.zeros(1, dtype=torch.long, device=real.device)
            logits_at(model, layout, one, one, probes=[recorder])  # to be read somewhere
            progress.update(len(real))
    if count == 0:
        raise InputError(
            f"there is nothing to take the mean of: no token of the reference stands in {span!r}."
        )
    values = torch.stack([totals[layer] for layer in range(n_layers)]) / count
    return MeanOutputs(site, span, count, values.float())


def _replace(tokens: Tensor, heads: Tensor | None, mean: Tensor | None) -> HookFunction:
    def hook_function(output: Tensor, hook: Any) -> Tensor:  # [batch, pos, (head,) width]
        where = tokens.to(output.device)[..., None]
        if heads is not None:
            where = (where & heads.to(output.device))[..., None]
        new = output.new_zeros(()) if mean is None else mean.to(output)
        return torch.where(where, new, output)

    return hook_function


def _layouts(
    model: HookedModel,
    reference: FactSet | Sequence[Prompt | LocatedPrompt] | Layout,
    span: str,
    batch_tokens: int | None,
) -> Iterable[tuple[Layout, Tensor]]:
    """The reference in batches, each with a mask of the tokens that are no padding."""
    if isinstance(reference, Layout):
        yield reference, torch.ones_like(reference.tokens, dtype=torch.bool)
        return
    if not isinstance(model, HookedLanguageModel) or model.tokenizer is None:
        raise InputError("a model without a tokenizer reads no prompts; give a layout of tokens.")
    prompts: Sequence[Prompt | LocatedPrompt]
    if isinstance(reference, FactSet):
        prompts = [make_prompt(fact, sentence="", dose=0, scheme="bare") for fact in reference]
    else:
        prompts = reference
    names = placed_atoms([span])
    located = [
        locate(model.tokenizer, prompt) if isinstance(prompt, Prompt) else prompt
        for prompt in prompts
    ]
    rows = [mark(each.ids, [each.positions(name) for name in names]) for each in located]
    for batch in batches(rows, device=device_of(model), limit=batch_tokens):
        yield Layout.of_symbols(batch.symbols, names), batch.real


def _hook_name(model: HookedModel, site: OutputSite, layer: int) -> str:
    name = _HOOKS[site].format(layer)
    if name not in model.hook_dict:
        there = [other for other, form in _HOOKS.items() if form.format(layer) in model.hook_dict]
        raise unknown("site of this model", site, there)
    return name
