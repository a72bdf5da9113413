"""The account of a logit difference: what every part of the model wrote to it, in logits.

    D = logit(o_) - logit(o*)   where the answer is read
      =   sum over layers, heads and attended tokens    pattern[last, j] (v_j - b_V) W_O
        + value biases through the heads, output biases of attention, MLPs with their biases
        + embedding, position, bias of the final norm, bias of the unembedding, soft-cap

`probes.account.readout` reads each part: norms are linear once their scales are frozen at the
values of this run. The parts say what was *written directly* to the difference in this run, not
what would happen without them.

Contract 4: the parts sum to the difference of the logits that the model itself gives, within 1e-4
of it in float32; `residual` is the rest.

Cost: one forward pass for a batch of prompts. Nothing of size pos x head x d_model is kept: only
the values of one layer at a time, and a number per read, layer, head and attended token.

>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> account = accounts(model, [Question((1, 5, 2, 5), position=3, plus=3, minus=1)])[0]
>>> account.attention.shape, abs(account.residual) < 1e-6
((1, 1, 4), True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from hijacklens.engine.batches import TokenBatch, batch_size, batches
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, device_of, require_eval
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.results.glance import Glance, Grid, Shown
from probes.account.readout import Frame, Readout
from probes.account.tally import Tally

READ_VALUES = 2**26
"""At most this many logits (reads x vocabulary) at once: a quarter of a GiB in float32."""
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


def accounts(
    model: HookedModel,
    questions: Sequence[Question],
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
    batch_tokens: int | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> list[Account]:
    """Account for many questions, in their order.

    Args:
        model: Any hooked model whose blocks add to a residual stream (GPT-2, LLaMA, Gemma, NeoX,
            OLMo-2, ...), or the one-layer model. If a model scales its stream or its logits by
            constants (Granite, Cohere), the parts do not balance and the residual shows it.
        questions: The differences to account for.
        probes: Act in their order; the account is of the changed model. Any change of values and
            patterns is accounted for; changes after them show in the residual.
        spans: The spans that the bits of the symbols mark.
        batch_tokens: Size of a batch in tokens, padding included; by default what suits the device.
        advance: Called after each batch with its fraction of the work.

    Raises:
        InputError: The model has no attention hooks or is in training mode, a question has no
            tokens, or a position outside its prompt.
    """
    require_eval(model, operation="an account of logits")
    for question in questions:
        if not 0 <= question.position < len(question.symbols):
            raise InputError(
                f"position {question.position} is not one of the {len(question.symbols)} tokens "
                "of its prompt; give one from 0."
            )
    layers = range(int(model.cfg.n_layers))
    missing = [
        name
        for i in layers
        for name in (f"blocks.{i}.attn.hook_v", f"blocks.{i}.attn.hook_pattern")
        if name not in model.hook_dict
    ]
    if missing:
        raise InputError(
            f"the model {model.cfg.model_name!r} has no hook {missing[0]!r}; an account needs "
            "values and attention patterns in every layer."
        )
    active, device, frame = check_probes(probes), device_of(model), Frame.of(model)
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


def _run(
    model: HookedModel,
    frame: Frame,
    questions: Sequence[Question],
    batch: TokenBatch,
    probes: Sequence[Probe],
    spans: Sequence[str],
) -> list[Account]:
    """Account for one batch, a row for each question."""
    device = batch.symbols.device
    layout = Layout.of_symbols(batch.symbols, spans)
    rows = torch.arange(len(questions), device=device)
    positions = torch.tensor([q.position for q in questions], device=device)
    plus, minus = [q.plus for q in questions], [q.minus for q in questions]
    readout = Readout.of(model, frame, plus, minus)
    tally = Tally(model, frame, readout, rows, positions)
    reader = HookProbe("account", tally.hooks(), packs=True)
    logits = logits_at(model, layout, rows, positions, probes=[*probes, reader])
    single = torch.tensor([question.minus is None for question in questions])
    # Only the logits of the questions leave the device, which may not have float64.
    first, second = (
        logits[rows, [token or 0 for token in tokens]].cpu().double() for tokens in (plus, minus)
    )
    norm = torch.zeros_like(first)
    if single.any():
        norm = torch.where(single, logits.float().logsumexp(-1).cpu().double(), norm)
    whole = first - torch.where(single, 0.0, second) - norm
    parts = tally.parts(normaliser=0 - norm)
    results = []
    for i, question in enumerate(questions):
        of_read = {name: part[i] for name, part in parts.items()}
        of_read["attention"] = of_read["attention"][..., : len(question.symbols)]  # no padding
        results.append(Account(**of_read, whole=float(whole[i])))
    return results
