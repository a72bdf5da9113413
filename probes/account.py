"""The account of a logit difference: what every part of the model wrote to it, in logits.

    D = logit(o_) - logit(o*)   where the answer is read
      =   sum over layers, heads and attended tokens    pattern[last, j] (v_j - b_V) W_O
        + value biases through the heads, output biases of attention, MLPs with their biases
        + embedding, position, bias of the final norm, bias of the unembedding, soft-cap

Norms divide by a scale that depends on the complete stream; with the scales frozen at their values
in this run they are linear (`Norm`, `Readout`). The parts say what was *written directly* to the
difference in this run, not what would happen without them.

Contract 4: the parts sum to the difference of the logits that the model itself gives, within 1e-4
of it in float32; `residual` is the rest.

Cost: one forward pass for a batch of prompts. Every part is projected on the readout as soon as it
is computed, so only the values of one layer at a time are kept, and a number per read, layer, head
and attended token.

>>> from hijacklens.one_layer.model import OneLayerConfig
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> account = accounts(model, [Question((1, 5, 2, 5), position=3, plus=3, minus=1)])[0]
>>> account.attention.shape, abs(account.residual) < 1e-6
((1, 1, 4), True)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import TokenBatch, batch_size, batches
from hijacklens.errors import InputError
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedModel, NamedHook, device_of
from hijacklens.models.verification import require_agreement
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.results.glance import Glance, Grid, Shown

READ_VALUES = 2**26
"""At most this many logits (reads x vocabulary) at once: a quarter of a GiB in float32."""
PROBE_SIZE = 16.0
"""Large enough that a norm's epsilon is negligible (1e-5 of 256), small enough for float16."""
SINGLE = ("embedding", "position", "norm_bias", "unembed_bias", "soft_cap", "normaliser")
"""The parts outside the layers."""
PARTS = ("attention", "value_bias", "output_bias", "mlp", "single")
"""The fields of an `Account` that sum to the difference."""


@dataclass(frozen=True, slots=True)
class Question:
    """A difference of two logits, or one log-probability, read at a position of a prompt."""

    symbols: TokenIds
    """The prompt in token ids, or in symbols (`hijacklens.prompts.layout`) if there are probes."""
    position: int
    """The position after which the next token is read."""
    plus: int
    minus: int | None
    """None accounts for the log-probability of `plus` alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Account(Shown):
    """The parts of one difference, in logits."""

    attention: Float[np.ndarray, "layer head pos"]
    """By layer, query head and attended token; zero after the position that is read."""
    value_bias: Float[np.ndarray, "layer head"]
    """b_V through a head: independent of the tokens if the attention sums to one."""
    output_bias: Float[np.ndarray, " layer"]
    """b_O, and the bias of a norm after attention."""
    mlp: Float[np.ndarray, " layer"]
    """MLP outputs with their biases."""
    single: Float[np.ndarray, " part"]
    """The parts of `SINGLE`, in its order. `normaliser` is minus the log of the softmax sum for a
    single log-probability, otherwise zero."""
    whole: float
    """The difference of the logits that the model gave."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(getattr(self, name).sum() for name in PARTS))

    @property
    def residual(self) -> float:
        """What the parts do not explain: `whole - total`, in logits."""
        return self.whole - self.total

    @property
    def by_head(self) -> Float[np.ndarray, "layer head"]:
        """What each head wrote, value bias included."""
        return self.attention.sum(-1) + self.value_bias

    def glance(self) -> Glance:
        """The difference, and its parts by kind."""
        layers, heads, tokens = self.attention.shape
        rows = [{"part": name, "sum": float(getattr(self, name).sum())} for name in PARTS]
        return Glance(
            f"{self.whole:+.2f} logits over {tokens} tokens, {layers} layers, {heads} heads · "
            f"residual {self.residual:.1e}",
            (Grid.of(rows, {"part": "{part}", "logits": "{sum:signed}"}),),
            steps=("attention", "by_head", "mlp"),
        )

    def __sub__(self, other: Account) -> Account:
        """Subtract another account of the same prompt, part by part.

        Raises:
            ValueError: The accounts are of different prompts or models.
        """
        if self.attention.shape != other.attention.shape:
            raise ValueError("accounts of different prompts cannot be subtracted token by token")
        parts = (getattr(self, name) - getattr(other, name) for name in PARTS)
        return Account(*parts, whole=self.whole - other.whole)


