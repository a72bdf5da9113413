"""The account of a logit difference: every part of the model that wrote it, and what each wrote.

    D = logit(o_) - logit(o*)   where the answer is read
      =   sum over layers, heads and source tokens    pattern[last, j] (v_j - b_V) W_O
        + value biases through the heads, output biases of attention, MLPs (their biases inside)
        + embedding, position, bias of the final norm, bias of the unembedding, soft-cap

each read off by the frozen readout of `probes.account.readout`: norms are linear with the scale
that they have in this run frozen, that of the final norm as well as those on the outputs of
attention and MLP in Gemma-2 and Gemma-3. The soft-cap is what capping adds to the difference. So
the parts say what was *written directly* to the difference in this run, not what would happen
without them.

Contract 4: the parts sum to the difference of the logits that the model itself gives, within 1e-4
of it in float32; `residual` is what they miss.

Cost: one forward pass for a batch of prompts. Kept per read and layer are a number for every head
and source token, the values of one layer at a time, and nothing of size pos x head x d_model.
Units: logits.

>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> account = accounts(model, [Question((1, 5, 2, 5), position=3, plus=3, minus=1)])[0]
>>> account.attention.shape, abs(account.residual) < 1e-6
((1, 1, 4), True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from hijacklens.engine.batches import Batch, batch_size, batches
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, device_of, require_eval
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.results.glance import Glance, Shown
from probes.account.readout import Frame, Readout
from probes.account.tally import Tally

READ_VALUES = 2**26
"""At most so many logits (reads x vocabulary) at once: a quarter of a GiB in float32."""
SINGLE = ("embedding", "position", "norm_bias", "unembed_bias", "soft_cap", "normaliser")
"""The parts that belong to no layer."""


@dataclass(frozen=True, slots=True)
class Question:
    """A difference of two logits, or one log-probability, read at a position of a prompt."""

    symbols: TokenIds
    """The prompt, in token ids or in symbols (`hijacklens.prompts.layout`) when probes are on."""
    position: int
    """Where the next token is read."""
    plus: int
    minus: int | None
    """None: the log-probability of `plus` by itself is accounted for."""


@dataclass(frozen=True, slots=True, eq=False)
class Account(Shown):
    """The parts of one difference, in logits."""

    attention: Float[np.ndarray, "layer head pos"]
    """By layer, query head and source token; zero behind the position that is read."""
    value_bias: Float[np.ndarray, "layer head"]
    """b_V through a head: the same whatever the tokens, if its attention sums to one."""
    output_bias: Float[np.ndarray, " layer"]
    """b_O, and the bias of a norm behind attention."""
    mlp: Float[np.ndarray, " layer"]
    """MLP outputs, their biases inside."""
    single: Float[np.ndarray, " part"]
    """The parts of `SINGLE`, in its order; `normaliser` is minus the log of the softmax's sum
    where one log-probability is accounted for, else zero."""
    whole: float
    """The difference of the logits that the model gave."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        groups = (self.attention, self.value_bias, self.output_bias, self.mlp, self.single)
        return float(sum(part.sum() for part in groups))

    @property
    def residual(self) -> float:
        """What the parts do not explain: `whole - total`, in logits."""
        return self.whole - self.total

    @property
    def by_head(self) -> Float[np.ndarray, "layer head"]:
        """What each head wrote, its value bias included."""
        return self.attention.sum(-1) + self.value_bias

    def glance(self) -> Glance:
        """The difference, and its parts by kind."""
        layers, heads, tokens = self.attention.shape
        names = ("attention", "value_bias", "output_bias", "mlp", "single")
        rows = tuple((name, f"{getattr(self, name).sum():+.2f}") for name in names)
        return Glance(
            f"{self.whole:+.2f} logits over {tokens} tokens, {layers} layers, {heads} heads · "
            f"residual {self.residual:.1e}",
            ("part", "logits"),
            rows,
            ("attention", "by_head", "mlp"),
        )

    def __sub__(self, other: Account) -> Account:
        """The account of the difference of two, read in the same prompt.

        Raises:
            ValueError: They are of different prompts or models.
        """
        if self.attention.shape != other.attention.shape:
            raise ValueError("accounts of different prompts cannot be subtracted token by token")
        return Account(
            self.attention - other.attention,
            self.value_bias - other.value_bias,
            self.output_bias - other.output_bias,
            self.mlp - other.mlp,
            self.single - other.single,
            self.whole - other.whole,
        )


