"""Tiny models that many tests of probes run on. They are loaded once: no test changes them.

So they are also compared and described once for a file of tests, which takes longer than a probe.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
from edited_values import ids_of
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.models.agreement import comparing_once
from hijacklens.models.loading import load_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@cache
def loaded(family):
    """A plain model and the same model with hooks."""
    plain = tiny_model(family)
    plain.set_attn_implementation("eager")
    return plain, load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer(family), device="cpu")


@pytest.fixture(scope="module")
def pair(family):
    """A plain model and the same model with hooks."""
    return loaded(family)


@pytest.fixture(scope="module")
def model(pair):
    with comparing_once(pair[1]):
        yield pair[1]


@pytest.fixture(scope="module")
def gpt2():
    with comparing_once(model := loaded("gpt2")[1]):
        yield model


@pytest.fixture(scope="module")
def ids(family):
    """Tokens of a short prompt [1, pos]."""
    return ids_of(family)
