"""Principal angles: known rotations, both sides, figure C.3's references, the trained anchor."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens import FactoredMatrix

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.one_layer import memory
from hijacklens.one_layer.embeddings import orthonormal
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from probes.geometry import subspaces

TASK = ConceptTask(bits=3, length=16)


def frame(rows: int, columns: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return orthonormal(rows, columns, draw, dtype=torch.float64)


def turned(*degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices [2k, 2k] of rank k that read subspaces at these angles and write the same."""
    k = len(degrees)
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    flat = torch.cat([torch.eye(k), torch.zeros(k, k)]).double()  # columns: what A reads
    tilted = torch.cat([angle.cos().diag(), angle.sin().diag()])
    strength = torch.arange(k, 0, -1).double()
    return (flat * strength) @ flat.T, (tilted * strength) @ flat.T


@settings(deadline=None, max_examples=25)
@given(
    degrees=st.lists(st.floats(0.01, 90), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, -3.0, 1e-6]),
)
def test_known_angles_come_back_in_any_basis(degrees, seed, scale):
    A, B = turned(*degrees)
    turn = frame(len(A), len(A), seed)
    found = subspaces.principal_angles(turn @ A, scale * (turn @ B), rank=len(degrees), side="left")
    assert found.degrees == pytest.approx(sorted(degrees, reverse=True), abs=1e-5)
    assert (found.smallest, found.largest) == (found.degrees[-1], found.degrees[0])
    written = subspaces.principal_angles(turn @ A, turn @ B, rank=len(degrees), side="right")
    assert written.degrees == pytest.approx([0] * len(degrees), abs=1e-5)


def test_left_is_read_and_right_is_written():
    x, y, z = torch.eye(3).double()
    A, B = torch.outer(x, y), torch.outer(x, z)  # both read x and write other directions
    assert subspaces.principal_angles(A, B, rank=1, side="left").degrees == pytest.approx([0])
    assert subspaces.principal_angles(A, B, rank=1, side="right").degrees == pytest.approx([90])
    # The paper's matrices act on columns: its left is our right.
    assert subspaces.principal_angles(A.T, B.T, rank=1, side="left").degrees == pytest.approx([90])
    assert torch.equal(x @ A, y)


def test_only_the_largest_singular_values_count_and_the_gap_is_reported():
    A = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0]))
    B = torch.diag(torch.tensor([4.0, 1.0, 2.0, 2.0]))
    assert subspaces.principal_angles(A, B, rank=1, side="left").degrees == pytest.approx([0])
    found = subspaces.principal_angles(A, A, rank=2, side="right")
    assert (found.gap, found.rank) == (2, 2)
    assert math.isinf(subspaces.principal_angles(A, A, rank=3, side="left").gap)
    assert subspaces.principal_angles(A, B, rank=2, side="left").other_gap == pytest.approx(1)


def test_a_factored_matrix_is_its_product():
    A, B = frame(2, 5, 0).T, frame(2, 5, 1)
    W = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = subspaces.principal_angles(FactoredMatrix(A, B), W, rank=2, side="right")
    assert ours.degrees == subspaces.principal_angles(A @ B, W, rank=2, side="right").degrees


def test_matrices_of_other_shapes_share_the_side_that_fits():
    A, B = torch.eye(4, 3), torch.eye(4, 2)
    assert subspaces.principal_angles(A, B, rank=2, side="left").largest == pytest.approx(0)
    with pytest.raises(InputError, match="3 and 2 dimensions"):
        subspaces.principal_angles(A, B, rank=2, side="right")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_a_matrix_does_not_have(rank):
    with pytest.raises(InputError, match=r"rank must lie in 1..2, the rank of 'A' \[4, 4\]"):
        subspaces.principal_angles(
            torch.diag(torch.tensor([1.0, 1.0, 0, 0])), torch.eye(4), rank=rank, side="left"
        )


def test_bad_input():
    with pytest.raises(InputError, match="at least 1"):
        subspaces.value_angles(model_with(torch.eye(8)), TASK, draws=0)
    with pytest.raises(InputError, match="no task"):
        subspaces.value_angles(model_with(torch.eye(8)))
    with pytest.raises(InputError, match="one-layer models"):
        subspaces.value_angles([torch.eye(8)], TASK)
    with pytest.raises(InputError, match="does not give a matrix"):
        subspaces.value_angles(
            model_with(torch.eye(8)), TASK, references={"bad": lambda model, draw: model}
        )


