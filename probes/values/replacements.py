"""What to put in place of a value matrix or OV circuit: sources of matrices.

A source gives a matrix for a place (model, layer, head). The same sources serve value matrices
W_V [d_model, d_head] of key/value heads and OV circuits W_V W_O [d_model, d_model] of query
heads; all act on row vectors, on what the model at hand feeds to W_V (`probes.values.matrices`).
They compose: `matched(identity())` is the identity at the Frobenius norm of what it replaces.

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

from hijacklens import sites
from hijacklens.errors import InputError, number, whole_number
from hijacklens.models.hooked import HookedModel
from hijacklens.one_layer import memory as concept_memory
from hijacklens.sites import HeadAxis, Sites
from probes.values.matrices import ov_circuit, value_matrix

MatrixKind: TypeAlias = Literal["value", "circuit"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix is replaced."""

    model: HookedModel = field(repr=False)
    layer: int
    head: int
    """A key/value head for value matrices, a query head for OV circuits."""
    kind: MatrixKind

    @property
    def axis(self) -> HeadAxis:
        """What the head is counted among."""
        return "kv_head" if self.kind == "value" else "head"

    @property
    def circuit(self) -> FactoredMatrix:
        """The OV circuit there, in float32 or better."""
        found = ov_circuit(self.model, self.layer, self.head)
        return FactoredMatrix(_at_least_float32(found.A), _at_least_float32(found.B))

    @property
    def current(self) -> Float[Tensor, "d_model width"]:
        """The matrix that is there, in float32 or better."""
        if self.kind == "circuit":
            circuit = self.circuit
            return circuit.A @ circuit.B
        return _at_least_float32(value_matrix(self.model, self.layer, self.head))

    @property
    def rank(self) -> int:
        """The rank that a matrix can have there: d_head."""
        return min(value_matrix(self.model, 0, 0).shape)


@dataclass(frozen=True, slots=True)
class Source:
    """Gives a matrix for every place; made by the functions of this module."""

    key: str
    """What it gives, in a few words; tensors by a hash of them."""
    make: Callable[[Place], Tensor] = field(compare=False, repr=False)
    make_inner: Callable[[Place], Tensor] | None = field(default=None, compare=False, repr=False)
    """Makes T [d_head, d_head] for which the new OV circuit is W_V T W_O; None where there may be
    none. Such a circuit needs no more than what the head sees anyway."""

    def matrix(self, place: Place) -> Float[Tensor, "d_model width"]:
        """The new matrix for a place, without gradient.

        Raises:
            InputError: There is none, or it has not the shape of the one that it replaces.
        """
        new: Any = _made(self.make, place)
        wanted = list(place.current.shape)
        if not isinstance(new, Tensor) or list(new.shape) != wanted:
            got = f"the shape {list(new.shape)}" if isinstance(new, Tensor) else repr(new)
            what = "a value matrix [d_model, d_head]"
            if place.kind == "circuit":
                what = "an OV circuit [d_model, d_model]"
            raise InputError(
                f"{self.key} gives {got} for layer {place.layer}, {place.axis} {place.head}; "
                f"{what} that acts on row vectors has the shape {wanted} there."
            )
        return new

    def inner(self, place: Place) -> Float[Tensor, "d_head d_head"]:
        """T for which the new OV circuit is W_V T W_O, without gradient.

        Raises:
            InputError: The source has none.
        """
        if self.make_inner is None:
            raise InputError(f"{self.key} gives no circuit that is made of W_V and W_O.")
        return _made(self.make_inner, place)


def zero() -> Source:
    """Nothing: the heads write only what their biases give."""
    return Source("zero", _zero, partial(_scaled_inner, 0.0))


def identity() -> Source:
    """Ones on the diagonal, zeros elsewhere: the identity where the matrix is square.

    On the one-layer model the values are then the embeddings themselves (figures 3a, C.1, C.6,
    Theorem 3). A W_V of a language model, [d_model, d_head], keeps the first d_head coordinates.
    """
    return Source("identity", _identity)


def scaled(factor: float | int) -> Source:
    """The matrix that is there, times a factor."""
    value = number("factor", factor)
    return Source(f"scaled({value!r})", partial(_scaled, value), partial(_scaled_inner, value))


