"""The memory fit: how well a W_V or an OV circuit is explained as an associative memory.

The paper reads a value matrix as a memory: equation 5.1 makes it a sum of outer products of the
embeddings of associated tokens. The fit measures how much of this is in any trained matrix: by the
cosine to the memory of given associations, by the fraction of its norm in their span, and by
whether its scores retrieve them. There are two controls: shuffled associations, and random
matrices with the same singular values (`outer_products`).

A model has vectors x (of a source token, read), y (of a target token, written) and a matrix W:

    one-layer model   x = y = W_E(t), W = W_V. The associated pairs are the Hamming-1 neighbours,
                      and M, the sum of the outer products, is the constructed memory of eq. 5.1.
    language model    those of the direct path (`direct_path`). outer(x, y) is the gradient with
                      respect to W of what the head adds to the logit of the target when it attends
                      to the source alone.

Layers in the middle read the residual stream at that point, not an embedding: a small fit there is
no proof of absence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens.errors import InputError, choice
from hijacklens.models.hooked import HookedModel, require_eval
from hijacklens.one_layer.task import ConceptTask
from hijacklens.progress import bar
from hijacklens.renamed import renamed
from hijacklens.results.result import Provenance
from hijacklens.sites import Heads, Layers, choose
from probes import named_models
from probes.memory_fit import associations
from probes.memory_fit.associations import Associations
from probes.memory_fit.direct_path import DirectPath
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

    Example:
        >>> from hijacklens.one_layer.memory import theorem_1
        >>> from hijacklens.one_layer.model import OneLayerTransformer
        >>> from hijacklens.one_layer.task import ConceptTask
        >>> task = ConceptTask(bits=3)
        >>> result = fit(OneLayerTransformer.from_weights(theorem_1(task)), task)
        >>> result.summary()[["statistic", "value", "p_family"]].round(3).values.tolist()
        [['cosine', 1.0, 0.005], ['span', 1.0, 0.005], ['recall', 1.0, 0.005]]
    """
    pairs = _associations(model, associated)
    _check(scaling, draws)
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

    Args:
        matrices: Name -> matrix [d_in, d_out] that acts on row vectors.
        read: x, a row per token id: what a matrix reads.
        write: y, a row per token id: the direction that it writes for a token.
        associated: As for `fit`.
        scaling: As for `fit`.
        draws: As for `fit`.
        seed: As for `fit`.

    Raises:
        InputError: As for `fit`, or the shapes do not match.
    """
    pairs = _associations(None, associated)
    _check(scaling, draws)
    x, y = read.detach().cpu().double(), write.detach().cpu().double()
    for tokens, vectors in ((pairs.source, x), (pairs.target, y)):
        if max(tokens) >= len(vectors):
            raise InputError(
                f"the pairs name token {max(tokens)}, and vectors are given for tokens 0 to "
                f"{len(vectors) - 1}."
            )
    memory = _memory(pairs, lambda ids: x[list(ids)], lambda ids: y[list(ids)], scaling)

    def factors(name: str, item: Any) -> Factors:
        W = named_models.matrix(item, lambda model: None, name=name)
        if W.shape != (x.shape[1], y.shape[1]):
            raise InputError(
                f"{name!r} is {list(W.shape)}; the vectors need {[x.shape[1], y.shape[1]]}."
            )
        return W, torch.eye(W.shape[1], dtype=W.dtype)

    listed = ((name, -1, -1, factors(name, W)) for name, W in named_models.named(matrices).items())
    return _result([_fit(memory, listed, draws, seed)], pairs, scaling, draws, seed)


def _associations(model: Models, associated: Associations | ConceptTask | None) -> Associations:
    if isinstance(associated, Associations):
        return associated
    task = named_models.task_of(model, associated)
    if task is None:
        raise InputError(
            "no associations are given: pass those of probes.memory_fit.associations (pairs, "
            "neighbours, of_facts), or a ConceptTask for its Hamming-1 neighbours."
        )
    return associations.neighbours(task)


def _check(scaling: str, draws: int) -> None:
    choice("scaling", scaling, get_args(Scaling))
    if draws < 2:
        raise InputError(f"draws is {draws!r}; give at least 2, or there is no control.")


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
    rest = iter(matrices)
    while block := list(islice(rest, size)):
        for name, layer, head, (A, B) in block:
            where = f" (layer {layer}, head {head})" if layer >= 0 else ""
            if not (A.any() and B.any()):
                raise InputError(f"the matrix of {name!r}{where} is zero; nothing can explain it.")
            sites.append((name, layer, head))
        factors = [factors for *_, factors in block]
        if frames is None:
            frames = memory.frames(spectrum_length(factors[0]), draws=draws, seed=seed)
        shuffled.append(memory.shuffled(factors, orders))
        advance(len(block) / 2)
        numbered = enumerate(sites[-len(block) :], start=len(sites) - len(block))
        # Matrices of your own have no layer and head: their number identifies them.
        ids = [(layer, head) if layer >= 0 else (i, 0) for i, (_, layer, head) in numbered]
        rotated.append(memory.rotated(factors, frames, seed=seed, branches=ids))
        advance(len(block) / 2)
    statistics = np.concatenate(shuffled)
    value = statistics[:, 0]
    controls = {
        "shuffled": Control.of(value, statistics[:, 1:]),
        "rotated": Control.of(value, np.concatenate(rotated)),
    }
    rows = [
        (*site, statistic, float(value[i, j]), name, *control.row(i, j))
        for i, site in enumerate(sites)
        for j, statistic in enumerate(STATISTICS)
        for name, control in controls.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _result(
    tables: list[pd.DataFrame],
    pairs: Associations,
    scaling: Scaling,
    draws: int,
    seed: int,
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
