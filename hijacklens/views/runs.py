"""A run: the attention of every head in one forward pass, and the views of it.

`hijacklens.views.run` makes one. Patterns are read after the probes, so a knock-out shows as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from hijacklens import sites
from hijacklens.errors import InputError
from hijacklens.prompts.spans import atoms
from hijacklens.sites import Heads, Layers
from hijacklens.views.components import attention_heads, attention_pattern, coloured_tokens
from hijacklens.views.sheet import View

Locate: TypeAlias = Callable[[str], tuple[int, ...]]
"""Atom of a span (without `+`) -> positions of its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One forward pass over one prompt or context."""

    tokens: tuple[str, ...]
    """Tokens as text, special tokens by name, tokens of the concept task by number."""
    patterns: Float[np.ndarray, "layer head query key"]
    """Attention, with the probes on, in float32."""
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
            layers: One layer, several, or None for all.
            heading: Text above the view; by default it names layers, heads and probes.
            names: A name per head instead of `L3 H5` (`H5` in one layer), in the order of the
                heads.
            folded: Start folded on a page.

        Raises:
            InputError: The model has no such layer or head, or names and heads differ in number.
        """
        pairs = sites.pairs(*self.patterns.shape[:2], layers=layers, heads=heads)
        if names is None:
            # The heading names a single layer, so short names leave more room for the maps.
            one_layer = len({layer for layer, _ in pairs}) == 1 and len(pairs) > 1
            names = [f"H{head}" if one_layer else f"L{layer} H{head}" for layer, head in pairs]
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

        Args:
            source: Span of the tokens that attend.
            heads: Heads of the chosen layers, or pairs (layer, head); None for all.
            layers: One layer, several, or None for all.
            without: A span to leave uncoloured, such as `at:0`: most heads rest on the first
                token (the attention sink), next to which nothing else shows.
            heading: Text above the view.

        Raises:
            InputError: The run has no such span, layer or head.
        """
        pairs = sites.pairs(*self.patterns.shape[:2], layers=layers, heads=heads)
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
        """View the tokens coloured by your own numbers, one per token.

        Raises:
            InputError: Numbers and tokens differ in number.
        """
        return coloured_tokens(heading, self.tokens, values)

    def _of(self, pairs: Sequence[tuple[int, int]]) -> str:
        """Describe heads and probes, for a heading."""
        layers = sorted({layer for layer, _ in pairs})
        n_layers, n_heads = self.patterns.shape[:2]
        if len(pairs) == 1:
            said = f", layer {layers[0]} head {pairs[0][1]}"
        elif len(pairs) == n_layers * n_heads:
            said = ", all heads"
        elif len(layers) == 1:
            numbers = (
                "" if len(pairs) == n_heads else f" heads {', '.join(str(h) for _, h in pairs)}"
            )
            said = f", layer {layers[0]}{numbers}"
        elif len(pairs) <= 6:
            said = f", heads {', '.join(f'{layer}.{head}' for layer, head in pairs)}"
        else:
            said = f", {len(pairs)} heads"
        return said + "".join(f", {key}" for key in self.probes)
