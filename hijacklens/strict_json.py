"""JSON that every reader takes: no NaN and no infinity (null instead), numbers of NumPy as numbers.

>>> text({"efficacy": float("nan"), "doses": range(3)}, indent=None)
'{"efficacy": null, "doses": [0, 1, 2]}'
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any


def text(record: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """A record as JSON, its keys in their order, letters of all languages as they are."""
    return json.dumps(_strict(record), indent=indent, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_strict(item) for item in sorted(value, key=str)]
    if isinstance(value, (list, tuple, range)):
        return [_strict(item) for item in value]
    # Commands that list names do without NumPy; where it was never imported, nothing is of it.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return _strict(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
