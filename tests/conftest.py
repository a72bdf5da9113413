"""Shared fixtures. Nothing in the tests may reach the network; they use a local hub."""

from __future__ import annotations

import gc
import os
import re

from hub_server import ENVIRONMENT, HUB, HubServer, online

# The libraries of the hub read their settings when they are imported. Tests are offline by default;
# the fixture `hub` connects them with a server on this machine.
os.environ |= {"HF_HUB_OFFLINE": "1", **ENVIRONMENT}
os.environ.pop("HF_TOKEN", None)
os.environ["PIP_NO_INDEX"] = "1"  # no library may install another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HIJACKLENS_STORE"] = "off"  # no test may read scores of an earlier run
# Tiny models are fastest on one thread, and far slower on two when the machine is shared. Processes
# that tests start inherit the setting; torch reads it when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import jaxtyping
import matplotlib
import pytest
from hypothesis import settings
from matplotlib.figure import Figure
from shared_data import SHARED

_jaxtyped = jaxtyping.jaxtyped
SHAPED = re.compile(r"\b(?:Float|Int|Bool|Shaped)\w*\[")


def _checked_once(function: Any = None, **options: Any) -> Any:
    """Check the functions whose arguments or results have shapes; pyright checks other types.

    Functions inside functions stay unchecked: each call would build their checker again.
    """
    if isinstance(function, FunctionType):
        kinds = map(str, function.__annotations__.values())
        if "<locals>" in function.__qualname__ or not any(map(SHAPED.search, kinds)):
            return function
    if function is None:
        return lambda function: _checked_once(function, **options)
    return _jaxtyped(function, **options)


jaxtyping.jaxtyped = _checked_once

# Nobody looks at the files of figures: they are small and not laid out, in a third of the time.
_save_figure = Figure.savefig


def _save_plainly(figure: Figure, *args: Any, **options: Any) -> None:
    figure.set_layout_engine("none")
    with matplotlib.rc_context({"savefig.dpi": 40, "savefig.bbox": "standard"}):
        _save_figure(figure, *args, **options)


Figure.savefig = _save_plainly

# What imports and collection make stays to the end. Looking through it for garbage again and again
# would take a tenth of the time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# A busy machine is no reason for a test to fail.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The whole CounterFact and the GPT-2 tokenizer; a test that lacks them says so."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder (set HIJACKLENS_SHARED); {SHARED} is not there")
    return SHARED


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """The hub of the tests, which are offline."""
    yield HUB
    HUB.reset()


@pytest.fixture
def hub(hub_server) -> Iterator[HubServer]:
    """The hub of the tests, which can reach it."""
    with online():
        yield hub_server
