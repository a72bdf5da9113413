"""The analyses of theorems and lemmas against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.paper import constructed_error, geometry_theory, identity_law
from analyses.paper.constructed_error import ANCHORS
from analyses.paper.error_exponent import (
    chernoff_bound,
    chernoff_information,
    label_divergence,
    token_logits,
)
from analyses.paper.lemmas import gram_matrix
from analyses.reproduction.reproduction import reproduce
from analyses.reproduction.workbench import Workbench
from hijacklens.one_layer import memory
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask

Q = math.exp(-1)


def constructed(task):
    return OneLayerTransformer.from_weights(memory.theorem_1(task))


class TestChernoffBound:
    def test_two_bits(self):
        """Tokens 1 and 2 weigh q and token 3 q^2. Against label 1, tokens 1 and 2 gain 1 for label
        0 and token 3 loses 1, so E exp(-sX) = (2q e^-s + q^2 e^s) / (2q + q^2), least at
        e^2s = 2 / q. Against label 3 no token gains anything.
        """
        task = ConceptTask(bits=2, omega=1.0)
        bound = chernoff_bound(task, constructed(task))
        one = math.log((2 + Q) / (2 * math.sqrt(2 * Q)))
        torch.testing.assert_close(
            bound.exponents, torch.tensor([one, one, 0.0], dtype=torch.float64), atol=1e-9, rtol=0
        )
        assert bound.exponent == 0
        assert bound.at(10) == pytest.approx(2 * math.exp(-10 * one) + 1)

    def test_values_computed_independently(self):
        task = ConceptTask(bits=5, omega=1.0)
        assert chernoff_bound(task, constructed(task)).exponent == pytest.approx(0.10715, abs=5e-6)
        assert chernoff_information(task) == pytest.approx(0.22225, abs=5e-6)

    @pytest.mark.parametrize("omega", [1.0, 0.5])
    def test_a_grid_of_s(self, omega):
        task = ConceptTask(bits=3, omega=omega)
        model = constructed(task)
        bound = chernoff_bound(task, model)
        logits = token_logits(model)
        s = torch.linspace(0, 10, 20001, dtype=torch.float64)[:, None]
        for other in range(1, 8):
            powers = torch.exp(-s * (logits[:, 0] - logits[:, other]))
            moments = powers @ task.token_distribution()[0]
            best = int(moments.argmin())
            assert bound.exponents[other - 1] == pytest.approx(-math.log(moments[best]), abs=1e-6)
            last = math.log(float((powers @ task.informative()[0])[best]))
            assert bound.last[other - 1] == pytest.approx(last, abs=1e-3)

    def test_without_noise_the_last_token_is_like_the_others(self):
        task = ConceptTask(bits=3, omega=1.0)
        bound = chernoff_bound(task, constructed(task))
        torch.testing.assert_close(bound.last, -bound.exponents)

    def test_it_holds_for_contexts_that_can_be_enumerated(self):
        """L = 2: the exact error, ties as errors, is a sum over pairs of tokens."""
        task = ConceptTask(bits=3, omega=0.5)
        model = constructed(task)
        logits = token_logits(model)
        sums = logits[:, None] + logits[None]  # [first, last, label]
        chance = task.token_distribution()[0][:, None] * task.informative()[0]
        wrong = sums[..., 1:].amax(-1) >= sums[..., 0]
        assert float(chance[wrong].sum()) <= chernoff_bound(task, model).at(2)


class TestInformation:
    def test_two_bits_without_noise(self):
        """Labels 0 and 3 share tokens 1 and 2, equally likely under both: the overlap is
        2q / (2q + q^2) for any s. Labels 0 and 1 share less.
        """
        task = ConceptTask(bits=2, omega=1.0)
        assert chernoff_information(task) == pytest.approx(math.log(1 + Q / 2))
        assert label_divergence(task) == math.inf

    def test_one_bit_with_noise(self):
        """(1/4, 3/4) against (3/4, 1/4): least at s = 1/2, where the overlap is sqrt(3) / 2."""
        task = ConceptTask(bits=1, omega=0.5)
        assert chernoff_information(task) == pytest.approx(-math.log(math.sqrt(3) / 2))
        assert label_divergence(task) == pytest.approx(math.log(3) / 2)

    def test_labels_that_share_no_token(self):
        task = ConceptTask(bits=1, omega=1.0)
        assert chernoff_information(task) == label_divergence(task) == math.inf


def test_the_anchor_gap_is_in_standard_errors():
    """A gap of two standard errors is reported as two."""
    n, anchor = 10_000, ANCHORS[1.0, 5][32]
    se = math.sqrt(anchor * (1 - anchor) * (1 / n + 1 / 65_536))
    row = {"omega": 1.0, "bits": 5, "length": 32, "contexts": n, "error": 1 - anchor + 2 * se}
    other = {**row, "bits": 3, "error": 1.0}  # without an anchor
    found = constructed_error.anchor_gap(pd.DataFrame([row, other]))
    assert found.value == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "claims"),
    [
        ("theorem1", {"bits": [3]}, ("at m = 5, omega = 1", "every accuracy is within")),
        ("theorem1", {"bits": [5], "beta": 2.0}, ("at m = 5, omega = 1", "every accuracy is")),
        ("theorem1", {"lengths": [32]}, ("the error falls from",)),
        ("theorem1", {"omegas": [1.0]}, ("the Chernoff information is",)),
        ("theorem4", {"tasks": [[5, 0.5]]}, ("margin of the Walsh", "at beta = 1", "if ")),
        ("lemma6", {"lengths": [1]}, ("without alpha",)),
    ],
)
def test_a_claim_is_open_where_settings_leave_nothing_to_measure(name, changes, claims):
    """Anchors of other settings, and rows that the table lacks, make no claim false."""
    result = reproduce(name, changes={"contexts": 16, **changes}, quiet=True)
    for outcome in result.outcomes:
        assert (outcome.state == "open") == outcome.claim.startswith(claims), outcome


class TestGeometry:
    def test_the_gram_matrix(self):
        gram = gram_matrix(2, a=1.0, b=3.0, b0=7.0)
        assert gram.tolist() == [[7, 2, 2, 1], [2, 7, 1, 2], [2, 1, 7, 2], [1, 2, 2, 7]]

    @pytest.mark.parametrize("omega", [1.0, 0.3])
    @pytest.mark.parametrize(
        ("bits", "beta", "ratio"), [(3, 3.0, 1.5), (5, 1.0, 0.0), (6, 2.0, 9.0)]
    )
    def test_the_logits_of_the_docstring(self, bits, beta, ratio, omega):
        task = ConceptTask(bits=bits, omega=omega, beta=beta)
        q = math.exp(-1 / beta)
        level = ((1 + q) ** (bits - 1) * (1 - q) - 1) / ((1 + q) ** bits - 1)
        k = torch.arange(bits + 1, dtype=torch.float64)
        logits = ratio**2 * memory.construction_logits(task)
        logits -= 2 * k * (bits - 2) * omega * level * (ratio + 2**bits / 4)
        exact = memory.geometry_logits(task, a=1.0, b=0.0, b0=ratio)
        torch.testing.assert_close(logits - logits[0], exact - exact[0])

    @pytest.mark.parametrize("bits", range(3, 11))
    def test_up_to_a_beta_of_two_every_margin_is_above_0(self, bits):
        for beta in (0.1, 0.5, 1.0, 2.0):
            task = ConceptTask(bits=bits, omega=1.0, beta=beta)
            for ratio in (0.0, 0.01, 0.3, 1.0, 7.0, 100.0, 1e4):
                logits = memory.geometry_logits(task, a=1.0, b=0.0, b0=ratio)
                assert memory.margin(logits) > 0

    def test_above_it_a_small_b0_fails(self):
        for beta, sign in ((2.0, 1), (2.1, -1)):
            task = ConceptTask(bits=3, omega=1.0, beta=beta)
            logits = memory.geometry_logits(task, a=1.0, b=0.0, b0=0.0)
            assert sign * memory.margin(logits) > 0

    def test_geometries_without_embeddings_keep_their_rows(self):
        settings = geometry_theory.GeometryGrid(
            tasks=((3, 1.0),),
            slopes=(1.0,),
            offsets=(0.0, 2.0),  # positive semidefinite from b = a m / 2 = 1.5 on
            ratios=(0.0,),
            lengths=(8, 16),
            contexts=64,
        )
        table = geometry_theory.error_by_geometry(settings, Workbench())
        assert table["feasible"].tolist() == [False, False, True, True]
        assert table["error"].isna().tolist() == [True, True, False, False]
        assert table["margin"].notna().all()


class TestIdentityLaw:
    def test_the_law_itself_matches_the_posterior(self):
        """Among absent labels, with any diagonal: here the one that makes the matrix positive."""
        task = ConceptTask(bits=3, omega=1.0, beta=2.0, length=4)
        gram = -(task.length / task.beta) * task.hamming().double()
        gram.fill_diagonal_(float(-torch.linalg.eigvalsh(gram)[0]))
        values, vectors = torch.linalg.eigh(gram)
        W_E = vectors * values.clamp(min=0).sqrt()
        tokens = task.sample(256, torch.Generator().manual_seed(0)).tokens
        matched = identity_law.posterior_divergence(W_E, task, tokens, absent=True)
        assert matched == pytest.approx(0, abs=1e-9)
        assert identity_law.posterior_divergence(W_E, task, tokens, absent=False) > 0.1

    def test_zero_embeddings(self):
        """Two bits, the context (1, 1): the posterior is on labels 0 and 3 at distance 1 and 2 at
        distance 2, with weights 1, 1 and q^2; a softmax of equal logits has a third each.
        """
        task = ConceptTask(bits=2, omega=1.0, length=2)
        weights = np.array([1, 1, Q**2]) / (2 + Q**2)
        expected = math.log(3) + float((weights * np.log(weights)).sum())
        tokens = torch.tensor([[1, 1]])
        found = identity_law.posterior_divergence(torch.zeros(4, 2), task, tokens, absent=True)
        assert found == pytest.approx(expected)

    def test_a_training_is_read_from_the_workbench(self, tmp_path, monkeypatch):
        small = {"bits": (3,), "seeds": 1, "steps": 2, "evaluation": 16}
        bench = Workbench(folder=tmp_path, quiet=True)
        first = reproduce("theorem3", changes=small, workbench=bench)
        monkeypatch.setattr(identity_law, "train_embeddings", None)
        again = reproduce("theorem3", changes=small, workbench=bench)
        pd.testing.assert_frame_equal(first.table, again.table)