def accounts(
    model: HookedModel,
    questions: Sequence[Question],
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
    batch_tokens: int | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> list[Account]:
    """The accounts of many questions, in their order.

    Args:
        model: Any hooked model whose blocks add to a residual stream (GPT-2, LLaMA, Gemma, NeoX,
            OLMo-2, ...), or the one-layer one. Where a model scales its stream or its logits by
            constants (Granite, Cohere) the parts do not balance, and the residual says so.
        questions: What is read where.
        probes: Act in their order; the account is that of the changed model. Values and patterns
            may be changed, in any way; changes further on show in the residual.
        spans: The spans that the bits of the symbols stand for.
        batch_tokens: Size of a batch in tokens, padding included; by default what suits the device.
        advance: Called after each batch with the share of the work that it was.

    Raises:
        InputError: The model has no attention hooks or is in training mode, a question has no
            tokens, or a position outside its prompt.
    """
    found: list[Account | None] = [None] * len(questions)
    run = _each(model, questions, check_probes(probes), spans, batch_tokens, advance)
    for i, account in run:
        found[i] = account
    return [account for account in found if account is not None]


def _each(
    model: HookedModel,
    questions: Sequence[Question],
    probes: Sequence[Probe],
    spans: Sequence[str],
    batch_tokens: int | None,
    advance: Callable[[float], object],
) -> Iterator[tuple[int, Account]]:
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
    device = device_of(model)
    limit = batch_size(device, batch_tokens)
    frame = Frame.of(model)
    most = max(1, READ_VALUES // int(model.cfg.d_vocab))
    total = sum(len(question.symbols) for question in questions)
    for group in _groups(questions, apart=not all(probe.packs for probe in probes)):
        rows = [questions[i].symbols for i in group]
        for batch in batches(rows, device=device, limit=limit, most_rows=most):
            members = [group[i] for i in batch.members]
            asked = [questions[i] for i in members]
            found = _run(model, frame, asked, batch, probes, spans)
            yield from zip(members, found, strict=True)
            advance(sum(len(question.symbols) for question in asked) / total)


def _groups(questions: Sequence[Question], *, apart: bool) -> Iterator[list[int]]:
    """Indices of questions that may share a batch; `apart`: only those of one length."""
    lengths = [len(question.symbols) if apart else 0 for question in questions]
    for length in sorted(set(lengths)):
        yield [i for i, other in enumerate(lengths) if other == length]


def _run(
    model: HookedModel,
    frame: Frame,
    asked: Sequence[Question],
    batch: Batch,
    probes: Sequence[Probe],
    spans: Sequence[str],
) -> list[Account]:
    """The accounts of one batch, a row each."""
    device = batch.symbols.device
    layout = Layout.of_symbols(batch.symbols, spans)
    rows = torch.arange(len(asked), device=device)
    positions = torch.tensor([question.position for question in asked], device=device)
    plus, minus = [q.plus for q in asked], [q.minus for q in asked]
    readout = Readout.of(model, frame, plus, minus)
    tally = Tally(model, frame, readout, rows, positions)
    reader = HookProbe("account", tally.hooks(), packs=True)
    logits = logits_at(model, layout, rows, positions, probes=[*probes, reader])
    single = torch.tensor([question.minus is None for question in asked])
    # Only what is asked for leaves the device, where float64 may not exist.
    first, second = (
        logits[rows, [token or 0 for token in tokens]].cpu().double() for tokens in (plus, minus)
    )
    norm = torch.zeros_like(first)
    if single.any():
        norm = torch.where(single, logits.float().logsumexp(-1).cpu().double(), norm)
    whole = first - torch.where(single, 0.0, second) - norm
    attention, *rest = tally.parts(normaliser=0 - norm)
    return [
        Account(
            attention[i, :, :, : len(question.symbols)],
            *(part[i] for part in rest),
            whole=value,
        )
        for i, (value, question) in enumerate(zip(whole.tolist(), asked, strict=True))
    ]
