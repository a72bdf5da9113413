"""Associative memories by construction, in place of a value matrix or OV circuit.

On the one-layer model this is equation 5.1 for a task. On a language model it is the same sum over
pairs of associated tokens (cue, answer):

    M = sum over pairs of outer(x(cue), u(answer))                       [d_model, d_model]

- x(cue) is the input of W_V if the residual stream is the embedding of the cue alone: W_E(cue)
  through the norm before attention, with its weight and bias. Positions are left out.
- u(answer) is the direction of the attention output that raises the answer's logit: the column of
  W_U times the weights of the final norm and, for Gemma-2 and -3, of the norm after attention;
  centred if these are layer norms. The scales of the norms and the soft cap change the size of the
  effect but not its sign.

M itself replaces an OV circuit. A W_V reaches the output only through W_O of the query heads that
read it, so it is replaced by the matrix whose circuits are nearest to M:

    W_V = argmin sum over heads h of ||W_V W_O(h) - M||^2 = [M ... M] pinv[W_O(1) ... W_O(g)]

On the one-layer model this is equation 5.1. The scale is arbitrary: `matched(associations(pairs))`
has the norm of the matrix that it replaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer import memory as concept_memory
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import hash_of
from hijacklens.sites import head_count
from probes.values.matrices import kv_head_of, norm_affine, output_matrix
from probes.values.replacements import MatrixSite, Replacement


def memory(task: ConceptTask) -> Replacement:
    """The memory of equation 5.1 from the embeddings of the one-layer model, unscaled.

    A scale changes the loss of that model but not its answers; `matched(memory(task))` has the
    norm of the W_V that it replaces, like `constructed_accuracy` in training results.

    Raises:
        InputError: When the probe is put on a model: it is not a one-layer model, its vocabulary
            is not that of the task, or the task has no neighbours at Hamming distance 1.
    """
    near = task.neighbours() & (task.hamming() == 1)
    return Replacement(f"memory({hash_of(near)})", partial(_memory, task))


def associations(pairs: Iterable[tuple[int, int]]) -> Replacement:
    """The memory of pairs of token ids (cue, answer); the module has its formula.

    Args:
        pairs: Token ids. A pair that is listed twice counts twice.

    Raises:
        InputError: There is no pair, or an item is not a pair of token ids; when the probe is put
            on a model, also if its vocabulary lacks a token id.

    Example:
        >>> from hijacklens.one_layer.architecture import OneLayerConfig
        >>> from probes.values.replacements import MatrixSite
        >>> model = OneLayerTransformer(OneLayerConfig(vocab=4, d_model=4, length=8))
        >>> new = associations([(0, 1)]).matrix(MatrixSite(model, 0, 0, "value"))
        >>> torch.allclose(new, torch.outer(model.W_E[0], model.W_E[1]), atol=1e-5)
        True
    """
    listed = [tuple(pair) for pair in pairs]
    if not listed or not all(len(p) == 2 and all(isinstance(i, int) for i in p) for p in listed):
        raise InputError(
            f"associations are pairs of token ids (cue, answer), at least one; got {listed[:3]}. "
            "Make ids with the tokenizer of the model."
        )
    ids = torch.tensor(listed)
    return Replacement(f"associations({len(listed)} pairs,{hash_of(ids)})", partial(_pairs, ids))


def _memory(task: ConceptTask, site: MatrixSite) -> Tensor:
    if not isinstance(site.model, OneLayerTransformer):
        raise InputError(
            "memory(task) is equation 5.1 for the one-layer model; for a language model name the "
            "pairs of associated tokens: associations(pairs)."
        )
    return concept_memory.constructed(site.model.W_E, task)


def _pairs(pairs: Tensor, site: MatrixSite) -> Tensor:
    model: Any = site.model
    vocab = int(model.cfg.d_vocab)
    if int(pairs.min()) < 0 or int(pairs.max()) >= vocab:
        raise InputError(
            f"associations name the token ids {int(pairs.min())} to {int(pairs.max())}; this "
            f"model knows 0 to {vocab - 1}."
        )
    device = site.current.device
    cues = _cues(site, pairs[:, 0]).to(device)  # [pair, d_model]
    answers = _answers(site, pairs[:, 1]).to(device)
    if site.kind == "circuit":
        return cues.mT @ answers
    outputs = torch.cat(
        [
            output_matrix(model, site.layer, head).to(device, torch.float32)
            for head in range(head_count(model, "head"))
            if kv_head_of(model, head) == site.head
        ],
        dim=1,
    )
    # All blocks of [M ... M] are equal, so the blocks of the pseudoinverse can be summed first.
    blocks = rearrange(torch.linalg.pinv(outputs), "(h m) e -> h m e", m=answers.shape[1])
    return cues.mT @ (answers @ reduce(blocks, "h m e -> m e", "sum"))


def _cues(site: MatrixSite, tokens: Tensor) -> Tensor:
    """Return the input of W_V if the residual stream is an embedding."""
    model: Any = site.model
    x = model.W_E.detach()[tokens.to(model.W_E.device)].float()
    kind = str(model.cfg.normalization_type)
    if kind.startswith("LN"):
        x = x - x.mean(-1, keepdim=True)
    if kind.startswith(("LN", "RMS")):
        x = x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    weight, bias = norm_affine(model, getattr(model.blocks[site.layer], "ln1", None))
    return x * weight.to(x) + bias.to(x)


def _answers(site: MatrixSite, tokens: Tensor) -> Tensor:
    """Return the directions of the attention output that raise the logits of tokens."""
    model: Any = site.model
    centred = str(model.cfg.normalization_type).startswith("LN")
    direction = model.W_U.detach().mT[tokens.to(model.W_U.device)].float()
    for norm in (
        getattr(model, "ln_final", None),
        getattr(model.blocks[site.layer], "ln1_post", None),
    ):
        if norm is not None:
            weight, _ = norm_affine(model, norm)
            direction = direction * weight.to(direction)
            if centred:
                direction = direction - direction.mean(-1, keepdim=True)
    return direction
