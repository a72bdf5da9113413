"""Population logits: closed forms against brute force, and the margins of the reference page."""

from __future__ import annotations

import math

import pytest
import torch

from hijacklens.errors import InputError
from hijacklens.one_layer.memory import theorem_1, uniform_logits
from hijacklens.one_layer.population import construction_logits, geometry_logits, margin
from hijacklens.one_layer.task import ConceptTask


def by_distance(logits: torch.Tensor, task: ConceptTask) -> torch.Tensor:
    """One logit per distance out of [label, token], after checking that it depends on no more."""
    distance = task.hamming()
    rows = []
    for k in range(task.bits + 1):
        values = logits[distance == k]
        torch.testing.assert_close(values, values[:1].expand_as(values), atol=1e-12, rtol=1e-12)
        rows.append(values[0])
    return torch.stack(rows)


def literal_geometry(task: ConceptTask, a: float, b: float, b0: float) -> torch.Tensor:
    """G A G p(. | y) with full matrices."""
    distance = task.hamming().double()
    gram = b - a * distance
    gram.fill_diagonal_(b0)
    adjacency = (distance == 1).double()
    return task.token_distribution() @ gram @ adjacency @ gram


class TestConstruction:
    @pytest.mark.parametrize("omega", [1.0, 0.5, 0.1])
    @pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
    @pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
    def test_closed_form_is_brute_force(self, bits, omega, beta):
        task = ConceptTask(bits=bits, omega=omega, beta=beta)
        weights = theorem_1(task, dtype=torch.float64)
        brute = uniform_logits(task.token_distribution(), W_E=weights.W_E, W_V=weights.W_V)
        torch.testing.assert_close(
            construction_logits(task), by_distance(brute, task), atol=1e-12, rtol=0
        )

    @pytest.mark.parametrize(
        ("bits", "expected"), [(3, 0.204), (5, 0.252), (6, 0.229), (7, 0.200), (8, 0.170)]
    )
    def test_margins_of_the_reference_page(self, bits, expected):
        logits = construction_logits(ConceptTask(bits=bits, omega=1.0))
        assert margin(logits) == pytest.approx(expected, abs=5e-4)
        noisy = construction_logits(ConceptTask(bits=bits, omega=0.5))
        assert margin(noisy) == pytest.approx(margin(logits) / 2, abs=1e-14)

    @pytest.mark.parametrize("bits", [3, 5, 8])
    @pytest.mark.parametrize("q", [0.1, 0.45, 0.55, 0.9])
    def test_margins_in_closed_form(self, bits, q):
        logits = construction_logits(ConceptTask(bits=bits, omega=1.0, beta=-1 / math.log(q)))
        z = (1 + q) ** bits - 1
        over_two = (bits - 2) * q * (1 - q * q) / z
        over_one = q * (bits - (bits - 1) * q) / z
        assert float(logits[0] - logits[2]) == pytest.approx(over_two, abs=1e-14)
        assert float(logits[0] - logits[1]) == pytest.approx(over_one, abs=1e-14)
        assert margin(logits) == pytest.approx(min(over_one, over_two), abs=1e-14)
        # distance 2 binds, except at m = 8 with q between 1/2 and 2/3
        assert (over_one < over_two) == (bits == 8 and 0.5 < q < 2 / 3)

    def test_two_bits_have_no_margin(self):
        assert margin(construction_logits(ConceptTask(bits=2, omega=1.0))) == pytest.approx(0)

    def test_by_hand(self):
        # m = 3, q = 1/2, Z = 19/8: logits 12/19, 4/19, (2 q + q^3) / Z = 9/19, 3 q^2 / Z = 6/19.
        logits = construction_logits(ConceptTask(bits=3, omega=1.0, beta=1 / math.log(2)))
        expected = torch.tensor([12, 4, 9, 6], dtype=torch.float64) / 19
        torch.testing.assert_close(logits, expected, atol=1e-15, rtol=0)

    def test_a_tiny_beta(self):
        # Only neighbours at distance 1 are drawn: y's m neighbours vote for it, and each of the
        # tokens at distance 2 gets the votes of two of them.
        logits = construction_logits(ConceptTask(bits=4, omega=1.0, beta=1e-3))
        assert logits.tolist() == [1.0, 0.0, 0.5, 0.0, 0.0]


class TestGeometry:
    @pytest.mark.parametrize("omega", [1.0, 0.5])
    @pytest.mark.parametrize(
        ("bits", "a", "b", "b0"),
        [
            (1, 0.3, 0.2, 1.0),
            (3, 0.1, 0.5, 1.0),
            (5, 1.0, 0.0, 0.0),
            (6, -0.4, 0.3, 2.0),
            (8, 0.1, 0.5, 1.0),
        ],
    )
    @pytest.mark.parametrize("beta", [0.5, 1.0])
    def test_walsh_formula_is_brute_force(self, bits, a, b, b0, omega, beta):
        task = ConceptTask(bits=bits, omega=omega, beta=beta)
        brute = by_distance(literal_geometry(task, a, b, b0), task)
        found = geometry_logits(task, a=a, b=b, b0=b0)
        torch.testing.assert_close(found, brute, atol=1e-9, rtol=1e-12)

    @pytest.mark.parametrize(("bits", "expected", "unit"), [(7, 1.515, 1e-3), (5, 0.3354, 1e-4)])
    def test_margins_of_the_reference_page(self, bits, expected, unit):
        logits = geometry_logits(ConceptTask(bits=bits, omega=1.0), a=0.1, b=0.5, b0=1.0)
        assert margin(logits) == pytest.approx(expected, abs=unit / 2)

    def test_orthonormal_embeddings_are_a_case_of_it(self):
        for omega in (1.0, 0.3):
            task = ConceptTask(bits=6, omega=omega, beta=0.8)
            torch.testing.assert_close(
                geometry_logits(task, a=0.0, b=0.0, b0=1.0),
                construction_logits(task),
                atol=1e-13,
                rtol=0,
            )

    def test_a_tiny_beta(self):
        task = ConceptTask(bits=4, omega=1.0, beta=1e-3)
        brute = by_distance(literal_geometry(task, 0.1, 0.5, 1.0), task)
        torch.testing.assert_close(geometry_logits(task, a=0.1, b=0.5, b0=1.0), brute)


@pytest.mark.parametrize("support", ["hamming-1", "first-bit", lambda a, b: a != b])
def test_other_supports_are_refused(support):
    task = ConceptTask(bits=4, support=support)
    with pytest.raises(InputError, match="closed forms are for the support 'all'"):
        construction_logits(task)
    with pytest.raises(InputError, match="uniform_logits"):
        geometry_logits(task, a=0.1, b=0.5, b0=1.0)
