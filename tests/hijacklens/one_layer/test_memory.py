"""The memory of equation 5.1: sums of outer products, Theorem 1, Lemma 2, closed forms, mixing."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from draws import seeded, theorem_1_scores, uniform_attention, upward
from scipy import stats

from hijacklens.errors import InputError
from hijacklens.one_layer import memory
from hijacklens.one_layer.embeddings import gaussian_embedding, hamming_geometry, orthonormal
from hijacklens.one_layer.evaluation import accuracy, hits
from hijacklens.one_layer.memory import construction_logits, geometry_logits, margin
from hijacklens.one_layer.task import ConceptTask


def literal(embedding: torch.Tensor, task: ConceptTask) -> torch.Tensor:
    """Equation 5.1 as the paper writes it, columns and all."""
    neighbours = task.neighbours()
    W_V = torch.zeros(embedding.shape[1], embedding.shape[1], dtype=embedding.dtype)
    for t in range(task.vocab):
        inner = torch.zeros(embedding.shape[1], dtype=embedding.dtype)
        for other in range(task.vocab):
            if neighbours[t, other] and (t ^ other).bit_count() == 1:
                inner += embedding[other]
        W_V += torch.outer(embedding[t], inner)
    return W_V


def literal_logits(tokens, W_E, W_Q, W_K, W_V_paper):
    """Equation 4.1 for one context, on columns; W_V_paper is the paper's, not its transpose."""
    x = W_E[tokens].T
    scores = (W_K.T @ x).T @ (W_Q.T @ x[:, -1]) / math.sqrt(W_K.shape[1])
    return W_E @ (W_V_paper @ (x @ scores.softmax(0)))


class TestConstructed:
    @pytest.mark.parametrize("support", ["all", "hamming-1", "first-bit", "first-two-bits", upward])
    def test_is_the_transpose_of_the_paper_s(self, support):
        task = ConceptTask(bits=4, support=support)
        embedding = gaussian_embedding(16, 5, seeded(), dtype=torch.float64)
        W_V = memory.constructed(embedding, task)
        torch.testing.assert_close(W_V, literal(embedding, task).T, atol=1e-12, rtol=0)
        assert torch.allclose(W_V, W_V.T) == (support != upward)

    def test_by_hand_on_unit_vectors(self):
        # Two bits, all others: 0 and 3 vote for 1 and 2, and the other way round.
        W_V = memory.constructed(torch.eye(4), ConceptTask(bits=2))
        assert W_V.tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]

    def test_on_a_support_that_is_not_symmetric_context_tokens_vote_for_labels(self):
        # N(0) = {1}, N(1) = {3}, N(3) = {2}, N(2) = {0}: a ring, one way.
        ring = {0: 1, 1: 3, 3: 2, 2: 0}
        matrix = torch.zeros(4, 4, dtype=torch.bool)
        for label, token in ring.items():
            matrix[label, token] = True
        task = ConceptTask(bits=2, omega=1.0, length=3, support=matrix)
        W_E = torch.eye(4)
        right = uniform_attention(task, W_E, memory.constructed(W_E, task))
        wrong = uniform_attention(task, W_E, memory.constructed(W_E, task).T)
        share = partial(accuracy, task=task, contexts_count=200)
        assert share(right, generator=seeded()).value == 1
        assert share(wrong, generator=seeded()).value == 0

    def test_errors(self):
        with pytest.raises(InputError, match=r"16 rows, and the task with bits=3 has 8 tokens"):
            memory.constructed(torch.eye(16), ConceptTask(bits=3))
        far = ConceptTask(bits=3, support=lambda a, b: (a ^ b) == 7)
        with pytest.raises(InputError, match="zero for ConceptTask"):
            memory.constructed(torch.eye(8), far)
        with pytest.raises(InputError, match="16 rows"):
            memory.random(torch.eye(16), ConceptTask(bits=3), seeded())

    def test_types(self):
        for dtype in (torch.float32, torch.float64):
            W_E = orthonormal(8, 8, dtype=dtype)
            assert memory.constructed(W_E, ConceptTask(bits=3)).dtype == dtype
            assert memory.random(W_E, ConceptTask(bits=3), seeded()).dtype == dtype


