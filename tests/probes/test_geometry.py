"""Inner products by distance, the fit of equation 5.2, spectra: exact cases and literal loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.one_layer.embeddings import (
    gaussian_embedding,
    gram_eigenvalues,
    hamming_geometry,
    orthonormal,
)
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from probes import geometry
from probes.geometry.hamming_fit import fit_gram

WORDS = torch.tensor([[0, 1, 4], [1, 0, 2], [4, 2, 0]])
"""Distances of three tokens."""


def gaussian(bits: int, d_model: int = 6, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return gaussian_embedding(1 << bits, d_model, draw, dtype=torch.float64)


def fitted(result: geometry.InnerProducts) -> dict[str, float]:
    return result.fit_summary()["value"].to_dict()


@settings(deadline=None, max_examples=25)
@given(
    bits=st.integers(2, 5),
    a=st.floats(0.01, 1.0),
    b=st.floats(-1.0, 3.0),
    jump=st.floats(0.0, 2.0),
    seed=st.integers(0, 9),
)
def test_equation_5_2_is_recovered_under_any_rotation(bits, a, b, jump, seed):
    spectrum = gram_eigenvalues(bits, a=a, b=b, b0=b + jump)
    assume(float(spectrum.levels().min()) > 1e-6)
    vocab = 1 << bits
    E = hamming_geometry(bits, a=a, b=b, b0=b + jump, dtype=torch.float64)
    turn = orthonormal(vocab, vocab, torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = fitted(geometry.fit(E @ turn, ConceptTask(bits=bits)))
    expected = {
        "a": a,
        "b": b,
        "b0": b + jump,
        "jump": jump,
        "r2": 1,
        "r2_means": 1,
        "residual": 0,
        "feasible": 1,
        "constant": spectrum.constant,
        "linear": spectrum.linear,
        "bulk": spectrum.bulk,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_two_bits_by_hand():
    E = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    table = geometry.fit(E, ConceptTask(bits=2)).to_dataframe()
    # distance 1: 00-01, 00-10, 01-11, 10-11; distance 2: 00-11, 01-10
    expected = pd.DataFrame(
        {
            "model": "matrix",
            "distance": [0.0, 1.0, 2.0],
            "pairs": [4, 4, 2],
            "mean": [(4 + 2 + 4 + 9) / 4, (2 + 0 + 3 + 0) / 4, (6 + 2) / 2],
            "std": [np.std([4, 2, 4, 9], ddof=1), np.std([2, 0, 3, 0], ddof=1), np.sqrt(8.0)],
        }
    )
    pd.testing.assert_frame_equal(table, expected)


def test_the_lines_are_those_of_literal_loops():
    task, E = ConceptTask(bits=3), gaussian(3)
    D, G = task.hamming().numpy(), (E @ E.T).numpy()
    pairs = [(i, j) for i in range(8) for j in range(i)]
    near, inner = (np.array([M[p] for p in pairs], dtype=float) for M in (D, G))
    slope, b = np.polyfit(near, inner, 1)
    left = inner - slope * near - b
    whole_slope, whole_b = np.polyfit(D.ravel(), G.ravel(), 1)
    fit = fit_gram(G, D)
    assert (fit.a, fit.b) == pytest.approx((-slope, b))
    assert fit.residual == pytest.approx(np.sqrt((left**2).mean()))
    assert fit.r2 == pytest.approx(np.corrcoef(near, inner)[0, 1] ** 2)
    assert (fit.linear_a, fit.linear_b) == pytest.approx((-whole_slope, whole_b))
    assert fit.linear_r2 == pytest.approx(np.corrcoef(D.ravel(), G.ravel())[0, 1] ** 2)
    means = np.array([inner[near == d].mean() for d in (1, 2, 3)])
    weights = np.array([(near == d).sum() for d in (1, 2, 3)])
    gone = weights @ (means - slope * np.array([1, 2, 3]) - b) ** 2
    assert fit.r2_means == pytest.approx(1 - gone / (weights @ (means - inner.mean()) ** 2))


def test_a_plain_line_explains_all_only_where_nothing_jumps():
    task = ConceptTask(bits=4)
    line = geometry.fit(hamming_geometry(4, a=0.2, b=1.0, b0=1.0), task)
    jump = geometry.fit(hamming_geometry(4, a=0.2, b=1.0, b0=3.0), task)
    assert fitted(line)["linear_r2"] == pytest.approx(1, abs=1e-6)
    assert fitted(line)["jump"] == pytest.approx(0, abs=1e-5)
    assert fitted(jump)["linear_r2"] < 0.9
    assert fitted(jump)["r2"] == pytest.approx(1, abs=1e-6)


def test_orthonormal_embeddings_have_no_variance_to_explain():
    frame = orthonormal(8, 8, torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fitted(geometry.fit(frame, ConceptTask(bits=3)))
    assert math.isnan(found["r2"]) and math.isnan(found["r2_means"])
    assert found["a"] == pytest.approx(0, abs=1e-12) and found["b0"] == pytest.approx(1)


def test_intervals_are_student_s_over_models():
    E = hamming_geometry(2, a=0.2, b=0.5, b0=1.0, dtype=torch.float64)
    found = geometry.fit({"one": E, "three": 3**0.5 * E}, ConceptTask(bits=2)).summary()
    # b0 is 1 and 3: mean 2, standard error 1, t(.975, 1) = 12.706
    assert found.loc[0, ["mean", "low", "high"]].tolist() == pytest.approx(
        [2, 2 - 12.7062, 2 + 12.7062], abs=1e-4
    )
    alone = geometry.fit(E, ConceptTask(bits=2)).summary()
    assert alone[["low", "high"]].isna().all(axis=None)


def test_scalings_are_those_of_edited_embeddings():
    task, E = ConceptTask(bits=3), gaussian(3) + 0.5
    centred = E - E.mean(0)
    edited = {
        "centred": centred,
        "unit": E / E.norm(dim=1, keepdim=True),
        "centred-unit": centred / centred.norm(dim=1, keepdim=True),
    }
    for scaling, by_hand in edited.items():
        ours = geometry.fit(E, task, scaling=scaling).table
        pd.testing.assert_frame_equal(ours, geometry.fit(by_hand, task).table)


def test_tokens_of_a_language_model_with_distances_of_one_s_own():
    model = hl.load_model(tiny_model("llama"), tokenizer=tiny_tokenizer("llama"))
    tokens = [300, 7, 41]
    ours = geometry.fit(model, WORDS, tokens=tokens)
    E = model.W_E.detach().double()[tokens]
    assert ours.table["distance"].tolist() == [0, 1, 2, 4]
    expected = [(E**2).sum(1).mean(), E[0] @ E[1], E[1] @ E[2], E[0] @ E[2]]
    assert ours.table["mean"].tolist() == pytest.approx([float(e) for e in expected])
    assert ours.fits[["feasible", "linear"]].isna().all(axis=None)
    unembedding = geometry.fit(model.W_U.T, WORDS, tokens=tokens)
    assert unembedding.table["mean"].tolist() != pytest.approx(ours.table["mean"].tolist())


def test_results_of_training_bring_their_task_and_seeds(trained):
    result = geometry.fit(trained)
    models = trained.best()
    assert list(result.fits["model"]) == ["seed 3", "seed 5"]
    by_hand = geometry.fit([m.W_E for m in models], trained.task)
    assert result.table["mean"].tolist() == by_hand.table["mean"].tolist()
    assert geometry.fit(list(models), trained.task).table.equals(result.table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distances": None}, "no distances"),
        ({"distances": ConceptTask(bits=4)}, "embeds 8 tokens"),
        ({"distances": WORDS}, "which tokens"),
        ({"distances": WORDS, "tokens": [1, 1, 2]}, "2 different tokens"),
        ({"distances": WORDS, "tokens": [1, 2]}, "2 different tokens"),
        ({"distances": WORDS, "tokens": [1, 2, 8]}, "0 to 7"),
        ({"distances": WORDS, "tokens": [-1, 2, 3]}, "0 to 7"),
        ({"distances": torch.ones(3, 2)}, "square"),
        ({"distances": torch.zeros(8, 8)}, "distance 0 is a token to itself"),
        ({"distances": WORDS.triu(), "tokens": [1, 2, 3]}, "symmetric"),
        ({"distances": 1 - torch.eye(8)}, "at least two distances"),
        ({"distances": ConceptTask(bits=3), "tokens": [1]}, "own tokens"),
        ({"distances": ConceptTask(bits=3), "model": {}}, "no model or matrix"),
        (
            {"distances": ConceptTask(bits=3), "model": torch.zeros(2, 2, 2)},
            "does not give a matrix",
        ),
        ({"distances": ConceptTask(bits=3), "model": torch.full((8, 2), math.nan)}, "not finite"),
        (
            {"distances": ConceptTask(bits=3), "model": torch.zeros(8, 2), "scaling": "unit"},
            "length 0",
        ),
    ],
)
def test_bad_input(arguments, message):
    arguments = {"model": gaussian(3), **arguments}
    with pytest.raises(InputError, match=message):
        geometry.fit(arguments.pop("model"), **arguments)


def test_saved_and_loaded(tmp_path):
    sources = {"1": gaussian(3), "2": gaussian(3, seed=1)}
    result = geometry.fit(sources, ConceptTask(bits=3), scaling="centred")
    again = hl.load_result(result.save(tmp_path))
    assert isinstance(again, geometry.InnerProducts)
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(again.fits, result.fits)
    assert (again.settings, again.provenance) == (result.settings, result.provenance)
    (tmp_path / "fits.parquet").unlink()
    with pytest.raises(InputError, match="not complete"):
        hl.load_result(tmp_path)


class TestSpectrum:
    def test_is_that_of_the_closed_form(self):
        task = ConceptTask(bits=4)
        expected = gram_eigenvalues(4, a=0.5, b=2.5, b0=3.0)
        E = hamming_geometry(4, a=0.5, b=2.5, b0=3.0, dtype=torch.float64)
        found = geometry.spectrum(E, task=task)
        values = sorted([expected.constant] + [expected.linear] * 4 + [expected.bulk] * 11)
        for column in ("value", "predicted", "squeezed"):
            assert (found.table[column] ** 2).tolist() == pytest.approx(values[::-1])
        below = found.summary().set_index("top").loc[5]
        ratio = math.sqrt(min(expected.linear, expected.constant) / expected.bulk)
        assert below["ratio"] == pytest.approx(ratio)
        assert below[["predicted_ratio", "bit_share"]].tolist() == pytest.approx([ratio, 1])
        assert below["largest_drop"] in (1, 5)

    def test_of_a_narrow_model_keeps_the_trace(self):
        found = geometry.spectrum(gaussian(5, d_model=12), task=ConceptTask(bits=5)).table
        assert (found["squeezed"] ** 2).sum() == pytest.approx((found["value"] ** 2).sum())
        assert (found["predicted"] ** 2).sum() < 0.9 * (found["value"] ** 2).sum()

    def test_ranks_by_hand(self):
        found = geometry.spectrum(
            {"flat": torch.eye(6), "steep": torch.diag(torch.tensor([3.0, 1.0]))}
        )
        flat, steep = (found.summary().iloc[i] for i in range(2))
        assert flat[["stable_rank", "effective_rank", "ratio"]].tolist() == pytest.approx([6, 6, 1])
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert steep[["stable_rank", "effective_rank", "ratio", "gap"]].tolist() == pytest.approx(
            [10 / 9, math.exp(entropy), 3, 2]
        )
        assert steep[["top", "over_bulk", "top_share"]].tolist() == pytest.approx([1, 3, 0.9])
        assert steep[["bit_share", "predicted_ratio"]].isna().all()

    def test_what_lies_below_rounding_is_no_drop(self):
        low = torch.diag(torch.tensor([4.0, 2.0, 1.9, 1e-18], dtype=torch.float64))
        assert geometry.spectrum(low).summary().loc[0, "top"] == 1
        assert geometry.spectrum(low, top=3).summary().loc[0, "ratio"] > 1e15

    def test_of_a_factored_matrix_is_that_of_the_product(self):
        from transformer_lens import FactoredMatrix

        A, B = gaussian(3, 2), gaussian(3, 2, seed=1).T
        ours = geometry.spectrum(FactoredMatrix(A, B), top=2).table["value"]
        assert ours.tolist() == pytest.approx(torch.linalg.svdvals(A @ B).tolist())

    def test_of_value_matrices(self, trained):
        found = geometry.spectrum(trained, matrix="W_V")
        first = torch.linalg.svdvals(trained.best()[0].W_V[0, 0].double())
        ours = found.table.loc[found.table["model"] == "seed 3", "value"]
        assert ours.tolist() == pytest.approx(first.tolist(), rel=1e-9)
        assert found.table["predicted"].isna().all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"top": 6}, "1..5"),
            ({"top": 0}, "1..5"),
            ({"task": ConceptTask(bits=4)}, "has 8 rows"),
            ({"matrix": "W_Q"}, "unknown matrix"),
            ({"model": torch.zeros(4, 4)}, "zero"),
        ],
    )
    def test_bad_input(self, arguments, message):
        from type_checks import unchecked

        arguments = {"model": gaussian(3), **arguments}
        with unchecked(), pytest.raises(InputError, match=message):
            geometry.spectrum(arguments.pop("model"), **arguments)

    def test_value_matrices_of_language_models_have_to_be_named(self):
        model = hl.load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"))
        with pytest.raises(InputError, match="not have exactly one W_V"):
            geometry.spectrum(model, matrix="W_V")

    def test_saved_and_loaded(self, tmp_path):
        result = geometry.spectrum([gaussian(3), gaussian(3, seed=1)], task=ConceptTask(bits=3))
        again = hl.load_result(result.save(tmp_path))
        assert isinstance(again, geometry.Spectra)
        pd.testing.assert_frame_equal(again.table, result.table)
        pd.testing.assert_frame_equal(again.summary(), result.summary())
        assert again.settings == result.settings


@pytest.fixture(scope="module")
def trained():
    task = ConceptTask(bits=3, length=16)
    return hl.train(
        task, d_model=6, seeds=(3, 5), steps=8, learning_rates=(0.01,), evaluation=64, quiet=True
    )


def test_models_of_one_layer_are_named_by_their_seed(trained):
    assert isinstance(trained.best()[0], OneLayerTransformer)
    both = geometry.fit([trained.best()[0]] * 2, trained.task)
    assert list(both.fits["model"]) == ["seed 3 0", "seed 3 1"]
