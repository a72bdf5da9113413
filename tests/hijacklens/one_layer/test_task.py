"""The task: its distributions by hand and by their definition, and the sampler against them."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from draws import seeded
from scipy import stats

from hijacklens.errors import InputError
from hijacklens.one_layer.task import ConceptTask, Contexts, MixedContexts, token_counts

NAMED = ["all", "hamming-1", "first-bit", "first-two-bits"]


def larger_or_next(a, b):
    """A rule that is not symmetric, nor one on a xor b: N(0) has 15 tokens, N(15) one."""
    return (b > a) | ((b == 0) & (a == 15))


def even_distance(a, b):
    """A user's rule that does depend on a xor b, so that the sampler shares one table."""
    return ((a ^ b) & 3 == 3) | ((a ^ b) & 12 == 12)


def name(support) -> str:
    return support if isinstance(support, str) else support.__name__


SUPPORTS = [*NAMED, larger_or_next, even_distance]


def literal_informative(task: ConceptTask) -> list[list[float]]:
    """pi(t | z) from its definition, one pair at a time, with strings of bits."""
    vocab, neighbours = task.vocab, task.neighbours()
    rows = []
    for z in range(vocab):
        weights = []
        for t in range(vocab):
            bits_z, bits_t = f"{z:0{task.bits}b}", f"{t:0{task.bits}b}"
            distance = sum(x != y for x, y in zip(bits_z, bits_t, strict=True))
            weights.append(math.exp(-distance / task.beta) if neighbours[z, t] else 0.0)
        rows.append([w / sum(weights) for w in weights])
    return rows


def p_value(counts: torch.Tensor, expected_shares: torch.Tensor) -> float:
    """Chi-square of counts [row, cell] against shares in each row, all rows in one test."""
    expected = counts.sum(1, keepdim=True) * expected_shares
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return 0.0
    # Each row's total is fixed, not only the sum of them all.
    return stats.chisquare(
        counts[possible], expected[possible], sum_check=False, ddof=len(counts) - 1
    ).pvalue