class TestRandom:
    def test_as_many_partners_as_neighbours_drawn_uniformly(self):
        task = ConceptTask(bits=4)
        draws = torch.stack([memory.random(torch.eye(16), task, seeded(s)) for s in range(500)])
        # With unit vectors entry [j, t] says how often t keeps partner j (row-vector convention).
        assert torch.equal(draws, draws.round())
        assert (draws.sum(1) == 4).all()
        assert stats.chisquare(draws.sum(0).flatten()).pvalue > 1e-3
        assert (draws.diagonal(dim1=1, dim2=2) > 0).any(), "t itself is not excluded"
        assert draws.max() > 1, "partners are drawn with replacement"
        assert not torch.equal(draws[0], draws[0].T)

    def test_as_many_as_each_token_s_own(self):
        task = ConceptTask(bits=3, support=upward)
        W_V = memory.random(torch.eye(8), task, seeded())
        near = task.neighbours() & (task.hamming() == 1)
        assert W_V.sum(0).tolist() == near.sum(1).tolist()

    def test_is_a_sum_of_outer_products_of_embeddings(self):
        task = ConceptTask(bits=3)
        pairs = memory.random(torch.eye(8, dtype=torch.float64), task, seeded(5))
        embedding = gaussian_embedding(8, 3, seeded(), dtype=torch.float64)
        torch.testing.assert_close(
            memory.random(embedding, task, seeded(5)), embedding.T @ pairs @ embedding
        )


class TestOthers:
    def test_identity(self):
        assert torch.equal(memory.identity(3), torch.eye(3))

    def test_matched(self):
        matrix = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        like = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        assert torch.allclose(memory.matched(matrix, like), matrix / 5)
        with pytest.raises(InputError, match="zeros cannot be rescaled"):
            memory.matched(torch.zeros(2, 2), like)


class TestTheorem1:
    @pytest.mark.parametrize("generator", [None, seeded()], ids=["unit", "random"])
    @pytest.mark.parametrize("support", ["all", "first-bit", upward])
    def test_logits_are_those_of_equation_4_1(self, generator, support):
        task = ConceptTask(bits=3, length=9, support=support)
        weights = memory.theorem_1(task, d_model=11, generator=generator, dtype=torch.float64)
        assert weights.W_E.shape == (8, 11)
        assert not weights.W_Q.any()
        assert not weights.W_K.any()
        tokens = task.sample(6, seeded()).tokens
        logits = uniform_attention(task, weights.W_E, weights.W_V)(tokens)
        for row, context in zip(logits, tokens, strict=True):
            expected = literal_logits(
                context, weights.W_E, weights.W_Q, weights.W_K, literal(weights.W_E, task)
            )
            torch.testing.assert_close(row, expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("bits", [3, 4, 5])
    def test_error_vanishes_with_the_length(self, bits):
        errors = []
        for length in (16, 64, 512):
            task = ConceptTask(bits=bits, omega=1.0, length=length)
            scores = theorem_1_scores(task)
            errors.append(1 - accuracy(scores, task, contexts_count=4000, generator=seeded()).value)
        assert errors[0] > errors[1] >= errors[2]
        assert errors[2] == 0

    def test_too_narrow(self):
        with pytest.raises(InputError, match="d_model=7"):
            memory.theorem_1(ConceptTask(bits=3), d_model=7)

    def test_equal_logits_stay_equal(self):
        # Token 0 alone: its neighbours 1, 2 and 4 tie, whatever L the votes are divided by.
        task = ConceptTask(bits=3)
        logits = theorem_1_scores(task)(torch.zeros(1, 7, dtype=torch.int64))
        assert logits.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]


class TestLemma2:
    """Hamming-1 support, omega = 1, orthonormal embeddings: 5.1 is right, the identity is not."""

    @pytest.mark.parametrize("bits", [3, 4])
    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_every_context_there_is(self, bits, length):
        task = ConceptTask(bits=bits, omega=1.0, length=length, support="hamming-1")
        pairs = [
            (label, context)
            for label, near in enumerate(task.neighbours())
            for context in itertools.product(near.nonzero().flatten().tolist(), repeat=length)
        ]
        labels, tokens = map(torch.tensor, zip(*pairs, strict=True))
        logits = theorem_1_scores(task)(tokens)
        # Ties counted for the label: the error is exactly 0, as the lemma says.
        assert hits(logits, labels, ties="label").min() == 1
        # Split evenly, contexts that two labels can give cost something: of a single token all m
        # neighbours are as likely; of two tokens or more, those with one or two types of them.
        split = hits(logits, labels)
        assert split.min() < 1
        types = torch.tensor([len(set(context)) for context in tokens.tolist()])
        expected = {1: 1 / bits, 2: 1 / 2, 3: 1.0}
        for number, share in expected.items():
            assert torch.allclose(split[types == number], torch.tensor(share, dtype=torch.float64))
        # With the identity the votes go to the tokens themselves, of which the label is none.
        identity = uniform_attention(task, torch.eye(task.vocab), memory.identity(task.vocab))(
            tokens
        )
        assert hits(identity, labels, ties="label").max() == 0

    def test_a_long_context_has_no_ties(self):
        task = ConceptTask(bits=4, omega=1.0, length=64, support="hamming-1")
        measured = accuracy(theorem_1_scores(task), task, contexts_count=5000, generator=seeded())
        assert measured.value == 1

    @pytest.mark.parametrize("bits", [3, 5])
    @pytest.mark.parametrize("length", [4, 64])
    def test_the_identity_is_never_right_without_noise(self, bits, length):
        task = ConceptTask(bits=bits, omega=1.0, length=length)
        scores = uniform_attention(task, torch.eye(task.vocab), memory.identity(task.vocab))
        for ties in ("split", "label"):
            measured = accuracy(scores, task, contexts_count=4000, generator=seeded(), ties=ties)
            assert measured.value == 0


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


