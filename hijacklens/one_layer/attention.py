"""The parts of the one-layer model: embedding, block and its one head, with hook points.

Their attributes have the names that TransformerLens gives them, since hook names and the paths
that probes take (`model.blocks[0].attn.W_V`) are made of those. Shapes and maths are in
`hijacklens.one_layer.model`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


class Embedding(nn.Module):
    """The embedding table, `embed.W_E` [vocab, d_model]; its transpose unembeds."""

    def __init__(self, W_E: Tensor) -> None:
        super().__init__()
        self.W_E = nn.Parameter(W_E)


class Inlet(nn.Module):
    """The input of a linear map, under the bridge's name: `unembed.hook_in`, `attn.v.hook_in`."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_in = HookPoint()


class Head(nn.Module):
    """The one head. Weights have TransformerLens' shape [head, d_model, width]."""

    W_O: Tensor

    def __init__(self, W_Q: Tensor, W_K: Tensor, W_V: Tensor) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(w[None].clone()) for w in (W_Q, W_K, W_V))
        # Equation 4.1 has no output matrix; tools that ask for one get the identity.
        identity = torch.eye(W_V.shape[-1], dtype=W_V.dtype, device=W_V.device)[None]
        self.register_buffer("W_O", identity, persistent=False)
        self.q, self.k, self.v = Inlet(), Inlet(), Inlet()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What each position reads from itself and those before it."""
        q = self.hook_q(torch.einsum("bpd,hde->bphe", self.q.hook_in(x), self.W_Q))
        k = self.hook_k(torch.einsum("bpd,hde->bphe", self.k.hook_in(x), self.W_K))
        v = self.hook_v(torch.einsum("bpd,hde->bphe", self.v.hook_in(x), self.W_V))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / self.W_Q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = self.hook_attn_scores(scores.masked_fill(later, -torch.inf))
        z = torch.einsum("bhqk,bkhe->bqhe", self.hook_pattern(scores.softmax(-1)), v)
        return torch.einsum("bqhe,hed->bqd", self.hook_z(z), self.W_O)


class Block(nn.Module):
    """The head as a TransformerLens block: nothing around it, no norm, no residual, no MLP."""

    def __init__(self, attn: Head) -> None:
        super().__init__()
        self.attn = attn
        self.hook_resid_pre, self.hook_attn_out = HookPoint(), HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The output of the head."""
        # Nothing is added to the output of the head: there is no residual stream.
        return self.hook_resid_post(self.hook_attn_out(self.attn(self.hook_resid_pre(x))))
