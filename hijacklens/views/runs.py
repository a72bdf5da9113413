"""Runs: the attention of every head in one forward pass over a text, a prompt, a fact or a context.

Patterns are read after the probes, so a knock-out shows as zeros.

>>> import torch
>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> model = OneLayerTransformer(OneLayerConfig(vocab=4, d_model=4, length=4))
>>> one = run(model, torch.tensor([0, 1, 2, 3]))
>>> one, one.attended(source="at:-1").props["tokens"]
(Run(4 tokens, 1 layer, 1 head), ['0 ', '1 ', '2 ', '3 '])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens import sites
from hijacklens.errors import InputError, strict
from hijacklens.facts.fact import Fact
from hijacklens.models.agreement import require_agreement, require_agreement_on
from hijacklens.models.hooked import HookedModel, device_of, hooked
from hijacklens.one_layer.spans import layout as context_layout
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at, probed, spans_of
from hijacklens.prompts.layout import Layout, mark
from hijacklens.prompts.prompt import Prompt, make_prompt
from hijacklens.prompts.schemes import Scheme, Unusable, get_scheme
from hijacklens.prompts.spans import AT, EVERYWHERE, TEXT, TOKEN, atoms
from hijacklens.prompts.tokens import LocatedPrompt, locate
from hijacklens.sites import Heads, Layers
from hijacklens.views.components import attention_heads, attention_pattern, coloured_tokens
from hijacklens.views.sheet import View

READING = "views"
"""Key of the probe that reads patterns."""
Subject: TypeAlias = "str | Prompt | Fact | Sequence[int] | Tensor"
"""The input of a run."""
Locate: TypeAlias = Callable[[str], tuple[int, ...]]
"""Atom of a span (without `+`) -> positions of its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One forward pass over one prompt or context."""

    tokens: tuple[str, ...]
    """Tokens as text, special tokens by name, tokens of the concept task by number."""
    patterns: Float[np.ndarray, "layer head query key"]
    """Attention, with the probes on, in float32; NaN in layers without attention (hybrids)."""
    text: str
    """The prompt; empty for a context of the one-layer model."""
    probes: tuple[str, ...]
    """Keys of the probes that were on."""
    _locate: Locate = field(repr=False)

    def __repr__(self) -> str:
        layers, heads = self.patterns.shape[:2]
        sizes = ((len(self.tokens), "token"), (layers, "layer"), (heads, "head"))
        parts = [f"{n} {noun}{'s' * (n != 1)}" for n, noun in sizes]
        return f"Run({', '.join([*parts, *self.probes])})"

    def positions(self, span: str) -> tuple[int, ...]:
        """Return the positions of the tokens in a span, in order.

        Raises:
            InputError: The span cannot be read, or the prompt or context has no such span.
        """
        return tuple(sorted({position for atom in atoms(span) for position in self._locate(atom)}))

    def heads(
        self,
        heads: Heads = None,
        *,
        layers: Layers = None,
        heading: str | None = None,
        names: Sequence[str] | None = None,
        folded: bool = False,
    ) -> View:
        """View attention patterns: a small map for each head, or one head in full.

        Args:
            heads: Heads of the chosen layers, or pairs (layer, head); None for all.
            layers: One layer, several, or None for all. Layers without attention are left out.
            heading: Text above the view; by default it names layers, heads and probes.
            names: A name per head instead of `L3 H5`, in the order of the heads.
            folded: Start folded on a page.

        Raises:
            InputError: The model has no such layer or head, none of the layers has attention, or
                names and heads differ in number.
        """
        pairs = self._chosen(layers, heads)
        if names is None:
            names = [f"L{layer} H{head}" for layer, head in pairs]
        patterns = self.patterns[[layer for layer, _ in pairs], [head for _, head in pairs]]
        heading = heading or f"Attention{self._of(pairs)}; rows attend to columns"
        if len(pairs) == 1 and len(names) == 1:
            return attention_pattern(heading, self.tokens, patterns[0], folded=folded)
        return attention_heads(heading, self.tokens, patterns, names, folded=folded)

    def attended(
        self,
        source: str = "last",
        *,
        heads: Heads = None,
        layers: Layers = None,
        without: str | None = None,
        heading: str | None = None,
    ) -> View:
        """View tokens coloured by the attention that the source tokens pay to them.

        The attention is a mean over the source tokens and the chosen heads, and sums to one.

        `heads`, `layers` and `heading` are as for `heads()`; `source` is the span of the tokens
        that attend. `without` is a span to leave uncoloured, such as `at:0`: most heads rest on
        the first token (the attention sink), next to which nothing else shows.

        Raises:
            InputError: The run has no such span, layer or head.
        """
        pairs = self._chosen(layers, heads)
        rows = self.positions(source)
        if not rows:
            raise InputError(f"no token is in the span {source!r} here; name another.")
        means = np.mean([self.patterns[layer, head][list(rows)] for layer, head in pairs], (0, 1))
        note = ""
        if without is not None:
            hidden = list(self.positions(without))
            note = f", {float(means[hidden].sum()):.0%} of it to {without} not shown"
            means[hidden] = 0
        heading = heading or f"Attention of {source}{self._of(pairs)}{note}"
        return coloured_tokens(heading, self.tokens, means.tolist())

    def coloured(self, heading: str, values: Sequence[float]) -> View:
        """View the tokens coloured by your own numbers; see `coloured_tokens`."""
        return coloured_tokens(heading, self.tokens, values)

    def _chosen(self, layers: Layers, heads: Heads) -> list[tuple[int, int]]:
        """Return the chosen pairs (layer, head) of the layers that have attention."""
        pairs = sites.pairs(*self.patterns.shape[:2], layers=layers, heads=heads)
        attending = with_attention(self.patterns)
        if chosen := [pair for pair in pairs if pair[0] in attending]:
            return chosen
        raise InputError(
            f"there is attention in the layers {sites.numbers(attending)} alone; choose of these."
        )

    def _of(self, pairs: Sequence[tuple[int, int]]) -> str:
        """Describe heads and probes, for a heading."""
        layers = sorted({layer for layer, _ in pairs})
        n_heads = self.patterns.shape[1]
        if len(pairs) == 1:
            said = f", layer {layers[0]} head {pairs[0][1]}"
        elif len(pairs) == len(with_attention(self.patterns)) * n_heads:
            said = ", all heads"
        elif len(layers) == 1:
            said = f", layer {layers[0]}"
            if len(pairs) < n_heads:
                said += f" heads {', '.join(str(head) for _, head in pairs)}"
        elif len(pairs) <= 6:
            said = f", heads {', '.join(f'{layer}.{head}' for layer, head in pairs)}"
        else:
            said = f", {len(pairs)} heads"
        return said + "".join(f", {key}" for key in self.probes)


def with_attention(patterns: Float[np.ndarray, "layer head query key"]) -> list[int]:
    """Return the layers that have attention: those without have NaN for patterns."""
    return np.flatnonzero(~np.isnan(patterns).all((1, 2, 3))).tolist()


@strict
def run(
    model: HookedModel,
    subject: Subject,
    *,
    scheme: str | Scheme | None = None,
    dose: int = 1,
    task: ConceptTask | None = None,
    probes: Sequence[Probe] = (),
    seed: int = 0,
) -> Run:
    """Run a model once and keep the attention of all heads.

    Args:
        model: Any hooked model.
        subject: A text, a `Prompt` or a `Fact` for a language model; token ids [pos] for a model
            that reads no text.
        scheme: Only with a fact: the scheme that hijacks it; None for its bare query.
        dose: Number of hijacking sentences before the query of a fact with a scheme.
        task: Only with token ids: the concept task, if probes or sources name its spans.
        probes: Act on the run, in order.
        seed: Seeds the draws of a scheme.

    Raises:
        InputError: The input does not suit the model, is empty or too long, a scheme cannot serve
            the fact, a probe names a span that is missing, or the model is in training mode or
            shows no attention.

    Note:
        Costs one forward pass, and memory for layers x heads x pos x pos numbers.
    """
    require_agreement(model, operation="a view of attention")
    probes = check_probes(probes)
    spans = spans_of(probes)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        ids, locate_atom = _context(model, subject, task)
        tokens, text = [str(token) for token in ids], ""
    else:
        prompt = _prompt(model, subject, scheme, dose, seed)
        located = locate(tokenizer, prompt)
        ids, locate_atom, text = located.ids, located.positions, located.text
        tokens = [
            text[start:end].strip() or str(tokenizer.convert_ids_to_tokens(token))
            for token, (start, end) in zip(ids, located.offsets, strict=True)
        ]
    length = int(model.cfg.n_ctx)
    if not 0 < len(ids) <= length:
        raise InputError(f"a run takes 1 to {length} tokens, not {len(ids)}.")
    require_agreement_on(model, torch.tensor(ids))
    located_spans = {span: locate_atom(span) for span in spans}
    for span, span_positions in located_spans.items():
        if span.startswith(TEXT) and not span_positions:
            raise InputError(f"the span {span!r} is not in {text!r}. Check its spelling.")
    marked = mark(ids, list(located_spans.values()))
    symbols = torch.tensor([marked], device=device_of(model))
    patterns = _patterns(model, Layout.of_symbols(symbols, spans), probes)
    keys = tuple(probe.key for probe in probes)
    return Run(tuple(tokens), patterns.numpy(), text, keys, locate_atom)


def attention(
    model: HookedModel,
    subject: Subject,
    *,
    heads: Heads = None,
    layers: Layers = None,
    **options: Any,
) -> View:
    """Run a model and view attention patterns: `run(model, subject, **options).heads(...)`."""
    return run(model, subject, **options).heads(heads, layers=layers)


def attended(
    model: HookedModel,
    subject: Subject,
    *,
    source: str = "last",
    heads: Heads = None,
    layers: Layers = None,
    without: str | None = None,
    **options: Any,
) -> View:
    """Run a model and view attended tokens: `run(model, subject, **options).attended(...)`."""
    one = run(model, subject, **options)
    return one.attended(source, heads=heads, layers=layers, without=without)


def _prompt(
    model: HookedModel, subject: Any, scheme: str | Scheme | None, dose: int, seed: int
) -> Prompt:
    if isinstance(subject, Fact):
        if scheme is None:
            return make_prompt(subject)
        rule = get_scheme(scheme)
        try:
            sentence = rule.sentence(subject, seed=seed)
        except Unusable as reason:
            raise InputError(f"case {subject.case_id} cannot be hijacked: {reason}.") from None
        return make_prompt(subject, sentence=sentence, dose=dose, scheme=rule.name)
    if scheme is not None:
        raise InputError(
            f"a scheme hijacks a Fact, not a {type(subject).__name__}; give a fact, or put the "
            "sentences into the text yourself."
        )
    if isinstance(subject, Prompt):
        return subject
    if not isinstance(subject, str):
        raise InputError(
            f"a language model is run on a text, a Prompt or a Fact, not a "
            f"{type(subject).__name__}."
        )
    if not subject.strip():
        raise InputError("the prompt is empty; give the beginning of a sentence.")
    # A text has no sentences and no subject, so probes that name them are refused.
    return Prompt(text=subject, scheme="", dose=0, spans={"query": ((0, len(subject)),)})


def _context(
    model: HookedModel, subject: Any, task: ConceptTask | None
) -> tuple[tuple[int, ...], Locate]:
    if isinstance(subject, (str, Prompt, Fact)):
        raise InputError(
            f"this {type(model).__name__} has no tokenizer and reads no text; give token ids, such "
            "as contexts.tokens[0]."
        )
    tokens = torch.as_tensor(subject)
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise InputError(
            f"the model reads token ids of the shape [pos], such as contexts.tokens[0]; got "
            f"{tuple(tokens.shape)} of {tokens.dtype}."
        )
    ids = tuple(int(token) for token in tokens)

    located = LocatedPrompt(ids, {"last": (len(ids) - 1,)}, "", ())

    def locate_atom(atom: str) -> tuple[int, ...]:
        if task is not None:
            mask = context_layout(task, tokens[None].cpu(), spans=[atom]).query(atom)[0]
            return tuple(mask.nonzero().flatten().tolist())
        if atom in (EVERYWHERE, "last") or atom.startswith((AT, TOKEN)):
            return located.positions(atom)
        raise InputError(f"the span {atom!r} belongs to a concept task; give task=... too.")

    return ids, locate_atom


def _patterns(
    model: HookedModel, layout: Layout, probes: Sequence[Probe]
) -> Float[Tensor, "layer head query key"]:
    patterns: dict[int, Tensor] = {}

    def keep(layer: int, pattern: Tensor, hook: Any) -> None:
        patterns[layer] = pattern[0].detach().float().cpu()

    layers, names = range(int(model.cfg.n_layers)), model.hook_dict
    reading = [(f"blocks.{i}.attn.hook_pattern", partial(keep, i)) for i in layers]
    reading = [(name, hook) for name, hook in reading if name in names]
    if not reading:
        raise InputError(f"no hook of {model.cfg.model_name!r} shows attention.")
    if "unembed.hook_in" in names:
        zero = torch.zeros(1, dtype=torch.long, device=layout.tokens.device)
        reader = HookProbe(READING, reading, packs=True)
        logits_at(model, layout, zero, zero, probes=[*probes, reader])
    else:  # a HookedTransformer
        with torch.inference_mode(), probed(model, probes, layout), hooked(model, reading):
            model(layout.tokens, return_type=None)
    none = torch.full_like(next(iter(patterns.values())), torch.nan)
    return torch.stack([patterns.get(i, none) for i in layers])
