"""Read what a user writes in short: doses, methods of defence."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from hijacklens.errors import InputError, choice, whole_number


def read_doses(text: str) -> tuple[int, ...]:
    """Return the doses of a range or a list, such as `0-5` or `0,1,5`.

    >>> read_doses("0-2,5")
    (0, 1, 2, 5)
    """
    from hijacklens.prompts.prompt import DOSE, MOST_SENTENCES

    doses: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,99})(?:-(\d{1,99}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(
                f"--doses {text!r}: {part!r} is neither a number nor a rising range. Write 0-5, "
                "or 0,1,5."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        whole_number(f"--doses {text!r}: {DOSE}", last, most=MOST_SENTENCES)
        doses.update(range(first, last + 1))
    return tuple(sorted(doses))


def method_table() -> list[dict[str, str]]:
    """Return the built-in methods of `hijacklens defend`: a row of `methods.csv` each."""
    table = resources.files("analyses") / "defence" / "methods.csv"
    return list(csv.DictReader(table.read_text("utf-8").splitlines()))


def read_method(name: str, known: Iterable[str]) -> tuple[Path | None, str]:
    """Return the name of a known method, or the file and the name of one such as `mine.py:Method`.

    >>> read_method("gate", ["gate"])
    (None, 'gate')
    """
    file, colon, attribute = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        return None, choice("method", name, known, "A file with one of your own: mine.py:Method.")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {file}, of the method {name}; give its path.")
    return path, attribute
