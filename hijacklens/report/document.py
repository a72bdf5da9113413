"""Writing a report to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hijacklens.errors import InputError
from hijacklens.files import RECORD, named_path, write_text
from hijacklens.report.page import Entry, page
from hijacklens.results.result import Result, load_result

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
            such folders, as `hijacklens reproduce` writes, means all of them.
        out: The HTML file.
        title: Title of the page.
        overwrite: Replace the file if it exists.

    Returns:
        The path of the file.

    Raises:
        InputError: There is no result, a folder holds none, the file exists already, or its
            folder does not.

    Note:
        The file holds all rows of all tables, compressed: about 45 bytes for an item of a hijack
        run, and 1.3 MB of script if there are views.
    """
    sources = [results] if isinstance(results, (Result, str, Path)) else list(results)
    if not sources:
        raise InputError("a report needs at least one result; name the folders that runs wrote.")
    path = _check_file(out, overwrite=overwrite)
    entries = [
        Entry(one) if isinstance(one, Result) else Entry(load_result(one), str(one))
        for source in sources
        for one in _results_in(source)
    ]
    write_text(path, page(entries, title=title))
    return path


def _results_in(source: Result | str | Path) -> Sequence[Result | str | Path]:
    """Return the results inside a folder that is not one itself; otherwise the source alone."""
    if isinstance(source, Result):
        return [source]
    folder = named_path(source, "folder")
    records = [] if (folder / RECORD).exists() else sorted(folder.glob(f"*/{RECORD}"))
    return [path.parent for path in records] or [source]


def _check_file(out: str | Path, *, overwrite: bool) -> Path:
    """Return the path of the file; refuse one that cannot or must not be written."""
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
