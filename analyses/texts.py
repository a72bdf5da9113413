"""Read what a user writes in short: doses."""

from __future__ import annotations

import re

from hijacklens.errors import InputError, whole_number


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
