"""Replacements: what to put in place of a value matrix or OV circuit.

A replacement gives a matrix for a site: for W_V [d_model, d_head] of a key/value head, or for the
OV circuit W_V W_O [d_model, d_model] of a query head. Matrices act on row vectors, on what the
model feeds to W_V (`probes.values.matrices`). Replacements compose: `matched(identity())` is the
identity at the Frobenius norm of the matrix that it replaces.

>>> matched(identity()).key, random(seed=3).key, taken_from(layer=5).key
('matched(identity)', 'random(seed=3)', 'taken_from(layer=5)')
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens.errors import InputError, number, whole_number
from hijacklens.models.hooked import HookedModel
from hijacklens.one_layer import memory as concept_memory
from hijacklens.probe import hash_of
from hijacklens.renamed import renamed
from hijacklens.sites import HeadAxis, Sites, choose
from probes.values.matrices import ov_circuit, value_matrix

MatrixKind: TypeAlias = Literal["value", "circuit"]


@dataclass(frozen=True, slots=True)
class MatrixSite:
    """The model, layer and head whose matrix is replaced."""

    model: HookedModel = field(repr=False)
    layer: int
    head: int
    """A key/value head for value matrices, a query head for OV circuits."""
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
    def current(self) -> Float[Tensor, "d_model width"]:
        """The model's own matrix, in float32 or better."""
        if self.kind == "circuit":
            circuit = self.circuit
            return circuit.A @ circuit.B
        return _at_least_float32(value_matrix(self.model, self.layer, self.head))

    @property
    def rank(self) -> int:
        """The largest rank of the model's matrices: d_head."""
        return min(value_matrix(self.model, 0, 0).shape)


@dataclass(frozen=True, slots=True)
class Replacement:
    """Gives a matrix for every site; made by the functions of this package."""

    key: str
    """The function and its arguments; tensors by a hash."""
    make: Callable[[MatrixSite], Tensor] = field(compare=False, repr=False)
    make_inner: Callable[[MatrixSite], Tensor] | None = field(
        default=None, compare=False, repr=False
    )
    """Makes T [d_head, d_head] if the new OV circuit is W_V T W_O, which needs no more than the
    head's own output; None otherwise."""
    spelling: tuple[str, Mapping[str, Any]] | None = field(default=None, compare=False, repr=False)
    """Kind and options of the probe as text; None if a text cannot name the replacement."""

    def matrix(self, site: MatrixSite) -> Float[Tensor, "d_model width"]:
        """Return the new matrix for a site, without gradient.

        Raises:
            InputError: The replacement returns no matrix, or a matrix of the wrong shape.
        """
        new: Any = _without_gradient(self.make, site)
        shape = list(site.current.shape)
        if not isinstance(new, Tensor) or list(new.shape) != shape:
            got = f"the shape {list(new.shape)}" if isinstance(new, Tensor) else repr(new)
            what = "a value matrix [d_model, d_head]"
            if site.kind == "circuit":
                what = "an OV circuit [d_model, d_model]"
            raise InputError(
                f"{self.key} gives {got} for layer {site.layer}, {site.axis} {site.head}; "
                f"{what} that acts on row vectors has the shape {shape} there."
            )
        return new

    def inner(self, site: MatrixSite) -> Float[Tensor, "d_head d_head"]:
        """Return T if the new OV circuit is W_V T W_O, without gradient.

        Raises:
            InputError: The replacement has no such T.
        """
        if self.make_inner is None:
            raise InputError(f"{self.key} cannot be written as W_V T W_O.")
        return _without_gradient(self.make_inner, site)


