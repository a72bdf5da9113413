"""Latent concept association: its distributions, and contexts drawn from them.

Section 4 of the paper (3.1 of the reference page, which is docs/reference/derivations.md). A token
is the decimal value of m bits, z_1 first, so V = 2^m. Each label z has a support N(z), which never
holds z itself, and

    pi(t | z)  proportional to  exp(-D_H(t, z) / beta)  on N(z), 0 elsewhere   (D_H: Hamming)
    p(t | z) = omega pi(t | z) + (1 - omega) / V

A context of length L has a uniform label z, tokens 1..L-1 from p(. | z) and token L from
pi(. | z): the last token is never noise, and the label occurs only through the noise.

Sampling costs O(batch L) time and memory: one 32-bit random integer per token (see `alias`).

>>> task = ConceptTask(bits=5, omega=0.5, beta=1.0, length=64)
>>> task.vocab
32
>>> contexts = task.sample(128, torch.Generator().manual_seed(0))
>>> contexts.tokens.shape, contexts.labels.shape
(torch.Size([128, 64]), torch.Size([128]))
>>> ConceptTask.from_configuration(task.configuration()) == task
True
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijacklens.errors import InputError, unknown
from hijacklens.one_layer import hypercube, sampling
from hijacklens.one_layer.sampling import AliasTable, Support

MAX_BITS = 12
"""Tables over the vocabulary are V x V: 128 MiB in float64 at 12 bits."""

_NUMBERS: Mapping[str, Callable[[Any], float]] = {
    "bits": operator.index,
    "omega": float,
    "beta": float,
    "length": operator.index,
}
"""The numbers of a task, with what makes a plain Python number of them (NumPy's are no JSON)."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts of the task with their labels."""

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class MixedContexts:
    """Contexts that mix the tokens of two distinct labels (figure C.13)."""

    tokens: Int[Tensor, "batch pos"]
    first: Int[Tensor, " batch"]
    """The label that tokens come from unless they are swapped (the paper's true target)."""
    second: Int[Tensor, " batch"]
    """The label that each token comes from with probability `rate` (the false target)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptTask:
    """The latent concept association task.

    The defaults omega = 0.5, beta = 1, length = 256 and all other tokens as support are ours: the
    paper's are recalled, not confirmed. Tasks are equal if their numbers are and the name of their
    support, or the matrix of their rule.

    Args:
        bits: m, from 1 to 12; the vocabulary has 2^m tokens.
        omega: Share of informative tokens, from 0 (noise alone) to 1 (no noise).
        beta: Temperature of the informative distribution, above 0, in units of Hamming distance.
        length: L, the number of tokens of a context, at least 1.
        support: N(z), which never holds z. `"all"` other tokens, the `"hamming-1"` neighbours, the
            tokens with the same `"first-bit"` z_1 or `"first-two-bits"` z_1, z_2; or a rule of
            your own, called once with tokens a [vocab, 1] and b [1, vocab] and giving whether b is
            in N(a); or that as a boolean matrix [vocab, vocab], N(a) in row a. Whether z is in its
            own support by your rule does not matter: it is taken out.

    Raises:
        InputError: A parameter outside its range, an unknown support, a rule whose answer is not
            boolean or does not fit [vocab, vocab], or a label whose support is empty.
    """

    bits: int
    omega: float = 0.5
    beta: float = 1.0
    length: int = 256
    support: str | Support = field(default="all", compare=False)
    _rule: str = field(init=False, repr=False)
    """The support as text, a name or a packed matrix: what is compared and saved."""
    _matrix: Tensor | None = field(init=False, repr=False, compare=False)
    """The support of a user, evaluated; None for a named one."""
    _tables: dict[torch.device, AliasTable] = field(init=False, repr=False, compare=False)
    """Device -> the table that tokens are drawn with. Its first half holds p, its second half pi:
    a row per label, or a single row of `token xor label` where all labels share that."""

    def __post_init__(self) -> None:
        for name, number in _NUMBERS.items():
            try:
                object.__setattr__(self, name, number(getattr(self, name)))
            except (TypeError, ValueError):
                kind = "whole number" if number is operator.index else "number"
                raise InputError(f"{name} must be a {kind}, got {getattr(self, name)!r}.") from None
        if not 1 <= self.bits <= MAX_BITS:
            raise InputError(
                f"bits must lie in 1..{MAX_BITS}, got {self.bits!r}: the vocabulary has 2^bits "
                "tokens, and the tables of the task grow with its square."
            )
        if not 0 <= self.omega <= 1:
            raise InputError(
                f"omega must lie in [0, 1], got {self.omega!r}: it is the share of informative "
                "tokens, and 1 - omega is the share of noise."
            )
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise InputError(
                f"beta must be above 0 and finite, got {self.beta!r}: tokens at Hamming distance D "
                "weigh exp(-D / beta)."
            )
        if self.length < 1:
            raise InputError(
                f"length must be at least 1, got {self.length!r}: the last token always counts."
            )
        if isinstance(self.support, str):
            matrix = None
            rows = sampling.named(self.support, self.bits, rows=1)
        else:
            matrix = rows = sampling.evaluate(self.support, self.bits)
        lonely = (~rows.any(1)).nonzero().flatten()
        if len(lonely):
            raise InputError(
                f"the support {self.support_name!r} with bits={self.bits} leaves N(z) empty for "
                f"z = {int(lonely[0])}: every label needs at least one other token. Use more bits "
                "or a wider support."
            )
        object.__setattr__(self, "_matrix", matrix)
        rule = self.support_name if matrix is None else sampling.pack(matrix)
        object.__setattr__(self, "_rule", rule)
        object.__setattr__(self, "_tables", {})

    def __repr__(self) -> str:
        return (
            f"ConceptTask(bits={self.bits}, omega={self.omega}, beta={self.beta}, "
            f"length={self.length}, support={self.support_name!r})"
        )

    @property
    def vocab(self) -> int:
        """V = 2^bits, the number of tokens and of labels."""
        return 1 << self.bits

    @property
    def support_name(self) -> str:
        """The name of the support, or `"user rule"`."""
        return self.support if isinstance(self.support, str) else "user rule"

    def hamming(self) -> Int[Tensor, "vocab vocab"]:
        """D_H between all pairs of tokens."""
        token = torch.arange(self.vocab)
        return hypercube.weight(token[:, None] ^ token, self.bits)

    def neighbours(self) -> Bool[Tensor, "vocab vocab"]:
        """The support: N(z) in row z. It is symmetric for the named ones, not for every rule."""
        if self._matrix is not None:
            return self._matrix.clone()
        return sampling.named(self.support_name, self.bits)

    def informative(self) -> Float[Tensor, "vocab vocab"]:
        """pi(. | z) in row z, in float64."""
        return self._informative(self.neighbours())

    def token_distribution(self) -> Float[Tensor, "vocab vocab"]:
        """p(. | z) = omega pi(. | z) + (1 - omega) / V in row z, in float64."""
        return self._with_noise(self.informative())

    def sample(
        self,
        batch: int,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
    ) -> Contexts:
        """Draw contexts with uniform labels, on the device of the generator.

        The same state of the generator gives the same contexts (on the same kind of device).

        Args:
            batch: How many, at least 1.
            generator: Where the randomness comes from, and where the contexts are made.
            device: If given, checked against the device of the generator.

        Returns:
            int64 tokens [batch, length] and labels [batch].

        Raises:
            InputError: `batch` below 1, or a generator on another device than `device`.
        """
        _check_draw(batch, generator, device)
        labels = self._labels(batch, generator)
        return Contexts(self._tokens(labels[:, None], generator), labels)

    def sample_mixed(
        self,
        batch: int,
        rate: float,
        generator: torch.Generator,
        *,
        mix_last: bool = True,
        device: torch.device | str | None = None,
    ) -> MixedContexts:
        """Draw contexts whose positions come from two distinct labels (figure C.13).

        Each position takes the token of a context of the second label with probability `rate`,
        and that of a context of the first one otherwise. Only the token that is taken is drawn:
        the tokens of a context are independent given the label, so the law is the same.

        Args:
            batch: How many, at least 1.
            rate: Mixing rate, from 0 (all tokens from the first label) to 1.
            generator: Where the randomness comes from, and where the contexts are made.
            mix_last: Whether the last position is mixed too, or always the first label's. The
                paper's choice is not known; mixing every position is our default.
            device: If given, checked against the device of the generator.

        Raises:
            InputError: `rate` outside [0, 1], `batch` below 1, or a generator on another device
                than `device`.
        """
        if not 0 <= rate <= 1:
            raise InputError(
                f"the mixing rate must lie in [0, 1], got {rate!r}: it is the share of tokens "
                "that come from the second label."
            )
        _check_draw(batch, generator, device)
        place = {"generator": generator, "device": generator.device}
        first = self._labels(batch, generator)
        # A step of 1..V-1 from the first label, round the vocabulary, reaches every other once.
        second = (first + torch.randint(1, self.vocab, (batch,), **place)) % self.vocab
        swapped = torch.rand(batch, self.length, dtype=torch.float64, **place) < rate
        if not mix_last:
            swapped[:, -1] = False
        source = torch.where(swapped, second[:, None], first[:, None])
        return MixedContexts(self._tokens(source, generator), first, second)

    def configuration(self) -> dict[str, Any]:
        """The task ready for JSON; a support of your own is saved as its packed matrix."""
        return {
            "bits": self.bits,
            "omega": self.omega,
            "beta": self.beta,
            "length": self.length,
            "support": self._rule if self._matrix is None else {"matrix": self._rule},
        }

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, Any]) -> ConceptTask:
        """The task that `configuration()` describes.

        Raises:
            InputError: An entry is missing, is not one of the task's, or cannot be read.
        """
        names = (*_NUMBERS, "support")
        if missing := [name for name in names if name not in configuration]:
            raise InputError(
                f"the configuration of a concept task lacks {', '.join(missing)}; it has "
                f"{', '.join(map(str, configuration)) or 'no entries'}."
            )
        for name in configuration:
            if name not in names:
                raise unknown("entry of a concept task", name, names)
        # The numbers first: the support is read by them.
        numbers = cls(**{name: configuration[name] for name in _NUMBERS})
        support = configuration["support"]
        if isinstance(support, Mapping):
            support = sampling.unpack(support.get("matrix", ""), numbers.bits)
        return replace(numbers, support=support)

    def _informative(self, neighbours: Tensor) -> Tensor:
        """The first rows of pi, as many as `neighbours` has."""
        token = torch.arange(self.vocab)
        distance = hypercube.weight(token[: len(neighbours), None] ^ token, self.bits)
        # A softmax, so that a tiny beta does not underflow to an empty row.
        score = (-distance.double() / self.beta).masked_fill(~neighbours, -torch.inf)
        return score.softmax(1)

    def _with_noise(self, informative: Tensor) -> Tensor:
        return self.omega * informative + (1 - self.omega) / self.vocab

    def _labels(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.vocab, (batch,), generator=generator, device=generator.device)

    def _tokens(self, source: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens of the labels in `source` [batch, 1 or length]: all from p, the last from pi."""
        table = self._table(generator.device)
        row = torch.zeros(1, self.length, dtype=torch.int64, device=generator.device)
        row[:, -1] = table.rows // 2
        shape = (len(source), self.length)
        if table.rows == 2:  # the distribution of `token xor label` is the same for all labels
            return (table.draw(shape, generator, row=row) ^ source.to(torch.int32)).long()
        return table.draw(shape, generator, row=row + source).long()

    def _table(self, device: torch.device) -> AliasTable:
        """The table on a device, made on first use and kept."""
        if device not in self._tables:
            if self._matrix is None:
                neighbours = sampling.named(self.support_name, self.bits, rows=1)
            else:
                shared = sampling.depends_on_xor(self._matrix)
                neighbours = self._matrix[:1] if shared else self._matrix
            informative = self._informative(neighbours)
            table = AliasTable.build(torch.cat([self._with_noise(informative), informative]))
            self._tables[device] = table.to(device)
        return self._tables[device]


def token_counts(
    tokens: Int[Tensor, "batch pos"], vocab: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch vocab"]:
    """How often each token occurs in each context: all that uniform attention sees of it."""
    counts = torch.zeros(len(tokens), vocab, dtype=dtype, device=tokens.device)
    one = torch.ones((), dtype=dtype, device=tokens.device)
    return counts.scatter_add_(1, tokens.long(), one.expand(tokens.shape))


def _check_draw(batch: int, generator: torch.Generator, device: torch.device | str | None) -> None:
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch!r}: it is the number of contexts.")
    if device is None:
        return
    wanted, has = torch.device(device), generator.device
    if wanted.type != has.type or wanted.index not in (None, has.index):
        raise InputError(
            f"contexts were asked for on {str(wanted)!r}, and the generator is on {str(has)!r}. "
            f"Pass torch.Generator({str(wanted)!r})."
        )
