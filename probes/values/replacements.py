"""Replacements: what to put in place of a value matrix or OV circuit.

A replacement gives a matrix for a site: for W_V [d_model, d_head] of a key/value head, or for the
OV circuit W_V W_O [d_model, d_model] of a query head. Replacements compose: `matched(identity())`
is the identity at the Frobenius norm of the matrix that it replaces.

>>> matched(taken_from(layer=5)).key
'matched(taken_from(layer=5))'
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens.errors import InputError, number, whole_number
from hijacklens.models.exclusive import made_for_run
from hijacklens.models.hooked import HookedModel
from hijacklens.one_layer import memory as concept_memory
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import hash_of
from hijacklens.renamed import renamed
from hijacklens.sites import HeadAxis, Sites, choose, head_count
from probes.anatomy import anatomy_of
from probes.anatomy.matrices import (
    is_latent,
    kv_head_of,
    output_matrix,
    ov_circuit,
    value_matrix,
)
from probes.anatomy.norms import embedded, normed

MatrixKind: TypeAlias = Literal["value", "circuit", "inner"]
"""W_V, W_V W_O, or the T [d_head, d_head] of a new OV circuit W_V T W_O."""


@dataclass(frozen=True, slots=True)
class MatrixSite:
    """The model, layer and head whose matrix is replaced."""

    model: HookedModel = field(repr=False)
    layer: int
    head: int
    """A key/value head for value matrices, a query head otherwise."""
    kind: MatrixKind

    @property
    def axis(self) -> HeadAxis:
        """Whether `head` counts query heads or key/value heads."""
        return "kv_head" if self.kind == "value" else "head"

    @property
    def circuit(self) -> FactoredMatrix:
        """The model's own OV circuit, in float32 or better."""
        circuit = ov_circuit(self.model, self.layer, self.head)
        return FactoredMatrix(_at_least_float32(circuit.A), _at_least_float32(circuit.B))

    @property
    def current(self) -> Float[Tensor, "rows columns"]:
        """The model's own matrix, in float32 or better; the identity for `inner`."""
        if self.kind == "value":
            return _at_least_float32(value_matrix(self.model, self.layer, self.head))
        A, B = self.circuit.A, self.circuit.B
        if self.kind == "circuit":
            return A @ B
        return torch.eye(len(B), dtype=B.dtype, device=B.device)


@dataclass(frozen=True, slots=True)
class Replacement:
    """Gives a matrix for every site; made by the functions of this package."""

    key: str
    """The function and its arguments; tensors by a hash."""
    make: Callable[[MatrixSite], Tensor] = field(compare=False, repr=False)
    has_inner: bool = field(default=False, compare=False, repr=False)
    """Whether it gives matrices of the kind `inner`: the new OV circuit then needs no more than
    the head's own output."""
    spelling: tuple[str, Mapping[str, Any]] | None = field(default=None, compare=False, repr=False)
    """Kind and options of the probe as text; None if a text cannot name the replacement."""

    def matrix(self, site: MatrixSite) -> Float[Tensor, "rows columns"]:
        """Return the new matrix for a site, without gradient.

        Raises:
            InputError: The replacement returns no matrix, or a matrix of the wrong shape.
        """
        # Scoring runs in inference mode, but cached matrices may be used with gradients later.
        with torch.inference_mode(False), torch.no_grad():
            new: Any = self.make(site)
            shape = list(site.current.shape)
        if not isinstance(new, Tensor) or list(new.shape) != shape:
            got = f"the shape {list(new.shape)}" if isinstance(new, Tensor) else repr(new)
            what = "a value matrix" if site.kind == "value" else "an OV circuit"
            raise InputError(
                f"{self.key} gives {got} for layer {site.layer}, {site.axis} {site.head}; "
                f"{what} that acts on row vectors has the shape {shape} there."
            )
        return new.detach()


def matrices(
    replacement: Replacement, model: HookedModel, kind: MatrixKind, sites: Sites
) -> dict[int, dict[int, Tensor]]:
    """Return layer -> head -> matrix.

    Each matrix is made once in a run (`hijacklens.models.exclusive`), since otherwise every batch
    would repeat the singular value decompositions.

    Raises:
        InputError: There is no matrix that fits.
    """
    made = made_for_run(model)
    result: dict[int, dict[int, Tensor]] = {layer: {} for layer in sites.by_layer}
    for layer, head in sites.pairs:
        name = (replacement.key, kind, layer, head)
        if name not in made:
            made[name] = replacement.matrix(MatrixSite(model, layer, head, kind))
        result[layer][head] = made[name]
    return result


def zero() -> Replacement:
    """Zeros: the heads write only what their biases give."""
    return replace(scaled(0.0), key="zero", spelling=("zero-value", {}))


def identity() -> Replacement:
    """Ones on the diagonal, zeros elsewhere: the identity if the matrix is square.

    On the one-layer model the values are then the embeddings themselves (figures 3a, C.1, C.6,
    Theorem 3). A W_V of a language model, [d_model, d_head], keeps the first d_head coordinates.
    """
    return Replacement("identity", _identity, spelling=("identity-value", {}))