def model_with(W_V: torch.Tensor) -> OneLayerTransformer:
    """Embeddings of strongly unequal lengths, so that subspaces are determined, and this W_V."""
    weights = memory.theorem_1(TASK, generator=torch.Generator().manual_seed(0))
    E = weights.W_E * torch.linspace(1, 3, 8)[:, None]
    zero = torch.zeros(8, 8)
    return OneLayerTransformer.from_weights(
        memory.OneLayerWeights(W_E=E, W_Q=zero, W_K=zero, W_V=W_V.float())
    )


def test_the_constructed_memory_is_at_no_angle_to_itself():
    W_V = memory.constructed(model_with(torch.eye(8)).W_E, TASK)
    # On orthogonal embeddings its singular values come in pairs: an odd rank would cut one.
    found = subspaces.value_angles(model_with(-5 * W_V), TASK, rank=2, draws=4)
    table = found.to_dataframe()
    sides = table.groupby(["reference", "side"], sort=False)["degrees"]
    assert sides.max()["constructed"].tolist() == pytest.approx([0, 0], abs=1e-3)
    assert (sides.min()[["random", "gaussian"]] > 1).all()
    assert len(table) == 3 * 4 * 2 * 2  # references, draws, sides, angles
    smallest = found.smallest().set_index(["reference", "side"])["degrees"]
    gaussian = table[(table["reference"] == "gaussian") & (table["index"] == 1)]
    by_hand = gaussian[gaussian["side"] == "left"]["degrees"].mean()
    assert smallest["gaussian", "left"] == pytest.approx(by_hand)
    # The memory is symmetric: both sides are the same; the random one's are not.
    assert smallest["constructed", "left"] == pytest.approx(
        smallest["constructed", "right"], abs=1e-3
    )
    assert smallest["random", "left"] != pytest.approx(smallest["random", "right"], abs=1e-3)


def test_a_rank_that_cuts_equal_singular_values_shows_in_the_gap():
    W_V = memory.constructed(model_with(torch.eye(8)).W_E, TASK)
    found = subspaces.value_angles(model_with(W_V), TASK, draws=1).summary()
    assert found.loc[0, ["gap", "reference_gap"]].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_references_of_one_s_own_and_seeds():
    model = model_with(torch.diag(torch.arange(1.0, 9.0)))
    own = {"start": lambda model, draw: OneLayerTransformer(model.config).W_V[0, 0]}
    found = subspaces.value_angles(model, TASK, rank=2, references=own, draws=1)
    start = OneLayerTransformer(model.config).W_V[0, 0]
    expected = subspaces.principal_angles(model.W_V[0, 0], start, rank=2, side="left")
    left = found.table[found.table["side"] == "left"]["degrees"].tolist()
    assert left[::-1] == pytest.approx(list(expected.degrees))

    def table(seed: int) -> pd.DataFrame:
        return subspaces.value_angles(model, TASK, draws=2, seed=seed).table

    pd.testing.assert_frame_equal(table(0), table(0))
    assert not np.allclose(table(0)["degrees"], table(1)["degrees"])


def test_saved_and_loaded(tmp_path):
    A, B = turned(20.0, 70.0)
    pair = subspaces.principal_angles(A, B, rank=2, side="left")
    again = hl.load_result(pair.save(tmp_path / "pair"))
    assert isinstance(again, subspaces.PrincipalAngles)
    assert again.configuration() == pair.configuration() and math.isinf(again.gap)
    many = subspaces.value_angles(model_with(torch.eye(8)), TASK, draws=1)
    other = hl.load_result(many.save(tmp_path / "many"))
    assert isinstance(other, subspaces.ValueAngles)
    pd.testing.assert_frame_equal(other.table, many.table)
    assert other.settings == many.settings


@pytest.mark.slow
def test_trained_value_matrices_lie_nearest_to_the_constructed_one():
    """The anchor of the reference page, 7.6: one run at m = 5, d = 64 gave 6.4, 16.5, 69.3."""
    task = ConceptTask(bits=5, length=256)
    trained = hl.train(task, d_model=64, seeds=3, steps=2500, learning_rates=(0.01,), quiet=True)
    found = subspaces.value_angles(trained)
    for side in subspaces.SIDES:
        rows = found.smallest()
        rows = rows[rows["side"] == side].set_index(["model", "reference"])["degrees"].unstack()
        assert (rows["constructed"] < rows["random"]).all()
        assert (rows["random"] < rows["gaussian"]).all()
        assert 3 < rows["constructed"].mean() < 11
        assert 12 < rows["random"].mean() < 35
        assert 55 < rows["gaussian"].mean() < 75
