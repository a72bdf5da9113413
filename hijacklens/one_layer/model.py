"""The one-layer transformer of the paper as a hooked model (equation 4.1).

    f(x) = [W_E^T W_V attn(W_E x)] at the last position,
    attn(U) = U softmax((W_K U)^T (W_Q U) / sqrt(d_a))

One head, embeddings tied with the unembedding; no residual stream, no normalisation, no MLP, no
positions. All matrices here act on row vectors, as in TransformerLens: the paper writes tokens
as columns, so its W_E, W_Q, W_K and W_V are the transposes of these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from hijacklens.errors import InputError, unknown
from hijacklens.files import write_json, write_whole
from hijacklens.one_layer import fast_path
from hijacklens.one_layer.architecture import (
    DTYPES,
    NAMES,
    PART_OF,
    OneLayerConfig,
    OneLayerWeights,
)
from hijacklens.one_layer.task import check_tokens

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
KIND = "hijacklens one-layer transformer"
LACKING = {
    **dict.fromkeys(("n_key_value_heads", "d_mlp", "normalization_type")),
    **dict.fromkeys(("parallel_attn_mlp", "use_attn_result", "use_attn_in"), False),
    **dict.fromkeys(("use_split_qkv_input", "final_rms", "default_prepend_bos"), False),
}
"""What the model does not have, by TransformerLens' names."""
NAME_A_FOLDER = "Name a folder that OneLayerTransformer.save or `hijacklens train` wrote."


class Embedding(nn.Module):
    """The embedding table, `embed.W_E` [vocab, d_model]; its transpose unembeds."""

    def __init__(self, W_E: Tensor) -> None:
        super().__init__()
        self.W_E = nn.Parameter(W_E)


class Inlet(nn.Module):
    """The input of a linear map, by the bridge's name."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_in = HookPoint()


class Head(nn.Module):
    """The one head. Weights have TransformerLens' shape [head, d_model, width]."""

    W_O: Tensor

    def __init__(self, W_Q: Tensor, W_K: Tensor, W_V: Tensor) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(w[None].clone()) for w in (W_Q, W_K, W_V))
        # Equation 4.1 has no output matrix; tools that need one get the identity.
        identity = torch.eye(W_V.shape[-1], dtype=W_V.dtype, device=W_V.device)[None]
        self.register_buffer("W_O", identity, persistent=False)
        self.q, self.k, self.v = Inlet(), Inlet(), Inlet()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what each position reads from itself and the positions before it."""
        q = self.hook_q(torch.einsum("bpd,hde->bphe", self.q.hook_in(x), self.W_Q))
        k = self.hook_k(torch.einsum("bpd,hde->bphe", self.k.hook_in(x), self.W_K))
        v = self.hook_v(torch.einsum("bpd,hde->bphe", self.v.hook_in(x), self.W_V))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / self.W_Q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = self.hook_attn_scores(scores.masked_fill(later, -torch.inf))
        z = torch.einsum("bhqk,bkhe->bqhe", self.hook_pattern(scores.softmax(-1)), v)
        return torch.einsum("bqhe,hed->bqd", self.hook_z(z), self.W_O)


class Block(nn.Module):
    """The head as a TransformerLens block, without norm, residual stream or MLP."""

    def __init__(self, attn: Head) -> None:
        super().__init__()
        self.attn = attn
        self.hook_resid_pre, self.hook_attn_out = HookPoint(), HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the output of the head; nothing is added to it, as there is no residual stream."""
        return self.hook_resid_post(self.hook_attn_out(self.attn(self.hook_resid_pre(x))))


