"""The exact posterior against enumeration, answers by hand, the reference page's accuracies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from draws import seeded, theorem_1_scores, upward

from hijacklens.errors import InputError
from hijacklens.one_layer import evaluation, memory
from hijacklens.one_layer.evaluation import (
    BayesRule,
    accuracy,
    evaluate,
    hits,
)
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask, token_counts


def likelihoods(task: ConceptTask) -> tuple[torch.Tensor, torch.Tensor]:
    """All contexts [vocab^length, length], and p(x | y) of each label, by multiplication."""
    p, pi = task.token_distribution().T, task.informative().T  # [token, label]
    contexts = torch.tensor(list(itertools.product(range(task.vocab), repeat=task.length)))
    return contexts, p[contexts[:, :-1]].prod(1) * pi[contexts[:, -1]]


SMALL = [
    ConceptTask(bits=2, omega=0.5, length=3),
    ConceptTask(bits=2, omega=1.0, length=4),
    ConceptTask(bits=3, omega=0.3, beta=0.5, length=3, support="hamming-1"),
    ConceptTask(bits=3, omega=1.0, length=3, support="first-bit"),
    ConceptTask(bits=2, omega=0.6, length=3, support=upward),
    ConceptTask(bits=2, omega=1.0, length=3, support=upward),
    ConceptTask(bits=2, omega=0.0, length=2),
    ConceptTask(bits=3, omega=0.5, length=1),
]


def bayes_accuracy(task, **contexts):
    """The accuracy of the best rule, with ties split evenly."""
    return accuracy(BayesRule(task), task, **contexts)


class TestPosterior:
    @pytest.mark.parametrize(("token", "run"), [(-1, "-1 to 1"), (4, "0 to 4")])
    def test_tokens_of_another_task_are_refused(self, token, run):
        with pytest.raises(
            InputError, match=f"Bayes rule: token ids run from {run}; it knows 0 to 3"
        ):
            BayesRule(ConceptTask(bits=2, length=3))(torch.tensor([[0, 1, token]]))

    @pytest.mark.parametrize("task", SMALL, ids=repr)
    def test_is_that_of_every_context(self, task):
        contexts, likelihood = likelihoods(task)
        torch.testing.assert_close(likelihood.sum(0), torch.ones(task.vocab).double())
        possible = likelihood.sum(1) > 0
        posterior = BayesRule(task)(contexts[possible])
        expected = likelihood[possible] / likelihood[possible].sum(1, keepdim=True)
        torch.testing.assert_close(posterior.exp(), expected, atol=1e-13, rtol=0)
        assert not posterior.isnan().any()
        if not possible.all():
            with pytest.raises(InputError, match="context 0 has probability 0 under every label"):
                BayesRule(task)(contexts[~possible])

    def test_by_hand(self):
        # q = 1/2. Context (0, 1): p(0 | y) pi(1 | y) for y = 0..3, with p(0 | 0) = 1/8 and so on.
        task = ConceptTask(bits=2, omega=0.5, beta=1 / math.log(2), length=2)
        posterior = BayesRule(task)(torch.tensor([[0, 1]])).exp()
        weights = torch.tensor([[0.125 * 0.4, 0.0, 0.325 * 0.2, 0.225 * 0.4]]).double()
        torch.testing.assert_close(posterior, weights / weights.sum())

    def test_is_calibrated(self):
        task = ConceptTask(bits=4, length=20)
        contexts = task.sample(50_000, seeded())
        top = BayesRule(task)(contexts.tokens).max(1)
        right = (top.indices == contexts.labels).double()
        for low, high in itertools.pairwise([0.2, 0.4, 0.6, 0.8, 0.95]):
            in_bin = (top.values.exp() > low) & (top.values.exp() <= high)
            promised = top.values.exp()[in_bin].mean()
            error = 4 * math.sqrt(0.25 / int(in_bin.sum()))
            assert abs(float(promised - right[in_bin].mean())) < error

    def test_one_rule_serves_many_batches(self):
        task = ConceptTask(bits=4, length=10)
        rule, tokens = BayesRule(task), task.sample(6, seeded()).tokens
        both = torch.cat([rule(tokens[:2]), rule(tokens[2:])])
        torch.testing.assert_close(both, BayesRule(task)(tokens), atol=1e-13, rtol=0)


class TestHits:
    @pytest.mark.parametrize(
        ("scores", "label", "split", "favoured"),
        [
            ([1.0, 3.0, 2.0], 1, 1.0, 1.0),
            ([1.0, 3.0, 2.0], 2, 0.0, 0.0),
            ([3.0, 3.0, 2.0], 0, 0.5, 1.0),
            ([3.0, 3.0, 3.0], 2, 1 / 3, 1.0),
            ([3.0, 3.0, 2.0], 2, 0.0, 0.0),
            ([-math.inf, 0.0, -math.inf], 1, 1.0, 1.0),
            ([math.nan, 1.0, 0.0], 1, 0.0, 0.0),
            ([math.nan, math.nan, math.nan], 1, 0.0, 0.0),
        ],
    )
    def test_cases(self, scores, label, split, favoured):
        scores, label = torch.tensor([scores]), torch.tensor([label])
        assert hits(scores, label).item() == pytest.approx(split)
        assert hits(scores, label, ties="label").item() == favoured

    def test_tolerance(self):
        scores, label = torch.tensor([[1.0, 1.0 + 1e-4, 0.0]]), torch.tensor([0])
        assert hits(scores, label).item() == 0
        assert hits(scores, label, tolerance=1e-3).item() == 0.5

    @pytest.mark.parametrize("length", [8, 30, 100])
    def test_rounding_does_not_break_the_ties_of_equation_5_1(self, length):
        """The model's float32 logits against the whole numbers that they are, at any length."""
        task = ConceptTask(bits=6, length=length)
        contexts = task.sample(4000, seeded())
        counts = token_counts(contexts.tokens, task.vocab, dtype=torch.float64)
        exact = counts @ (task.hamming() == 1).double()
        model = OneLayerTransformer.from_weights(memory.theorem_1(task))
        found = hits(model.last_logits(contexts.tokens), contexts.labels)
        assert torch.equal(found, hits(exact, contexts.labels, tolerance=0.0))
        small = 1e-6 * model.last_logits(contexts.tokens)
        assert torch.equal(found, hits(small, contexts.labels))

    def test_leading_axes(self):
        scores = torch.randn(2, 3, 7, 5, generator=seeded())
        labels = torch.randint(5, (2, 3, 7), generator=seeded())
        fractions = hits(scores, labels)
        assert fractions.shape == (2, 3, 7)
        assert torch.equal(fractions, (scores.argmax(-1) == labels).double())


