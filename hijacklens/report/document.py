"""Writing a report to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hijacklens.errors import InputError
from hijacklens.files import RECORD, write_whole
from hijacklens.report.page import Entry, page
from hijacklens.results.result import Result, load_result, named_path

TITLE = "Context hijacking: a report"


def write_report(
    results: Result | str | Path | Sequence[Result | str | Path],
    *,
    out: str | Path,
    title: str = TITLE,
    overwrite: bool = False,
) -> Path:
    """Write saved results as one HTML file that opens with no network.

    Args:
        results: One or several: folders that a run wrote, or results themselves. A folder of
            such folders, as `hijacklens reproduce` writes, stands for all of them.
        out: The HTML file.
        title: Stands above the page.
        overwrite: Replace the file if it is there.

    Returns:
        The path of the file.

    Raises:
        InputError: No result is given, a folder holds none, the file is there already, or its
            folder is not.

    Note:
        The file holds all rows of all tables, compressed: about 45 bytes for an item of a hijack
        run, and 1.3 MB of script where there are views.
    """
    listed = [results] if isinstance(results, (Result, str, Path)) else list(results)
    if not listed:
        raise InputError("a report needs at least one result; name the folders that runs wrote.")
    path = _free(out, overwrite=overwrite)
    entries = [
        Entry(one) if isinstance(one, Result) else Entry(load_result(one), str(one))
        for item in listed
        for one in _single(item)
    ]
    text = page(entries, title=title)

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8", newline="\n")

    write_whole(path, write)
    return path


def _single(item: Result | str | Path) -> Sequence[Result | str | Path]:
    """A result or folder by itself; the folders with results in a folder that has none."""
    if isinstance(item, Result):
        return [item]
    folder = named_path(item, "folder")
    inside = [] if (folder / RECORD).exists() else sorted(folder.glob(f"*/{RECORD}"))
    return [path.parent for path in inside] or [item]


def _free(out: str | Path, *, overwrite: bool) -> Path:
    """The path of the file, where one may be written."""
    path = named_path(out, "file")
    if path.is_dir():
        raise InputError(f"{str(out)!r} is a folder; name a file for the report, such as r.html.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(out)!r}: there is no folder {str(path.parent)!r}.")
    if path.exists() and not overwrite:
        raise InputError(
            f"{str(out)!r} is there already. Choose another name, or say overwrite (--overwrite on "
            "the command line) to replace it."
        )
    return path
