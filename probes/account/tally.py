"""The tally: numbers per read that the hooks of an account record while a batch runs.

Every part is projected on the readout as soon as it is computed, so no activation is kept: one
number per read, head and attended token for attention, one per read for an MLP. Norm scales, which
are known only later in the run, divide the numbers at the end.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.models.hooked import HookedModel, NamedHook
from probes.account.readout import Frame, Norm, Readout


class Tally:
    """The numbers of one forward pass: call `hooks` before it and `parts` after it."""

    def __init__(
        self,
        model: HookedModel,
        frame: Frame,
        readout: Readout,
        rows: Int[Tensor, " read"],
        positions: Int[Tensor, " read"],
    ) -> None:
        self.model: Any = model
        self.frame, self.readout = frame, readout
        self.rows, self.positions = rows, positions
        self.values: dict[int, Tensor] = {}
        """Values of the running layer, until its attention pattern is known."""
        self.notes: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def hooks(self) -> list[NamedHook]:
        """Return the hooks that record the numbers, as far as this model has them."""
        final = int(self.model.cfg.n_layers)
        hooks: list[NamedHook] = [
            ("hook_pos_embed", partial(self._project, "position", 0)),
            ("blocks.0.hook_resid_pre", partial(self._project, "embedding", 0)),
            ("ln_final.hook_scale", partial(self._scale, "final_scale", 0)),
            ("unembed.hook_in", self._normed),
        ]
        for layer in range(final):
            block = f"blocks.{layer}"
            hooks += [
                (f"{block}.attn.hook_v", partial(self._values, layer)),
                (f"{block}.attn.hook_pattern", partial(self._pattern, layer)),
                (f"{block}.ln1_post.hook_scale", partial(self._scale, "attention_scale", layer)),
                (f"{block}.hook_mlp_out", partial(self._project, "mlp", layer)),
            ]
        return [hook for hook in hooks if hook[0] in self.model.hook_dict]

    def _at_reads(self, value: Tensor) -> Tensor:
        rows, positions = self.rows.to(value.device), self.positions.to(value.device)
        if value.shape[0] == 1:  # one row of positions for the whole batch
            rows = torch.zeros_like(rows)
        return value[rows, positions]

    def _project(self, name: str, layer: int, value: Tensor, hook: Any) -> None:
        pulled = self.readout.pulled.to(value.device)
        self.notes[name][layer] = (self._at_reads(value).to(pulled.dtype) * pulled).sum(-1)

    def _scale(self, name: str, layer: int, value: Tensor, hook: Any) -> None:
        self.notes[name][layer] = self._at_reads(value)[..., 0]

    def _normed(self, value: Tensor, hook: Any) -> None:
        added = self.readout.soft_cap(self._at_reads(value), self.frame.soft_cap)
        self.notes["soft_cap"][0] = added

    def _values(self, layer: int, value: Tensor, hook: Any) -> None:
        self.values[layer] = value

    def _pattern(self, layer: int, pattern: Tensor, hook: Any) -> None:
        """Project what each head reads from each attended token.

        values  [row, pos, kv_head, d_head]
        pattern [row, head, query, key], read at one query of a row: weight [read, head, pos]
        """
        attn = self.model.blocks[layer].attn
        v = self.values.pop(layer)
        norm = self.frame.after_attention[layer]
        pulled = self.readout.pulled.to(v.device)
        pulled = pulled if norm is None else norm.pull(pulled)
        W_O = attn.W_O.to(v.device, pulled.dtype)  # [head, d_head, d_model]
        through_head = torch.einsum("hed,rd->rhe", W_O, pulled)
        n_heads, n_kv = W_O.shape[0], v.shape[2]
        grouped = through_head.unflatten(1, (n_kv, n_heads // n_kv))
        rows, positions = self.rows.to(v.device), self.positions.to(v.device)
        read = torch.einsum("rjke,rkge->rkgj", v.to(pulled.dtype)[rows], grouped).flatten(1, 2)
        weight = pattern[rows, :, positions].to(pulled)
        b_V = getattr(attn, "b_V", None)
        per_head = torch.zeros_like(through_head[..., 0])
        if b_V is not None:
            bias = b_V.to(pulled).reshape(-1, W_O.shape[1])
            bias = bias.repeat_interleave(n_heads // len(bias), dim=0)
            per_head = (through_head * bias).sum(-1)
        self.notes["attention"][layer] = weight * (read - per_head[..., None])
        self.notes["value_bias"][layer] = weight.sum(-1) * per_head
        b_O = getattr(attn, "b_O", None)
        from_bias = torch.zeros_like(per_head[:, 0])
        if b_O is not None:
            from_bias = pulled @ b_O.to(pulled)
        self.notes["output_bias"][layer] = from_bias

    def parts(self, normaliser: Float[Tensor, " read"]) -> dict[str, np.ndarray]:
        """Return the parts of `Account` [read, ...] in float64, divided by the norms' scales."""
        layers = range(int(self.model.cfg.n_layers))
        reads = len(self.rows)

        def note(name: str, layer: int = 0, missing: float = 0.0) -> np.ndarray:
            value = self.notes[name].get(layer)
            return np.full(reads, missing) if value is None else value.cpu().double().numpy()

        final = note("final_scale", missing=1.0)
        stacks: dict[str, list[np.ndarray]] = defaultdict(list)
        for layer in layers:
            down = note("attention_scale", layer, missing=1.0) * final
            for name in ("attention", "value_bias", "output_bias"):
                part = note(name, layer)
                stacks[name].append(part / down.reshape(-1, *(1,) * (part.ndim - 1)))
            norm: Norm | None = self.frame.after_attention[layer]
            if norm is not None:  # its bias is added after its scale
                pulled = self.readout.pulled
                shift = (pulled @ norm.bias.to(pulled)).cpu().double().numpy()
                stacks["output_bias"][-1] = stacks["output_bias"][-1] + shift / final
            stacks["mlp"].append(note("mlp", layer) / final)
        position = embedding = np.zeros(reads)
        if self.frame.residual:
            position = note("position") / final
            embedding = note("embedding") / final - position
        readout = self.readout
        stacks["single"] = [
            embedding,
            position,
            readout.norm_bias.cpu().double().numpy(),
            (readout.plus_bias - readout.minus_bias).cpu().double().numpy(),
            note("soft_cap"),
            normaliser.cpu().double().numpy(),
        ]
        return {name: np.stack(arrays, 1) for name, arrays in stacks.items()}
