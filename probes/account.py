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

>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> account = accounts(model, [Question((1, 5, 2, 5), position=3, plus=3, minus=1)])[0]
>>> account.attention.shape, abs(account.residual) < 1e-6
((1, 1, 4), True)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batch_size import read_values
from hijacklens.engine.batches import TokenBatch, batches
from hijacklens.errors import InputError
from hijacklens.models.agreement import require_agreement
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedModel, NamedHook, device_of
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.results.glance import Glance, Grid, Shown
from probes.anatomy import Anatomy, Pulled, anatomy_of
from probes.anatomy.matrices import head_matrices
from probes.anatomy.norms import Norm
from probes.values import removed_biases

SINGLE = ("embedding", "position", "norm_bias", "unembed_bias", "soft_cap", "normaliser", "other")
"""The parts that belong to no layer, and `other`: what layers add to the stream that is neither a
head nor an MLP, such as state-space mixers."""
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
    """b_V through a head, unless a probe of `values` removed it: independent of the tokens if the
    attention sums to one."""
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

    The model is the one-layer model or any hooked model whose layers add to a residual stream; how
    they do is measured first (`probes.anatomy`). Probes act in their order. Changes of values and
    patterns are accounted for; changes after them show in the residual. `spans` are those that the
    bits of the symbols mark, `batch_tokens` counts padding, and `advance` is called after each
    batch with its fraction of the work.

    Raises:
        InputError: The model's logits are no sum that its hooks show, or it is in training mode; a
            question has no tokens, or a position outside its prompt.
    """
    require_agreement(model, operation="an account of logits")
    for question in questions:
        if not 0 <= question.position < len(question.symbols):
            raise InputError(
                f"position {question.position} is not one of the {len(question.symbols)} tokens "
                "of its prompt; give one from 0."
            )
    active, device = check_probes(probes), device_of(model)
    if not questions:
        return []
    tokens = Layout.of_symbols(torch.tensor([questions[0].symbols]), spans).tokens[0]
    anatomy = anatomy_of(model, tokens.tolist())
    max_rows = max(1, read_values(device) // int(model.cfg.d_vocab))
    total = sum(len(question.symbols) for question in questions)
    packs = all(probe.packs for probe in active)
    rows = [question.symbols for question in questions]
    results: dict[int, Account] = {}
    for batch in batches(model, rows, limit=batch_tokens, most_rows=max_rows, one_length=not packs):
        in_batch = [questions[i] for i in batch.members]
        parts = _run(model, anatomy, in_batch, batch, active, spans)
        results.update(zip(batch.members, parts, strict=True))
        advance(sum(len(question.symbols) for question in in_batch) / total)
    return [results[i] for i in range(len(questions))]


@dataclass(frozen=True, slots=True)
class _Readout:
    """Reads of `logit(plus) - logit(minus)` as linear maps, or of `logit(plus)` alone.

    With the final scale frozen `D = x . pulled / scale + norm_bias + biases[0] - biases[1]`, where
    x is the residual stream at the position that is read.
    """

    columns: Float[Tensor, "2 read width"]
    """Columns of W_U for plus and minus, zeros without minus."""
    biases: Float[Tensor, "2 read"]
    directions: Pulled
    norm_bias: Float[Tensor, " read"]
    """What the final norm's bias adds to the difference."""

    @classmethod
    def of(cls, model: HookedModel, anatomy: Anatomy, questions: Sequence[Question]) -> _Readout:
        untyped: Any = model
        device, W_U, b_U = device_of(model), untyped.W_U, untyped.b_U
        tokens = torch.tensor([[q.plus for q in questions], [q.minus or 0 for q in questions]])
        minus_counts = torch.tensor([q.minus is not None for q in questions], device=device)
        with torch.inference_mode():
            dtype = torch.promote_types(W_U.dtype, torch.float32)
            counts = torch.stack([torch.ones_like(minus_counts), minus_counts]).to(dtype)
            counts = counts * anatomy.logit_scale
            columns = W_U.T[tokens.to(W_U.device)].to(device, dtype) * counts[..., None]
            biases = torch.zeros_like(counts)
            if b_U is not None:
                biases = b_U[tokens.to(b_U.device)].to(device, dtype) * counts
            read, norm_bias = columns[0] - columns[1], torch.zeros_like(biases[0])
            if anatomy.final is not None:
                norm_bias = anatomy.projected(read) @ anatomy.final.bias.to(device, dtype)
            return cls(columns, biases, anatomy.pulled(read), norm_bias)