class TestConstructionLogits:
    @pytest.mark.parametrize("omega", [1.0, 0.5, 0.1])
    @pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
    @pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
    def test_closed_form_is_brute_force(self, bits, omega, beta):
        task = ConceptTask(bits=bits, omega=omega, beta=beta)
        weights = memory.theorem_1(task, dtype=torch.float64)
        brute = memory.uniform_logits(task.token_distribution(), W_E=weights.W_E, W_V=weights.W_V)
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


class TestGeometryLogits:
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
        logits = geometry_logits(task, a=a, b=b, b0=b0)
        torch.testing.assert_close(logits, brute, atol=1e-9, rtol=1e-12)

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

    @pytest.mark.parametrize("omega", [1.0, 0.5])
    def test_theorem_4_is_right(self, omega):
        task = ConceptTask(bits=5, omega=omega)
        W_E = hamming_geometry(5, a=0.1, b=0.5, b0=1.0, dtype=torch.float64)
        logits = memory.uniform_logits(
            task.token_distribution(), W_E=W_E, W_V=memory.constructed(W_E, task)
        )
        expected = geometry_logits(task, a=0.1, b=0.5, b0=1.0)
        torch.testing.assert_close(logits, expected[task.hamming()], atol=1e-11, rtol=0)
        assert (logits.argmax(1) == torch.arange(32)).all()

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


# Reference page, 7.5: shares predicting the first and the second label, n = 65,536.
MIXED = {
    5: {
        0.0: (0.9997, 0.0),
        0.2: (0.9883, 0.0046),
        0.3: (0.9341, 0.0373),
        0.4: (0.7618, 0.1688),
        0.5: (0.4509, 0.4500),
        0.6: (0.1710, 0.7575),
        0.7: (0.0384, 0.9326),
        0.8: (0.0046, 0.9878),
    },
    8: {
        0.0: (0.9955, 0.0),
        0.2: (0.9739, 0.0031),
        0.3: (0.9194, 0.0290),
        0.4: (0.7545, 0.1550),
        0.5: (0.4487, 0.4421),
        0.6: (0.1590, 0.7533),
        0.7: (0.0304, 0.9187),
        0.8: (0.0034, 0.9738),
    },
}


def mixed_shares(bits: int, rate: float, count: int) -> tuple[float, float]:
    task = ConceptTask(bits=bits, omega=0.5, beta=1.0, length=256)
    scores, generator = theorem_1_scores(task), seeded()
    first = second = 0.0
    for _ in range(count // 4096):
        mixed = task.sample_mixed(4096, rate, generator)
        logits = scores(mixed.tokens)
        first += float(hits(logits, mixed.first).sum())
        second += float(hits(logits, mixed.second).sum())
    return first / count, second / count


@pytest.mark.parametrize(
    ("bits", "rate", "count"),
    [
        *((5, rate, 32_768) for rate in MIXED[5]),
        *((8, rate, 32_768) for rate in (0.2, 0.4, 0.6)),
        *(pytest.param(8, rate, 65_536, marks=pytest.mark.slow) for rate in MIXED[8]),
    ],
)
def test_mixing_curve(bits, rate, count):
    for fraction, anchor in zip(mixed_shares(bits, rate, count), MIXED[bits][rate], strict=True):
        variance = anchor * (1 - anchor)
        # Three standard errors of the difference, the anchor's own and its rounding included.
        error = math.sqrt(variance / count + variance / 65_536)
        assert abs(fraction - anchor) <= 3 * error + 1e-4, (fraction, anchor)
