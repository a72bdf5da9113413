"""Which layers and heads are chosen, and the errors of a wrong choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from type_checks import unchecked

from hijacklens import sites
from hijacklens.errors import InputError

MODEL = SimpleNamespace(
    cfg=SimpleNamespace(n_layers=3, n_heads=4, n_key_value_heads=2),
    hook_dict={f"blocks.{layer}.attn.hook_z": None for layer in range(3)},
)
CHOICES = {
    "heads of layers": ({"layers": range(1, 3), "heads": [0]}, ((1, 0), (2, 0))),
    "pairs": ({"heads": [(2, 1), (0, 3), (2, 1)]}, ((0, 3), (2, 1))),
    "one layer": ({"layers": 1}, ((1, 0), (1, 1), (1, 2), (1, 3))),
    "grouped": ({"layers": [1], "axis": "kv_head"}, ((1, 0), (1, 1))),
    "two numbers": ({"heads": [1, 2], "layers": 0}, ((0, 1), (0, 2))),
    "two numbers of named layers": ({"heads": (1, 2), "layers": 0}, ((0, 1), (0, 2))),
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
    "one bare pair": ({"heads": (1, 2)}, r"give \[\(1, 2\)\] for head 2 of layer 1, or \[1, 2\]"),
    "as a command writes it": ({"heads": "1.2"}, r"'1.2'; give several, .* \[\(8, 3\)\]"),
    "a fraction": ({"heads": 1.2}, r"1\.2; give several"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    asked, pairs = CHOICES[name]
    with unchecked():
        assert sites.choose(MODEL, **asked).pairs == pairs


@pytest.mark.parametrize("heads", [[(1, 0)], iter([(1, 0)])])
def test_a_layer_of_a_hybrid_without_heads_is_refused_by_name_only(heads):
    hooks = {"blocks.0.attn.hook_z": None}
    hybrid = SimpleNamespace(
        cfg=SimpleNamespace(**vars(MODEL.cfg), model_name="x"), hook_dict=hooks
    )
    with unchecked():
        assert sites.choose(hybrid, heads=[3]).pairs == ((0, 3),)
        with pytest.raises(InputError, match=r"layer 1 of 'x' has no attn\.hook_z; .* it: 0"):
            sites.choose(hybrid, heads=heads)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices(name):
    asked, message = WRONG[name]
    with unchecked(), pytest.raises(InputError, match=message):
        sites.choose(MODEL, **asked)


def test_a_probe_refuses_one_bare_pair_and_keeps_two_heads_of_every_layer():
    with unchecked(), pytest.raises(InputError, match="may mean two things"):
        sites.canonical(None, (1, 2))
    layers, heads = sites.canonical(None, [2, 1, 2])
    with unchecked():
        chosen = sites.choose(MODEL, layers=layers, heads=heads)
    assert chosen.by_layer == {0: (1, 2), 1: (1, 2), 2: (1, 2)}
    assert sites.numbers(heads) == "1+2"
    assert sites.canonical((1, 0), None) == ((0, 1), None)


def test_heads_by_layer():
    with unchecked():
        chosen = sites.choose(MODEL, heads=[(2, 1), (0, 3), (2, 0)])
    assert chosen.by_layer == {0: (3,), 2: (0, 1)}
