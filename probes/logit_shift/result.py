"""The account of one fact's shift as a result: a table of parts, maps, files.

A part is a row of `to_dataframe()`: what a source token, layer, head, MLP or bias wrote to
`logit o_ - logit o*` in the bare and in the hijacked run, and the difference. The kinds:

    attention     a head's reading of one source token (value bias apart)
    value_bias    b_V through a head's output matrix
    output_bias   b_O of a layer
    mlp           an MLP, its biases inside
    embedding     the embedding of the last token
    position      its positional embedding (GPT-2)
    norm_bias     the bias of the final norm
    unembed_bias  that of the unembedding
    soft_cap      what the final soft-cap adds to the difference (Gemma-2)
    normaliser    zero, unless the two targets are read behind different tokens; then both are
                  log-probabilities, and this is the difference of their softmax sums' logs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.prompts.prompt import Prompt
from hijacklens.results.glance import Glance
from hijacklens.results.provenance import Provenance, provenance_from
from hijacklens.results.result import Result
from probes.account import SINGLE, Account
from probes.inputs.alignment import Unit
from probes.logit_shift.figures import check_axes, heat_map, shows

if TYPE_CHECKING:
    from hijacklens.results.exhibits import Exhibit

COLUMNS = ("span", "token", "position", "layer", "head", "kind", "bare", "hijacked", "shift")
KINDS = ("attention", "value_bias", "output_bias", "mlp", *SINGLE)
TABLE, PATTERNS = "account.parquet", "patterns.npz"


def parts_table(units: Sequence[Unit], bare: Account, hijacked: Account) -> pd.DataFrame:
    """Every part of two accounts of a fact, a row each, where tokens correspond.

    `position` is that in the hijacked prompt; missing where a part has none, as layer and head.
    """
    n_layers, n_heads, _ = hijacked.attention.shape
    sums = [
        np.stack([account.attention[..., list(places)].sum(-1) for places in sides])
        for account, sides in (
            (bare, [unit.bare for unit in units]),
            (hijacked, [unit.hijacked for unit in units]),
        )
    ]
    per_head = n_layers * n_heads
    layer, head = np.divmod(np.arange(per_head), n_heads)
    repeated = np.repeat(np.arange(len(units)), per_head)
    places = pd.array([u.hijacked[0] if u.hijacked else None for u in units], dtype="Int64")
    last = next(unit for unit in reversed(units) if unit.span == "last")
    blocks = [
        pd.DataFrame(
            {
                "span": [units[i].span for i in repeated.tolist()],
                "token": [units[i].token for i in repeated.tolist()],
                "position": places[repeated],
                "layer": np.tile(layer, len(units)),
                "head": np.tile(head, len(units)),
                "kind": "attention",
                "bare": sums[0].ravel(),
                "hijacked": sums[1].ravel(),
            }
        ),
        _block("value_bias", bare.value_bias, hijacked.value_bias, layer=layer, head=head),
        _block("output_bias", bare.output_bias, hijacked.output_bias, layer=range(n_layers)),
        _block("mlp", bare.mlp, hijacked.mlp, layer=range(n_layers)),
    ]
    for i, kind in enumerate(SINGLE):
        place = {}
        if kind in ("embedding", "position"):
            place = {"span": ["last"], "token": [last.token], "position": [last.hijacked[-1]]}
        blocks.append(_block(kind, bare.single[[i]], hijacked.single[[i]], **place))
    kinds = {"position": "Int64", "layer": "Int64", "head": "Int64"}
    table = pd.concat([_typed(block) for block in blocks], ignore_index=True)
    table["shift"] = table["hijacked"] - table["bare"]
    return table.astype(kinds)[list(COLUMNS)]


def _block(kind: str, bare: np.ndarray, hijacked: np.ndarray, **columns: Any) -> pd.DataFrame:
    values = {"bare": bare.ravel(), "hijacked": hijacked.ravel()}
    return pd.DataFrame({"kind": kind, **columns, **values})


def _typed(block: pd.DataFrame) -> pd.DataFrame:
    """All columns, missing ones with no values, so that tables join without a change of type."""
    block = block.reindex(columns=[name for name in COLUMNS if name != "shift"])
    texts = {"span": "string", "token": "string", "kind": "string"}
    return block.astype({**texts, "position": "Int64", "layer": "Int64", "head": "Int64"})


@dataclass(frozen=True, eq=False)
class ShiftAccount(Result):
    """What wrote the logit shift of one fact; made by `logit_shift.trace`. Units: logits."""

    table: pd.DataFrame
    """See `to_dataframe`."""
    bare: float
    """logit o_ - logit o* behind the bare query, as the model gives it."""
    hijacked: float
    """The same behind the hijacked prompt."""
    settings: Mapping[str, Any]
    """Model, fact, scheme, dose, the hijacked prompt, probes, seed."""
    provenance: Provenance
    tokens: tuple[str, ...] = ()
    """The tokens of the hijacked prompt, where the patterns are kept."""
    patterns: Float[np.ndarray, "layer head query key"] | None = None
    """Where the heads look in the hijacked prompt; see `probes.attention.page.with_patterns`."""

    figure_names = ()

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
        """The residual's size as a share of the largest of the shift and both differences."""
        largest = max(abs(self.shift), abs(self.bare), abs(self.hijacked))
        return abs(self.residual) / largest if largest else abs(self.residual)

    @property
    def prompt(self) -> Prompt:
        """The hijacked prompt with its spans."""
        record = self.settings["prompt"]
        spans = {
            name: tuple((int(start), int(end)) for start, end in stretches)
            for name, stretches in record["spans"].items()
        }
        return Prompt(record["text"], record["scheme"], record["dose"], spans)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per part: span, token, position, layer, head, kind, bare, hijacked, shift.

        The last three are logits; spans are those of `probes.inputs.alignment`, kinds those of this
        module.
        """
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """The parts summed by kind, those of attention by span too: bare, hijacked, shift."""
        spans = self.table["span"].where(self.table["kind"] == "attention", "")
        sums: Any = self.table.assign(span=spans).groupby(["kind", "span"], sort=False)
        found = sums[["bare", "hijacked", "shift"]].sum().reset_index()
        kept = (found[["bare", "hijacked", "shift"]] != 0).any(axis=1)
        return found.loc[kept].reset_index(drop=True)

    def biggest(self, n: int = 10, *, by: Sequence[str] = ("layer", "head")) -> pd.DataFrame:
        """The `n` parts with the largest share in the shift, up or down.

        Args:
            n: How many.
            by: What the parts are summed over to: any columns of the table but the values.

        Raises:
            InputError: A column that the table does not have.
        """
        allowed = COLUMNS[:6]
        if not by or set(by) - set(allowed):
            raise InputError(f"cannot sum by {list(by)}; allowed: {', '.join(allowed)}.")
        keys = list(dict.fromkeys(("kind", *by)))
        values = ["bare", "hijacked", "shift"]
        groups: Any = self.table.groupby(keys, dropna=False, sort=False)
        sums = groups[values].sum().reset_index()
        largest = sums["shift"].abs().sort_values(ascending=False, kind="stable").index[:n]
        return sums.loc[largest].reset_index(drop=True)

    def plot(self, *, by: Sequence[str] = ("token", "layer")) -> Figure:
        """A map of the shift by layer and token, span or head; see `probes.logit_shift.figures`.

        Args:
            by: What stands on the left and what below: `("token", "layer")`, `("layer", "head")`,
                `("span", "layer")`, or the other way round.

        Raises:
            InputError: Other axes.
        """
        axis = check_axes(by)
        table, order = self.table, []
        if axis == "token":
            table = table.assign(token=_token_labels(table))
        if axis != "head":
            order = list(dict.fromkeys(table.loc[table["kind"] == "attention", axis]))
        groups: Any = table.loc[table["layer"].isna()].groupby("kind", sort=False)
        loose = groups["shift"].sum()
        rest = ", ".join(f"{kind} {value:+.2f}" for kind, value in loose.items() if shows(value))
        fact = self.settings["fact"]
        return heat_map(
            table,
            by,
            label=f"part of the shift (logits; red: towards {fact['target_false']!r})",
            title=(
                f"{self.settings['model']['name']}: {fact['target_false']!r} against "
                f"{fact['target_true']!r}\n{self.settings['scheme']}, dose "
                f"{self.settings['dose']}: {self.bare:+.2f} → {self.hijacked:+.2f}, "
                f"shift {self.shift:+.2f}"
            ),
            note=f"beside the layers: {rest or 'nothing above 0.005'}",
            order=order,
        )

    def exhibits(self) -> list[Exhibit]:
        """Both maps, the attention of the heads that wrote most, and the parts."""
        from probes.logit_shift.exhibits import account_exhibits

        return account_exhibits(self)

    def configuration(self) -> dict[str, Any]:
        """The settings, the totals in logits, and the sum of each kind of part."""
        kinds: Any = self.table.groupby("kind", sort=False)["shift"].sum()
        return {
            **self.settings,
            "unit": "logits",
            "bare": self.bare,
            "hijacked": self.hijacked,
            "shift": self.shift,
            "residual": self.residual,
            "relative_residual": self.relative_residual,
            "parts": {str(kind): float(value) for kind, value in kinds.items()},
        }

    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """The table, its summary, both maps, and the attention patterns where they are kept."""
        found: dict[str, Callable[[Path], None]] = {
            TABLE: lambda path: self.table.to_parquet(path, index=False),
            "summary.csv": lambda path: self.summary().to_csv(path, index=False),
        }
        maps = {"token_layer": ("token", "layer"), "layer_head": ("layer", "head")}
        for name, by in maps.items():
            figure = self.plot(by=by)
            for ending in ("svg", "png"):
                found[f"{name}.{ending}"] = lambda path, figure=figure: plots.write(figure, path)
        if self.patterns is not None:
            arrays = {"tokens": np.array(self.tokens), "patterns": self.patterns}
            found[PATTERNS] = lambda path: _write_arrays(path, arrays)
        return found

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> ShiftAccount:
        """Read the table back; the rest is in the record."""
        try:
            table = pd.read_parquet(folder / TABLE)
            more: dict[str, Any] = {}
            if (folder / PATTERNS).exists():
                with np.load(folder / PATTERNS, allow_pickle=False) as held:
                    tokens = tuple(str(token) for token in held["tokens"])
                    more = {"tokens": tokens, "patterns": held["patterns"]}
        except (OSError, ValueError) as error:
            raise InputError(f"the result in {str(folder)!r} is not whole: {error}") from error
        names = ("model", "fact", "scheme", "dose", "prompt", "probes", "seed")
        settings = {name: record[name] for name in names}
        provenance = provenance_from(record)
        return cls(table, record["bare"], record["hijacked"], settings, provenance, **more)

    def glance(self) -> Glance:
        """The shift, and its largest parts by layer and head."""
        fact, settings = self.settings["fact"], self.settings
        whole = ("the whole", f"{self.bare:+.2f}", f"{self.hijacked:+.2f}", f"{self.shift:+.2f}")
        rows = []
        for row in self.biggest(5).to_dict("records"):
            place = "" if pd.isna(row["layer"]) else f" L{row['layer']}"
            place += "" if pd.isna(row["head"]) else f" H{row['head']}"
            numbers = (f"{row[name]:+.2f}" for name in ("bare", "hijacked", "shift"))
            rows.append((f"{row['kind']}{place}", *numbers))
        return Glance(
            f"{settings['model']['name']} · case {fact['case_id']}, {fact['target_false']!r} "
            f"against {fact['target_true']!r} · {settings['scheme']}, dose {settings['dose']} · "
            f"residual {self.residual:.1e} logits",
            ("part (logits)", "bare", "hijacked", "shift"),
            (whole, *rows),
            ("summary()", "biggest()", "plot()", "save(folder)"),
        )


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    with path.open("wb") as file:  # a name would get another ending
        np.savez_compressed(file, **arrays)


def _token_labels(table: pd.DataFrame) -> pd.Series:
    """Labels of tokens, told apart by their position where a text occurs twice."""
    places = table["position"].astype("string").fillna("-")
    return places.str.cat(table["token"], sep="  ")