def scaled(factor: float | int) -> Replacement:
    """The model's own matrix times a factor."""
    factor = number("factor", factor)
    spelling = ("scale-value", {"factor": factor})
    return Replacement(f"scaled(factor={factor!r})", partial(_scaled, factor), True, spelling)


def low_rank(rank: int) -> Replacement:
    """The best approximation of rank at most `rank` in Frobenius norm (truncated SVD).

    For an OV circuit it approximates the product W_V W_O, computed from the factors.

    Raises:
        InputError: `rank` is below 1 or, when the probe is put on a model, above d_head.
    """
    rank = whole_number("rank", rank, least=1)
    spelling = ("low-rank-value", {"rank": rank})
    return Replacement(f"low_rank(rank={rank})", partial(_low_rank, rank), True, spelling)


def random(*, seed: int) -> Replacement:
    """A Gaussian matrix at the Frobenius norm of the matrix that it replaces, drawn for each site.

    The draw for one site does not depend on which other sites are chosen. In place of an OV
    circuit it is a product of two Gaussian factors, which has the rank of a circuit, d_head.
    """
    seed = whole_number("seed", seed)
    spelling = ("random-value", {"seed": seed})
    return Replacement(f"random(seed={seed})", partial(_random, seed), spelling=spelling)


def taken_from(
    *, layer: int | None = None, head: int | None = None, model: HookedModel | None = None
) -> Replacement:
    """The matrix of another layer, head or model; omitted arguments come from the site.

    Args:
        layer: Layer of the matrix.
        head: Head of the matrix: a key/value head in place of a W_V, a query head in place of an
            OV circuit. Its bias is not taken along.
        model: Another model of the same widths; the key holds a hash of all its value and output
            matrices, which must not change after this call.

    Raises:
        InputError: No argument is given.
    """
    if layer is None and head is None and model is None:
        raise InputError("taken_from() names nothing; give the layer, head or model to take from.")
    name = None
    if model is not None:
        circuits = [ov_circuit(model, *site) for site in choose(model).pairs]
        name = f"{model.cfg.model_name}:{hash_of(*(m for c in circuits for m in (c.A, c.B)))}"
    arguments = {"layer": layer, "head": head, "model": name}
    text = ",".join(f"{name}={value}" for name, value in arguments.items() if value is not None)
    return Replacement(f"taken_from({text})", partial(_taken_from, layer, head, model))


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
    """The memory of pairs of token ids (cue, answer): a sum over them, as in equation 5.1.

        M = sum over pairs of outer(x(cue), u(answer))                       [d_model, d_model]

    - x(cue) is the input of W_V if the residual stream is the embedding of the cue alone, as the
      model makes it, through the norm before attention, if there is one. Positions are left out.
    - u(answer) is the direction of the attention output that raises the answer's logit: the column
      of W_U times the weights of the final norm and, for Gemma-2 and -3, of the norm after
      attention; centred if these are layer norms. The scales of the norms and the soft cap change
      the size of the effect but not its sign.

    M itself replaces an OV circuit. A W_V reaches the output only through W_O of the query heads
    that read it, so it is replaced by the matrix whose circuits are nearest to M:

        W_V = argmin sum over heads h of ||W_V W_O(h) - M||^2 = [M ... M] pinv[W_O(1) ... W_O(g)]

    A pair that is listed twice counts twice. The scale is arbitrary: `matched(associations(pairs))`
    has the norm of the matrix that it replaces. On the one-layer model this is equation 5.1.

    Raises:
        InputError: There is no pair, or an item is not a pair of token ids; when the probe is put
            on a model, also if its vocabulary lacks a token id, or its hooks do not show what W_V
            reads and how the logits are made.
    """
    listed = [tuple(pair) for pair in pairs]
    if not listed or not all(len(p) == 2 and all(isinstance(i, int) for i in p) for p in listed):
        raise InputError(
            f"associations are pairs of token ids (cue, answer), at least one; got {listed[:3]}. "
            "Make ids with the tokenizer of the model."
        )
    ids = torch.tensor(listed)
    return Replacement(f"associations({len(listed)} pairs,{hash_of(ids)})", partial(_pairs, ids))


def given(matrices: Tensor | Mapping[tuple[int, int], Tensor]) -> Replacement:
    """A matrix of your own for all sites, or a mapping (layer, head) -> matrix.

    `replace` and `replace_circuit` also accept the tensor or the mapping itself.

    Raises:
        InputError: The argument is anything else, or an empty mapping.
    """
    if isinstance(matrices, Tensor):
        return Replacement(f"matrix({hash_of(matrices)})", partial(_given, matrices))
    pairs = all(isinstance(site, tuple) and len(site) == 2 for site in matrices)
    if not matrices or not pairs or not all(isinstance(m, Tensor) for m in matrices.values()):
        raise InputError(
            "matrices for several sites are a mapping {(layer, head): tensor, ...} with at least "
            f"one entry; got one with the keys {list(matrices)}."
        )
    digest = hash_of(*(item for site in sorted(matrices) for item in (site, matrices[site])))
    return Replacement(f"matrices({digest})", partial(_given, dict(matrices)))