class _Tally:
    """The numbers of one forward pass: call `hooks` before it and `parts` after it.

    Norm scales, which are known only later in the run, divide the numbers at the end.
    """

    def __init__(
        self,
        model: HookedModel,
        anatomy: Anatomy,
        readout: _Readout,
        positions: Tensor,
        removed: Collection[tuple[int, int]],
    ) -> None:
        self.model: Any = model
        self.removed = removed
        """Layer and key/value head of the values that have no b_V."""
        self.anatomy, self.readout, self.positions = anatomy, readout, positions
        self.values: dict[int, Tensor] = {}
        """Layer -> values, as long as a layer still reads them."""
        self.waiting: dict[int, dict[str, Tensor]] = defaultdict(dict)
        """Layer -> pattern and, for gated heads, z, until both are known."""
        self.notes: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def hooks(self) -> list[NamedHook]:
        """Return the hooks that record the numbers, as far as this model has them."""
        layers, before = self.anatomy.layers, self.readout.directions.before
        hooks: list[NamedHook] = [
            ("hook_pos_embed", partial(self._project, "position", 0, before[0])),
            ("blocks.0.hook_resid_pre", partial(self._project, "embedding", 0, before[0])),
            *self._scales("ln_final", self.anatomy.final, "final_scale", 0),
            ("unembed.hook_in", self._normed),
        ]
        if any(form.other for form in layers):
            end = partial(self._project, "stream", len(layers), self.readout.directions.at_end)
            hooks.append((self.anatomy.stream_end, end))
        for layer, form in enumerate(layers):
            block, direction = f"blocks.{layer}", before[layer]
            if layer in {other.values_of for other in layers if other.attends}:
                hooks.append((f"{block}.attn.{form.values}", partial(self._values, layer)))
            if form.attends:
                needed = ("pattern", "z") if form.gated else ("pattern",)
                hooks += [
                    (f"{block}.attn.hook_{name}", partial(self._heads, layer, name))
                    for name in needed
                ]
                norm = form.after_attention
                hooks += self._scales(f"{block}.ln1_post", norm, "attention_scale", layer)
            middle = self.readout.directions.middle[layer]
            for i, name in enumerate(form.mlps):
                mlp = partial(self._project, f"mlp {i}", layer, middle)
                hooks.append((name, mlp))
            if form.post is not None:
                for name, norm in zip(("ln1", "ln2"), form.post, strict=True):
                    hooks += self._scales(f"{block}.{name}", norm, name, layer)
            if form.other:
                stream = partial(self._project, "stream", layer, direction)
                hooks.append((f"{block}.hook_in", stream))
                if layer + 1 < len(layers):
                    stream = partial(self._project, "stream", layer + 1, before[layer + 1])
                    hooks.append((f"blocks.{layer + 1}.hook_in", stream))
        return [hook for hook in hooks if hook[0] in self.anatomy.hook_names]

    def _at_reads(self, value: Tensor) -> Tensor:
        positions = self.positions.to(value.device)
        if value.shape[0] == 1:  # one row of positions for the whole batch
            return value[0, positions]
        return value[torch.arange(len(positions), device=value.device), positions]

    def _project(self, name: str, layer: int, pulled: Tensor, value: Tensor, hook: Any) -> None:
        pulled = pulled.to(value.device)
        self.notes[name][layer] = (self._at_reads(value).to(pulled.dtype) * pulled).sum(-1)

    def _scales(self, path: str, norm: Norm | None, name: str, layer: int) -> list[NamedHook]:
        """Return the hooks that note the scale of a norm, from its input and output if need be."""
        if norm is None:
            return []
        if f"{path}.hook_scale" in self.anatomy.hook_names:
            return [(f"{path}.hook_scale", partial(self._scale, name, layer))]
        seen: list[Tensor] = []

        def keep_input(value: Tensor, hook: Any) -> None:
            seen[:] = [self._at_reads(value).float()]

        def note_scale(value: Tensor, hook: Any) -> None:
            unscaled = norm.apply(seen.pop())
            output = self._at_reads(value).float() - norm.bias.to(value.device)
            square = (unscaled * unscaled).sum(-1)
            self.notes[name][layer] = square / (unscaled * output).sum(-1)

        return [(f"{path}.hook_in", keep_input), (f"{path}.hook_out", note_scale)]

    def _scale(self, name: str, layer: int, value: Tensor, hook: Any) -> None:
        self.notes[name][layer] = self._at_reads(value)[..., 0]

    def _normed(self, value: Tensor, hook: Any) -> None:
        """Note what the final soft-cap, which is not linear, adds to the difference."""
        cap = self.anatomy.soft_cap
        if cap > 0:
            columns = self.readout.columns
            logits = (self._at_reads(value).to(columns) * columns).sum(-1) + self.readout.biases
            plus, minus = cap * torch.tanh(logits / cap) - logits
            self.notes["soft_cap"][0] = plus - minus

    def _values(self, layer: int, value: Tensor, hook: Any) -> None:
        clip = self.anatomy.layers[layer].clip
        self.values[layer] = value if clip is None else value.clamp(-clip, clip)

    def _heads(self, layer: int, name: str, value: Tensor, hook: Any) -> None:
        """Project what each head reads from each attended token, once all of it is known.

        values  [row, pos, kv_head, d_head]
        pattern [row, head, query, key], read at one query of a row: weight [read, head, pos]
        """
        form, waiting = self.anatomy.layers[layer], self.waiting[layer]
        if name == "pattern":
            rows = torch.arange(len(value), device=value.device)
            value = value[rows, :, self.positions.to(value.device)]
        waiting[name] = value if name == "pattern" else self._at_reads(value)
        if "pattern" not in waiting or (form.gated and "z" not in waiting):
            return
        v = self.values[form.values_of]
        if not any(other.values_of == form.values_of for other in self.anatomy.layers[layer + 1 :]):
            del self.values[form.values_of]
        pulled = self.readout.directions.heads[layer].to(v.device)
        weight = waiting["pattern"].to(pulled)
        W_O, b_O = head_matrices(self.model, layer, "O")
        b_V = head_matrices(self.model, layer, "V")[1] if form.values == "hook_v" else None
        W_O = W_O.to(v.device, pulled.dtype)  # [head, d_head, d_model]
        through_head = torch.einsum("hed,rd->rhe", W_O, pulled)
        n_heads, n_kv = W_O.shape[0], v.shape[2]
        if form.gated:
            every = v.to(pulled.dtype).repeat_interleave(n_heads // n_kv, 2)
            ungated = torch.einsum("rhj,rjhe->rhe", weight, every)
            gate = waiting["z"].to(pulled) / ungated
            through_head = through_head * torch.where(ungated == 0, 0.0, gate)
        grouped = through_head.unflatten(1, (n_kv, n_heads // n_kv))
        read = torch.einsum("rjke,rkge->rkgj", v.to(pulled.dtype), grouped).flatten(1, 2)
        per_head = torch.zeros_like(through_head[..., 0])
        if b_V is not None:
            bias = b_V.to(pulled).reshape(-1, W_O.shape[1])
            bias = bias.repeat_interleave(n_heads // len(bias), dim=0)
            kept = [(form.values_of, kv) not in self.removed for kv in range(n_kv)]
            kept = torch.tensor(kept, device=bias.device).repeat_interleave(n_heads // n_kv)
            bias = bias * kept[:, None]
            per_head = (through_head * bias).sum(-1)
        self.notes["attention"][layer] = weight * (read - per_head[..., None])
        self.notes["value_bias"][layer] = weight.sum(-1) * per_head
        if b_O is not None:
            self.notes["output_bias"][layer] = pulled @ b_O.to(pulled)
        del self.waiting[layer]

    def parts(self, normaliser: Float[Tensor, " read"]) -> dict[str, np.ndarray]:
        """Return the parts of `Account` [read, ...] in float64, divided by the norms' scales."""
        readout, layers = self.readout, self.anatomy.layers
        to = readout.directions

        def note(name: str, layer: int = 0, missing: float = 0.0, shape: Any = ()) -> np.ndarray:
            value = self.notes[name].get(layer)
            empty = np.full((len(self.positions), *shape), missing)
            return empty if value is None else _float64(value)

        def bias(norm: Norm, direction: Tensor) -> np.ndarray:
            return _float64(direction @ norm.bias.to(direction))

        down = note("final_scale", missing=1.0)  # what numbers of the present stream are divided by
        other = np.zeros(len(self.positions))
        n_heads, length = next(iter(self.notes["attention"].values())).shape[1:]
        shapes = {"attention": (n_heads, length), "value_bias": (n_heads,), "output_bias": ()}
        stacks: dict[str, list[np.ndarray]] = defaultdict(list)
        for layer, form in reversed(list(enumerate(layers))):
            after, middle, shift = down, down / form.stream, 0.0
            down = middle
            if form.post is not None:
                ends = (to.middle[layer], to.at_end)
                if layer + 1 < len(layers):
                    ends = (to.middle[layer], to.before[layer + 1])
                middle = after * note("ln2", layer)
                down = middle * note("ln1", layer)
                shift = bias(form.post[0], ends[0]) / middle + bias(form.post[1], ends[1]) / after
            scale = down * note("attention_scale", layer, missing=1.0) / form.attention
            for name, shape in shapes.items():
                stacks[name].append((note(name, layer, shape=shape).T / scale).T)
            if form.after_attention is not None:  # its bias is added after its scale
                shift = bias(form.after_attention, to.before[layer]) * form.attention / down
            stacks["output_bias"][-1] += shift
            mlp = sum(note(f"mlp {i}", layer) * x for i, x in enumerate(form.mlps.values()))
            stacks["mlp"].append(mlp / middle)
            if form.other:
                added = note("stream", layer + 1) / after - note("stream", layer) / down
                for name in (*shapes, "mlp"):
                    added = added - stacks[name][-1].reshape(len(added), -1).sum(1)
                other = other + added
        position, embedding = note("position") / down, note("embedding") / down
        single = [
            (embedding - position) * self.anatomy.residual,
            position * self.anatomy.residual,
            _float64(readout.norm_bias),
            _float64(readout.biases[0] - readout.biases[1]),
            note("soft_cap"),
            _float64(normaliser),
            other,
        ]
        by_layer = {name: arrays[::-1] for name, arrays in stacks.items()}
        return {name: np.stack(a, 1) for name, a in {**by_layer, "single": single}.items()}


def _float64(value: Tensor) -> np.ndarray:
    return value.cpu().double().numpy()


def _run(
    model: HookedModel,
    anatomy: Anatomy,
    questions: Sequence[Question],
    batch: TokenBatch,
    probes: Sequence[Probe],
    spans: Sequence[str],
) -> list[Account]:
    """Account for one batch, a row for each question."""
    rows = torch.arange(len(questions), device=batch.symbols.device)
    positions = torch.tensor([question.position for question in questions], device=rows.device)
    readout = _Readout.of(model, anatomy, questions)
    tally = _Tally(model, anatomy, readout, positions, removed_biases(model, probes))
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