def low_rank(rank: int) -> Source:
    """The best approximation of rank at most `rank` in Frobenius norm (truncated SVD).

    For an OV circuit it is that of the product W_V W_O, made from its factors.

    Raises:
        InputError: When it is put on a model: `rank` is below 1 or above d_head.
    """
    rank = whole_number("rank", rank, least=1)
    return Source(f"low_rank({rank})", partial(_low_rank, rank), partial(_low_rank_inner, rank))


def random(*, seed: int) -> Source:
    """A Gaussian matrix at the Frobenius norm of the one it replaces, drawn anew for each place.

    The draw of a place does not depend on which others are chosen. In place of an OV circuit it is
    a product of two Gaussian factors, so that it has the rank of a circuit, d_head, too.
    """
    seed = whole_number("seed", seed)
    return Source(f"random(seed={seed})", partial(_random, seed))


def taken_from(
    *, layer: int | None = None, head: int | None = None, model: HookedModel | None = None
) -> Source:
    """The matrix of another layer, head or model; what is left out stays as at the place replaced.

    Args:
        layer: Layer that it is taken from.
        head: Head that it is taken from: a key/value head in place of a W_V, a query head in place
            of an OV circuit. Its bias does not come along.
        model: Model that it is taken from, of the same widths; its matrices enter the key by a
            hash of all of them and shall not change after this call.

    Raises:
        InputError: Nothing is named.
    """
    if layer is None and head is None and model is None:
        raise InputError("taken_from() names nothing; give the layer, head or model to take from.")
    named: dict[str, Any] = {"layer": layer, "head": head}
    named["model"] = None if model is None else _model_hash(model)
    said = ",".join(f"{name}={value}" for name, value in named.items() if value is not None)
    return Source(f"taken_from({said})", partial(_taken_from, layer, head, model))


