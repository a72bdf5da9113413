"""The memory fit: literal loops, exact memories, both controls, the one-layer model, files."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import tiny_tokenizer

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.one_layer import memory
from hijacklens.one_layer.embeddings import gaussian_embedding, orthonormal
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from probes import memory_fit
from probes.memory_fit import associations
from probes.memory_fit.outer_products import Control, Memory

TASK = ConceptTask(bits=3)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64)


def values(result: memory_fit.MemoryFit) -> dict[str, float]:
    return result.verdicts().set_index("statistic")["value"].to_dict()


def literal(W, read, write, pairs) -> dict[str, float]:
    """The three statistics by loops over tokens, with every outer product written out."""
    targets = sorted({o for _, o in pairs})
    by_target = [
        sum(torch.outer(read[s], write[o]) for s, other in pairs if other == o) for o in targets
    ]
    M = sum(by_target)
    basis = torch.stack([m.flatten() for m in by_target], dim=1)
    best = basis @ torch.linalg.lstsq(basis, W.flatten()[:, None], driver="gelsd").solution
    wins = []
    for s, o in pairs:
        others = [t for t in targets if (s, t) not in pairs]
        score = read[s] @ W @ write[o]
        rivals = [float(read[s] @ W @ write[t]) for t in others]
        if rivals:
            wins.append(np.mean([(r < score) + 0.5 * (r == score) for r in rivals]))
    return {
        "cosine": float((W * M).sum() / (W.norm() * M.norm())),
        "span": float(best.square().sum() / W.square().sum()),
        "recall": float(np.mean(wins)),
    }


@settings(deadline=None, max_examples=12)
@given(data=st.data(), seed=st.integers(0, 99))
def test_statistics_are_those_of_literal_loops(data, seed):
    every = list(itertools.product(range(6), range(5)))
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=4, max_size=14, unique=True))
    pairs = [(0, 0), (1, 1), *(p for p in chosen if p not in {(0, 0), (1, 1)})]
    W, read, write = gaussian(7, 4, seed), gaussian(6, 7, seed + 1), gaussian(5, 4, seed + 2)
    fitted = memory_fit.fit_matrices({"W": W}, read, write, associations.pairs(pairs), draws=2)
    assert values(fitted) == pytest.approx(literal(W, read, write, pairs), abs=1e-7)


def test_ties_count_half():
    read = write = torch.eye(4, dtype=torch.float64)
    W = torch.zeros(4, 4, dtype=torch.float64)
    W[0, 1] = 1  # retrieved; rows 1 to 3 are all ties
    pairs = associations.pairs([(0, 1), (1, 2), (2, 3), (3, 0)])
    fitted = memory_fit.fit_matrices({"W": W}, read, write, pairs, draws=2)
    assert values(fitted) == pytest.approx({"cosine": 0.5, "span": 1, "recall": (1 + 3 * 0.5) / 4})


class TestExact:
    @pytest.mark.parametrize("support", ["all", "hamming-1", "first-bit"])
    def test_the_constructed_memory_is_explained_in_full(self, support):
        task = ConceptTask(bits=4, support=support)
        model = OneLayerTransformer.from_weights(memory.theorem_1(task, dtype=torch.float64))
        fitted = memory_fit.fit(model, task)
        assert values(fitted) == pytest.approx({"cosine": 1, "span": 1, "recall": 1}, abs=1e-9)
        assert (fitted.verdicts()["p_family"] == 1 / 200).all()

    def test_it_is_so_whatever_the_embeddings_and_the_scale(self):
        draw = torch.Generator().manual_seed(0)
        E = gaussian_embedding(8, 5, draw, dtype=torch.float64)
        W = 7 * memory.constructed(E, TASK)
        fitted = values(memory_fit.fit_matrices({"W": W}, E, E, TASK))
        assert fitted["cosine"] == pytest.approx(1) and fitted["span"] == pytest.approx(1)

    def test_coefficients_of_one_target_each_are_in_the_span_but_not_in_the_memory(self):
        E = orthonormal(8, 8, torch.Generator().manual_seed(0), dtype=torch.float64)
        near = (TASK.hamming() == 1).double()
        strength = torch.arange(1, 9).double()
        W = E.T @ (near * strength) @ E
        fitted = values(memory_fit.fit_matrices({"W": W}, E, E, TASK))
        assert fitted["span"] == pytest.approx(1)
        assert fitted["cosine"] == pytest.approx(
            float(strength.mean() / strength.square().mean().sqrt())
        )

    def test_noise_added_to_the_memory_reduces_its_fraction(self):
        E = orthonormal(8, 8, dtype=torch.float64)
        M = memory.constructed(E, TASK)  # 24 ones; the diagonal is orthogonal to it
        fitted = values(memory_fit.fit_matrices({"W": M + 2 * torch.eye(8)}, E, E, TASK))
        assert fitted["cosine"] ** 2 == pytest.approx(24 / (24 + 4 * 8))
        assert fitted["span"] == pytest.approx(24 / 56)

    def test_direction_matters(self):
        """0 looks up 1 and not the other way round: on row vectors x_0 W = y_1."""
        E = torch.eye(3, dtype=torch.float64)
        pairs = associations.pairs([(0, 1), (1, 2)])
        W = torch.outer(E[0], E[1]) + torch.outer(E[1], E[2])
        fitted = memory_fit.fit_matrices({"W": W, "transposed": W.T}, E, E, pairs, draws=2)
        cosine = fitted.verdicts().query("statistic == 'cosine'").set_index("model")["value"]
        assert cosine.to_dict() == pytest.approx({"W": 1, "transposed": 0})

    def test_equation_5_1_of_an_asymmetric_support_is_in_our_convention(self):
        def upward(a, b):
            return (b > a) | (a == a.max())

        task = ConceptTask(bits=3, support=upward)
        E = gaussian_embedding(8, 6, torch.Generator().manual_seed(1), dtype=torch.float64)
        near = associations.neighbours(task)
        read, write = E[list(near.source)], E[list(near.target)]
        assert torch.allclose(read.T @ write, memory.constructed(E, task))
        fitted = values(memory_fit.fit_matrices({"W": memory.constructed(E, task)}, E, E, task))
        assert fitted["cosine"] == pytest.approx(1)

    def test_unit_scaling_is_that_of_scaled_vectors(self):
        read, write, W = gaussian(8, 5), gaussian(8, 4, 1), {"W": gaussian(5, 4, 2)}
        ours = memory_fit.fit_matrices(W, read, write, TASK, scaling="unit", draws=5)
        read, write = (v / v.norm(dim=1, keepdim=True) for v in (read, write))
        by_hand = memory_fit.fit_matrices(W, read, write, TASK, draws=5)
        pd.testing.assert_frame_equal(ours.table, by_hand.table)


class TestControls:
    def test_a_random_matrix_is_at_its_expectation(self):
        E = orthonormal(16, 16, torch.Generator().manual_seed(0), dtype=torch.float64)
        fitted = memory_fit.fit_matrices({"W": gaussian(16, 16)}, E, E, ConceptTask(bits=4))
        rows = fitted.table.set_index(["statistic", "control"])["mean"]
        for control, off in (("shuffled", 0.1), ("rotated", 0.02)):  # W has its own mean
            assert rows["cosine", control] == pytest.approx(0, abs=off)
            # 16 of 256 dimensions
            assert rows["span", control] == pytest.approx(16 / 256, rel=0.1)
            assert rows["recall", control] == pytest.approx(0.5, abs=0.03)
        assert (fitted.verdicts()["p"] > 0.01).all()

    def test_where_neighbours_are_alike_only_both_controls_clear_random_matrices(self):
        """A low-rank geometry makes shuffled associations too weak a control."""
        task = ConceptTask(bits=5)
        bits = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
        noise = gaussian(32, 12, seed=9) * 0.1
        E = torch.nn.functional.pad(bits, (0, 7)) + noise
        single = {"shuffled": 0, "rotated": 0}
        family = {"shuffled": 0, "rotated": 0}
        for repeat in range(10):
            matrices = {f"{i}": gaussian(12, 12, seed=10 * repeat + i) for i in range(10)}
            fitted = memory_fit.fit_matrices(matrices, E, E, task, draws=39, seed=repeat).table
            for control in single:
                rows = fitted.query("statistic == 'recall' and control == @control")
                single[control] += int((rows["p"] <= 0.05).sum())
                family[control] += int((rows["p_family"] <= 0.05).any())
        # At the level of 5%: 5 of 100 matrices, half a family of 10.
        assert single["rotated"] <= 12 and family["rotated"] <= 3
        assert single["shuffled"] >= 15 and family["shuffled"] >= 5
        matrices["memory"] = memory.constructed(E, task) + 3 * matrices["0"]
        strong = memory_fit.fit_matrices(matrices, E, E, task, draws=99).verdicts()
        assert set(strong.loc[strong["p_family"] <= 0.01, "model"]) == {"memory"}

    def test_a_shuffle_keeps_how_often_tokens_occur(self):
        read, write = gaussian(4, 3), gaussian(3, 2, 1)
        source, target = np.array([0, 1, 2, 3, 3]), np.array([0, 0, 1, 2, 0])
        order = np.array([2, 0, 4, 1, 3])
        W = gaussian(3, 2, 2)
        factors = [(W, torch.eye(2).double())]
        shuffled = Memory(read, write, source, target).shuffled(factors, [order])
        by_hand = Memory(read, write, source, target[order]).shuffled(factors, [])
        assert shuffled[:, 1] == pytest.approx(by_hand[:, 0])
        assert sorted(target[order]) == sorted(target)

    def test_rotated_matrices_have_the_singular_values_and_the_spread_of_random_ones(self):
        E = torch.eye(6, dtype=torch.float64)
        diagonal = Memory(E, E, np.arange(6), np.arange(6))
        A, B = gaussian(6, 2), gaussian(2, 6, 1)
        frames = diagonal.frames(2, draws=400, seed=0)
        fitted = diagonal.rotated([(A, B), (A / 2, B)], frames, seed=0, branches=[(0, 0), (0, 1)])
        # With M = 1: the cosine is trace(U' S V'^T) / |W| sqrt(6), of mean 0 and variance 1 / 36.
        assert fitted[0, :, 0].mean() == pytest.approx(0, abs=0.02)
        assert fitted[0, :, 0].std() == pytest.approx(1 / 6, rel=0.1)
        # Each matrix turns by itself, and its scale does not matter.
        assert np.corrcoef(fitted[0, :, 0], fitted[1, :, 0])[0, 1] == pytest.approx(0, abs=0.12)
        assert fitted[1, :, 0].std() == pytest.approx(1 / 6, rel=0.1)
        alone = diagonal.rotated([(A, B)], frames, seed=0, branches=[(0, 1)])
        assert alone[0] == pytest.approx(fitted[1])

    def test_p_values_by_hand(self):
        null = np.array([[[0.0], [1.0], [2.0]], [[10.0], [10.0], [16.0]]])
        control = Control.of(np.array([[2.0], [13.0]]), null)
        assert control.mean[:, 0] == pytest.approx([1, 12])
        assert control.std[:, 0] == pytest.approx([1, math.sqrt(12)])
        assert control.z[:, 0] == pytest.approx([1, 1 / math.sqrt(12)])
        # at least as large: 2 of (0, 1, 2); 16 of (10, 10, 16); and itself
        assert control.p[:, 0] == pytest.approx([2 / 4, 2 / 4])
        # largest z of each draw: max(-1, -.58), max(0, -.58), max(1, 1.15)
        assert control.p_family[:, 0] == pytest.approx([2 / 4, 2 / 4])

    def test_values_that_no_draw_changes_are_not_significant(self):
        control = Control.of(np.array([[0.5]]), np.full((1, 9, 1), 0.5))
        assert (control.z[0, 0], control.p[0, 0], control.p_family[0, 0]) == (0, 1, 1)

    def test_seeds(self):
        def table(seed: int) -> pd.DataFrame:
            W, E = {"W": gaussian(5, 5)}, gaussian(8, 5, 1)
            return memory_fit.fit_matrices(W, E, E, TASK, draws=5, seed=seed).table

        pd.testing.assert_frame_equal(table(0), table(0))
        other = table(1)
        assert (other["value"] == table(0)["value"]).all()
        assert not np.isclose(other["mean"], table(0)["mean"]).any()

    def test_blocks_give_what_one_call_gives(self, monkeypatch):
        W, E = {f"{i}": gaussian(5, 5, i) for i in range(5)}, gaussian(8, 5, 9)
        whole = memory_fit.fit_matrices(W, E, E, TASK, draws=5).table
        monkeypatch.setattr(memory_fit, "BLOCK", 2 * 24 * 8)
        pd.testing.assert_frame_equal(memory_fit.fit_matrices(W, E, E, TASK, draws=5).table, whole)


def test_trained_value_matrices_hold_the_memory():
    """What the paper says of W_V, on a small model: section 5 and figures C.2, C.3."""
    task = ConceptTask(bits=4, length=64)
    trained = hl.train(
        task, d_model=12, seeds=2, steps=600, learning_rates=(0.01,), evaluation=512, quiet=True
    )
    fitted = memory_fit.fit(trained, draws=99).verdicts()
    assert list(fitted["model"].unique()) == ["seed 0", "seed 1"]
    by_statistic = fitted.groupby("statistic")["value"].min()
    assert by_statistic["cosine"] > 0.7 and by_statistic["recall"] > 0.9
    assert (fitted.loc[fitted["statistic"] != "span", "p_family"] <= 0.02).all()
    start = [OneLayerTransformer(model.config) for model in trained.best()]
    untrained = memory_fit.fit(start, task, draws=99).verdicts()
    assert (untrained["p_family"] > 0.05).all()


class TestAssociations:
    def test_neighbours_are_those_of_equation_5_1(self):
        fitted = associations.neighbours(ConceptTask(bits=3, support="first-bit"))
        expected = {
            (s, t)
            for s in range(8)
            for t in range(8)
            if (s ^ t).bit_count() == 1 and s // 4 == t // 4
        }
        assert set(zip(fitted.source, fitted.target, strict=True)) == expected

    def test_of_facts_by_hand(self):
        tokenizer, facts = tiny_tokenizer("gpt2"), sample_facts()
        fitted = associations.of_facts(facts, tokenizer)
        expected = {}
        for fact in facts:
            before = tokenizer(fact.prompt).input_ids
            whole = tokenizer(f"{fact.prompt} {fact.target_true}").input_ids
            start = fact.template.index("{}")
            ends = fact.prompt[: start + len(fact.subject)]
            subject = tokenizer(ends).input_ids[-1]  # byte-level: words do not merge
            expected[subject, whole[len(before)]] = None
        assert list(zip(fitted.source, fitted.target, strict=True)) == list(expected)
        assert fitted.skipped == () and fitted.label == "sample: subject to true target"

    def test_near_words_and_facts_without_one(self):
        tokenizer, facts = tiny_tokenizer("llama"), sample_facts()
        fitted = associations.of_facts(facts, tokenizer, cue="near", answer="false")
        with_near = [fact for fact in facts if fact.near_false]
        assert [skip.case_id for skip in fitted.skipped] == [
            fact.case_id for fact in facts if not fact.near_false
        ]
        assert "near" in fitted.skipped[0].reason
        expected = {
            (
                tokenizer(f"{fact.prompt} {fact.near_false}").input_ids[-1],
                tokenizer(f"{fact.prompt} {fact.target_false}").input_ids[
                    len(tokenizer(fact.prompt).input_ids)
                ],
            ): None
            for fact in with_near
        }
        assert list(zip(fitted.source, fitted.target, strict=True)) == list(expected)

    @pytest.mark.parametrize(
        ("listed", "message"),
        [
            ([(0, 1)], "at least 2"),
            ([(0, 1), (2, 1)], "2 sources and 1 targets"),
            ([(0, 1), (0, 1), (0, 2)], "1 sources"),
            ([(0, -1), (0, 1)], "two token ids"),
            ([(0, 1, 2)], "two token ids"),
            ([(0.5, 1)], "two token ids"),
        ],
    )
    def test_bad_pairs(self, listed, message):
        from type_checks import unchecked

        with unchecked(), pytest.raises(InputError, match=message):
            associations.pairs(listed)

    def test_a_pair_that_comes_twice_counts_once(self):
        assert len(associations.pairs([(0, 1), (1, 2), (0, 1)])) == 2

    def test_unknown_names(self):
        from type_checks import unchecked

        with unchecked():
            for given in ({"cue": "object"}, {"answer": "maybe"}):
                with pytest.raises(InputError, match="unknown"):
                    associations.of_facts(sample_facts(), tiny_tokenizer("gpt2"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"associated": associations.pairs([(0, 1), (1, 8)])}, "token 8"),
        ({"matrices": {"W": torch.zeros(5, 5)}}, "zero"),
        ({"matrices": {"W": torch.ones(4, 5)}}, r"\[5, 5\]"),
        ({"matrices": {}}, "no model or matrix"),
        ({"draws": 1}, "at least 2"),
        ({"scaling": "log"}, "unknown scaling"),
        ({"read": torch.zeros(8, 5)}, "length 0"),
        ({"write": gaussian(7, 5)}, "token 7"),
    ],
)
def test_bad_input(change, message):
    from type_checks import unchecked

    E = gaussian(8, 5)
    given = {"matrices": {"W": gaussian(5, 5)}, "read": E, "write": E, "associated": TASK}
    with unchecked(), pytest.raises(InputError, match=message):
        memory_fit.fit_matrices(**{**given, **change})


def test_bad_models():
    model = OneLayerTransformer.from_weights(memory.theorem_1(TASK))
    with pytest.raises(InputError, match="no associations"):
        memory_fit.fit(model)
    with pytest.raises(InputError, match="fit_matrices"):
        memory_fit.fit(torch.eye(8), TASK)
    with pytest.raises(InputError, match="W_E of this model has 0 to 7"):
        memory_fit.fit(model, ConceptTask(bits=4))
    with pytest.raises(InputError, match="layer 1"):
        memory_fit.fit(model, TASK, layers=1)
    model.train()
    with pytest.raises(InputError, match="training mode"):
        memory_fit.fit(model, TASK)


def test_saved_and_loaded(tmp_path):
    W, E = {"a": gaussian(5, 5), "b": gaussian(5, 5, 1)}, gaussian(8, 5, 2)
    result = memory_fit.fit_matrices(W, E, E, TASK, draws=5)
    again = hl.load_result(result.save(tmp_path))
    assert isinstance(again, memory_fit.MemoryFit)
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(again.summary(), result.summary())
    assert again.settings == result.settings
    assert result.summary()["matrices"].tolist() == [1] * 6
    with pytest.raises(InputError, match="unknown statistic"):
        result.best(statistic="recal")
    assert (
        result.best(statistic="span", count=1)["z"].iloc[0]
        == result.verdicts().query("statistic == 'span'")["z"].max()
    )
