"""Planted circuits: models of a pocket world whose hijack is set by hand, with the truth on record.

    mention heads   attend to objects and add each to the answer: they carry the hijack
    memory          the MLP of the first layer, which turns a name into a code of its true object
    recall head     attends to names and turns that code into the answer
    relay, reader   with `chain`, a hijack in two steps: the relay writes a code of the objects that
                    it sees, and the reader of a later layer turns the code into the answer
    noise heads     all others: random attention and random outputs

The model is a plain GPT-2 with embeddings that are orthogonal to one another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hijacklens.errors import InputError, number, whole_number
from hijacklens.world.training import tokenizer
from hijacklens.world.world import World

Head = tuple[int, int]
"""Layer and head."""
HEAD_WIDTH = 32
FOCUS = 8.0
"""The score by which a planted head prefers what it attends to."""
CONSTANT = 5.0
"""The length of a part of the stream that all positions have, so that a norm divides by nearly the
same number everywhere; without it, heads would weaken one another through the norms."""
SCALE = 4.0
"""What a mention head adds to the logit of an object, if it attends to that object alone."""


@dataclass(frozen=True, slots=True)
class PlantedCircuit:
    """A model and the truth about it."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    world: World
    mention: tuple[Head, ...]
    """The heads that write mentioned objects into the answer; with `chain`, also its reader."""
    relay: tuple[Head, ...]
    """The heads without which a reader has nothing to read."""
    recall: Head
    """The head that moves what the memory knows to the answer."""
    memory: int
    """The layer whose MLP is the memory."""

    @property
    def carriers(self) -> frozenset[Head]:
        """All heads that the hijack needs."""
        return frozenset((*self.mention, *self.relay))

    def precision(self, found: Iterable[Head]) -> float:
        """Return the fraction of the found heads that carry the hijack."""
        heads = frozenset(found)
        return len(heads & self.carriers) / max(len(heads), 1)

    def recalled(self, found: Iterable[Head]) -> float:
        """Return the fraction of the heads that carry the hijack which are found."""
        return len(frozenset(found) & self.carriers) / len(self.carriers)


def plant(
    world: World,
    *,
    layers: int = 4,
    heads: int = 6,
    mention: int = 3,
    chain: bool = False,
    noise: float = 0.3,
    seed: int = 0,
) -> PlantedCircuit:
    """Set a model by hand; which heads have which role is drawn by the seed.

    Args:
        world: A small world with names of one word.
        layers: At least 2.
        heads: Heads of each layer, of width 32.
        mention: Number of heads that each carry a part of the hijack.
        chain: Also plant a relay and a reader, a hijack in two steps.
        noise: Size of what a noise head writes, compared with a mention head.
        seed: Seeds the roles, the directions and the noise.

    Raises:
        InputError: The names have several words, a number is out of range, or the model is too
            small for the words of the world.
    """
    whole_number("layers", layers, least=2)
    whole_number("mention", mention, least=1, most=layers * heads - 3)
    number("noise", noise, least=0)
    if world.name_words != 1:
        raise InputError(f"name_words is {world.name_words}; a planted memory reads one word.")
    n, words, width = world.n_objects, len(world.vocabulary), heads * HEAD_WIDTH
    if words + 3 * n > width - 2 or n > HEAD_WIDTH - 1:
        raise InputError(
            f"heads is {heads}, a width of {width}; a world of {words} words and {n} objects needs "
            f"at least {words + 3 * n + 2}, and at most {HEAD_WIDTH - 1} objects. Give more heads "
            "or a smaller world."
        )
    generator = torch.Generator().manual_seed(whole_number("seed", seed))
    rng = np.random.default_rng([seed, 4])
    config = GPT2Config(
        vocab_size=words, n_positions=world.length, n_embd=width, n_layer=layers, n_head=heads,
        n_inner=world.subjects, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).eval()
    basis = torch.randn(width, width, generator=generator)
    basis[:, 0] = 1  # no direction has a mean, which norms would remove
    basis = torch.linalg.qr(basis).Q.T[1:]
    embed, (answer, home_code, seen_code) = basis[:words], basis[words : words + 3 * n].split(n)
    objects = embed[[world.ids[word] for word in world.objects]]
    names = embed[[world.ids[name] for (name,) in world.names]]
    everywhere = embed.sum(0, keepdim=True)
    sites = [(layer, head) for layer in range(layers) for head in range(heads)]
    # What reads a code is in a later layer than what writes it.
    relay = [(0, int(rng.integers(heads)))] if chain else []
    later = [site for site in sites if site[0] > 0]
    reader, recall = (later[i] for i in rng.choice(len(later), 2, replace=False))
    taken = {recall, *relay, *([reader] if chain else [])}
    free = [site for site in sites if site not in taken]
    direct = [free[i] for i in rng.choice(len(free), mention, replace=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.shape[0] != width:
                parameter.zero_()
        model.transformer.wte.weight.copy_(embed)
        model.transformer.wpe.weight.copy_(CONSTANT * basis[-1])
        model.lm_head.weight[[world.ids[word] for word in world.objects]] = (
            SCALE * _length(width) * answer
        )
        plan = {
            **dict.fromkeys(direct, (objects, objects, answer, 1.0)),
            **dict.fromkeys(relay, (objects, objects, seen_code, 1.0)),
            **({reader: (everywhere, seen_code, answer, 1.0)} if chain else {}),
            recall: (names, home_code, answer, 3.0),
        }
        for (layer, head), (keys, reads, writes, strength) in plan.items():
            _set_head(model.transformer.h[layer].attn, head, keys, reads, strength * writes)
        for layer, head in sites:
            if (layer, head) not in plan:
                _set_noise(model.transformer.h[layer].attn, head, noise, generator)
        memory = model.transformer.h[0].mlp
        # A neuron per subject, which is far above zero at its name and far below elsewhere.
        memory.c_fc.weight.copy_(2 * FOCUS * _length(width) * names.T)
        memory.c_fc.bias.fill_(-FOCUS)
        homes = torch.from_numpy(world.homes[0])
        memory.c_proj.weight.copy_(home_code[homes] / FOCUS)
    return PlantedCircuit(
        model, tokenizer(world), world, (*direct, *([reader] if chain else [])), tuple(relay),
        recall, 0,
    )  # fmt: skip


def _length(width: int) -> float:
    """Return the length, before a norm, of what has length 1 after it."""
    return (1 + CONSTANT**2) ** 0.5 / width**0.5


def _set_head(attention: Any, head: int, keys: Tensor, reads: Tensor, writes: Tensor) -> None:
    """Let a head attend to tokens along `keys`, and turn each of `reads` into one of `writes`."""
    width, own = attention.embed_dim, slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    _, key, value = attention.c_attn.weight.split(width, 1)
    attention.c_attn.bias[:width][own][-1] = FOCUS * HEAD_WIDTH**0.5
    key[:, own][:, -1] = _length(width) * keys.sum(0)
    value[:, own][:, : len(reads)] = _length(width) * reads.T
    attention.c_proj.weight[own][: len(writes)] = writes


def _set_noise(attention: Any, head: int, noise: float, generator: torch.Generator) -> None:
    """Give a head random attention and random outputs."""
    width, own = attention.embed_dim, slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    for part in attention.c_attn.weight.split(width, 1):
        drawn = torch.randn(width, HEAD_WIDTH, generator=generator)
        part[:, own] = drawn / width**0.5
    drawn = torch.randn(HEAD_WIDTH, width, generator=generator)
    attention.c_proj.weight[own] = noise * drawn / HEAD_WIDTH**0.5 / width**0.5
