"""The ways of sharing prefixes on the packaged real models (`make test-models`)."""

from __future__ import annotations

import pytest

from hijacklens.facts.atlas import atlas
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack

pytestmark = pytest.mark.packaged


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_every_way_gives_the_same_items(name):
    model = load_model(name, device="cpu")
    facts = atlas().where(relation=["P36"]).limit(3, seed=0)

    def score(sharing):
        execution = Execution(sharing=sharing, store=False)
        return hijack(model, facts, doses=[0, 1, 3], execution=execution, quiet=True)

    plain = score("plain").items
    for sharing in ("packed", "cached"):
        result = score(sharing)
        assert result.settings.models[0].engine.sharing == sharing
        for column in ("first_true", "first_false", "sum_true", "sum_false", "top_logprob"):
            assert (result.items[column] - plain[column]).abs().max() < 1e-4
        assert result.items["top_token"].equals(plain["top_token"])
