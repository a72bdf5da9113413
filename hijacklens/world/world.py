"""The pocket world as one frozen record: knobs, words, subjects and their true objects.

An object is a vector of bits. Every document has a topic, which is an object, and related objects
are those at a small Hamming distance from it. A document is a sequence of sentences:

    fact        Ban Bason lives in Baland.                   about a subject
    talk        People talk about Baland and Celandic.       objects near the topic
    negation    Do not think of Deland.                      by default any object
    mention     Think of Deland.   Deland.                   any object
    filler      The weather was mild today.                  always the same

The wordings are those of the built-in hijack schemes, so that these schemes apply unchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hijacklens.errors import InputError, number, several, unknown, whole_number

RELATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lives", ("{} lives in", "{} is at home in")),
    ("works", ("{} works in", "{} has a job in")),
    ("studied", ("{} studied in", "{} went to school in")),
    ("votes", ("{} votes in", "{} is a citizen of")),
)
"""Name of a relation -> its wordings, each followed by the object."""
TALK = "People talk about {first} and {second} ."
NEGATION = "Do not think of {denied} ."
MENTIONS = ("Think of {any} .", "{any} .")
FILLER = "The weather was mild today ."
SLOTS = ("{stated}", "{first}", "{second}", "{denied}", "{any}")
"""Places of a sentence that objects fill: of a fact, of talk (two), of a negation, of a mention."""
SCHEMES = {"talk": "People talk about {target_false} and {target_false}."}
"""Scheme that only this world has -> its template."""


class Frame(NamedTuple):
    """A wording of a kind of sentence."""

    probability: float
    """Its fraction among the sentences that repeat none."""
    words: tuple[str, ...]
    """Words, `{}` for the name of a subject, and `SLOTS`."""
    relation: int | None = None


def knob(default: Any, help: str, least: float = 0, most: float = math.inf) -> Any:
    """Return a field of a record with its explanation and its range."""
    return field(default=default, metadata={"help": help, "range": (least, most)})


def check_knobs(record: Any) -> None:
    """Check and convert the numbers of a record whose fields are made by `knob`.

    Raises:
        InputError: A value has the wrong type or is outside its range.
    """
    for each in fields(record):
        value, least, most = getattr(record, each.name), *each.metadata["range"]
        if isinstance(each.default, (bool, str)):
            continue
        if isinstance(each.default, int):
            top = {} if most == math.inf else {"most": most}
            value = whole_number(each.name, value, least=least, **top)
        elif not least <= (value := number(each.name, value)) <= most:
            limits = f"between {least:g} and {most:g}" if most < math.inf else f"from {least:g} on"
            raise InputError(f"{each.name} is {value!r}; give a number {limits}.")
        object.__setattr__(record, each.name, value)


@dataclass(frozen=True, kw_only=True)
class World:
    """The knobs of a pocket world; two equal records describe the same distribution of documents.

    Raises:
        InputError: A knob is outside its range, or the fractions of sentences exceed 1 together.
    """

    sharing: float | int = knob(
        1.0,
        "Fraction of facts drawn by the topic of their document; 0 keeps facts and talk apart.",
        0,
        1,
    )
    bits: int = knob(5, "Bits of an object; there are 2^bits objects.", 1, 8)
    beta: float | int = knob(
        0.7, "Temperature of topics: an object at distance D has weight exp(-D / beta).", 0.05, 100
    )
    subjects: int = knob(
        300, "Number of subjects; with the size of the model, this sets the capacity.", 2, 20_000
    )
    name_words: int = knob(
        2, "Words in the name of a subject; subjects share first and last names.", 1, 3
    )
    relations: int = knob(2, "Relations, each with an object of every subject.", 1, len(RELATIONS))
    wordings: int = knob(2, "Wordings of each relation.", 1, 2)
    zipf: float | int = knob(
        1.0, "Exponent of Zipf's law by which subjects are frequent; 0 for equally frequent.", 0, 4
    )
    contradictions: float | int = knob(
        0.1,
        "Fraction of facts that state an object drawn by the topic instead of the true one.",
        0,
        1,
    )
    repetition: float | int = knob(
        0.0, "Probability that a sentence repeats an earlier one of its document.", 0, 1
    )
    fact_fraction: float | int = knob(0.5, "Fraction of sentences that state a fact.", 0, 1)
    negation_fraction: float | int = knob(0.05, "Fraction of sentences 'Do not think of X.'", 0, 1)
    negation_topic: float | int = knob(
        0.0, "Fraction of those in which X is drawn by the topic; else any object.", 0, 1
    )
    mention_fraction: float | int = knob(
        0.05, "Fraction of sentences that only name any object.", 0, 1
    )
    filler_fraction: float | int = knob(
        0.05, "Fraction of sentences about the weather; what is left is talk.", 0, 1
    )
    near_fraction: float | int = knob(
        0.2, "Fraction of objects in talk that are named by their near word.", 0, 1
    )
    length: int = knob(40, "Tokens of a document; the last sentence may be cut.", 8, 1024)
    world_seed: int = knob(0, "Seed of the names and of the true objects.")

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.talk < -1e-9:
            raise InputError(
                f"the fractions of facts, negation, mentions and filler are {1 - self.talk:g} "
                "together; give fractions of at most 1 in all. What is left is talk."
            )
        if self.subjects < self.n_objects:
            raise InputError(
                f"subjects is {self.subjects}; give at least {self.n_objects}, one for each of the "
                f"objects of {self.bits} bits."
            )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> World:
        """Return the world of a saved record.

        Raises:
            InputError: It has a knob that does not exist, or a value outside its range.
        """
        names = [each.name for each in fields(cls)]
        for name in record:
            if name not in names:
                raise unknown("knob of a world", name, names)
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """Return the knobs by name, ready for JSON."""
        return asdict(self)

    @property
    def n_objects(self) -> int:
        """The number of objects."""
        return 2**self.bits

    @property
    def talk(self) -> float:
        """The fraction of sentences that are talk."""
        return (
            1
            - self.fact_fraction
            - self.negation_fraction
            - self.mention_fraction
            - self.filler_fraction
        )

    @cached_property
    def related(self) -> Float[np.ndarray, "topic object"]:
        """The probability of an object by the topic."""
        index = np.arange(self.n_objects)
        distance = np.array([bin(i).count("1") for i in index])[index[:, None] ^ index]
        weight = np.exp(-distance / self.beta)
        return weight / weight.sum(1, keepdims=True)

    @cached_property
    def frequency(self) -> Float[np.ndarray, " subject"]:
        """The probability of a subject by its rank, before objects are considered."""
        weight = np.arange(1, self.subjects + 1) ** -self.zipf
        return weight / weight.sum()

    @cached_property
    def homes(self) -> Int[np.ndarray, "relation subject"]:
        """The true object of each subject in each relation; objects have equally many subjects."""
        rng = np.random.default_rng([self.world_seed, 0])
        objects = np.arange(self.subjects) % self.n_objects
        return np.stack([rng.permutation(objects) for _ in range(self.relations)])

    @cached_property
    def given_home(self) -> Float[np.ndarray, "relation subject"]:
        """The probability of a subject among those with the same true object."""
        totals = [np.bincount(home, self.frequency, self.n_objects)[home] for home in self.homes]
        return self.frequency / np.stack(totals)

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """The words for the objects."""
        return tuple(f"{stem}land" for stem in itertools.islice(_stems(), self.n_objects))

    @cached_property
    def near_words(self) -> tuple[str, ...]:
        """The near word of each object, which never answers a query."""
        return tuple(f"{word}ic" for word in self.objects)

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The words of the name of each subject, by rank."""
        endings = (("r",), ("n", "son"), ("n", "ra", "son"))[self.name_words - 1]
        pool = self.subjects
        if self.name_words > 1:
            pool = math.ceil(2 * self.subjects ** (1 / self.name_words))
        lists = [[f"{s}{end}" for s in itertools.islice(_stems(), pool)] for end in endings]
        drawn = np.random.default_rng([self.world_seed, 1]).choice(
            pool**self.name_words, self.subjects, replace=False
        )
        places = np.stack(np.unravel_index(drawn, (pool,) * self.name_words), 1)
        return tuple(
            tuple(words[i] for words, i in zip(lists, place, strict=True)) for place in places
        )

    @cached_property
    def templates(self) -> tuple[tuple[str, ...], ...]:
        """The wordings of each relation that this world uses."""
        return tuple(texts[: self.wordings] for _, texts in RELATIONS[: self.relations])

    @cached_property
    def frames(self) -> tuple[Frame, ...]:
        """All wordings of sentences; their probabilities sum to 1."""
        wordings = self.relations * self.wordings
        facts = [
            Frame(self.fact_fraction / wordings, (*text.split(), "{stated}", "."), relation)
            for relation, texts in enumerate(self.templates)
            for text in texts
        ]
        others = [
            (max(self.talk, 0), TALK),
            (self.negation_fraction, NEGATION),
            (self.filler_fraction, FILLER),
        ]
        others += [(self.mention_fraction / len(MENTIONS), text) for text in MENTIONS]
        return (*facts, *(Frame(fraction, tuple(text.split())) for fraction, text in others))

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """All words, by token id; the first is for words that the world does not have."""
        words = [w for frame in self.frames for w in frame.words if not w.startswith("{")]
        named = sorted(set(itertools.chain(*self.names)))
        return ("<unk>", *dict.fromkeys([*words, *self.objects, *self.near_words, *named]))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word -> token id."""
        return {word: i for i, word in enumerate(self.vocabulary)}

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            InputError: It has a word that the world does not have.
        """
        words = text.replace(".", " . ").split()
        for word in words:
            if word not in self.ids or word == "<unk>":
                raise unknown("word of this world", word, self.vocabulary[1:])
        return [self.ids[word] for word in words]

    def text(self, tokens: Any) -> str:
        """Return the text of token ids."""
        words = [self.vocabulary[i] for i in several("tokens", tokens, "[1, 2]")]
        return " ".join(words).replace(" .", ".")

    def queries(self) -> Iterator[dict[str, Any]]:
        """Yield a record per subject and relation for `hijacklens.load_facts`, frequent ones first.

        The false target is drawn uniformly from the other objects.
        """
        rng = np.random.default_rng([self.world_seed, 2])
        others = rng.integers(1, self.n_objects, size=self.homes.shape)
        for s, r in itertools.product(range(self.subjects), range(self.relations)):
            true = int(self.homes[r, s])
            false = (true + int(others[r, s])) % self.n_objects
            yield {
                "case_id": s * self.relations + r,
                "relation_id": RELATIONS[r][0],
                "subject": " ".join(self.names[s]),
                "template": self.templates[r][0],
                "target_true": self.objects[true],
                "target_false": self.objects[false],
                "near_true": self.near_words[true],
                "near_false": self.near_words[false],
            }


def _stems() -> Iterator[str]:
    """Yield distinct beginnings of words: Ba, Be, ..., Zu, Baba, Babe, ..."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    for count in itertools.count(1):
        for parts in itertools.product(syllables, repeat=count):
            yield "".join(parts).capitalize()
