"""The memory fit: how well a W_V or an OV circuit is explained as an associative memory.

The paper reads a value matrix as a memory: equation 5.1 makes it a sum of outer products of the
embeddings of associated tokens. The fit measures how much of this is in any trained matrix: by the
cosine to the memory of given associations, by the fraction of its norm in their span, and by
whether its scores retrieve them. There are two controls: shuffled associations, and random
matrices with the same singular values (`outer_products`).

A model has vectors x (of a source token, read), y (of a target token, written) and a matrix W:

    one-layer model   x = y = W_E(t), W = W_V. The associated pairs are the Hamming-1 neighbours,
                      and M, the sum of the outer products, is the constructed memory of eq. 5.1.
    language model    those of the direct path (`DirectPath`). outer(x, y) is the gradient with
                      respect to W of what the head adds to the logit of the target when it attends
                      to the source alone.

Layers in the middle read the residual stream at that point, not an embedding: a small fit there is
no proof of absence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens.errors import InputError, choice
from hijacklens.models.exclusive import exclusive
from hijacklens.models.hooked import HookedModel, require_eval, vocabulary_of
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.progress import bar
from hijacklens.renamed import renamed
from hijacklens.results.result import Provenance
from hijacklens.sites import Heads, Layers, choose
from probes import named_models
from probes.anatomy import Anatomy, anatomy_of
from probes.anatomy.matrices import is_latent, ov_circuit
from probes.anatomy.norms import Norm, embedded, norm_at, norm_before_attention
from probes.memory_fit import associations
from probes.memory_fit.associations import Associations
from probes.memory_fit.outer_products import STATISTICS, Control, Factors, Memory, spectrum_length
from probes.memory_fit.result import COLUMNS, MemoryFit, MemoryFitSettings
from probes.named_models import Models

Scaling: TypeAlias = Literal["model", "unit"]
"""Vectors with their lengths in the model, or each scaled to length 1."""
BLOCK = 2**25
"""Maximum number of scores in memory: 256 MiB in float64."""
AT_ONCE = 32
"""Maximum number of matrices between two updates of the progress bar."""


@renamed(source="model")
def fit(
    model: Models,
    associated: Associations | ConceptTask | None = None,
    *,
    layers: Layers = None,
    heads: Heads = None,
    scaling: Scaling = "model",
    draws: int = 199,
    seed: int = 0,
    quiet: bool = False,
) -> MemoryFit:
    """Fit the memory of given associations to the W_V or the OV circuits of models.

    Args:
        model: One-layer models, language models, or a `TrainingResult`: see `probes.named_models`.
        associated: Pairs of tokens (`probes.memory_fit.associations`); a task, for its Hamming-1
            neighbours; None for the task of a `TrainingResult`.
        layers: Layers of a language model; None for all.
        heads: Query heads of these, or pairs (layer, head); None for all.
        scaling: `"model"`: vectors with their lengths in the model, as in equation 5.1;
            `"unit"`: each of length 1, so that all tokens have equal weight.
        draws: The number of shuffled associations, and of rotated matrices, for each matrix; the
            smallest p-value is 1 / (draws + 1).
        seed: Seed of the draws, which are the same for all models.
        quiet: Draw no progress bar.

    Raises:
        InputError: There are no associations, a model lacks one of the tokens, layers or heads,
            or a matrix is zero.

    Note:
        All 270 heads of a model of d_model 576 take 16 s on one core with 199 pairs and 99 draws;
        a one-layer model at m = 7 with 199 draws takes less than a second.
    """
    pairs = _associations(model, associated, scaling, draws)
    tables = []
    for name, item in named_models.named(model).items():
        if not isinstance(item, HookedModel):
            raise InputError(
                f"{name!r} is {type(item).__name__}, not a hooked model. Use fit_matrices for "
                "matrices with vectors of your own."
            )
        require_eval(item, operation="memory_fit.fit")
        path = DirectPath.of(item)
        memory = _memory(pairs, path.read, path.write, scaling)
        sites = choose(item, layers=layers, heads=heads).pairs
        matrices = ((name, *site, path.circuit(*site)) for site in sites)
        with bar(len(sites), unit="matrices", label=name, quiet=quiet) as progress:
            tables.append(_fit(memory, matrices, draws, seed, progress.update))
    return _result(tables, pairs, scaling, draws, seed)


def fit_matrices(
    matrices: Mapping[str, Tensor | FactoredMatrix],
    read: Float[Tensor, "source_token d_in"],
    write: Float[Tensor, "target_token d_out"],
    associated: Associations | ConceptTask,
    *,
    scaling: Scaling = "model",
    draws: int = 199,
    seed: int = 0,
) -> MemoryFit:
    """Fit matrices and token vectors of your own; `p_family` is over all the matrices.

    The matrices act on row vectors. `read` has a row x per token id, what a matrix reads; `write`
    a row y, the direction that it writes for a token. The other arguments are those of `fit`.

    Raises:
        InputError: As for `fit`, or the shapes do not match.
    """
    pairs = _associations(None, associated, scaling, draws)
    x, y = read.detach().cpu().double(), write.detach().cpu().double()
    for tokens, vectors in ((pairs.source, x), (pairs.target, y)):
        if max(tokens) >= len(vectors):
            raise InputError(
                f"the pairs name token {max(tokens)}, and vectors are given for tokens 0 to "
                f"{len(vectors) - 1}."
            )
    memory = _memory(pairs, lambda ids: x[list(ids)], lambda ids: y[list(ids)], scaling)

    def factors(name: str, item: Any) -> Factors:
        W = named_models.matrix(item, name=name)
        if W.shape != (x.shape[1], y.shape[1]):
            raise InputError(
                f"{name!r} is {list(W.shape)}; the vectors need {[x.shape[1], y.shape[1]]}."
            )
        return W, torch.eye(W.shape[1], dtype=W.dtype)

    listed = ((name, -1, -1, factors(name, W)) for name, W in named_models.named(matrices).items())
    return _result([_fit(memory, listed, draws, seed)], pairs, scaling, draws, seed)


def _associations(
    model: Models, associated: Associations | ConceptTask | None, scaling: str, draws: int
) -> Associations:
    """Return the associations; refuse settings that cannot be used."""
    choice("scaling", scaling, get_args(Scaling))
    if draws < 2:
        raise InputError(f"draws is {draws!r}; give at least 2, or there is no control.")
    if isinstance(associated, Associations):
        return associated
    task = named_models.task_of(model, associated)
    if task is None:
        raise InputError(
            "no associations are given: pass those of probes.memory_fit.associations (pairs, "
            "neighbours, of_facts), or a ConceptTask for its Hamming-1 neighbours."
        )
    return associations.neighbours(task)


def _memory(
    pairs: Associations,
    read: Callable[[Sequence[int]], Tensor],
    write: Callable[[Sequence[int]], Tensor],
    scaling: Scaling,
) -> Memory:
    """Return the vectors of the distinct tokens, and the two tokens of each pair."""
    from_tokens, source = np.unique(pairs.source, return_inverse=True)
    to_tokens, target = np.unique(pairs.target, return_inverse=True)
    x, y = read(from_tokens.tolist()), write(to_tokens.tolist())
    for tokens, vectors in ((from_tokens, x), (to_tokens, y)):
        length = torch.linalg.vector_norm(vectors, dim=1)
        usable = torch.isfinite(length) & (length > 0)
        if not usable.all():
            raise InputError(
                f"token {int(tokens[int((~usable).nonzero()[0, 0])])} has a vector of length 0 or "
                "with entries that are not finite; leave its pairs out."
            )
        if scaling == "unit":
            vectors /= length[:, None]
    return Memory(x, y, source, target)


def _fit(
    memory: Memory,
    matrices: Iterable[tuple[str, int, int, Factors]],
    draws: int,
    seed: int,
    advance: Callable[[float], Any] = lambda done: None,
) -> pd.DataFrame:
    """Return the rows of one family of matrices, computed in blocks that fit in memory."""
    shuffle = np.random.default_rng(seed)
    orders = [shuffle.permutation(len(memory.source)) for _ in range(draws)]
    size = max(1, min(AT_ONCE, BLOCK // (len(memory.source) * len(memory.write))))
    sites: list[tuple[str, int, int]] = []
    shuffled, rotated, frames = [], [], None
    numbered = enumerate(matrices)
    while block := list(islice(numbered, size)):
        factors = [matrix[-1] for _, matrix in block]
        for _, (name, layer, head, (A, B)) in block:
            where = f" (layer {layer}, head {head})" if layer >= 0 else ""
            if not (A.any() and B.any()):
                raise InputError(f"the matrix of {name!r}{where} is zero; nothing can explain it.")
            sites.append((name, layer, head))
        if frames is None:
            frames = memory.frames(spectrum_length(factors[0]), draws=draws, seed=seed)
        shuffled.append(memory.shuffled(factors, orders))
        advance(len(block) / 2)
        # Matrices of your own have no layer and head: their number identifies them.
        ids = [(layer, head) if layer >= 0 else (i, 0) for i, (_, layer, head, _) in block]
        rotated.append(memory.rotated(factors, frames, seed=seed, branches=ids))
        advance(len(block) / 2)
    statistics = np.concatenate(shuffled)
    value = statistics[:, 0]
    controls = {
        "shuffled": Control.of(value, statistics[:, 1:]),
        "rotated": Control.of(value, np.concatenate(rotated)),
    }
    rows = [
        (*site, statistic, float(value[i, j]), name, *(float(numbers[i, j]) for numbers in control))
        for i, site in enumerate(sites)
        for j, statistic in enumerate(STATISTICS)
        for name, control in controls.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _result(
    tables: list[pd.DataFrame], pairs: Associations, scaling: Scaling, draws: int, seed: int
) -> MemoryFit:
    return MemoryFit(
        table=pd.concat(tables, ignore_index=True),
        settings=MemoryFitSettings(
            associations=pairs.label,
            pairs=len(pairs),
            sources=len(set(pairs.source)),
            targets=len(set(pairs.target)),
            skipped=tuple(pairs.skipped),
            scaling=scaling,
            draws=draws,
        ),
        provenance=Provenance.now(seed=seed),
    )


@dataclass(frozen=True, slots=True)
class DirectPath:
    """The direct path of a head: token vectors and OV circuits with all norms multiplied in.

    A head that attends only to token s, and whose input is the embedding of s alone, writes x_s W.
    It adds x_s W y_o / scale to the logit of o, relative to the average token of the vocabulary:

        x_s = C E(s) / rms      direction of the embedding; C subtracts the mean for a layer norm;
                                E(s) itself if no norm comes before attention (OLMo 2)
        W   = C diag(w1) W_V W_O diag(w2) C
                                w1: the norm before attention, w2: one after it (Gemma-2 and -3)
        y_o = C diag(wf) (W_U(o) - mean over the vocabulary)
                                wf: the final norm, without its scale

    Positions, biases and the epsilons of norms are left out. x, W and y do not depend on how the
    weights were processed. The one-layer model has no norm: x = y = W_E(t) and W = W_V.
    """

    model: Any
    anatomy: Anatomy
    before: Mapping[int, Norm | None]
    """Layer with heads -> the norm before its attention; None if there is none."""

    @classmethod
    def of(cls, model: HookedModel) -> DirectPath:
        """Return the direct path of any hooked model.

        Raises:
            InputError: Hooks do not show how the model makes logits or what W_V reads, or it norms
                the stream itself.
        """
        anatomy = anatomy_of(model)
        if any(form.post for form in anatomy.layers):
            raise InputError(
                f"{model.cfg.model_name!r} has norms of the residual stream itself, so no direct "
                "path leads from a head to the logits. Use another model for the memory fit."
            )
        attending = [layer for layer, form in enumerate(anatomy.layers) if form.attends]
        with exclusive(model):
            paths = {layer: norm_before_attention(model, layer) for layer in attending}
        norms = {i: None if path is None else norm_at(model, path) for i, path in paths.items()}
        return cls(model, anatomy, norms)

    def read(self, tokens: Sequence[int]) -> Float64[Tensor, "token d_model"]:
        """Return x: what a head reads of each token.

        Raises:
            InputError: The model does not have such a token.
        """
        _check_tokens(tokens, vocabulary_of(self.model), "W_E")
        x = _double(embedded(self.model, list(tokens)))
        first = self._first
        if first is None:
            return x
        if first.centred:
            x = x - x.mean(-1, keepdim=True)
        return x / x.square().mean(-1, keepdim=True).sqrt()

    @property
    def _first(self) -> Norm | None:
        """The norm of the first layer with heads, of whose kind all others are."""
        return next(iter(self.before.values()))

    def write(self, tokens: Sequence[int]) -> Float64[Tensor, "token d_model"]:
        """Return y: the direction of a head's output that raises each token's logit.

        Raises:
            InputError: The model does not have such a token.
        """
        W_U = self.model.W_U  # [d_model, vocab]
        _check_tokens(tokens, W_U.shape[1], "W_U")
        y = _double(W_U[:, list(tokens)].T)
        if not isinstance(self.model, OneLayerTransformer):
            y = y - _double(W_U.detach().float().mean(1))
        return self.anatomy.pulled(y).at_end.double()

    def circuit(self, layer: int, head: int) -> Factors:
        """Return W of a query head, as factors [d_model, d_head] and [d_head, d_model].

        Raises:
            InputError: The model has no such head, or no matrices per head.
        """
        if is_latent(self.model, layer):
            raise InputError(
                f"layer {layer} of {self.model.cfg.model_name!r} makes values from a latent, so "
                "its OV circuit does not read the residual stream; the fit needs one that does."
            )
        circuit = ov_circuit(self.model, layer, head)
        A, B = _double(circuit.A), _double(circuit.B)
        norm, first = self.before.get(layer), self._first
        if (norm and norm.centred) != (first and first.centred):
            raise InputError(
                f"layer {layer} of {self.model.cfg.model_name!r} reads the residual stream through "
                "another kind of norm than its first layer; choose layers=... of one kind."
            )
        if norm is not None:
            A = _double(norm.weight)[:, None] * A
            A = A - A.mean(0) if norm.centred else A
        if (norm := self.anatomy.layers[layer].after_attention) is not None:
            B = B * _double(norm.weight)
        if self.anatomy.final is not None and self.anatomy.final.centred:
            B = B - B.mean(1, keepdim=True)
        return A, B


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _check_tokens(tokens: Sequence[int], size: int, name: str) -> None:
    if not 0 <= min(tokens) <= max(tokens) < size:
        raise InputError(
            f"token ids run from {min(tokens)} to {max(tokens)}; {name} of this model has 0 to "
            f"{size - 1}. Make the associations with this model's tokenizer."
        )
