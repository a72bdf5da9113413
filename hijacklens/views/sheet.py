"""Views that show and save themselves, and sheets of several views that share one bundle."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from hijacklens import plots
from hijacklens.errors import InputError, unknown
from hijacklens.files import expand_home, write_whole
from hijacklens.results import exhibits
from hijacklens.views import figures
from hijacklens.views.page import frame, save_page

PICTURES = (".png", ".svg", ".pdf")


class View(exhibits.View):
    """A view that shows itself as the last value of a notebook cell."""

    __slots__ = ()

    def plot(self) -> Figure:
        """Draw the same numbers as a matplotlib figure: maps of heads, or a strip of tokens.

        Raises:
            InputError: The component has no figure.
        """
        return figures.draw(self)

    def save(self, path: str | Path) -> Path:
        """Write the view to a file and return its path; see `Sheet.save`."""
        return Sheet((self,)).save(path)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return Sheet((self,))._repr_mimebundle_(include, exclude) | {"text/plain": repr(self)}


@dataclass(frozen=True, slots=True)
class Sheet:
    """Views from top to bottom.

    In a notebook cell they share one frame. Where scripts do not run, as on GitHub or in a mail, a
    picture replaces the views that are not folded.

    Raises:
        InputError: There are no views.
    """

    views: Sequence[exhibits.View]
    title: str = ""
    note: str = ""
    """A paragraph above the views."""

    def __post_init__(self) -> None:
        if len(self.views) == 0 or not all(isinstance(v, exhibits.View) for v in self.views):
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
            InputError: The name ends otherwise, its folder is missing, or a picture would have to
                show several views.
        """
        target = expand_home(path)
        if not target.parent.is_dir():
            raise InputError(f"cannot write {str(path)!r}: make the folder first.")
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
        figure = figures.draw(self.views[0])
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
        kinds = set(makers if include is None else include) - set(exclude or ())
        return {kind: make() for kind, make in makers.items() if kind in kinds}

    def _picture(self) -> bytes:
        pictures = []
        for view in [view for view in self.views if not view.folded] or self.views[:1]:
            buffer = io.BytesIO()
            figures.draw(view).savefig(buffer, format="png", dpi=80)
            pictures.append(Image.open(buffer).convert("RGB"))
        width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
        column, top = Image.new("RGB", (width, height), "white"), 0
        for picture in pictures:
            column.paste(picture, (0, top))
            top += picture.height
        buffer = io.BytesIO()
        column.save(buffer, format="png", optimize=True)
        return buffer.getvalue()