class TestAccuracy:
    def test_counts_what_is_right(self):
        task = ConceptTask(bits=3, length=4)

        def first_token(tokens):
            return torch.nn.functional.one_hot(tokens[:, 0], 8).float()

        measured = accuracy(first_token, task, contexts_count=1000, generator=seeded())
        contexts = task.sample(1000, seeded())
        assert measured.value == float((contexts.tokens[:, 0] == contexts.labels).double().mean())
        assert 0 < measured.low < measured.value < measured.high < 1

    def test_ties_give_their_share(self):
        task = ConceptTask(bits=3, length=4)
        flat = accuracy(
            lambda tokens: torch.zeros(len(tokens), 8),
            task,
            contexts_count=999,
            generator=seeded(),
        )
        assert flat.value == pytest.approx(1 / 8, abs=1e-12)
        assert flat.low < flat.value < flat.high

    def test_memory_is_bounded(self, monkeypatch):
        seen = []

        def flat(tokens):
            seen.append(len(tokens))
            return torch.zeros(len(tokens), 8)

        monkeypatch.setattr(evaluation, "CHUNK", 800)
        task = ConceptTask(bits=3, length=4)
        accuracy(flat, task, contexts_count=250, generator=seeded())
        assert seen == [100, 100, 50]
        seen.clear()
        accuracy(flat, ConceptTask(bits=3, length=16), contexts_count=70, generator=seeded())
        assert seen == [50, 20]

    @pytest.mark.parametrize("count", [0, -5])
    def test_errors(self, count):
        with pytest.raises(InputError, match=f"contexts_count is {count}; give a whole number"):
            bayes_accuracy(ConceptTask(bits=3), contexts_count=count, generator=seeded())

    @pytest.mark.parametrize("task", SMALL, ids=repr)
    def test_bayes_is_the_best_there_is(self, task):
        # Exactly: each context counts with its most likely label.
        _, likelihood = likelihoods(task)
        best = float(likelihood.max(1).values.sum() / task.vocab)
        measured = bayes_accuracy(task, contexts_count=40_000, generator=seeded()).value
        assert abs(measured - best) < 4 * math.sqrt(best * (1 - best) / 40_000) + 1e-12

    def test_at_ten_bits(self):
        task = ConceptTask(bits=10, length=256)
        assert bayes_accuracy(task, contexts_count=512, generator=seeded()).value > 0.99


