"""The ways of sharing prefixes on the packaged real models (`make test-models`)."""

from __future__ import annotations

import pytest

from hijacklens.facts.atlas import atlas
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.scoring.hijack import hijack

pytestmark = pytest.mark.packaged


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_every_way_gives_the_same_items(name):
    model = load_model(name, device="cpu")
    facts = atlas().where(relation=["P36"]).limit(3, seed=0)
    options = {"doses": [0, 1, 3], "quiet": True, "store": False}
    plain = hijack(model, facts, way="plain", **options).items
    for way in ("packed", "cached"):
        result = hijack(model, facts, way=way, **options)
        assert result.settings["models"][0]["engine"]["way"] == way
        for column in ("first_true", "first_false", "sum_true", "sum_false", "top_logprob"):
            assert (result.items[column] - plain[column]).abs().max() < 1e-4
        assert result.items["top_token"].equals(plain["top_token"])