def computed(function: Callable[[HookedModel, int, int], Tensor], *, name: str) -> Replacement:
    """The result of a function (model, layer, head) -> matrix.

    Args:
        function: Called once for each site in every run. It receives key/value heads for W_V, query
            heads for OV circuits.
        name: Identifies the function in keys and stored readings; change it with the function.
    """
    return Replacement(f"computed({name})", partial(_computed, function))


@renamed(source="replacement")
def matched(replacement: Replacement) -> Replacement:
    """Another replacement, scaled to the Frobenius norm of the matrix that it replaces."""
    make = partial(_matched, replacement)
    return Replacement(f"matched({replacement.key})", make, replacement.has_inner)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(*like.shape, dtype=like.dtype, device=like.device)


def _identity(site: MatrixSite) -> Tensor:
    return _eye(site.current)


def _scaled(factor: float, site: MatrixSite) -> Tensor:
    return factor * site.current


def _low_rank(rank: int, site: MatrixSite) -> Tensor:
    """Return a truncated SVD.

    The T of a circuit is W_O R R^T pinv(W_O), where R holds the first right singular vectors of
    W_V W_O. These lie in the rows of W_O, so W_V T W_O = W_V W_O R R^T.
    """
    matrix = site.current if site.kind == "value" else site.circuit
    largest = min(matrix.shape if isinstance(matrix, Tensor) else matrix.A.shape)
    if not 1 <= rank <= largest:
        what = f"a matrix {list(matrix.shape)}" if site.kind == "value" else "an OV circuit"
        raise InputError(f"rank must lie in 1..{largest} for {what}, got {rank!r}.")
    if isinstance(matrix, Tensor):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return (left[:, :rank] * values[:rank]) @ right[:rank]
    outputs = matrix.B.double()
    right = FactoredMatrix(matrix.A.double(), outputs).svd()[2][:, :rank]
    inner = (outputs @ right @ (right.mT @ torch.linalg.pinv(outputs))).to(matrix.B.dtype)
    return inner if site.kind == "inner" else matrix.A @ inner @ matrix.B


def _random(seed: int, site: MatrixSite) -> Tensor:
    text = f"{seed} {site.kind} {site.layer} {site.head}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    )
    current = site.current
    rows, columns = current.shape
    new = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if site.kind == "circuit":
        rank = min(site.circuit.A.shape)
        right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        new = new[:, :rank] @ right
    return concept_memory.matched(new.to(current), current)


def _taken_from(
    layer: int | None, head: int | None, model: HookedModel | None, site: MatrixSite
) -> Tensor:
    layer = site.layer if layer is None else layer
    head = site.head if head is None else head
    return MatrixSite(site.model if model is None else model, layer, head, site.kind).current


def _given(matrices: Tensor | Mapping[tuple[int, int], Tensor], site: MatrixSite) -> Tensor:
    if isinstance(matrices, Tensor):
        return matrices
    if (site.layer, site.head) not in matrices:
        raise InputError(
            f"no matrix is given for layer {site.layer}, {site.axis} {site.head}; there are "
            f"some for (layer, {site.axis}) in {sorted(matrices)}."
        )
    return matrices[site.layer, site.head]


def _computed(function: Callable[[HookedModel, int, int], Tensor], site: MatrixSite) -> Tensor:
    return function(site.model, site.layer, site.head)


def _matched(replacement: Replacement, site: MatrixSite) -> Tensor:
    if site.kind == "inner":
        circuit = replace(site, kind="circuit")
        norm = torch.linalg.matrix_norm
        factor = norm(_matched(replacement, circuit)) / norm(replacement.matrix(circuit))
        return replacement.matrix(site) * factor
    current = site.current
    return concept_memory.matched(replacement.matrix(site).to(current), current)


def _at_least_float32(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


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
    made, name = made_for_run(model), ("vectors", site.layer, hash_of(pairs))
    if name not in made:
        made[name] = _cues(site, pairs[:, 0]), _answers(site, pairs[:, 1])
    cues, answers = (vectors.to(device) for vectors in made[name])  # [pair, d_model]
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
    x = normed(model, site.layer, embedded(model, tokens.tolist()))
    if not is_latent(model, site.layer):
        return x
    attn = model.blocks[site.layer].attn
    norm = attn.kv_a_layernorm.original_component
    compressed = attn.kv_a_proj_with_mqa.original_component(x.to(norm.weight.dtype))
    return norm(compressed[..., : len(norm.weight)]).float()


def _answers(site: MatrixSite, tokens: Tensor) -> Tensor:
    """Return the directions of the attention output that raise the logits of tokens."""
    model: Any = site.model
    made = made_for_run(model)
    if (anatomy := made.get("anatomy")) is None:
        anatomy = made["anatomy"] = anatomy_of(model)
    direction = model.W_U.detach().mT[tokens.to(model.W_U.device)].float()
    return anatomy.pulled(direction).heads[site.layer]
