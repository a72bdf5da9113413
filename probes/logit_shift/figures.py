"""Heat maps of the parts of a shift: any of token, span or head against layer.

Red parts push the answer towards the false target, blue ones towards the true target; the colour
scale is symmetric. What a layer wrote beside its heads (MLP, biases) stands in lines of its own,
and what belongs to no layer is named below, so that nothing of the shift is left out.
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
MOST_LABELS = 40
"""More cells than this along an axis get every second, third, ... label."""
COLOURS = "RdBu_r"


def check_axes(by: Sequence[str], allowed: Sequence[str] = AXES) -> str:
    """The axis that stands against layer.

    Raises:
        InputError: It is not one of `allowed`, or layer is not the other one.
    """
    names = [name for name in by if name != "layer"]
    if len(by) != 2 or len(names) != 1 or names[0] not in allowed:
        pairs = ", ".join(f"('{name}', 'layer')" for name in allowed)
        raise InputError(f"cannot plot by {tuple(by)!r}; allowed: {pairs}, in either order.")
    return names[0]


def heat_map(
    table: pd.DataFrame,
    by: Sequence[str],
    *,
    label: str,
    title: str,
    note: str,
    order: Sequence[Any] = (),
) -> Figure:
    """Draw sums of parts as a layer map.

    Args:
        table: Rows with `kind`, `layer`, `shift` and the axis: one of `by` beside layer.
        by: The axis on the left and the one below; one of them is `layer`.
        label: Says what the colour is.
        title: Stands above the map.
        note: Stands below it.
        order: The values of the axis from first to last; sorted where not given.
    """
    axis = check_axes(by)
    heads = table["kind"].isin(["attention", "value_bias"])
    main = table.loc[heads] if axis == "head" else table.loc[table["kind"] == "attention"]
    grid = main.pivot_table(index=axis, columns="layer", values="shift", aggfunc="sum", sort=False)
    grid = grid.reindex(index=list(order) or sorted(grid.index), columns=sorted(grid.columns))
    rest = table.loc[table["layer"].notna() & ~table.index.isin(main.index)]
    extra = pd.DataFrame(
        {
            "MLP": rest.loc[rest["kind"] == "mlp"].groupby("layer")["shift"].sum(),
            "biases": rest.loc[rest["kind"] != "mlp"].groupby("layer")["shift"].sum(),
        }
    )
    extra = extra.T.reindex(columns=grid.columns).fillna(0.0)
    extra = extra[(extra != 0).any(axis=1)]
    n_main = len(grid)
    names = [*map(str, grid.index), *extra.index]
    values = np.vstack([grid.fillna(0.0).to_numpy(float), extra.to_numpy(float)])
    sideways = by[0] == "layer"
    values = values.T if sideways else values
    rows, columns = values.shape
    top = float(np.abs(values).max()) or 1.0
    size = {"width": 2.4 + 0.24 * columns, "height": 1.6 + 0.24 * rows}
    with plots.canvas(width=max(size["width"], 4.8), height=max(size["height"], 2.6)) as (
        figure,
        (ax,),
    ):
        image = ax.imshow(values, cmap=COLOURS, vmin=-top, vmax=top, aspect="auto")
        ax.grid(visible=False)
        layers = [str(layer) for layer in grid.columns]
        below, left = (names, layers) if sideways else (layers, names)
        _ticks(ax.xaxis, below)
        _ticks(ax.yaxis, left)
        if sideways and axis != "head":
            ax.tick_params(axis="x", rotation=90)
        if len(extra):
            line = ax.axvline if sideways else ax.axhline
            line(n_main - 0.5, color="#000000", linewidth=0.8)
        ax.set_xlabel(f"{axis if sideways else 'layer'}\n{note}")
        ax.set_ylabel("layer" if sideways else axis)
        ax.set_title(_plain(title), fontsize=10)
        figure.colorbar(image, ax=ax, label=_plain(label), shrink=0.9)
    return figure


def shows(value: Any) -> bool:
    """Whether a number written with two decimals is more than zeros."""
    return abs(float(value)) >= 0.005


def _ticks(axis: Any, labels: Sequence[str]) -> None:
    step = -(-len(labels) // MOST_LABELS)
    # Lines beside the layers' heads have names and always get their label.
    kept = [i for i, label in enumerate(labels) if i % step == 0 or not label.isdigit()]
    axis.set_ticks(kept, [_plain(labels[i]) for i in kept])


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
