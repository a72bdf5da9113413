"""A tiny model of every family: as Hugging Face runs it, as a bridge, and as a folder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.models.loading import load_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(family):
    """The model as Hugging Face runs it."""
    return copy.deepcopy(tiny_model(family))


@pytest.fixture(scope="module")
def bridge(family):
    return load_model(tiny_model(family), tokenizer=tiny_tokenizer(family), device="cpu")


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"tiny-{family}"
    tiny_model(family).save_pretrained(path)
    tiny_tokenizer(family).save_pretrained(path)
    return path