class MatrixCache:
    """Keeps the matrices of a probe until the weights of their model change.

    Without it, every batch would repeat the singular value decompositions. Copies start empty.
    """

    def __init__(self) -> None:
        self._of_model: WeakKeyDictionary[Any, tuple[Any, dict[tuple[int, int], Tensor]]]
        self._of_model = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return MatrixCache, ()

    def matrices(
        self,
        make: Callable[[MatrixSite], Tensor],
        model: HookedModel,
        kind: MatrixKind,
        sites: Sites,
    ) -> dict[int, dict[int, Tensor]]:
        """Return layer -> head -> matrix; `make` must be the same in every call.

        Raises:
            InputError: There is no matrix that fits.
        """
        weights = [
            (p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()
        ]
        if self._of_model.get(model, (None,))[0] != weights:
            self._of_model[model] = (weights, {})
        matrices = self._of_model[model][1]
        for layer, head in sites.pairs:
            if (layer, head) not in matrices:
                matrices[layer, head] = make(MatrixSite(model, layer, head, kind))
        return {
            layer: {head: matrices[layer, head] for head in heads}
            for layer, heads in sites.by_layer.items()
        }


def zero() -> Replacement:
    """Zeros: the heads write only what their biases give."""
    return _times("zero", 0.0, "zero-value", {})


def identity() -> Replacement:
    """Ones on the diagonal, zeros elsewhere: the identity if the matrix is square.

    On the one-layer model the values are then the embeddings themselves (figures 3a, C.1, C.6,
    Theorem 3). A W_V of a language model, [d_model, d_head], keeps the first d_head coordinates.
    """
    return Replacement("identity", _identity, None, ("identity-value", {}))


def scaled(factor: float | int) -> Replacement:
    """The model's own matrix times a factor."""
    factor = number("factor", factor)
    return _times(f"scaled(factor={factor!r})", factor, "scale-value", {"factor": factor})


def low_rank(rank: int) -> Replacement:
    """The best approximation of rank at most `rank` in Frobenius norm (truncated SVD).

    For an OV circuit it approximates the product W_V W_O, computed from the factors.

    Raises:
        InputError: `rank` is below 1 or, when the probe is put on a model, above d_head.
    """
    rank = whole_number("rank", rank, least=1)
    make = partial(_low_rank, rank), partial(_low_rank_inner, rank)
    return Replacement(f"low_rank(rank={rank})", *make, ("low-rank-value", {"rank": rank}))


def random(*, seed: int) -> Replacement:
    """A Gaussian matrix at the Frobenius norm of the matrix that it replaces, drawn for each site.

    The draw for one site does not depend on which other sites are chosen. In place of an OV
    circuit it is a product of two Gaussian factors, which has the rank of a circuit, d_head.
    """
    seed = whole_number("seed", seed)
    spelling = ("random-value", {"seed": seed})
    return Replacement(f"random(seed={seed})", partial(_random, seed), None, spelling)


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
    arguments = {
        "layer": layer,
        "head": head,
        "model": None if model is None else _model_hash(model),
    }
    text = ",".join(f"{name}={value}" for name, value in arguments.items() if value is not None)
    return Replacement(f"taken_from({text})", partial(_taken_from, layer, head, model))


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
        function: Called once for each site, and again after the model's weights have changed. It
            receives key/value heads for W_V, query heads for OV circuits.
        name: Identifies the function in keys and stored readings; change it with the function.
    """
    return Replacement(f"computed({name})", partial(_computed, function))


@renamed(source="replacement")
def matched(replacement: Replacement) -> Replacement:
    """Another replacement, scaled to the Frobenius norm of the matrix that it replaces."""
    inner = None if replacement.make_inner is None else partial(_matched_inner, replacement)
    return Replacement(f"matched({replacement.key})", partial(_matched, replacement), inner)


def _without_gradient(make: Callable[[MatrixSite], Tensor], site: MatrixSite) -> Any:
    # Scoring runs in inference mode, but cached matrices may be used with gradients later.
    with torch.inference_mode(False), torch.no_grad():
        new = make(site)
    return new.detach() if isinstance(new, Tensor) else new


def _times(key: str, factor: float, kind: str, options: Mapping[str, Any]) -> Replacement:
    make, make_inner = partial(_scaled, factor), partial(_scaled_inner, factor)
    return Replacement(key, make, make_inner, (kind, options))


def _scaled(factor: float, site: MatrixSite) -> Tensor:
    return factor * site.current


def _scaled_inner(factor: float, site: MatrixSite) -> Tensor:
    outputs = site.circuit.B
    return factor * torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)


def _identity(site: MatrixSite) -> Tensor:
    current = site.current
    return torch.eye(*current.shape, dtype=current.dtype, device=current.device)


def _low_rank(rank: int, site: MatrixSite) -> Tensor:
    if site.kind == "value":
        return truncated(site.current, rank)
    circuit = site.circuit
    return circuit.A @ _low_rank_inner(rank, site) @ circuit.B


def truncated(
    matrix: Float[Tensor, "*axes rows columns"], rank: int
) -> Float[Tensor, "*axes rows columns"]:
    """Return the best approximation of a matrix by one of rank at most `rank` (truncated SVD).

    Raises:
        InputError: `rank` is below 1 or above the smaller side of the matrix.
    """
    largest = min(matrix.shape[-2:])
    if not 1 <= rank <= largest:
        raise InputError(
            f"rank must lie in 1..{largest} for a matrix {list(matrix.shape)}, got {rank!r}."
        )
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def _low_rank_inner(rank: int, site: MatrixSite) -> Tensor:
    """W_O R R^T pinv(W_O), where R holds the first right singular vectors of W_V W_O.

    These lie in the rows of W_O, so W_V T W_O = W_V W_O R R^T, the truncated SVD.
    """
    if not 1 <= rank <= site.rank:
        raise InputError(f"rank must lie in 1..{site.rank} for an OV circuit, got {rank!r}.")
    circuit = site.circuit
    outputs = circuit.B.double()
    _, _, right = FactoredMatrix(circuit.A.double(), outputs).svd()
    right = right[:, :rank]
    return (outputs @ right @ (right.mT @ torch.linalg.pinv(outputs))).to(circuit.B.dtype)


def _random(seed: int, site: MatrixSite) -> Tensor:
    text = f"{seed} {site.kind} {site.layer} {site.head}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    )
    current = site.current
    rows, columns = current.shape
    new = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if site.kind == "circuit":
        right = torch.randn(site.rank, columns, generator=generator, dtype=torch.float64)
        new = new[:, : site.rank] @ right
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
    current = site.current
    return concept_memory.matched(replacement.matrix(site).to(current), current)


def _matched_inner(replacement: Replacement, site: MatrixSite) -> Tensor:
    norm = torch.linalg.matrix_norm
    return replacement.inner(site) * (
        norm(_matched(replacement, site)) / norm(replacement.matrix(site))
    )


def _model_hash(model: HookedModel) -> str:
    """Return the name of a model and a hash of all its value and output matrices."""
    circuits = [ov_circuit(model, *site) for site in choose(model).pairs]
    return f"{model.cfg.model_name}:{hash_of(*(m for c in circuits for m in (c.A, c.B)))}"


def _at_least_float32(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
