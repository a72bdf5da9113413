"""Write a report: check where it goes, read the results, and make the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hijacklens.errors import InputError, strict, utf8
from hijacklens.files import RECORD, check_folder, named_path, write_text

if TYPE_CHECKING:
    from hijacklens.results.result import Result

TITLE = "Context hijacking: a report"


@strict
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
            such folders, as `hijacklens reproduce` writes, means all of them. Comparisons come
            first on the page.
        out: The HTML file.
        title: Title of the page.
        overwrite: Replace the file if it exists.

    Returns:
        The path of the file.

    Raises:
        InputError: There is no result, a folder holds none, the file exists already, or its
            folder does not exist or is not writable.
        OSError: There is no room for the file.

    Note:
        The file holds all rows of all tables, compressed: about 45 bytes for an item of a hijack
        run, and 1.3 MB of script if there are views.
    """
    utf8("the title", title, "'My runs'")
    path = named_path(out, "file")
    if path.is_dir():
        raise InputError(f"{str(out)!r} is a folder; name a file for the report, such as r.html.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(out)!r}: there is no folder {str(path.parent)!r}.")
    if path.exists() and not overwrite:
        raise InputError(
            f"{str(out)!r} already exists. Choose another name, or pass overwrite=True "
            "(--overwrite on the command line) to replace it."
        )
    check_folder(path.parent, overwrite=True)

    # Imported here so that the checks above answer at once.
    from hijacklens.results.result import Result, load_result

    sources = [results] if isinstance(results, (Result, str, Path)) else list(results)
    if not sources:
        raise InputError("a report needs at least one result; name the folders that runs wrote.")
    found = [
        (one, "") if isinstance(one, Result) else (load_result(one), str(one))
        for source in sources
        for one in ([source] if isinstance(source, Result) else results_in(source))
    ]
    from hijacklens.report.page import Entry, page

    # Readers look for the verdict first; within a kind, the order is that of the arguments.
    found.sort(key=lambda one: not one[0].leads)
    write_text(path, page([Entry(*one) for one in found], title=title))
    return path


def results_in(source: str | Path, *records: str) -> Sequence[str | Path]:
    """Return the results inside a folder that is not one itself; otherwise the folder alone.

    `records` are names of files that make a folder a result, by default `result.json`.
    """
    folder, names = named_path(source, "folder"), records or (RECORD,)
    if any((folder / name).exists() for name in names):
        return [source]
    return sorted({p.parent for name in names for p in folder.glob(f"[!.]*/{name}")}) or [source]
