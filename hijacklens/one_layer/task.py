"""Latent concept association: its distributions, and contexts drawn from them.

Section 4 of the paper (3.1 of the reference page, which is docs/reference/derivations.md). A token
is the decimal value of m bits, z_1 first, so V = 2^m. Each label z has a support N(z), which never
holds z itself, and

    pi(t | z)  proportional to  exp(-D_H(t, z) / beta)  on N(z), 0 elsewhere   (D_H: Hamming)
    p(t | z) = omega pi(t | z) + (1 - omega) / V

A context of length L has a uniform label z, tokens 1..L-1 from p(. | z) and token L from
pi(. | z): the last token is never noise, and the label occurs only through the noise.
Sampling costs O(batch L) time and memory: one 32-bit random integer per token (see `sampling`).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import PlainSerializer, PlainValidator
from torch import Tensor

from hijacklens.errors import InputError, number, shown, strict, unknown, whole_number
from hijacklens.one_layer import hypercube
from hijacklens.one_layer.sampling import AliasTable

MAX_BITS = 12
"""Tables over the vocabulary are V x V: 128 MiB in float64 at 12 bits."""

_NUMBERS = ("bits", "omega", "beta", "length")

Support: TypeAlias = Callable[[Tensor, Tensor], Tensor] | Tensor
"""A user's support: a rule (a, b) -> "b is in N(a)", or its boolean matrix [vocab, vocab]."""

SUPPORTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda difference, bits: difference != 0,
    "hamming-1": lambda difference, bits: difference & (difference - 1) == 0,
    "first-bit": lambda difference, bits: difference >> (bits - 1) == 0,
    "first-two-bits": lambda difference, bits: difference >> max(bits - 2, 0) == 0,
}
"""The named supports, as rules on a xor b; a itself is taken out afterwards.

Because they depend on a xor b alone, all labels share one distribution of `token xor label`.
"""


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
    """The label of the tokens that are not swapped (the paper's true target)."""
    second: Int[Tensor, " batch"]
    """The label of a token with probability `rate` (the false target)."""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptTask:
    """The latent concept association task.

    The defaults omega = 0.5, beta = 1, length = 256 and all other tokens as support are ours: the
    paper's are recalled, not confirmed. Tasks are equal if their numbers and the name of their
    support, or the matrix of their rule, are equal.

    Args:
        bits: m, from 1 to 12; the vocabulary has 2^m tokens.
        omega: Fraction of informative tokens, from 0 (noise alone) to 1 (no noise).
        beta: Temperature of the informative distribution, above 0, in units of Hamming distance.
        length: L, the number of tokens of a context, at least 1.
        support: N(z), which never holds z. `"all"` other tokens, the `"hamming-1"` neighbours, the
            tokens with the same `"first-bit"` z_1 or `"first-two-bits"` z_1, z_2; or your own
            rule, called once with tokens a [vocab, 1] and b [1, vocab], that returns whether b is
            in N(a); or the same as a boolean matrix [vocab, vocab], N(a) in row a. Your rule may
            put z into N(z) or not: z is always taken out.

    Raises:
        InputError: A parameter outside its range, an unknown support, a rule whose answer is not
            boolean or does not fit [vocab, vocab], or a label whose support is empty.
    """

    bits: int
    omega: float = 0.5
    beta: float = 1.0
    length: int = 256
    support: str | Support = field(default="all", compare=False)
    """A name, or the boolean matrix of a user's support without its diagonal."""
    _rule: str = field(init=False, repr=False)
    """The support as text, a name or a packed matrix, which is compared and saved."""
    _tables: dict[torch.device, AliasTable] = field(init=False, repr=False, compare=False)
    """Device -> alias table. Its first half holds p, its second half pi: a row per label, or a
    single row of `token xor label` if all labels share that distribution."""

    def __post_init__(self) -> None:
        plain = {  # Python numbers, since NumPy's are not JSON
            "bits": whole_number("bits", self.bits, least=1, most=MAX_BITS),
            "omega": number("omega", self.omega),
            "beta": number("beta", self.beta),
            "length": whole_number("length", self.length, least=1),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if not 0 <= self.omega <= 1:
            raise InputError(
                f"omega must lie in [0, 1], got {self.omega}: it is the fraction of informative "
                "tokens, and 1 - omega is the fraction of noise."
            )
        if self.beta <= 0:
            raise InputError(
                f"beta must be above 0, got {self.beta}: tokens at Hamming distance D weigh "
                "exp(-D / beta)."
            )
        rule = self.support
        if isinstance(rule, str):
            if rule not in SUPPORTS:
                raise unknown("support", rule, SUPPORTS, "Or pass a rule (a, b) -> b in N(a).")
        else:
            matrix = _evaluated(rule, self.bits)
            object.__setattr__(self, "support", matrix)
            rule = _packed(matrix)
        empty = (~self._supports(rows=1).any(1)).nonzero().flatten()
        if len(empty):
            raise InputError(
                f"the support {self.support_name!r} with bits={self.bits} leaves N(z) empty for "
                f"z = {int(empty[0])}: every label needs at least one other token. Use more bits "
                "or a wider support."
            )
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
        """Return D_H between all pairs of tokens."""
        token = torch.arange(self.vocab)
        return hypercube.weight(token[:, None] ^ token, self.bits)

    def neighbours(self) -> Bool[Tensor, "vocab vocab"]:
        """Return N(z) in row z; symmetric for the named supports, not for every rule."""
        return self._supports().clone()

    def informative(self) -> Float[Tensor, "vocab vocab"]:
        """Return pi(. | z) in row z, in float64."""
        return self._informative(self.neighbours())

    def token_distribution(self) -> Float[Tensor, "vocab vocab"]:
        """Return p(. | z) = omega pi(. | z) + (1 - omega) / V in row z, in float64."""
        return self.omega * self.informative() + (1 - self.omega) / self.vocab

    def sample(
        self,
        batch: int,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
    ) -> Contexts:
        """Draw contexts with uniform labels, in int64, on the device of the generator.

        The same state of the generator gives the same contexts (on the same kind of device). A
        `device` is compared with that of the generator.

        Raises:
            InputError: `batch` below 1, or a generator on another device than `device`.
        """
        _check_draw(batch, generator, device)
        labels = torch.randint(self.vocab, (batch,), generator=generator, device=generator.device)
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

        Each position has the token of a context of the second label with probability `rate`, and
        the token of a context of the first label otherwise. Only that token is drawn: tokens of a
        context are independent given the label, so the distribution is the same. With
        `mix_last=False` the last token is of the first label. The paper's choice is not known;
        mixing every position is our default.

        Raises:
            InputError: `rate` outside [0, 1], `batch` below 1, or a generator on another device
                than `device`.
        """
        if not 0 <= rate <= 1:
            raise InputError(
                f"the mixing rate must lie in [0, 1], got {rate!r}: it is the fraction of "
                "tokens that come from the second label."
            )
        _check_draw(batch, generator, device)
        draw = {"generator": generator, "device": generator.device}
        first = torch.randint(self.vocab, (batch,), **draw)
        # Steps of 1..V-1 from the first label, modulo V, reach every other label once.
        second = (first + torch.randint(1, self.vocab, (batch,), **draw)) % self.vocab
        swapped = torch.rand(batch, self.length, dtype=torch.float64, **draw) < rate
        if not mix_last:
            swapped[:, -1] = False
        labels = torch.where(swapped, second[:, None], first[:, None])
        return MixedContexts(self._tokens(labels, generator), first, second)

    def configuration(self) -> dict[str, Any]:
        """Return the task ready for JSON; a user's support is saved as its packed matrix."""
        return {
            "bits": self.bits,
            "omega": self.omega,
            "beta": self.beta,
            "length": self.length,
            "support": self._rule if isinstance(self.support, str) else {"matrix": self._rule},
        }

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, Any]) -> ConceptTask:
        """Return the task that `configuration()` describes.

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
        # The numbers first: the size of the support depends on them.
        numbers = cls(**{name: configuration[name] for name in _NUMBERS})
        support = configuration["support"]
        if isinstance(support, Mapping):
            support = _unpacked(support.get("matrix", ""), numbers.bits)
        return replace(numbers, support=support)

    def _supports(self, rows: int | None = None) -> Bool[Tensor, "row vocab"]:
        """Return the matrix of a user's support; that of a named one, or its first rows."""
        if isinstance(self.support, Tensor):
            return self.support
        token = torch.arange(self.vocab)
        difference = token[:rows, None] ^ token
        return SUPPORTS[self.support_name](difference, self.bits) & (difference != 0)

    def _informative(self, neighbours: Tensor) -> Tensor:
        """Return the first rows of pi, one per row of `neighbours`."""
        token = torch.arange(self.vocab)
        distances = hypercube.weight(token[: len(neighbours), None] ^ token, self.bits)
        # A softmax, so that a tiny beta does not underflow to an empty row.
        scores = (-distances.double() / self.beta).masked_fill(~neighbours, -torch.inf)
        return scores.softmax(1)

    def _tokens(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the tokens of labels [batch, 1 or length]: from p, the last token from pi."""
        table = self._table(generator.device)
        row = torch.zeros(1, self.length, dtype=torch.int64, device=generator.device)
        row[:, -1] = table.rows // 2
        shape = (len(labels), self.length)
        if table.rows == 2:  # the distribution of `token xor label` is the same for all labels
            return (table.draw(shape, generator, row=row) ^ labels.to(torch.int32)).long()
        return table.draw(shape, generator, row=row + labels).long()

    def _table(self, device: torch.device) -> AliasTable:
        """Return the table on a device, made on first use and kept."""
        if device not in self._tables:
            neighbours, token = self._supports(rows=1), torch.arange(self.vocab)
            # Whether membership of b in N(a) depends on a xor b alone.
            if torch.equal(neighbours, neighbours[0][token[: len(neighbours), None] ^ token]):
                neighbours = neighbours[:1]
            informative = self._informative(neighbours)
            noisy = self.omega * informative + (1 - self.omega) / self.vocab
            self._tables[device] = AliasTable.build(torch.cat([noisy, informative])).to(device)
        return self._tables[device]


def token_counts(
    tokens: Int[Tensor, "batch pos"], vocab: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch vocab"]:
    """Return how often each token occurs in each context: all that uniform attention sees."""
    counts = torch.zeros(len(tokens), vocab, dtype=dtype, device=tokens.device)
    one = torch.ones((), dtype=dtype, device=tokens.device)
    return counts.scatter_add_(1, tokens.long(), one.expand(tokens.shape))


def check_tokens(what: str, tokens: Int[Tensor, "*axes"], vocab: int) -> None:
    """Refuse token ids that a model or rule with `vocab` tokens does not have.

    Raises:
        InputError: An id is below 0 or too large.
    """
    # A negative id would silently count from the end of a table.
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise InputError(
            f"{what}: token ids run from {int(tokens.min())} to {int(tokens.max())}; it knows "
            f"0 to {vocab - 1}."
        )


def _check_draw(batch: int, generator: torch.Generator, device: torch.device | str | None) -> None:
    whole_number("batch", batch, least=1)
    expected, actual = torch.device(device or generator.device), generator.device
    if expected.type != actual.type or expected.index not in (None, actual.index):
        raise InputError(
            f"the contexts should be on {str(expected)!r}, and the generator is on "
            f"{str(actual)!r}. Pass torch.Generator({str(expected)!r})."
        )


def _evaluated(support: Support, bits: int) -> Bool[Tensor, "vocab vocab"]:
    """Return the matrix of a user's support, without the diagonal, on the CPU."""
    vocab = 1 << bits
    token = torch.arange(vocab)
    fits = [(vocab, vocab)]
    if isinstance(support, Tensor):
        what, matrix = "matrix", support
    elif callable(support):
        what, matrix = "rule's answer for all pairs", support(token[:, None], token[None])
        fits += [(vocab, 1), (1, vocab)]  # a rule may ignore a or b
    else:
        raise InputError(
            f"a support is {', '.join(SUPPORTS)}, a rule (a, b) -> b in N(a) or a boolean matrix, "
            f"not {shown(support)}."
        )
    if not (isinstance(matrix, Tensor) and matrix.dtype == torch.bool):
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InputError(
            f"the {what} of the support must be a tensor of booleans, got {kind}: entry (a, b) "
            "says whether b is in N(a)."
        )
    if tuple(matrix.shape) not in fits:
        raise InputError(
            f"the {what} of the support must have the shape [{vocab}, {vocab}] (2^bits tokens), "
            f"got {list(matrix.shape)}."
        )
    return matrix.detach().cpu().expand(vocab, vocab) & (token[:, None] != token)


def _packed(matrix: Bool[Tensor, "vocab vocab"]) -> str:
    """Return the matrix as text: bits, zlib, base64."""
    return base64.b64encode(zlib.compress(np.packbits(matrix.numpy()).tobytes(), 9)).decode("ascii")


def _unpacked(text: str, bits: int) -> Bool[Tensor, "vocab vocab"]:
    """Return the matrix of a text that `_packed` made."""
    vocab = 1 << bits
    try:
        packed = zlib.decompress(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise InputError(
            f"the support matrix of a saved concept task cannot be read: {error!r}. Save the task "
            "again with configuration()."
        ) from error
    size = -(-vocab * vocab // 8)
    if len(packed) != size:
        raise InputError(
            f"the support matrix of a saved concept task has {len(packed)} bytes; bits={bits} "
            f"needs {size}. Were the bits changed by hand?"
        )
    flat = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=vocab * vocab)
    return torch.from_numpy(flat.astype(bool)).view(vocab, vocab)


TaskRecord: TypeAlias = Annotated[
    ConceptTask,
    PlainValidator(ConceptTask.from_configuration),
    PlainSerializer(ConceptTask.configuration),
]
"""A task as a field of a result or of its settings."""
