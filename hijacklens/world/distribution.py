"""The distribution of the documents of a pocket world: samples, and exact probabilities.

`Documents` draws many documents at a time in NumPy alone. Every batch has its own seed, so that a
training resumes at any step without the state of a random generator.

`Reader` is an ideal reader. Given the topic, sentences that repeat none are independent, so that
the probability of a text is a sum over topics; a name has few subjects, so that it costs little.

>>> reader = Reader(World(bits=2, subjects=4))
>>> reader.posterior("People talk about Baland and Baland. Think of").round(2)
array([0.25, 0.25, 0.25, 0.25])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hijacklens.errors import InputError, choice
from hijacklens.world.world import SLOTS, Frame, World

GAP = -1
"""Marks the end of a shorter sentence; the codes of names and slots are below it."""


class Documents:
    """The stream of documents of a world: `batch(i, n)` depends on world, seed, i and n alone."""

    def __init__(self, world: World, *, seed: int = 0) -> None:
        """Take a world and the seed of the stream."""
        self.world, self.seed = world, seed
        codes = ["gap", *(f"{{}}{i}" for i in range(world.name_words)), *SLOTS]
        rows = [_expanded(frame.words, world.name_words) for frame in world.frames]
        self._frames = np.full((len(rows), max(map(len, rows))), GAP)
        for i, row in enumerate(rows):
            ids = [-1 - codes.index(w) if w.startswith("{") else world.ids[w] for w in row]
            self._frames[i, : len(row)] = ids
        self._names = np.array([[world.ids[word] for word in name] for name in world.names])
        words = (world.objects, world.near_words)
        self._objects = np.array([[world.ids[word] for word in each] for each in words])
        # Per relation: subjects in the order of their objects, with cumulative probabilities to
        # which the number of the object is added.
        self._order = np.argsort(world.homes, axis=1, kind="stable")
        self._below = np.take_along_axis(world.homes, self._order, 1).astype(float)
        for below, order, given in zip(self._below, self._order, world.given_home, strict=True):
            for home in range(world.n_objects):
                below[below.astype(int) == home] += np.cumsum(
                    np.append(0, given[order[below.astype(int) == home]])
                )[:-1]

    def batch(self, index: int, count: int) -> Int[np.ndarray, "count length"]:
        """Return documents as token ids.

        Cost: about 1 s for 10,000 documents of 48 tokens.
        """
        world, rng = self.world, np.random.default_rng([self.seed, index, 3])
        shortest = int((self._frames != GAP).sum(1).min())
        size = (count, -(-world.length // shortest))
        frame = rng.choice(len(world.frames), size, p=[frame.probability for frame in world.frames])
        topic = np.broadcast_to(rng.integers(0, world.n_objects, (count, 1)), size)

        def anything() -> Any:
            return rng.integers(0, world.n_objects, size)

        def happens(probability: float) -> Any:
            return rng.random(size) < probability

        subject_of = np.where(happens(world.sharing), topic, anything())
        home = self._near(rng, subject_of)
        relations = np.array([frame.relation or 0 for frame in world.frames])[frame]
        subject = self._subject(relations, home, rng.random(size))
        stated = np.where(happens(world.contradictions), self._near(rng, subject_of), home)
        denied = np.where(happens(world.negation_topic), self._near(rng, topic), anything())
        talked = [
            self._objects[happens(world.near_fraction).astype(int), self._near(rng, topic)]
            for _ in range(2)
        ]
        plain = self._objects[0]
        slots = [plain[stated], *talked, plain[denied], plain[anything()]]
        names = np.moveaxis(self._names[subject], -1, 0)
        values = np.stack([np.full(size, GAP), *names, *slots], -1)
        codes = self._frames[frame]
        filled = np.take_along_axis(values, np.where(codes < 0, -1 - codes, 0), -1)
        sentences = np.where(codes < 0, filled, codes)
        copied, earlier = happens(world.repetition), rng.random(size)
        for k in range(1, size[1]):
            rows = np.flatnonzero(copied[:, k])
            sentences[rows, k] = sentences[rows, (earlier[rows, k] * k).astype(int)]
        flat = sentences.reshape(count, -1)
        order = np.argsort(flat == GAP, axis=1, kind="stable")  # gaps to the end
        return np.take_along_axis(flat, order[:, : world.length], 1)

    def _near(self, rng: np.random.Generator, topic: Any) -> Any:
        """Draw objects by topics: every bit flips with the probability of one step away."""
        flip = 1 / (1 + np.exp(1 / self.world.beta))
        for bit in range(self.world.bits):
            topic = topic ^ ((rng.random(topic.shape) < flip).astype(int) << bit)
        return topic

    def _subject(self, relation: Any, home: Any, uniform: Any) -> Any:
        """Draw subjects whose object in a relation is `home`."""
        drawn = np.zeros_like(home)
        for r, (order, below) in enumerate(zip(self._order, self._below, strict=True)):
            here = relation == r
            place = np.searchsorted(below, home[here] + uniform[here], side="right") - 1
            drawn[here] = order[place]
        return drawn


def _expanded(words: tuple[str, ...], name_words: int) -> list[str]:
    """Return the words with a marker per word of a name."""
    name = [f"{{}}{i}" for i in range(name_words)]
    return [part for word in words for part in (name if word == "{}" else [word])]


class Reader:
    """An ideal reader of a world.

    A reader who knows the facts answers with the true object and the rate of contradictions. A
    reader who does not know them has the context alone, so that its shift is the log-likelihood
    ratio of the context: the shift of any reader that weighs the context with any prior.
    """

    def __init__(self, world: World, *, knows: bool = True) -> None:
        """Take a world, and whether the reader knows the true objects of its subjects."""
        self.world, self.knows = world, knows
        self._kinds = [(f, tuple(world.ids.get(w, w) for w in f.words)) for f in world.frames]
        self._objects = {world.ids[word]: i for i, word in enumerate(world.objects)}
        self._near = {world.ids[word]: i for i, word in enumerate(world.near_words)}
        names = [tuple(world.ids[word] for word in name) for name in world.names]
        self._subjects = {
            name[:end]: np.array([], int) for name in names for end in range(len(name) + 1)
        }
        begins: dict[tuple[int, ...], list[int]] = {start: [] for start in self._subjects}
        for s, name in enumerate(names):
            for end in range(len(name) + 1):
                begins[name[:end]].append(s)
        self._subjects = {start: np.array(found) for start, found in begins.items()}
        self._fresh = lru_cache(maxsize=100_000)(self._fresh_sentence)

    def log_probability(self, continuation: str, after: str = "") -> float:
        """Return the log-probability of a continuation of a document, in nats.

        Raises:
            InputError: A word is unknown, or no document of the world begins with `after`.
        """
        start = self.world.tokens(after)
        return self._log(start + self.world.tokens(continuation)) - self._possible(start, after)

    def posterior(self, prompt: str) -> Float[np.ndarray, " object"]:
        """Return the probability of each object as the next word; 0 where no object can follow.

        Raises:
            InputError: A word is unknown, or no document of the world begins with the prompt.
        """
        start = self.world.tokens(prompt)
        before = self._possible(start, prompt)
        return np.exp([self._log([*start, token]) - before for token in self._objects])

    def margin(self, prompt: str, true: str, false: str) -> float:
        """Return log p(false) - log p(true) after a prompt, in nats.

        Raises:
            InputError: As `posterior`, or a target is no object.
        """
        start = self.world.tokens(prompt)
        self._possible(start, prompt)
        false_log, true_log = (
            self._log([*start, self.world.ids[choice("object", o, self.world.objects)]])
            for o in (false, true)
        )
        return false_log - true_log

    def document_log_probability(self, tokens: Sequence[int]) -> float:
        """Return the log-probability that a document begins with these token ids, in nats."""
        return self._log([int(token) for token in tokens])

    def _possible(self, tokens: list[int], text: str) -> float:
        log = self._log(tokens)
        if log == -np.inf:
            raise InputError(
                f"no document of this world begins with {text!r}; give sentences of its kinds, "
                f"such as {' '.join(self.world.frames[-1].words)!r}."
            )
        return log

    def _log(self, tokens: list[int]) -> float:
        """Return the log-probability of the beginning of a document."""
        stop, repetition = self.world.ids["."], self.world.repetition
        by_topic = np.zeros(self.world.n_objects)
        done: list[tuple[int, ...]] = []
        while tokens:
            end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
            words, tokens = tuple(tokens[:end]), tokens[end:]
            probability = self._fresh(words)
            if done:
                again = np.mean([earlier[: len(words)] == words for earlier in done])
                probability = (1 - repetition) * probability + repetition * again
            with np.errstate(divide="ignore"):
                by_topic = by_topic + np.log(probability)
            done.append(words)
        return float(np.logaddexp.reduce(by_topic) - np.log(len(by_topic)))

    def _fresh_sentence(self, words: tuple[int, ...]) -> Float[np.ndarray, " topic"]:
        """Return the probability, by topic, that a sentence which repeats none begins so."""
        total = np.zeros(self.world.n_objects)
        for frame, kind in self._kinds:
            if frame.probability:
                given = self._fact if frame.relation is not None else self._other
                total += frame.probability * given(frame, kind, words)
        return total

    def _other(
        self, frame: Frame, kind: tuple, words: tuple[int, ...]
    ) -> Float[np.ndarray, " topic"]:
        """Return the probability of words in a sentence without a subject."""
        world, nothing = self.world, np.zeros(self.world.n_objects)
        total = np.ones(world.n_objects)
        if len(words) > len(kind):
            return nothing
        for word, slot in zip(words, kind, strict=False):
            plain, near = self._objects.get(word), self._near.get(word)
            if not isinstance(slot, str):
                if slot != word:
                    return nothing
            elif slot in ("{first}", "{second}") and near is not None:
                total = total * world.near_fraction * world.related[:, near]
            elif plain is None:
                return nothing
            elif slot in ("{first}", "{second}"):
                total = total * (1 - world.near_fraction) * world.related[:, plain]
            else:
                topical = world.negation_topic if slot == "{denied}" else 0.0
                any_object = (1 - topical) / world.n_objects
                total = total * (topical * world.related[:, plain] + any_object)
        return total

    def _fact(
        self, frame: Frame, kind: tuple, words: tuple[int, ...]
    ) -> Float[np.ndarray, " topic"]:
        """Return the probability of words in a fact, summed over its possible subjects."""
        world, nothing = self.world, np.zeros(self.world.n_objects)
        subjects = self._subjects.get(words[: world.name_words])
        rest = kind[1:-2]
        named = words[world.name_words : world.name_words + len(rest)]
        after = words[world.name_words + len(rest) :]
        if subjects is None or named != rest[: len(named)] or after[1:] not in ((), kind[-1:]):
            return nothing
        stated = self._objects.get(after[0]) if after else None
        if after and stated is None:
            return nothing
        if self.knows:
            home = world.homes[frame.relation, subjects]
            by_subject = world.related[:, home] * world.given_home[frame.relation, subjects]
            if stated is not None:
                false = world.contradictions * world.related[:, [stated]]
                by_subject = by_subject * ((1 - world.contradictions) * (home == stated) + false)
            by_topic = by_subject.sum(1)
        else:
            by_topic = np.full(world.n_objects, world.frequency[subjects].sum())
            if stated is not None:
                by_topic = by_topic * world.related[:, stated]
        return world.sharing * by_topic + (1 - world.sharing) * by_topic.mean()