class OneLayerTransformer(HookedRootModule):
    """Equation 4.1 with TransformerLens hooks.

    It is a `hijacklens.models.hooked.HookedModel`, in evaluation mode, as it has no dropout. Hook
    points have TransformerLens' names and shapes, so a probe written for GPT-2 runs on it:

        hook_embed -> blocks.0.hook_resid_pre                  [batch, pos, d_model]
          -> blocks.0.attn.{q,k,v}.hook_in                     [batch, pos, d_model]
          -> blocks.0.attn.hook_q, hook_k, hook_v              [batch, pos, head, d_attn or d_model]
          -> blocks.0.attn.hook_attn_scores, hook_pattern      [batch, head, query, key]
          -> blocks.0.attn.hook_z                              [batch, pos, head, d_model]
          -> blocks.0.hook_attn_out = blocks.0.hook_resid_post [batch, pos, d_model]
          -> unembed.hook_in -> logits                         [batch, pos, vocab]

    A causal mask is applied, as in every language model here, so the logits at position l are those
    of the context of the first l tokens. At the last position, the only one that the paper reads,
    the mask covers nothing, and the softmax runs over the complete context as in equation 4.1.

    Cost: O(batch pos^2 d), and a pattern [batch, pos, pos]; `last_logits` is much faster.
    """

    def __init__(self, config: OneLayerConfig) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(config.seed)

        def gaussian(rows: int, columns: int) -> Tensor:
            values = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
            return (values * config.std).to(DTYPES[config.dtype])

        d = config.d_model
        W_E, W_Q, W_K = gaussian(config.vocab, d), gaussian(d, config.d_a), gaussian(d, config.d_a)
        W_V = gaussian(d, d)
        if config.value_init == "identity":
            W_V = torch.eye(d, dtype=W_V.dtype)
        self.config = config
        self.tokenizer = None  # TransformerLens' tools look for it
        self.embed, self.hook_embed = Embedding(W_E), HookPoint()
        attn = Head(W_Q, W_K, W_V)
        self.blocks = nn.ModuleList([Block(attn)])
        self.unembed = Inlet()
        for name, part in PART_OF.items():
            if part in config.freeze:
                getattr(self.embed if name == "W_E" else attn, name).requires_grad_(False)
        self.setup()  # names the hook points
        self.eval()

    @classmethod
    def from_weights(
        cls, weights: OneLayerWeights, *, length: int = 256, freeze: Sequence[str] = ()
    ) -> OneLayerTransformer:
        """Return a model with copies of these weights, on their device.

        `OneLayerTransformer.from_weights(memory.theorem_1(task))` is the model of Theorem 1.

        Raises:
            InputError: The shapes or dtypes of the matrices do not agree.
        """
        vocab, d_model = weights.W_E.shape
        config = OneLayerConfig(
            vocab=vocab,
            d_model=d_model,
            d_attn=weights.W_Q.shape[-1],
            length=length,
            freeze=freeze,
            dtype=str(weights.W_E.dtype).removeprefix("torch."),
        )
        model = cls(config).to(weights.W_E.device)
        model.fill(weights, source="from_weights")
        return model

    @property
    def attention(self) -> Head:
        """The one attention head, `blocks[0].attn`."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attn

    @property
    def cfg(self) -> SimpleNamespace:
        """The entries that TransformerLens' caches and patching tools read; read-only.

        `d_head` is the width of a value, d_model, since W_V is square; `d_attn` that of a query.
        """
        config = self.config
        return SimpleNamespace(
            **LACKING,
            model_name="one-layer",
            n_layers=1,
            n_heads=1,
            attn_only=True,
            positional_embedding_type="none",
            output_logits_soft_cap=-1.0,
            d_model=config.d_model,
            d_head=config.d_model,
            d_attn=config.d_a,
            attn_scale=config.d_a**0.5,
            d_vocab=config.vocab,
            d_vocab_out=config.vocab,
            n_ctx=config.length,
            dtype=self.W_E.dtype,
            device=self.W_E.device,
        )

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embeddings, a row per token."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The unembedding: W_E transposed, since the two are tied."""
        return self.W_E.mT

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """The model has no bias: zeros."""
        return self.W_E.new_zeros(self.config.vocab)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_attn"]:
        """Query matrix."""
        return self.attention.W_Q[None]

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_attn"]:
        """Key matrix."""
        return self.attention.W_K[None]

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value matrix, square; the transpose of the paper's, which acts on columns."""
        return self.attention.W_V[None]

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Equation 4.1 has no output matrix: the identity."""
        return self.attention.W_O[None]

    def forward(
        self, tokens: Int[Tensor, "batch pos"], return_type: str | None = "logits"
    ) -> Float[Tensor, "rows columns vocab"] | None:
        """Return logits [batch, pos, vocab]; at position l for the context of the first l tokens.

        With `return_type=None` it fills hooks and caches without unembedding.

        Raises:
            InputError: A token is not in the vocabulary, or `return_type` is another.
        """
        if return_type not in ("logits", None):
            raise unknown("return_type", return_type, ["logits"], "Or None for no output.")
        self._check(tokens)
        x = self.blocks[0](self.hook_embed(self.W_E[tokens]))
        if return_type is None:
            return None
        return self.unembed.hook_in(x) @ self.W_U

    def last_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """Return `model(tokens)[:, -1]` without hooks: 10 to 100 times faster (`fast_path`)."""
        self._check(tokens)
        counts = fast_path.log_counts(tokens, self.config.vocab, dtype=self.W_E.dtype)
        return fast_path.last_logits(counts, tokens[:, -1], self.weights())

    def weights(self) -> OneLayerWeights:
        """Return W_E, W_Q, W_K and W_V without layer and head axes; not copies."""
        head = self.attention
        return OneLayerWeights(W_E=self.W_E, W_Q=head.W_Q[0], W_K=head.W_K[0], W_V=head.W_V[0])

    def with_value(self, W_V: Float[Tensor, "d_model d_model"]) -> OneLayerTransformer:
        """Return a copy of the model with another value matrix and the same configuration."""
        model = OneLayerTransformer(self.config).to(self.W_E)
        model.fill(replace(self.weights(), W_V=W_V.to(self.W_E)), source="with_value")
        return model

    def run_with_cache(
        self, *args: Any, return_cache_object: bool = True, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Return the logits and a TransformerLens `ActivationCache` of all activations.

        The cache leaves the embedding out of its decompositions (`decompose_resid` and the like),
        since it reaches the output only through the head. The arguments are those of
        `HookedRootModule.run_with_cache`; `return_cache_object=False` gives a plain dict.
        """
        output, activations = super().run_with_cache(*args, **kwargs)
        if not return_cache_object:
            return output, activations
        has_batch = not kwargs.get("remove_batch_dim", False)
        cache = ActivationCache(activations, self, has_batch_dim=has_batch)
        cache.has_embed = False
        return output, cache

    def tokens_to_residual_directions(
        self, tokens: int | Int[Tensor, "*axes"]
    ) -> Float[Tensor, "*axes d_model"]:
        """Return the columns of W_U: the product with the output is the token's logit."""
        return self.W_E[tokens]

    def accumulated_bias(self, *args: Any, **kwargs: Any) -> Float[Tensor, " d_model"]:
        """Return zeros: the sum of biases that TransformerLens' decompositions need."""
        return self.W_E.new_zeros(self.config.d_model)

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `config.json`, each complete or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, write in self.files().items():
            write_whole(target / name, write)
        return target

    def files(self) -> dict[str, Callable[[Path], None]]:
        """Return file name -> function that writes it."""

        def write_weights(path: Path) -> None:
            tensors = {name: w.detach().cpu().contiguous() for name, w in self.weights().items()}
            # One entry: the order of several is not fixed, and equal models must give equal files.
            path.write_bytes(save(tensors, metadata={"kind": KIND}))

        def write_config(path: Path) -> None:
            write_json(path, {"kind": KIND, **asdict(self.config)})

        return {WEIGHTS_FILE: write_weights, CONFIG_FILE: write_config}

    @classmethod
    def load(
        cls, folder: str | Path, *, device: torch.device | str | None = None
    ) -> OneLayerTransformer:
        """Read a model that `save` wrote.

        Raises:
            InputError: A file is missing, unreadable or not of such a model, or the weights do not
                have the shapes or the dtype of the configuration.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8-sig"))
            path = path.with_name(WEIGHTS_FILE)
            weights = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"no one-layer model in {str(path.parent)!r}: {path.name} cannot be read "
                f"({error}). {NAME_A_FOLDER}"
            ) from error
        names = {field.name for field in fields(OneLayerConfig)}
        if not isinstance(record, dict) or record.pop("kind", None) != KIND or set(record) != names:
            raise InputError(
                f"{path.with_name(CONFIG_FILE)} is not the configuration of a one-layer model. "
                f"{NAME_A_FOLDER}"
            )
        if set(weights) != set(NAMES):
            raise InputError(
                f"{path} holds the weights {sorted(weights)}; a one-layer model has {NAMES}."
            )
        model = cls(OneLayerConfig(**record))
        model.fill(OneLayerWeights(**weights), source=str(path))
        return model if device is None else model.to(device)

    def fill(self, weights: OneLayerWeights, *, source: str = "fill") -> None:
        """Overwrite the weights in place; `source` is their origin, for the error.

        Raises:
            InputError: A matrix has another shape or dtype.
        """
        pairs = [(name, old, getattr(weights, name)) for name, old in self.weights().items()]
        for name, old, new in pairs:
            if new.shape != old.shape or new.dtype != old.dtype:
                raise InputError(
                    f"{source}: {name} is {tuple(new.shape)} {new.dtype}; this model's "
                    f"configuration says {tuple(old.shape)} {old.dtype}."
                )
        with torch.no_grad():
            for _, old, new in pairs:
                old.copy_(new)

    def _check(self, tokens: Tensor) -> None:
        if tokens.shape[-1] == 0:
            raise InputError("one-layer model: the contexts are empty; give at least one token.")
        check_tokens("one-layer model", tokens, self.config.vocab)
