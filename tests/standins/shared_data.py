"""Where the whole CounterFact and the GPT-2 tokenizer lie, on machines that have them."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.get("HIJACKLENS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