class TestEvaluate:
    TASK = ConceptTask(bits=3, length=64)

    def test_by_hand(self) -> None:
        """All give the same answer: right once in eight; a sure right answer: loss 0."""
        one = torch.zeros(8, dtype=torch.float64)
        one[5] = 1.0
        answerers = {
            "five": lambda tokens: one.expand(len(tokens), 8),
            "none": lambda tokens: torch.zeros(len(tokens), 8),
            "nan": lambda tokens: torch.full((len(tokens), 8), math.nan),
        }
        draw = seeded()
        scores = evaluate(answerers, self.TASK, draw, count=20_000)
        assert scores["five"].accuracy.value == pytest.approx(1 / 8, abs=0.01)
        assert scores["five"].loss == pytest.approx(math.log(7 + math.e) - 1 / 8, abs=0.01)
        assert scores["none"].accuracy.value == pytest.approx(1 / 8)
        assert scores["none"].loss == pytest.approx(math.log(8))
        assert scores["nan"].accuracy.value == 0.0

    def test_all_see_the_same_contexts(self) -> None:
        rule = BayesRule(self.TASK)
        draw = seeded(1)
        scores = evaluate({1: rule, 2: rule}, self.TASK, draw, count=5000)
        assert scores[1] == scores[2]
        low, high = scores[1].accuracy.low, scores[1].accuracy.high
        assert low < scores[1].accuracy.value < high
        with pytest.raises(InputError, match="evaluation is 0"):
            evaluate({1: rule}, self.TASK, draw, count=0)


# Reference page, 7.2: Bayes / constructed, omega = .5, beta = 1, n = 131,072 contexts.
NOISY = {
    (5, 32): (0.7074, 0.5883),
    (5, 64): (0.9232, 0.8393),
    (5, 128): (0.9956, 0.9794),
    (5, 256): (1.0, 0.9997),
    (6, 32): (0.6872, 0.5249),
    (6, 64): (0.9223, 0.7960),
    (6, 128): (0.9963, 0.9702),
    (6, 256): (1.0, 0.9994),
    (7, 32): (0.6651, 0.4552),
    (7, 64): (0.9212, 0.7402),
    (7, 128): (0.9965, 0.9510),
    (7, 256): (1.0, 0.9985),
    (8, 32): (0.6472, 0.3872),
    (8, 64): (0.9150, 0.6704),
    (8, 128): (0.9963, 0.9201),
    (8, 256): (1.0, 0.9956),
}
# The same page: constructed, omega = 1, beta = 1, n = 65,536.
NOISELESS = {
    (5, 32): 0.9639,
    (5, 64): 0.9992,
    (5, 128): 1.0,
    (6, 32): 0.9262,
    (6, 64): 0.9961,
    (6, 128): 1.0,
    (7, 32): 0.8628,
    (7, 64): 0.9863,
    (7, 128): 0.9998,
    (8, 32): 0.7806,
    (8, 64): 0.9627,
    (8, 128): 0.9991,
}


def check_constructed(task: ConceptTask, expected: float, count: int, anchor_count: int) -> None:
    measured = accuracy(theorem_1_scores(task), task, contexts_count=count, generator=seeded())
    assert abs(measured.value - expected) <= slack(expected, count, anchor_count)


def slack(fraction: float, count: int, anchor_count: int) -> float:
    """Four standard errors of the difference of two fractions, and the rounding of the anchor."""
    if count == QUICK:
        return 0.015
    return 4 * math.sqrt(fraction * (1 - fraction) * (1 / count + 1 / anchor_count)) + 1e-4


QUICK = 8192
COUNTS = pytest.mark.parametrize("count", [QUICK, pytest.param(131_072, marks=pytest.mark.slow)])


@COUNTS
@pytest.mark.parametrize(("bits", "length"), NOISY)
def test_bayes_and_constructed_accuracies(bits, length, count):
    task = ConceptTask(bits=bits, omega=0.5, beta=1.0, length=length)
    best, constructed = NOISY[bits, length]
    measured = bayes_accuracy(task, contexts_count=count, generator=seeded())
    assert abs(measured.value - best) <= slack(best, count, 131_072)
    check_constructed(task, constructed, count, 131_072)


@COUNTS
@pytest.mark.parametrize(("bits", "length"), NOISELESS)
def test_constructed_accuracies_without_noise(bits, length, count):
    task = ConceptTask(bits=bits, omega=1.0, beta=1.0, length=length)
    check_constructed(task, NOISELESS[bits, length], count, 65_536)
