"""A sheet: several views that share one copy of the bundle, in a cell, in a file, as pictures.

>>> from hijacklens.views.view import coloured_tokens
>>> Sheet((coloured_tokens("bare", ["The"], [1.0]), coloured_tokens("hijacked", ["Do"], [0.0])))
Sheet(2 views: 'bare', 'hijacked')
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hijacklens import plots
from hijacklens.errors import InputError, unknown
from hijacklens.files import expand_home, write_whole
from hijacklens.views.page import frame, save_page
from hijacklens.views.view import View

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Sheet:
    """Views from top to bottom.

    In a notebook cell they share one frame; where scripts do not run, on GitHub or in a mail, a
    picture stands for those that are not folded.

    Raises:
        InputError: There are no views.
    """

    views: Sequence[View]
    title: str = ""
    note: str = ""
    """A paragraph above the views."""

    def __post_init__(self) -> None:
        if len(self.views) == 0 or not all(isinstance(view, View) for view in self.views):
            raise InputError(
                f"a sheet holds views, at least one, such as those of views.attention(...); got "
                f"{self.views!r}."
            )

    def save(self, path: str | Path) -> Path:
        """Write the views to a file and return its path.

        Args:
            path: Ends in `.html` for a page that needs no network; in `.png`, `.svg` or `.pdf` for
                the figure of a sheet with one view.

        Raises:
            InputError: The name ends otherwise, its folder is not there, or a picture is asked of
                several views.
        """
        target = expand_home(path)
        if not target.parent.is_dir():
            raise InputError(f"cannot write {str(path)!r}: make the folder of it first.")
        if target.suffix == ".html":
            title = self.title or self.views[0].heading
            save_page(self.views, target, title=title, note=self.note)
            return target
        if target.suffix not in PICTURES:
            raise unknown("ending", target.suffix, [".html", *PICTURES], f"Given {str(path)!r}.")
        if len(self.views) > 1:
            raise InputError(
                f"a picture shows one view and this sheet has {len(self.views)}; save them one by "
                "one, or as a page that ends in .html."
            )
        figure = self.views[0].plot()
        write_whole(target, lambda part: plots.write(figure, part))
        return target

    def __repr__(self) -> str:
        return f"Sheet({len(self.views)} views: {', '.join(repr(v.heading) for v in self.views)})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        makers: dict[str, Callable[[], Any]] = {
            "text/html": lambda: frame(self.views, note=self.note),
            "image/png": self._picture,
            "text/plain": lambda: repr(self),
        }
        wanted = set(makers if include is None else include) - set(exclude or ())
        return {kind: make() for kind, make in makers.items() if kind in wanted}

    def _picture(self) -> bytes:
        """The figures of the views that are not folded, one below the other."""
        parts = []
        for view in [view for view in self.views if not view.folded] or self.views[:1]:
            held = io.BytesIO()
            view.plot().savefig(held, format="png", dpi=80, bbox_inches="tight")
            parts.append(Image.open(held).convert("RGB"))
        size = max(part.width for part in parts), sum(part.height for part in parts)
        whole = Image.new("RGB", size, "white")
        for i, part in enumerate(parts):
            whole.paste(part, (0, sum(above.height for above in parts[:i])))
        held = io.BytesIO()
        whole.save(held, format="png", optimize=True)
        return held.getvalue()
