"""Ablation of heads, attention layers or MLPs: their output is replaced by zero or a mean.

    ablate(heads=[(8, 3), (9, 1)])                          # two heads, at every token
    ablate(layers=range(8, 12), site="mlp_out")             # four MLPs
    ablate(heads=[(8, 3)], kind="mean", means=mean_outputs(model, facts), span="last")

The output of a (query) head is z [batch, pos, head, d_head], before the output matrix; replacing
it by zero equals zeroing the head's rows of that matrix. `attn_out` and `mlp_out` [batch, pos,
d_model] are what a layer adds to the residual stream: with the bias of the output matrix, and
after the norm that Gemma-2 and -3 put there. Zero is far from anything that the model has seen.
The mean over reference prompts keeps what a head says on all of them and removes only what it says
about one prompt. The cost is one masked copy of the output of each ablated layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import batches
from hijacklens.errors import InputError, choice, strict
from hijacklens.facts.fact import FactSet
from hijacklens.models.agreement import require_agreement, require_agreement_on
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import (
    HookedLanguageModel,
    HookedModel,
    HookFunction,
    NamedHook,
)
from hijacklens.probe import HookProbe, hash_of, logits_at, spell
from hijacklens.progress import bar
from hijacklens.prompts.chat import prompt_of
from hijacklens.prompts.layout import Layout, mark
from hijacklens.prompts.prompt import Prompt
from hijacklens.prompts.spans import EVERYWHERE, check_span, placed_atoms
from hijacklens.prompts.tokens import LocatedPrompt, locate
from hijacklens.results.glance import Glance, Shown
from hijacklens.sites import Heads, Layers, canonical
from probes.activation_sites import choose_sites, hook_name
from probes.checks import check_heads

OutputSite: TypeAlias = Literal["z", "attn_out", "mlp_out"]
Kind: TypeAlias = Literal["zero", "mean"]
SITES: tuple[OutputSite, ...] = get_args(OutputSite)


@dataclass(frozen=True, slots=True, eq=False)
class MeanOutputs(Shown):
    """The mean output of every head (`z`) or layer (`attn_out`, `mlp_out`) over some tokens."""

    site: OutputSite
    span: str
    """The tokens that the mean is over."""
    count: int
    """The number of these tokens."""
    values: Float[Tensor, "layer ... width"]
    """[layer, head, d_head] for `z`, [layer, d_model] otherwise; float32, on the CPU. NaN for a
    layer without such an output (hybrids)."""

    @property
    def hash(self) -> str:
        """Sixteen hex digits that identify the values."""
        return hash_of(self.values)

    def glance(self) -> Glance:
        """Return the site, the span and the size of the means."""
        shape = " x ".join(map(str, self.values.shape))
        return Glance(
            f"{self.site}, mean over {self.count:,} tokens of {self.span} · {shape} · {self.hash}",
            steps=("values", "hash"),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ablation:
    """A probe that replaces outputs of heads or layers; made by `ablate`."""

    site: OutputSite
    layers: Layers
    heads: Heads
    means: MeanOutputs | None
    """What replaces the outputs; None for zero."""
    span: str
    """The tokens at which outputs are replaced."""

    @property
    def key(self) -> str:
        """What is replaced, by what, and where; means by their span and hash."""
        means = self.means and {"kind": "mean", "means": f"{self.means.span}/{self.means.hash}"}
        options = {"heads": self.heads, "layers": self.layers, "site": self.site, **(means or {})}
        return spell("ablate", ablate, {**options, "span": self.span})

    @property
    def spans(self) -> Sequence[str]:
        """The span at whose tokens outputs are replaced."""
        return (self.span,)

    @property
    def packs(self) -> bool:
        """True: the replacement does not depend on other tokens."""
        return True

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return one hook per ablated layer.

        Raises:
            InputError: As for every probe; in the forward pass, if the means are those of a model
                of another shape.
        """
        tokens = layout.query(self.span)  # [batch, pos]
        named: list[NamedHook] = []
        chosen = choose_sites(model, self.site, layers=self.layers, heads=self.heads, allowed=SITES)
        for layer, heads in chosen.by_layer.items():
            mask = None
            if self.site == "z":
                mask = torch.isin(torch.arange(int(model.cfg.n_heads)), torch.tensor(heads))
            mean = self.means and (self.means, layer, int(model.cfg.n_layers))
            named.append((hook_name(self.site, layer), _replace(tokens, mask, mean)))
        return named


@strict
def ablate(
    *,
    heads: Heads = None,
    layers: Layers = None,
    site: OutputSite = "z",
    kind: Kind = "zero",
    means: MeanOutputs | None = None,
    span: str = EVERYWHERE,
) -> Ablation:
    """Replace the outputs of heads, or of entire attention layers or MLPs, by zero or by a mean.

    Args:
        heads: Query heads of each of the layers (`[1, 2]`), or pairs (layer, head) (`[(1, 2)]`);
            None for all heads. They need the site `z`.
        layers: One layer, several, or None for all.
        site: `z` for head outputs, `attn_out` or `mlp_out` for what a layer adds to the residual
            stream. Ablating all heads of a layer leaves the bias of its output matrix (GPT-2),
            normalised if a norm follows; ablating `attn_out` leaves nothing.
        kind: `zero` or `mean`.
        means: With `mean`, the values, made by `mean_outputs`.
        span: The tokens at which outputs are replaced.

    Returns:
        A probe; it packs.

    Raises:
        InputError: The site or kind is unknown, the site has no heads, or means are missing, of
            another site, or given with `zero`. Layers and heads are checked when the probe is put
            on a model.
    """
    choice("site", site, SITES)
    choice("kind of ablation", kind, get_args(Kind))
    check_heads(site, heads)
    if (kind == "mean") != (means is not None):
        raise InputError(
            "an ablation of kind 'mean' needs means=mean_outputs(model, facts), and kind 'zero' "
            "takes no means."
        )
    if means is not None and means.site != site:
        raise InputError(f"the means are of {means.site}, not of {site}; make them for this site.")
    check_span(span)
    layers, heads = canonical(layers, heads)
    return Ablation(site=site, layers=layers, heads=heads, means=means, span=span)