def table(labels: torch.Tensor, tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    """How often each token [column] occurs with each label [row]."""
    labels = labels[:, None].expand_as(tokens)
    return (
        torch.bincount((labels * vocab + tokens).flatten(), minlength=vocab**2)
        .double()
        .view(vocab, vocab)
    )


class TestDistributions:
    def test_by_hand(self):
        # q = exp(-1/beta) = 1/2: distances 1, 1, 2 weigh 1/2, 1/2, 1/4.
        task = ConceptTask(bits=2, omega=0.5, beta=1 / math.log(2))
        pi = torch.tensor(
            [[0, 0.4, 0.4, 0.2], [0.4, 0, 0.2, 0.4], [0.4, 0.2, 0, 0.4], [0.2, 0.4, 0.4, 0]],
            dtype=torch.float64,
        )
        torch.testing.assert_close(task.informative(), pi, atol=1e-15, rtol=0)
        p = torch.tensor([0.125, 0.325, 0.325, 0.225], dtype=torch.float64)
        torch.testing.assert_close(task.token_distribution()[0], p, atol=1e-15, rtol=0)

    @pytest.mark.parametrize(
        ("support", "z", "members"),
        [
            ("all", 2, [0, 1, 3, 4, 5, 6, 7]),
            ("hamming-1", 5, [1, 4, 7]),
            ("first-bit", 1, [0, 2, 3]),  # z_1 is the most significant bit
            ("first-bit", 6, [4, 5, 7]),
            ("first-two-bits", 4, [5]),
            ("first-two-bits", 3, [2]),
        ],
    )
    def test_named_supports_at_three_bits(self, support, z, members):
        row = ConceptTask(bits=3, support=support).neighbours()[z]
        assert row.nonzero().flatten().tolist() == members

    @pytest.mark.parametrize("support", SUPPORTS, ids=name)
    @pytest.mark.parametrize(("omega", "beta"), [(0.5, 1.0), (1.0, 0.3), (0.0, 7.0)])
    def test_match_their_definition(self, support, omega, beta):
        task = ConceptTask(bits=4, omega=omega, beta=beta, support=support)
        pi = torch.tensor(literal_informative(task), dtype=torch.float64)
        torch.testing.assert_close(task.informative(), pi, atol=1e-14, rtol=0)
        torch.testing.assert_close(
            task.token_distribution(), omega * pi + (1 - omega) / 16, atol=1e-14, rtol=0
        )

    def test_hamming(self):
        distances = ConceptTask(bits=6).hamming()
        expected = [[(a ^ b).bit_count() for b in range(64)] for a in range(64)]
        assert distances.tolist() == expected

    def test_a_tiny_beta_does_not_underflow(self):
        # exp(-1 / 0.001) is 0 in floating point; the nearest tokens still share all the mass.
        task = ConceptTask(bits=3, beta=0.001)
        expected = (task.hamming() == 1).double() / 3
        torch.testing.assert_close(task.informative(), expected)


class TestSampler:
    """Fixed seeds: a p-value below 1e-3 by bad luck cannot come and go."""

    @pytest.mark.parametrize("support", SUPPORTS, ids=name)
    @pytest.mark.parametrize("omega", [0.5, 1.0])
    def test_matches_the_exact_distributions(self, support, omega):
        task = ConceptTask(bits=4, omega=omega, beta=1.5, length=16, support=support)
        contexts = task.sample(200_000, seeded())
        noisy = table(contexts.labels, contexts.tokens[:, :-1], 16)
        last = table(contexts.labels, contexts.tokens[:, -1:], 16)
        assert p_value(noisy, task.token_distribution()) > 1e-3
        assert p_value(last, task.informative()) > 1e-3
        labels = torch.bincount(contexts.labels, minlength=16)
        assert stats.chisquare(labels).pvalue > 1e-3

    @pytest.mark.parametrize("support", SUPPORTS, ids=name)
    def test_a_slightly_wrong_distribution_is_rejected(self, support):
        task = ConceptTask(bits=4, omega=0.5, beta=1.5, length=16, support=support)
        contexts = task.sample(200_000, seeded())
        noisy = table(contexts.labels, contexts.tokens[:, :-1], 16)
        last = table(contexts.labels, contexts.tokens[:, -1:], 16)
        for omega in (0.48, 0.52):
            assert p_value(noisy, replace(task, omega=omega).token_distribution()) < 1e-6
        for other in SUPPORTS:
            if other != support:
                wrong = replace(task, support=other)
                assert p_value(noisy, wrong.token_distribution()) < 1e-6
                assert p_value(last, wrong.informative()) < 1e-6
        assert p_value(last, task.token_distribution()) < 1e-6
        if support != "hamming-1":  # at a single distance beta has no meaning
            for beta in (1.3, 1.7):
                wrong = replace(task, beta=beta)
                assert p_value(last, wrong.informative()) < 1e-6
                assert p_value(noisy, wrong.token_distribution()) < 1e-6
        if support == larger_or_next:
            backwards = task.token_distribution().T
            assert p_value(noisy, backwards / backwards.sum(1, keepdim=True)) < 1e-6

    @pytest.mark.parametrize("support", ["all", larger_or_next], ids=name)
    def test_positions_are_independent_and_alike(self, support):
        task = ConceptTask(bits=4, omega=0.5, length=6, support=support)
        contexts = task.sample(200_000, seeded())
        of_seven = contexts.tokens[contexts.labels == 7]
        p = task.token_distribution()[7]
        pairs = (p[:, None] * p).view(1, -1)
        for one, other in [(0, 1), (1, 2), (0, 4), (2, 3)]:
            joint = torch.bincount(of_seven[:, one] * 16 + of_seven[:, other], minlength=256)
            assert p_value(joint.double()[None], pairs) > 1e-3
        with_last = (p[:, None] * task.informative()[7]).view(1, -1)
        joint = torch.bincount(of_seven[:, 4] * 16 + of_seven[:, 5], minlength=256)
        assert p_value(joint.double()[None], with_last) > 1e-3

    def test_the_label_occurs_through_the_noise_alone(self):
        task = ConceptTask(bits=4, omega=0.7, length=33)
        contexts = task.sample(20_000, seeded())
        is_label = contexts.tokens == contexts.labels[:, None]
        assert not is_label[:, -1].any()
        count, tokens = int(is_label[:, :-1].sum()), is_label[:, :-1].numel()
        assert stats.binomtest(count, tokens, 0.3 / 16).pvalue > 1e-3
        assert stats.binomtest(count, tokens, 0.32 / 16).pvalue < 1e-6
        noiseless = replace(task, omega=1.0).sample(20_000, seeded())
        assert not (noiseless.tokens == noiseless.labels[:, None]).any()

    @pytest.mark.parametrize("support", SUPPORTS, ids=name)
    def test_the_last_token_is_never_noise(self, support):
        task = ConceptTask(bits=4, omega=0.0, length=2, support=support)
        contexts = task.sample(50_000, seeded())
        assert task.neighbours()[contexts.labels, contexts.tokens[:, -1]].all()
        # and the first one is nothing else
        assert (
            p_value(
                table(contexts.labels, contexts.tokens[:, :1], 16), torch.full((16, 16), 1 / 16)
            )
            > 1e-3
        )

    @pytest.mark.parametrize("support", ["all", larger_or_next], ids=name)
    def test_the_seed_decides(self, support):
        task = ConceptTask(bits=4, length=32, support=support)
        before = torch.get_rng_state()
        first, again = task.sample(50, seeded(3)), task.sample(50, seeded(3))
        fresh = replace(task).sample(50, seeded(3))  # with tables of its own
        for other in (again, fresh):
            assert torch.equal(first.tokens, other.tokens)
            assert torch.equal(first.labels, other.labels)
        assert not torch.equal(first.tokens, task.sample(50, seeded(4)).tokens)
        generator = seeded(3)
        task.sample(50, generator)
        assert not torch.equal(first.tokens, task.sample(50, generator).tokens)
        assert torch.equal(before, torch.get_rng_state()), "the global generator was used"

    @pytest.mark.parametrize(("bits", "length"), [(1, 1), (1, 7), (12, 5)])
    def test_extreme_sizes(self, bits, length):
        task = ConceptTask(bits=bits, length=length)
        contexts = task.sample(300, seeded())
        assert isinstance(contexts, Contexts)
        assert contexts.tokens.shape == (300, length)
        assert contexts.tokens.dtype == contexts.labels.dtype == torch.int64
        assert contexts.tokens.min() >= 0
        assert contexts.tokens.max() < task.vocab
        assert (contexts.tokens[:, -1] != contexts.labels).all()


class TestMixing:
    @pytest.mark.parametrize("support", ["all", larger_or_next], ids=name)
    @pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
    def test_tokens_come_from_both_labels_at_the_rate(self, rate, support):
        task = ConceptTask(bits=4, omega=0.5, length=6, support=support)
        mixed = task.sample_mixed(300_000, rate, seeded())
        assert isinstance(mixed, MixedContexts)
        pair = (mixed.first == 5) & (mixed.second == 12)
        tokens, p, pi = mixed.tokens[pair], task.token_distribution(), task.informative()
        assert len(tokens) > 1000
        early = torch.bincount(tokens[:, :-1].flatten(), minlength=16).double()[None]
        last = torch.bincount(tokens[:, -1], minlength=16).double()[None]
        assert p_value(early, ((1 - rate) * p[5] + rate * p[12])[None]) > 1e-3
        assert p_value(last, ((1 - rate) * pi[5] + rate * pi[12])[None]) > 1e-3
        assert p_value(early, ((0.8 - rate) * p[5] + (rate + 0.2) * p[12]).abs()[None]) < 1e-4

    def test_the_last_position_may_stay_unmixed(self):
        task = ConceptTask(bits=4, length=3, support="first-bit")
        mixed = task.sample_mixed(5_000, 1.0, seeded(), mix_last=False)
        neighbours = task.neighbours()
        assert neighbours[mixed.first, mixed.tokens[:, -1]].all()
        assert not neighbours[mixed.second, mixed.tokens[:, -1]].all()
        mixed = task.sample_mixed(5_000, 1.0, seeded())
        assert neighbours[mixed.second, mixed.tokens[:, -1]].all()

    def test_labels_are_distinct_and_every_pair_is_as_likely(self):
        mixed = ConceptTask(bits=3, length=1).sample_mixed(100_000, 0.5, seeded())
        pairs = torch.bincount(mixed.first * 8 + mixed.second, minlength=64).double()
        expected = (1 - torch.eye(8, dtype=torch.float64)) / 56
        assert p_value(pairs[None], expected.view(1, -1)) > 1e-3

    def test_positions_are_swapped_one_by_one(self):
        # One token type per label, so that each token tells where it comes from.
        task = ConceptTask(bits=4, omega=1.0, length=8, support=lambda a, b: b == (a ^ 1))
        mixed = task.sample_mixed(50_000, 0.25, seeded())
        swapped = (mixed.tokens ^ 1) == mixed.second[:, None]
        assert (swapped | ((mixed.tokens ^ 1) == mixed.first[:, None])).all()
        counts = torch.bincount(swapped.sum(1), minlength=9).double()[None]
        binomial = torch.tensor([stats.binom.pmf(k, 8, 0.25) for k in range(9)])[None]
        assert p_value(counts, binomial) > 1e-3


class TestUserSupport:
    def test_a_matrix_and_its_rule_are_the_same_task(self):
        rule = ConceptTask(bits=4, support=larger_or_next)
        token = torch.arange(16)
        matrix = ConceptTask(bits=4, support=larger_or_next(token[:, None], token[None]))
        assert rule == matrix
        assert hash(rule) == hash(matrix)
        assert rule != ConceptTask(bits=4, support=even_distance)
        assert rule != ConceptTask(bits=4)
        assert torch.equal(rule.sample(20, seeded()).tokens, matrix.sample(20, seeded()).tokens)

    def test_a_token_is_never_its_own_neighbour(self):
        task = ConceptTask(bits=3, support=lambda a, b: (a >= 0) & (b >= 0))
        assert torch.equal(task.neighbours(), ConceptTask(bits=3).neighbours())

    def test_a_rule_may_ignore_one_side(self):
        task = ConceptTask(bits=3, support=lambda a, b: b < 2)
        assert task.neighbours().sum(1).tolist() == [1, 1, 2, 2, 2, 2, 2, 2]

    def test_what_is_handed_out_is_a_copy(self):
        task = ConceptTask(bits=3, support=lambda a, b: b < 2)
        task.neighbours().fill_(False)
        assert task.neighbours().any()


class TestConfiguration:
    @pytest.mark.parametrize("support", SUPPORTS, ids=name)
    def test_survives_json(self, support):
        task = ConceptTask(bits=4, omega=0.25, beta=0.7, length=9, support=support)
        again = ConceptTask.from_configuration(json.loads(json.dumps(task.configuration())))
        assert again == task
        assert torch.equal(again.neighbours(), task.neighbours())
        assert torch.equal(again.sample(10, seeded()).tokens, task.sample(10, seeded()).tokens)
        assert again.configuration() == task.configuration()

    def test_a_large_matrix_stays_small(self):
        task = ConceptTask(bits=10, support=lambda a, b: (a ^ b) < 64)
        assert len(json.dumps(task.configuration())) < 20_000

    def test_numpy_numbers_become_plain_ones(self):
        task = ConceptTask(bits=4, omega=np.float64(0.25), length=9)
        assert type(task.configuration()["omega"]) is float

    def test_named_tasks_pickle(self):
        task = ConceptTask(bits=3, support="first-bit")
        task.sample(1, seeded())
        assert pickle.loads(pickle.dumps(task)) == task

    def test_repr_is_one_line(self):
        task = ConceptTask(bits=4, support=larger_or_next)
        assert repr(task) == (
            "ConceptTask(bits=4, omega=0.5, beta=1.0, length=256, support='user rule')"
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": None}, "lacks bits"),
            ({"omgea": 1.0}, "unknown entry of a concept task 'omgea'; did you mean 'omega'"),
            ({"support": {"matrix": "?!"}}, "cannot be read"),
            ({"support": {}}, "cannot be read|has 0 bytes"),
            ({"bits": 3}, "bits=3 needs 8"),
        ],
    )
    def test_errors(self, change, message):
        configuration = ConceptTask(bits=4, support=larger_or_next).configuration()
        configuration.update(change)
        configuration = {key: value for key, value in configuration.items() if value is not None}
        with pytest.raises(InputError, match=message):
            ConceptTask.from_configuration(configuration)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"omega": 1.5}, r"omega must lie in \[0, 1\], got 1.5"),
            ({"omega": -0.1}, "got -0.1"),
            ({"omega": math.nan}, "omega is nan"),
            ({"beta": 0.0}, "beta must be above 0, got 0.0"),
            ({"beta": -1.0}, "got -1.0"),
            ({"beta": math.inf}, "beta is inf; give a finite number"),
            ({"bits": 0}, "bits is 0; give a whole number of at least 1"),
            ({"bits": 13}, "bits is 13; .* at most 12"),
            ({"length": 0}, "length is 0; .* at least 1"),
            ({"support": "hamming"}, "unknown support 'hamming'; did you mean 'hamming-1'"),
            ({"bits": 1, "support": "first-bit"}, "N.z. empty for z = 0"),
            ({"bits": 1, "support": "first-two-bits"}, "N.z. empty for z = 0"),
            ({"bits": 2, "support": "first-two-bits"}, "N.z. empty for z = 0"),
            ({"support": lambda a, b: (a != 5) & (b >= 0)}, "'user rule'.* empty for z = 5"),
            ({"support": lambda a, b: a + b}, "must be a tensor of booleans, got torch.int64"),
            ({"support": lambda a, b: True}, "must be a tensor of booleans, got bool"),
            ({"support": lambda a, b: torch.ones(3, dtype=torch.bool)}, r"\[8, 8\].*got \[3\]"),
            ({"support": torch.ones(4, 4, dtype=torch.bool)}, r"matrix.*\[8, 8\].*got \[4, 4\]"),
            ({"support": torch.ones(1, 8, dtype=torch.bool)}, r"got \[1, 8\]"),
        ],
    )
    def test_parameters(self, arguments, message):
        with pytest.raises(InputError, match=message):
            ConceptTask(**{"bits": 3, **arguments})

    def test_draws(self):
        task = ConceptTask(bits=3)
        with pytest.raises(InputError, match="batch is 0; give a whole number"):
            task.sample(0, seeded())
        with pytest.raises(InputError, match="batch is -2; give a whole number"):
            task.sample_mixed(-2, 0.5, seeded())
        with pytest.raises(InputError, match=r"should be on 'cuda', and the generator is on 'cpu'"):
            task.sample(1, seeded(), device="cuda")
        for rate in (-0.1, 1.1, math.nan):
            with pytest.raises(InputError, match=r"mixing rate must lie in \[0, 1\]"):
                task.sample_mixed(1, rate, seeded())
        assert task.sample(1, seeded(), device="cpu").tokens.device.type == "cpu"


def test_token_counts():
    tokens = torch.tensor([[3, 1, 3, 0], [2, 2, 2, 2]])
    assert token_counts(tokens, 4).tolist() == [[1, 1, 0, 2], [0, 0, 4, 0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("support", ["all", larger_or_next], ids=name)
def test_on_a_gpu(support):
    task = ConceptTask(bits=4, length=16, support=support)
    contexts = task.sample(40_000, torch.Generator("cuda").manual_seed(0), device="cuda")
    assert contexts.tokens.is_cuda
    noisy = table(contexts.labels, contexts.tokens[:, :-1], 16).cpu()
    assert p_value(noisy, task.token_distribution()) > 1e-3
    mixed = task.sample_mixed(100, 0.5, torch.Generator("cuda").manual_seed(0))
    assert mixed.tokens.is_cuda
