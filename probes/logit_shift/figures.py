"""Heat maps of the parts of a shift: tokens, spans or heads by layer.

Red parts push the answer towards the false target, blue ones towards the true target; the colour
scale is symmetric. MLPs and biases of the layers have separate lines, and parts outside the layers
are listed below the map, so that the figure shows the complete shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError

AXES = ("token", "span", "head")
VALUES = {"bare": "bare (logits)", "hijacked": "hijacked (logits)", "shift": "shift (logits)"}
"""Column -> its title in a report."""
LEAST = 0.005
"""Parts outside the layers are named from this size on, where two decimals are not zero."""
READING = (
    "Parts above zero (red) push the answer towards the false target, those below (blue) towards "
    "the true one. The parts sum to the shift; the residual is the rest."
)


def check_axes(by: Sequence[str], allowed: Sequence[str] = AXES) -> str:
    """Return the axis of a map that is not `layer`.

    Raises:
        InputError: It is not one of `allowed`, or the other one is not `layer`.
    """
    names = [name for name in by if name != "layer"]
    if len(by) != 2 or len(names) != 1 or names[0] not in allowed:
        pairs = ", ".join(f"('{name}', 'layer')" for name in allowed)
        raise InputError(f"cannot plot by {tuple(by)!r}; allowed: {pairs}, in either order.")
    return names[0]


def heat_map(table: pd.DataFrame, by: Sequence[str], *, label: str, title: str) -> Figure:
    """Draw sums of parts as a map of layers and one other axis.

    The table has rows with `kind`, `layer`, `shift` and the other axis, in the order of that axis.
    `by` names the vertical and the horizontal axis, `label` says what the colour means.
    """
    axis = check_axes(by)
    heads = table["kind"].isin(["attention", "value_bias"])
    main = table.loc[heads] if axis == "head" else table.loc[table["kind"] == "attention"]
    grid = main.pivot_table(index=axis, columns="layer", values="shift", aggfunc="sum", sort=False)
    grid = grid.reindex(index=list(dict.fromkeys(main[axis])), columns=sorted(grid.columns))
    rest = table.loc[table["layer"].notna() & ~table.index.isin(main.index)]
    sums = {
        "MLP": rest.loc[rest["kind"] == "mlp"].groupby("layer")["shift"].sum(),
        "biases": rest.loc[rest["kind"] != "mlp"].groupby("layer")["shift"].sum(),
    }
    extra = pd.DataFrame(sums).T.reindex(columns=grid.columns).fillna(0.0)
    extra = extra[(extra != 0).any(axis=1)]
    parts: Any = table.loc[table["layer"].isna()].groupby("kind", sort=False)["shift"].sum()
    loose = [f"{kind} {part:+.2f}" for kind, part in parts.items() if abs(part) >= LEAST]
    note = f"in no layer: {', '.join(loose) or f'all below {LEAST}'}" if len(parts) else ""
    names = [*grid.index, *extra.index]
    values = np.vstack([grid.fillna(0.0).to_numpy(float), extra.to_numpy(float)])
    sideways = by[0] == "layer"
    values = values.T if sideways else values
    layers = list(grid.columns)
    left, below = (layers, names) if sideways else (names, layers)
    width, height = max(2.4 + 0.24 * len(below), 4.8), max(1.6 + 0.24 * len(left), 2.6)
    with plots.canvas(width=width, height=height) as (figure, (ax,)):
        plots.heat_map(ax, values, rows=left, columns=below, label=label)
        if sideways and axis != "head":
            ax.tick_params(axis="x", rotation=90)
        if len(extra):
            line = ax.axvline if sideways else ax.axhline
            line(len(grid) - 0.5, color="#000000", linewidth=0.8)
        ax.set_xlabel(f"{axis if sideways else 'layer'}\n{note}")
        ax.set_ylabel("layer" if sideways else axis)
        ax.set_title(plots.escape(title), fontsize=10)
    return figure