def given(matrices: Tensor | Mapping[tuple[int, int], Tensor]) -> Source:
    """A matrix of your own for all places, or a mapping (layer, head) -> matrix.

    `replace` and `replace_circuit` take the tensor or mapping itself, too.

    Raises:
        InputError: Something else is given, or an empty mapping.
    """
    if isinstance(matrices, Tensor):
        return Source(f"matrix({tensor_hash(matrices)})", partial(_given, matrices))
    pairs = all(isinstance(place, tuple) and len(place) == 2 for place in matrices)
    if not matrices or not pairs or not all(isinstance(m, Tensor) for m in matrices.values()):
        raise InputError(
            "matrices for several places are a mapping {(layer, head): tensor, ...} with at least "
            f"one entry; got one with the keys {list(matrices)}."
        )
    parts = [f"{place} {tensor_hash(matrices[place])}" for place in sorted(matrices)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Source(f"matrices({digest})", partial(_given, dict(matrices)))


def computed(function: Callable[[HookedModel, int, int], Tensor], *, name: str) -> Source:
    """What a function (model, layer, head) -> matrix makes; heads are those of the place.

    Args:
        function: Called once for each place, and again when the model's weights have changed.
        name: Tells it apart in keys and stored scores; change it when the function changes.
    """
    return Source(f"computed({name})", partial(_computed, function))


def matched(source: Source) -> Source:
    """What another source gives, at the Frobenius norm of the matrix that it replaces."""
    inner = None if source.make_inner is None else partial(_matched_inner, source)
    return Source(f"matched({source.key})", partial(_matched, source), inner)


def tensor_hash(tensor: Tensor) -> str:
    """Sixteen hex digits that stand for the type, shape and values of a tensor."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _made(make: Callable[[Place], Tensor], place: Place) -> Any:
    # Scores are read in inference mode, but what is made then may be used with gradients later.
    with torch.inference_mode(False), torch.no_grad():
        new = make(place)
    return new.detach() if isinstance(new, Tensor) else new


def _zero(place: Place) -> Tensor:
    return torch.zeros_like(place.current)


def _identity(place: Place) -> Tensor:
    now = place.current
    return torch.eye(*now.shape, dtype=now.dtype, device=now.device)


def _scaled(factor: float, place: Place) -> Tensor:
    return factor * place.current


def _scaled_inner(factor: float, place: Place) -> Tensor:
    outputs = place.circuit.B
    return factor * torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)


def _low_rank(rank: int, place: Place) -> Tensor:
    if place.kind == "value":
        return concept_memory.low_rank(place.current, rank)
    circuit = place.circuit
    return circuit.A @ _low_rank_inner(rank, place) @ circuit.B


def _low_rank_inner(rank: int, place: Place) -> Tensor:
    """W_O R R^T pinv(W_O), R the first right singular vectors of W_V W_O.

    These lie in the rows of W_O, so W_V T W_O = W_V W_O R R^T, the truncated SVD.
    """
    if not 1 <= rank <= place.rank:
        raise InputError(f"rank must lie in 1..{place.rank} for an OV circuit, got {rank!r}.")
    circuit = place.circuit
    outputs = circuit.B.double()
    _, _, right = FactoredMatrix(circuit.A.double(), outputs).svd()
    kept = right[:, :rank]
    return (outputs @ kept @ (kept.mT @ torch.linalg.pinv(outputs))).to(circuit.B.dtype)


def _random(seed: int, place: Place) -> Tensor:
    text = f"{seed} {place.kind} {place.layer} {place.head}"
    draw = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    )
    now = place.current
    rows, columns = now.shape
    drawn = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    if place.kind == "circuit":
        right = torch.randn(place.rank, columns, generator=draw, dtype=torch.float64)
        drawn = drawn[:, : place.rank] @ right
    return concept_memory.matched(drawn.to(now), now)


def _taken_from(
    layer: int | None, head: int | None, model: HookedModel | None, place: Place
) -> Tensor:
    there = place.model if model is None else model
    at_layer = place.layer if layer is None else layer
    return Place(there, at_layer, place.head if head is None else head, place.kind).current


def _given(matrices: Tensor | Mapping[tuple[int, int], Tensor], place: Place) -> Tensor:
    if isinstance(matrices, Tensor):
        return matrices
    if (place.layer, place.head) not in matrices:
        raise InputError(
            f"no matrix is given for layer {place.layer}, {place.axis} {place.head}; there are "
            f"some for (layer, {place.axis}) in {sorted(matrices)}."
        )
    return matrices[place.layer, place.head]


def _computed(function: Callable[[HookedModel, int, int], Tensor], place: Place) -> Tensor:
    return function(place.model, place.layer, place.head)


def _matched(source: Source, place: Place) -> Tensor:
    now = place.current
    return concept_memory.matched(source.matrix(place).to(now), now)


def _matched_inner(source: Source, place: Place) -> Tensor:
    whole, inner = _matched(source, place), source.inner(place)
    return inner * (
        torch.linalg.matrix_norm(whole) / torch.linalg.matrix_norm(source.matrix(place))
    )


def _model_hash(model: HookedModel) -> str:
    """The name of a model and a hash of all its value and output matrices."""
    digest = hashlib.sha256()
    for layer, head in sites.choose(model).pairs:
        circuit = ov_circuit(model, layer, head)
        digest.update(f"{tensor_hash(circuit.A)} {tensor_hash(circuit.B)}".encode())
    return f"{model.cfg.model_name}:{digest.hexdigest()[:16]}"


def _at_least_float32(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


class MadeMatrices:
    """What a source has made for a probe, for as long as the weights of their model do not change.

    A singular value decomposition per batch would cost more than the batch. Copies start empty.
    """

    def __init__(self) -> None:
        self._of_model: WeakKeyDictionary[Any, tuple[Any, dict[tuple[int, int], Tensor]]]
        self._of_model = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return MadeMatrices, ()

    def of(
        self,
        make: Callable[[Place], Tensor],
        model: HookedModel,
        kind: MatrixKind,
        sites: Sites,
    ) -> dict[int, dict[int, Tensor]]:
        """What is made for all sites: layer -> head -> matrix; always by the same function.

        Raises:
            InputError: It has no matrix that fits.
        """
        state = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()
        )
        seen, made = self._of_model.get(model, (None, {}))
        if seen != state:
            made = {}
            self._of_model[model] = (state, made)
        for layer, head in sites.pairs:
            if (layer, head) not in made:
                made[layer, head] = make(Place(model, layer, head, kind))
        return {
            layer: {head: made[layer, head] for head in heads}
            for layer, heads in sites.by_layer.items()
        }