@exclusively
def accounts(
    model: HookedModel,
    questions: Sequence[Question],
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
    batch_tokens: int | None = None,
    advance: Callable[[float], object] = lambda fraction: None,
) -> list[Account]:
    """Account for many questions, in their order.

    The model is any hooked model whose blocks add to a residual stream (GPT-2, LLaMA, Gemma, NeoX,
    OLMo-2, ...), or the one-layer model. If a model scales its stream or its logits by constants
    (Granite, Cohere), the parts do not balance and the residual shows it. Probes act in their
    order; any change of values and patterns is accounted for, changes after them show in the
    residual. `spans` are those that the bits of the symbols mark, `batch_tokens` counts padding,
    and `advance` is called after each batch with its fraction of the work.

    Raises:
        InputError: The model has no attention hooks or is in training mode, a question has no
            tokens, or a position outside its prompt.
    """
    require_agreement(model, operation="an account of logits")
    for question in questions:
        if not 0 <= question.position < len(question.symbols):
            raise InputError(
                f"position {question.position} is not one of the {len(question.symbols)} tokens "
                "of its prompt; give one from 0."
            )
    for i, hook in product(range(int(model.cfg.n_layers)), ("hook_v", "hook_pattern")):
        if (name := f"blocks.{i}.attn.{hook}") not in model.hook_dict:
            raise InputError(
                f"the model {model.cfg.model_name!r} has no hook {name!r}; an account needs "
                "values and attention patterns in every layer."
            )
    active, device, frame = check_probes(probes), device_of(model), _Frame(model)
    limit = batch_size(device, batch_tokens)
    max_rows = max(1, READ_VALUES // int(model.cfg.d_vocab))
    total = sum(len(question.symbols) for question in questions)
    # Under a probe that does not pack, only prompts of one length share a batch.
    packs = all(probe.packs for probe in active)
    lengths = [0 if packs else len(question.symbols) for question in questions]
    results: dict[int, Account] = {}
    for length in sorted(set(lengths)):
        group = [i for i, other in enumerate(lengths) if other == length]
        rows = [questions[i].symbols for i in group]
        for batch in batches(rows, device=device, limit=limit, most_rows=max_rows):
            members = [group[i] for i in batch.members]
            in_batch = [questions[i] for i in members]
            parts = _run(model, frame, in_batch, batch, active, spans)
            results.update(zip(members, parts, strict=True))
            advance(sum(len(question.symbols) for question in in_batch) / total)
    return [results[i] for i in range(len(questions))]


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm or RMS norm without its scale: `norm(x) = weight * (C x) / scale + bias`.

    C subtracts the mean for a layer norm and is the identity for an RMS norm.

    >>> norm = Norm(weight=torch.tensor([1.0, 2.0]), bias=torch.zeros(2), centred=True)
    >>> norm.pull(torch.tensor([[3.0, 2.0]]))     # (3, 4) without its mean
    tensor([[-0.5000,  0.5000]])
    """

    weight: Float[Tensor, " d_model"]
    """The effective weight: 1 + w for Gemma, ones if the weight is folded into the next matrix."""
    bias: Float[Tensor, " d_model"]
    centred: bool

    @classmethod
    def of(cls, module: Any, width: int, like: Tensor) -> Norm:
        """Measure what a norm module does by applying it to three vectors [1, 1, width].

        This works whatever the name, offset or folding of the weight. The vectors have the dtype of
        `like`, a tensor of the model.
        """
        device = next(iter(module.parameters()), like).device
        signs = torch.ones(width, dtype=like.dtype, device=device)
        signs[1::2] = -1
        if width % 2:
            signs[-3:] = signs.new_tensor([2, -1, -1])  # the mean stays zero
        rows = torch.stack([torch.zeros_like(signs), signs, torch.ones_like(signs)]) * PROBE_SIZE
        with torch.inference_mode():
            bias, along, flat = (module(row[None, None])[0, 0].float() for row in rows)
        signs = signs.float()
        weight = (along - bias) * signs.pow(2).mean().sqrt() / signs
        centred = bool((flat - bias).abs().max() < 0.1 * weight.abs().max())
        return cls(weight.clone(), bias.clone(), centred)

    def pull(self, direction: Float[Tensor, "read d_model"]) -> Float[Tensor, "read d_model"]:
        """Map a direction on the output to the one on the input that reads the same times scale.

        The norm's bias is left out.
        """
        weighted = direction * self.weight.to(direction.device)
        return weighted - weighted.mean(-1, keepdim=True) if self.centred else weighted


class _Frame:
    """What the readout needs of a model besides its activations; made once per model."""

    def __init__(self, model: HookedModel) -> None:
        like = next(iter(model.parameters())).new_empty(0, device=device_of(model))

        def norm(owner: Any, path: str) -> Norm | None:
            if f"{path}.hook_scale" not in model.hook_dict:
                return None
            return Norm.of(getattr(owner, path.split(".")[-1]), int(model.cfg.d_model), like)

        untyped: Any = model
        blocks = range(int(model.cfg.n_layers))
        self.final = norm(model, "ln_final")
        self.after_attention = [norm(untyped.blocks[i], f"blocks.{i}.ln1_post") for i in blocks]
        """Layer -> the norm on the output of attention (Gemma-2 and -3)."""
        self.soft_cap = float(getattr(model.cfg, "output_logits_soft_cap", None) or 0)
        """Logits become `soft_cap * tanh(logits / soft_cap)`, if it is above 0."""
        self.residual = not isinstance(model, OneLayerTransformer)
        """Whether the embedding reaches the output."""


@dataclass(frozen=True, slots=True)
class _Readout:
    """Reads of `logit(plus) - logit(minus)` as linear maps, or of `logit(plus)` alone.

    With the final scale frozen `D = x . pulled / scale + norm_bias + biases[0] - biases[1]`, where
    x is the residual stream at the position that is read.
    """

    columns: Float[Tensor, "2 read d_model"]
    """Columns of W_U for plus and minus, zeros without minus."""
    biases: Float[Tensor, "2 read"]
    pulled: Float[Tensor, "read d_model"]
    norm_bias: Float[Tensor, " read"]
    """What the final norm's bias adds to the difference."""

    @classmethod
    def of(cls, model: HookedModel, frame: _Frame, questions: Sequence[Question]) -> _Readout:
        untyped: Any = model
        device, W_U, b_U = device_of(model), untyped.W_U, untyped.b_U
        tokens = torch.tensor([[q.plus for q in questions], [q.minus or 0 for q in questions]])
        minus_counts = torch.tensor([q.minus is not None for q in questions], device=device)
        with torch.inference_mode():
            dtype = torch.promote_types(W_U.dtype, torch.float32)
            counts = torch.stack([torch.ones_like(minus_counts), minus_counts]).to(dtype)
            columns = W_U.T[tokens.to(W_U.device)].to(device, dtype) * counts[..., None]
            biases = torch.zeros_like(counts)
            if b_U is not None:
                biases = b_U[tokens.to(b_U.device)].to(device, dtype) * counts
            pulled = columns[0] - columns[1]
            norm_bias = torch.zeros_like(biases[0])
            if frame.final is not None:
                norm_bias = pulled @ frame.final.bias.to(device, dtype)
                pulled = frame.final.pull(pulled)
            return cls(columns, biases, pulled, norm_bias)


class _Tally:
    """The numbers of one forward pass: call `hooks` before it and `parts` after it.

    Norm scales, which are known only later in the run, divide the numbers at the end.
    """

    def __init__(
        self, model: HookedModel, frame: _Frame, readout: _Readout, positions: Tensor
    ) -> None:
        self.model: Any = model
        self.frame, self.readout, self.positions = frame, readout, positions
        self.values: dict[int, Tensor] = {}
        """Values of the running layer, until its attention pattern is known."""
        self.notes: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def hooks(self) -> list[NamedHook]:
        """Return the hooks that record the numbers, as far as this model has them."""
        hooks: list[NamedHook] = [
            ("hook_pos_embed", partial(self._project, "position", 0)),
            ("blocks.0.hook_resid_pre", partial(self._project, "embedding", 0)),
            ("ln_final.hook_scale", partial(self._scale, "final_scale", 0)),
            ("unembed.hook_in", self._normed),
        ]
        for layer in range(int(self.model.cfg.n_layers)):
            block = f"blocks.{layer}"
            hooks += [
                (f"{block}.attn.hook_v", partial(self._values, layer)),
                (f"{block}.attn.hook_pattern", partial(self._pattern, layer)),
                (f"{block}.ln1_post.hook_scale", partial(self._scale, "attention_scale", layer)),
                (f"{block}.hook_mlp_out", partial(self._project, "mlp", layer)),
            ]
        return [hook for hook in hooks if hook[0] in self.model.hook_dict]

    def _at_reads(self, value: Tensor) -> Tensor:
        positions = self.positions.to(value.device)
        if value.shape[0] == 1:  # one row of positions for the whole batch
            return value[0, positions]
        return value[torch.arange(len(positions), device=value.device), positions]

    def _project(self, name: str, layer: int, value: Tensor, hook: Any) -> None:
        pulled = self.readout.pulled.to(value.device)
        self.notes[name][layer] = (self._at_reads(value).to(pulled.dtype) * pulled).sum(-1)

    def _scale(self, name: str, layer: int, value: Tensor, hook: Any) -> None:
        self.notes[name][layer] = self._at_reads(value)[..., 0]

    def _normed(self, value: Tensor, hook: Any) -> None:
        """Note what the final soft-cap, which is not linear, adds to the difference."""
        cap = self.frame.soft_cap
        if cap > 0:
            columns = self.readout.columns
            logits = (self._at_reads(value).to(columns) * columns).sum(-1) + self.readout.biases
            plus, minus = cap * torch.tanh(logits / cap) - logits
            self.notes["soft_cap"][0] = plus - minus

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
        read = torch.einsum("rjke,rkge->rkgj", v.to(pulled.dtype), grouped).flatten(1, 2)
        rows = torch.arange(len(v), device=v.device)
        weight = pattern[rows, :, self.positions.to(v.device)].to(pulled)
        b_V, b_O = getattr(attn, "b_V", None), getattr(attn, "b_O", None)
        per_head = torch.zeros_like(through_head[..., 0])
        if b_V is not None:
            bias = b_V.to(pulled).reshape(-1, W_O.shape[1])
            bias = bias.repeat_interleave(n_heads // len(bias), dim=0)
            per_head = (through_head * bias).sum(-1)
        self.notes["attention"][layer] = weight * (read - per_head[..., None])
        self.notes["value_bias"][layer] = weight.sum(-1) * per_head
        if b_O is not None:
            self.notes["output_bias"][layer] = pulled @ b_O.to(pulled)

    def parts(self, normaliser: Float[Tensor, " read"]) -> dict[str, np.ndarray]:
        """Return the parts of `Account` [read, ...] in float64, divided by the norms' scales."""
        readout = self.readout

        def note(name: str, layer: int = 0, missing: float = 0.0) -> np.ndarray:
            value = self.notes[name].get(layer)
            return np.full(len(self.positions), missing) if value is None else _float64(value)

        final = note("final_scale", missing=1.0)
        stacks: dict[str, list[np.ndarray]] = defaultdict(list)
        for layer, norm in enumerate(self.frame.after_attention):
            down = note("attention_scale", layer, missing=1.0) * final
            for name in ("attention", "value_bias", "output_bias"):
                stacks[name].append((note(name, layer).T / down).T)
            if norm is not None:  # its bias is added after its scale
                shift = _float64(readout.pulled @ norm.bias.to(readout.pulled))
                stacks["output_bias"][-1] += shift / final
            stacks["mlp"].append(note("mlp", layer) / final)
        position, embedding = note("position") / final, note("embedding") / final
        single = [
            (embedding - position) * self.frame.residual,
            position * self.frame.residual,
            _float64(readout.norm_bias),
            _float64(readout.biases[0] - readout.biases[1]),
            note("soft_cap"),
            _float64(normaliser),
        ]
        stacks["single"] = single
        return {name: np.stack(arrays, 1) for name, arrays in stacks.items()}


def _float64(value: Tensor) -> np.ndarray:
    return value.cpu().double().numpy()


def _run(
    model: HookedModel,
    frame: _Frame,
    questions: Sequence[Question],
    batch: TokenBatch,
    probes: Sequence[Probe],
    spans: Sequence[str],
) -> list[Account]:
    """Account for one batch, a row for each question."""
    rows = torch.arange(len(questions), device=batch.symbols.device)
    positions = torch.tensor([question.position for question in questions], device=rows.device)
    tally = _Tally(model, frame, _Readout.of(model, frame, questions), positions)
    reader = HookProbe("account", tally.hooks(), packs=True)
    layout = Layout.of_symbols(batch.symbols, spans)
    logits = logits_at(model, layout, rows, positions, probes=[*probes, reader])
    # Only the logits of the questions leave the device, which may not have float64.
    plus = logits[rows, [question.plus for question in questions]].cpu().double()
    minus = logits[rows, [question.minus or 0 for question in questions]].cpu().double()
    single = torch.tensor([question.minus is None for question in questions])
    norm = torch.zeros_like(plus)
    if single.any():
        norm = torch.where(single, logits.float().logsumexp(-1).cpu().double(), norm)
    whole = plus - torch.where(single, 0.0, minus) - norm
    parts = tally.parts(normaliser=0 - norm)
    results = []
    for i, question in enumerate(questions):
        of_read = {name: part[i] for name, part in parts.items()}
        of_read["attention"] = of_read["attention"][..., : len(question.symbols)]  # no padding
        results.append(Account(**of_read, whole=float(whole[i])))
    return results