@strict
@exclusively
def mean_outputs(
    model: HookedModel,
    reference: FactSet | Sequence[Prompt | LocatedPrompt] | Layout,
    *,
    site: OutputSite = "z",
    span: str = EVERYWHERE,
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> MeanOutputs:
    """Return the mean output of every head or layer over the tokens of reference prompts.

    Args:
        model: Any hooked model.
        reference: Facts, for their bare queries (dose 0); or prompts; or a layout, which is run
            unchanged, e.g. `hijacklens.one_layer.spans.layout(task, tokens)`.
        site: `z`, `attn_out` or `mlp_out`.
        span: The tokens that the mean is over, each counted once: by default all of them,
            including a BOS; `last` gives the mean at the token where the answer is read.
        batch_tokens: Size of a batch in tokens; by default as the device allows.
        quiet: Draw no progress bar.

    Raises:
        InputError: There is no prompt or no token in the span, the site or span is unknown, the
            model has no such output, or it is in training mode.

    Note:
        Costs one forward pass over the prompts. Sums are kept in float64.
    """
    require_agreement(model, operation="the mean of outputs")
    layers = choose_sites(model, site, allowed=SITES).by_layer
    totals: dict[int, Tensor] = {}
    count = 0

    def add(layer: int, tokens: Tensor, output: Tensor, hook: Any) -> None:
        total = output[tokens.to(output.device)].sum(0, dtype=torch.float64).cpu()
        totals[layer] = totals[layer] + total if layer in totals else total

    rows = len(reference.tokens) if isinstance(reference, Layout) else len(reference)
    with bar(rows, unit="prompts", label=f"mean {site}", quiet=quiet) as progress:
        for layout, real in _layouts(model, reference, span, batch_tokens):
            tokens = layout.query(span) & real
            count += int(tokens.sum())
            hooks = [(hook_name(site, layer), partial(add, layer, tokens)) for layer in layers]
            first = torch.zeros(1, dtype=torch.long, device=real.device)
            logits_at(model, layout, first, first, probes=[HookProbe("mean", hooks)])
            progress.update(len(real))
    if count == 0:
        raise InputError(
            f"there is nothing to take the mean of: no token of the reference is in {span!r}."
        )
    if len({total.shape for total in totals.values()}) > 1:
        raise InputError(f"{site} is of another size in each layer of this model; it has no means.")
    absent = torch.full_like(next(iter(totals.values())), torch.nan)
    sums = [totals.get(layer, absent) for layer in range(int(model.cfg.n_layers))]
    values = torch.stack(sums) / count
    return MeanOutputs(site, span, count, values.float())


def _replace(
    tokens: Tensor, heads: Tensor | None, mean: tuple[MeanOutputs, int, int] | None
) -> HookFunction:
    """Return a hook that puts zero, or the mean of a layer among so many, in place of outputs."""

    def hook_function(output: Tensor, hook: Any) -> Tensor:  # [batch, pos, (head,) width]
        where = tokens.to(output.device)[..., None]
        if heads is not None:
            where = (where & heads.to(output.device))[..., None]
        new = output.new_zeros(())
        if mean is not None:
            means, layer, n_layers = mean
            needed, shape = (n_layers, *output.shape[2:]), tuple(means.values.shape)
            if needed != shape:
                raise InputError(
                    f"the means are those of another model: their shape is {shape}, and this "
                    f"model's {means.site} needs {needed}. Make them with mean_outputs(model, ...)."
                )
            new = means.values[layer].to(output)
        return torch.where(where, new, output)

    return hook_function


def _layouts(
    model: HookedModel,
    reference: FactSet | Sequence[Prompt | LocatedPrompt] | Layout,
    span: str,
    batch_tokens: int | None,
) -> Iterable[tuple[Layout, Tensor]]:
    """Yield the reference in batches, each with a mask of the tokens that are not padding."""
    if isinstance(reference, Layout):
        require_agreement_on(model, reference.tokens[0])
        yield reference, torch.ones_like(reference.tokens, dtype=torch.bool)
        return
    if not isinstance(model, HookedLanguageModel) or model.tokenizer is None:
        raise InputError("without a tokenizer a model cannot read prompts; give a layout.")
    prompts: Sequence[Prompt | LocatedPrompt] = (
        [prompt_of(fact, reference, model.tokenizer) for fact in reference]
        if isinstance(reference, FactSet)
        else reference
    )
    names = placed_atoms([span])
    rows = []
    for prompt in prompts:
        located = locate(model.tokenizer, prompt) if isinstance(prompt, Prompt) else prompt
        rows.append(mark(located.ids, [located.positions(name) for name in names]))
    for batch in batches(model, rows, limit=batch_tokens):
        yield Layout.of_symbols(batch.symbols, names), batch.real
