"""Fuzzing meets what users meet: their calls are not checked by jaxtyping."""

from __future__ import annotations

import pytest
from type_checks import unchecked


@pytest.fixture(autouse=True, scope="module")
def as_users_have_it():
    with unchecked():
        yield
