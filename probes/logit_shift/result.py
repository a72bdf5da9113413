"""The account of one fact's shift as a result: a table of parts, maps, files.

A part is a row of `to_dataframe()`: what an attended token, layer, head, MLP or bias wrote to
`logit o_ - logit o*` in the bare and in the hijacked run, and the difference. The kinds:

    attention     what a head reads from one attended token, without the value bias
    value_bias    b_V through a head's output matrix
    output_bias   b_O of a layer
    mlp           an MLP, including its biases
    embedding     the embedding of the last token
    position      its positional embedding (GPT-2)
    norm_bias     the bias of the final norm
    unembed_bias  the bias of the unembedding
    soft_cap      what the final soft-cap adds to the difference (Gemma-2)
    normaliser    zero, unless the two targets are read after different tokens; then both are
                  log-probabilities, and this is the difference of the logs of their softmax sums
    other         what layers add that is no head and no MLP, such as a state-space mixer (Jamba)
                  or per-layer embeddings (Gemma 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from hijacklens import views
from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact
from hijacklens.prompts.correspondence import Unit
from hijacklens.prompts.prompt import Prompt
from hijacklens.results.exhibits import Drawing, Exhibit, Table, Text, Views
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.result import ProbedSettings
from hijacklens.views.runs import with_attention
from probes.account import SINGLE, Account
from probes.logit_shift.figures import READING, VALUES, heat_map

COLUMNS = ("span", "token", "position", "layer", "head", "kind", "bare", "hijacked", "shift")
NUMBERS = ["bare", "hijacked", "shift"]
SHOWN_HEADS = 8
"""How many heads a report shows next to each other."""


def parts_table(units: Sequence[Unit], bare: Account, hijacked: Account) -> pd.DataFrame:
    """Return every part of two accounts of a fact as a row, parts that correspond in one row.

    `position` counts in the hijacked prompt. Position, layer and head are missing where a part
    has none.
    """
    layers, heads = map(np.ravel, np.indices(hijacked.value_bias.shape))
    last = next(unit for unit in reversed(units) if unit.span == "last")
    blocks = [
        _block(
            "attention",
            bare.attention[..., list(unit.bare)].sum(-1),
            hijacked.attention[..., list(unit.hijacked)].sum(-1),
            span=unit.span,
            token=unit.token,
            position=unit.hijacked[0] if unit.hijacked else pd.NA,
            layer=layers,
            head=heads,
        )
        for unit in units
    ]
    by_layer = {"layer": range(len(hijacked.mlp))}
    blocks += [
        _block("value_bias", bare.value_bias, hijacked.value_bias, layer=layers, head=heads),
        _block("output_bias", bare.output_bias, hijacked.output_bias, **by_layer),
        _block("mlp", bare.mlp, hijacked.mlp, **by_layer),
    ]
    at_last = {"span": "last", "token": last.token, "position": last.hijacked[-1]}
    for i, kind in enumerate(SINGLE):
        at = at_last if kind in ("embedding", "position") else {}
        blocks.append(_block(kind, bare.single[[i]], hijacked.single[[i]], **at))
    table = pd.concat(blocks, ignore_index=True)
    table["shift"] = table["hijacked"] - table["bare"]
    return table


def _block(kind: str, bare: np.ndarray, hijacked: np.ndarray, **columns: Any) -> pd.DataFrame:
    """Return rows with all columns but the shift, missing ones empty, so that types agree."""
    values = {"kind": kind, **columns, "bare": bare.ravel(), "hijacked": hijacked.ravel()}
    texts = dict.fromkeys(("span", "token", "kind"), "string")
    counts = dict.fromkeys(("position", "layer", "head"), "Int64")
    block = pd.DataFrame(values).reindex(columns=list(COLUMNS[:-1]))
    return block.astype({**texts, **counts})


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings(ProbedSettings):
    """The settings of `trace`."""

    fact: Fact
    dose: int
    prompt: Prompt
    """The hijacked prompt, with its spans."""


TOKENS = Stored(
    "patterns.npz",
    encode=lambda tokens: np.array(tokens) if tokens else None,
    decode=lambda array, record: tuple(array.tolist()),
)


@dataclass(frozen=True, eq=False)
class ShiftAccount(Result):
    """What wrote the logit shift of one fact; made by `logit_shift.trace`. Units: logits."""

    table: Annotated[pd.DataFrame, Stored("account.parquet")]
    """See `to_dataframe`."""
    bare: float
    """logit o_ - logit o* after the bare query, as the model gives it."""
    hijacked: float
    """logit o_ - logit o* after the hijacked prompt."""
    settings: TraceSettings
    provenance: Provenance
    tokens: Annotated[tuple[str, ...], TOKENS] = ()
    """The tokens of the hijacked prompt, if the patterns are kept."""
    patterns: Annotated[
        Float[np.ndarray, "layer head query key"] | None, Stored("patterns.npz")
    ] = None
    """Attention in the hijacked prompt, NaN in layers without attention; see
    `probes.logit_shift.page.with_patterns`."""

    figures: ClassVar = {
        "token_layer": {"by": ("token", "layer")},
        "layer_head": {"by": ("layer", "head")},
    }
    derived: ClassVar = {"summary.csv": "summary"}

    @property
    def shift(self) -> float:
        """Hijacked minus bare, as the model gives them, in logits."""
        return self.hijacked - self.bare

    @property
    def residual(self) -> float:
        """What the parts do not explain: the shift minus their sum, in logits."""
        return self.shift - float(self.table["shift"].sum())

    @property
    def relative_residual(self) -> float:
        """The size of the residual relative to the largest of the shift and both differences."""
        largest = max(abs(self.shift), abs(self.bare), abs(self.hijacked))
        return abs(self.residual) / largest if largest else abs(self.residual)

    @property
    def prompt(self) -> Prompt:
        """The hijacked prompt with its spans."""
        return self.settings.prompt

    def to_dataframe(self) -> pd.DataFrame:
        """A row per part: span, token, position, layer, head, kind, bare, hijacked, shift.

        The last three are logits. Spans are `hijacklens.prompts.correspondence.SPANS`; the kinds
        are listed in `probes.logit_shift.result`.
        """
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """Sum the parts by kind, and attention by span too: bare, hijacked, shift (logits)."""
        spans = self.table["span"].where(self.table["kind"] == "attention", "")
        groups: Any = self.table.assign(span=spans).groupby(["kind", "span"], sort=False)
        sums = groups[NUMBERS].sum().reset_index()
        return sums.loc[(sums[NUMBERS] != 0).any(axis=1)].reset_index(drop=True)

    def biggest(self, n: int = 10, *, by: Sequence[str] = ("layer", "head")) -> pd.DataFrame:
        """Return the `n` parts that contribute most to the shift, in either direction.

        Parts are summed over all columns of the table but those of `by`.

        Raises:
            InputError: A column that the table does not have.
        """
        allowed = COLUMNS[:6]
        if not by or set(by) - set(allowed):
            raise InputError(f"cannot sum by {list(by)}; allowed: {', '.join(allowed)}.")
        keys = list(dict.fromkeys(("kind", *by)))
        groups: Any = self.table.groupby(keys, dropna=False, sort=False)
        sums = groups[NUMBERS].sum().reset_index()
        largest = sums.sort_values("shift", key=abs, ascending=False, kind="stable")[:n]
        return largest.reset_index(drop=True)

    def plot(self, *, by: Sequence[str] = ("token", "layer")) -> Figure:
        """Draw a map of the shift: layers by tokens, spans or heads, the vertical axis first.

        Raises:
            InputError: Other axes.
        """
        # Positions distinguish tokens of equal text.
        positions = self.table["position"].astype("string").fillna("-")
        table = self.table.assign(token=positions.str.cat(self.table["token"], sep="  "))
        fact = self.settings.fact
        return heat_map(
            table,
            by,
            label=f"part of the shift (logits; red: towards {fact.target_false!r})",
            title=(
                f"{self.settings.title}: {fact.target_false!r} against "
                f"{fact.target_true!r}\n{self.settings.scheme.name}, dose "
                f"{self.settings.dose}: {self.bare:+.2f} → {self.hijacked:+.2f}, "
                f"shift {self.shift:+.2f}"
            ),
        )

    def attention_views(self, *, top: int = 12) -> list[views.View]:
        """Show the tokens, coloured by what heads read from them, and the `top` heads.

        Raises:
            InputError: The account has no patterns, or `top` is below 1.
        """
        if top < 1:
            raise InputError(f"top counts heads and cannot be {top}; give 1 or more.")
        if self.patterns is None:
            raise InputError("the account has no attention patterns; see with_patterns(...).")
        by_head: Any = self.by_head
        by_head = by_head[
            by_head.index.get_level_values("layer").isin(with_attention(self.patterns))
        ]
        target = self.settings.fact.target_false
        largest = by_head.sort_values(key=abs, ascending=False, kind="stable").index[:top]
        # Heads that carry the hijack come before those that work against it.
        layers, heads = zip(*sorted(largest, key=lambda head: -by_head[head]), strict=True)
        attention = self.table[self.table["kind"] == "attention"]
        by_token = attention.groupby("position")["shift"].sum()
        return [
            views.coloured_tokens(
                f"What the heads took from each token, hijacked minus bare (logits towards "
                f"{target!r}; hover for the number)",
                self.tokens,
                [float(by_token.get(i, 0.0)) for i in range(len(self.tokens))],
            ),
            views.attention_heads(
                f"Attention of the heads with the largest parts, from + (towards {target!r}) to -",
                self.tokens,
                self.patterns[list(layers), list(heads)],
                [f"L{i} H{j}: {by_head[i, j]:+.2f}" for i, j in zip(layers, heads, strict=True)],
            ),
        ]

    @property
    def by_head(self) -> pd.Series:
        """What each head wrote to the shift, value bias included, by layer and head (logits)."""
        parts: Any = self.table[self.table["kind"].isin(["attention", "value_bias"])]
        return parts.groupby(["layer", "head"])["shift"].sum()

    def exhibits(self) -> list[Exhibit]:
        """The prompts, both maps, the attention of the heads that wrote most, and the parts."""
        fact = self.settings.fact
        query = (
            f"“{self.settings.prompt.text}” was given to {self.settings.title}. Logit "
            f"{fact.target_false!r} - {fact.target_true!r} is {self.bare:+.3f} on the bare "
            f"query and {self.hijacked:+.3f} here: a shift of {self.shift:+.3f}, of which the "
            f"parts leave {self.residual:.1e}."
        )
        attention = []
        if self.patterns is not None:
            note = (
                "Rows attend to columns. Choose a head to see its pattern in full; numbers next to "
                "heads are their parts of the shift, in logits."
            )
            shown = self.attention_views(top=SHOWN_HEADS)
            attention.append(Views("Where the heads look", shown, note))
        return [
            Text("What was run", (query, READING)),
            Drawing("Shift by token and layer", self.plot(by=("token", "layer"))),
            Drawing("Shift by layer and head", self.plot(by=("layer", "head"))),
            *attention,
            Table("Parts by kind", self.summary(), file="account-summary.csv", labels=VALUES),
            Table(
                "Every part",
                self.table.sort_values("shift", key=abs, ascending=False, kind="stable"),
                note="The largest come first.",
                file="account.csv",
                filters=("kind", "span", "layer", "head"),
                labels=VALUES,
            ),
        ]

    def findings(self) -> dict[str, Any]:
        """Return the totals in logits, and the sum of each kind of part."""
        kinds: Any = self.table.groupby("kind", sort=False)["shift"].sum()
        return {
            "unit": "logits",
            "shift": self.shift,
            "residual": self.residual,
            "relative_residual": self.relative_residual,
            "parts": {str(kind): float(value) for kind, value in kinds.items()},
        }

    def glance(self, top: int = 12) -> Glance:
        """The parts by kind and span, and the `top` biggest parts by token, layer and head."""
        fact, settings = self.settings.fact, self.settings
        numbers = {name: f"{{{name}:signed}}" for name in NUMBERS}
        measured = {name: getattr(self, name) for name in NUMBERS}
        parts = [
            *(
                {**row, "part": _part(row["kind"], row["span"])}
                for row in self.summary().to_dict("records")
            ),
            {"part": "sum of the parts", **self.table[NUMBERS].sum()},
            {"part": f"logit {fact.target_false!r} - {fact.target_true!r}", **measured},
        ]
        biggest = self.biggest(top, by=("token", "position", "layer", "head"))
        biggest["part"] = biggest["kind"].map(_part)
        biggest["token"] = [
            f"{token!r} at {position}" if kind == "attention" else ""
            for kind, token, position in biggest[["kind", "token", "position"]].to_numpy()
        ]
        chat = ", in a chat" if settings.prompt.templated else ""
        places = {"token": "{token}", "layer": "{layer:d}", "head": "{head:d}"}
        return Glance(
            f"{settings.title} · case {fact.case_id} ({fact.subject or fact.template}) · "
            f"{settings.scheme.name}, dose {settings.dose}{chat} · seed {settings.seed}",
            (
                Grid.of(parts, {"part (logits)": "{part}", **numbers}),
                Grid.of(biggest, {"biggest parts": "{part}", **places, **numbers}),
            ),
            (
                f"residual of the shift: {self.residual:+.1e} logits",
                "every token counts once: hijack is without mention, query without subject and "
                "last",
                "biggest parts: what one head reads from one token; biggest() sums a head over all "
                "tokens",
                f"prompt: {settings.prompt.text}",
                *(f"probe: {key}" for key in settings.probes),
            ),
            ("summary()", "biggest()", "plot()", "save(folder)"),
        )


def _part(kind: str, span: str = "") -> str:
    """Write a kind of part in words, with the span that attention reads from."""
    words = "MLP" if kind == "mlp" else kind.replace("_", " ")
    return f"{words} to {span}" if span else words
