"""Which layers and heads are chosen, and the errors of a wrong choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from type_checks import unchecked

from hijacklens import sites
from hijacklens.errors import InputError

MODEL = SimpleNamespace(cfg=SimpleNamespace(n_layers=3, n_heads=4, n_key_value_heads=2))
CHOICES = {
    "heads of layers": ({"layers": range(1, 3), "heads": [0]}, ((1, 0), (2, 0))),
    "pairs": ({"heads": [(2, 1), (0, 3), (2, 1)]}, ((0, 3), (2, 1))),
    "one layer": ({"layers": 1}, ((1, 0), (1, 1), (1, 2), (1, 3))),
    "grouped": ({"layers": [1], "axis": "kv_head"}, ((1, 0), (1, 1))),
    "all": ({"axis": "kv_head"}, ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))),
}
WRONG = {
    "no such layer": ({"layers": [3]}, "layer 3 is not one of this model's; it has 3"),
    "no such key/value head": ({"heads": [2], "axis": "kv_head"}, "kv_head 2 .* it has 2"),
    "negative": ({"layers": -1}, "layer -1"),
    "not a number": ({"layers": ["first"]}, "'first' is not a layer or head number"),
    "none": ({"layers": []}, "no layer or head is chosen"),
    "pairs and layers": ({"layers": [0], "heads": [(0, 1)]}, "leave layers out"),
    "pairs and numbers": ({"heads": [(0, 1), 2]}, "not both"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    asked, pairs = CHOICES[name]
    with unchecked():
        assert sites.choose(MODEL, **asked).pairs == pairs


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices(name):
    asked, message = WRONG[name]
    with unchecked(), pytest.raises(InputError, match=message):
        sites.choose(MODEL, **asked)


def test_heads_by_layer():
    with unchecked():
        chosen = sites.choose(MODEL, heads=[(2, 1), (0, 3), (2, 0)])
    assert chosen.by_layer == {0: (3,), 2: (0, 1)}
