"""Whether a hooked model computes what the plain model does (contract 1).

TransformerLens rebuilds the attention of most architectures from its parts. Options of the
configuration, adapters and hooks of the user may get lost on the way, and nothing would say so.
Therefore `load_model` reads a short and a longer prompt with the plain model before it adds hook
points (`Expected.of`), and again afterwards with the hooked model and with the plain modules under
it (`check`). A bridge from elsewhere is checked when it is first used.

The result, an `Agreement`, decides how the model runs (`hijacklens.models.agreement`). A model that
looks ahead is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.errors import InputError
from hijacklens.models.additions import attention_of, own_attention
from hijacklens.models.computation import computation_of
from hijacklens.models.device_memory import is_out_of_memory
from hijacklens.models.devices import arithmetic
from hijacklens.models.exclusive import held
from hijacklens.models.hooked import HookedModel, device_of, hooked
from hijacklens.models.unhooked import PlainBlocks, logits_of, unhooked

TEXT = (
    "The Eiffel Tower is in the city of Paris. Do not think of Guam, said Anna in 1984. The "
    "mother tongue of Danielle Darrieux is French, and she was born in Bordeaux; nobody knows "
    "why Leo, who works for Apple, speaks of Rome."
)
LONG, SHORT = 48, 5
"""Tokens of the two prompts; the short one is the beginning of the long one."""
READ = (SHORT - 1, 11, LONG - 1)
"""Positions of the long prompt at which predictions are compared."""
NATS = 1e-4
"""Root mean square difference over the vocabulary, in nats, up to which float32 models agree."""
RELATIVE = 1e-5
"""The same in units of the spread of the log-probabilities, for very wide logits."""
ROUNDED = 0.25
"""The same in rounded arithmetic (16-bit dtypes, TF32, autocast). There, batches of another shape
change the packaged models by up to 0.08."""
KEPT = "_hijacklens_agreement"
"""Attribute of a model: its `Agreement`."""

_Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Tokens [batch, pos], and the row and the position of each read."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The result of a check; each text is empty if all is well."""

    plain: str = ""
    """Why the plain modules under the hooked model do not run in its place."""
    hooked: str = ""
    """How the hooked model differs from the plain one, which rules out probes."""
    alone: str = ""
    """Why the numbers of a prompt depend on the other prompts of its batch."""
    switch: int | None = None
    """The length at which rotary embeddings get other frequencies (longrope): the longest prompt
    of a batch decides, so shorter and longer prompts run apart."""
    attention: str | None = None
    """The implementation of attention in the plain modules."""
    plain_blocks: str = ""
    """Why plain blocks do not run next to hooked ones."""
    computation: str = ""
    """The digest of what the model computed (`hijacklens.models.computation`)."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the plain model computes."""

    ids: Sequence[int]
    """The long prompt."""
    long: Float[Tensor, "read vocab"]
    """Log-probabilities at `READ`."""
    short: Float[Tensor, "1 vocab"]
    """Log-probabilities after the short prompt, which is read by itself."""
    attention: str | None
    """The implementation of attention."""

    @classmethod
    def of(cls, plain: torch.nn.Module, tokenizer: Any) -> Expected:
        """Run a plain model on both prompts, each by itself.

        Raises:
            InputError: The model is not causal.
        """
        ids = prompt_of(plain, tokenizer)
        at = _read_positions(ids)
        long = _whole_pass(plain, ids)[at]
        short = _whole_pass(plain, ids[:SHORT])[-1:]
        if _difference(long[:1], short, plain):
            changed = _whole_pass(plain, [*ids[:SHORT], *ids[:SHORT:-1], ids[0]])[at]
            if reason := _difference(long[:1], changed[:1], plain):
                raise InputError(
                    f"this {type(plain).__name__} is not a causal language model: a later token "
                    f"changes what it predicts after an earlier one ({reason}). Check is_decoder "
                    "and use_bidirectional_attention in its config.json. If its activations are "
                    "quantised, one scale for all tokens does this, too. Use another model."
                )
        config = getattr(plain, "config", None)
        return cls(ids, long, short, getattr(config, "_attn_implementation", None))


def check(model: HookedModel, expected: Expected | None = None) -> Agreement:
    """Compare a hooked model, and the plain modules under it, with the plain model.

    Both prompts are read in one batch, as the engine does. The result is kept with the model.

    Args:
        model: A hooked model.
        expected: What the plain model computes; by default what the plain modules compute.

    Raises:
        InputError: The model is not causal, or neither form of it computes what the plain model
            does.

    Note:
        Costs three forward passes over 300 tokens in all.
    """
    if not isinstance(model, TransformerBridge):
        return Agreement(plain=f"a {type(model).__name__} has no plain modules")
    if expected is None:
        plain = unhooked(model, attention_of(model))
        if plain is None:  # there is nothing to compare with
            reason = "hooks or folded weights are on the model"
            return Agreement(plain=reason, computation=computation_of(model).digest)
        expected = Expected.of(plain, model.tokenizer)
    agreement = Agreement(plain="it is spread over several devices")
    for attention in _implementations(model, expected):
        plain = unhooked(model, attention)
        if plain is not None:
            agreement = _check_plain(plain, expected, attention, int(model.cfg.n_ctx))
        if not agreement.plain:
            break
    last_layer = f"blocks.{int(model.cfg.n_layers) - 1}."
    idle = [(name, _idle) for name in model.hook_dict if name.startswith(last_layer)]
    reason = (
        "its attention function is not one of transformers, and hook points have eager attention"
        if own_attention(model)
        else _disagreement(
            lambda batch: _hooked_logits(model, batch, idle),
            expected,
            model,
            alone=bool(agreement.alone),
        )
    )
    if agreement.plain and reason:
        raise InputError(
            f"cannot run this {type(model.original_model).__name__} as transformers does. With "
            f"hook points: {reason}. Without: {agreement.plain}."
        )
    apart = reason or agreement.plain
    if not apart:
        blocks = PlainBlocks.of(model, agreement.attention)

        def with_plain_blocks(batch: _Batch) -> Tensor:
            with held(model), blocks.where_no_hook_acts(()):
                return _hooked_logits(model, batch)

        apart = _disagreement(with_plain_blocks, expected, model, alone=bool(agreement.alone))
    agreement = replace(
        agreement,
        hooked=reason,
        plain_blocks=apart,
        switch=_switch(model),
        computation=computation_of(model).digest,
    )
    vars(model)[KEPT] = agreement
    return agreement


def compare(model: HookedModel, plain: torch.nn.Module, prompt: Int[Tensor, " pos"]) -> str:
    """Describe how the hooked and the plain form differ after a prompt; empty if they agree."""
    batch = _batch([prompt.tolist()], [(0, len(prompt) - 1)], device_of(model))
    one, other = _hooked_logits(model, batch), logits_of(plain, *batch)
    return _difference(one.float().log_softmax(-1), other.float().log_softmax(-1), model)


def difference(
    one: Float[Tensor, "read vocab"], other: Float[Tensor, "read vocab"], *, exact: bool
) -> str:
    """Describe how log-probabilities (nats) differ; empty if they agree.

    Args:
        one: Log-probabilities.
        other: Those that they are compared with.
        exact: Whether float32 or better computed them, without TF32 or autocast.
    """
    finite = one.isfinite() & other.isfinite()
    if not bool(finite.any(-1).all()) or not torch.equal(one.isfinite(), other.isfinite()):
        return "some log-probabilities are not finite"
    count = finite.sum(-1)
    apart = torch.where(finite, one - other, 0.0)
    mean = torch.where(finite, other, 0.0).sum(-1, keepdim=True) / count[:, None]
    spread = (torch.where(finite, other - mean, 0.0).square().sum(-1) / count).sqrt()
    allowed = (RELATIVE * spread).clamp(min=NATS) if exact else ROUNDED * spread
    if bool(((apart.square().sum(-1) / count).sqrt() <= allowed).all()):
        return ""
    return f"log-probabilities differ by up to {float(apart.abs().max()):.2g} nats"


def is_exact(model: Any) -> bool:
    """Return whether a model computes in float32 or better, without TF32 or autocast."""
    weight = next(iter(model.parameters()))
    return arithmetic(weight.dtype, weight.device) in ("float32", "float64")


def _difference(one: Tensor, other: Tensor, model: Any) -> str:
    return difference(one, other, exact=is_exact(model))


def prompt_of(plain: torch.nn.Module, tokenizer: Any) -> list[int]:
    """Return the tokens of the long prompt: a text, or numbers if it has too few tokens."""
    embedding: Any = plain.get_input_embeddings()  # type: ignore[operator]
    if not hasattr(embedding, "num_embeddings"):
        raise InputError(
            f"the embedding of this {type(plain).__name__} is a {type(embedding).__name__}, which "
            "does not say how many tokens it has. If it is an adapter, merge it first "
            "(merge_and_unload)."
        )
    size = int(embedding.num_embeddings)
    ids = [i for i in tokenizer(TEXT).input_ids if i < size] if tokenizer is not None else []
    config: Any = plain.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or LONG
    return [*ids, *range(max(0, size - LONG), size)][: min(LONG, context)]


def _read_positions(ids: Sequence[int]) -> list[int]:
    return [min(position, len(ids) - 1) for position in READ]


def _whole_pass(plain: torch.nn.Module, prompt: Sequence[int]) -> Float[Tensor, "pos vocab"]:
    tokens = torch.tensor([prompt], device=next(plain.parameters()).device)
    with torch.inference_mode():
        return plain(input_ids=tokens).logits[0].float().log_softmax(-1)


def _batch(rows: Sequence[Sequence[int]], at: Sequence[tuple[int, int]], device: Any) -> _Batch:
    """Return rows as tensors, padded on the right."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    at_row, at_position = torch.tensor(at, device=device).T
    return tokens, at_row, at_position


def _implementations(model: TransformerBridge, expected: Expected) -> list[str | None]:
    """Return the implementations of attention to try in the plain modules, the fastest first."""
    inner: Any = model.original_model
    if own_attention(model):  # a short prompt may not show what another one does
        return [expected.attention]
    # Fused attention does not compute soft caps.
    capped = getattr(inner.config.get_text_config(), "attn_logit_softcapping", None) is not None
    fused = bool(getattr(inner, "_supports_sdpa", False)) and not capped
    # A method that the user replaced may call a module below the hook points, which is eager.
    return list(dict.fromkeys([*(["sdpa"] if fused else []), expected.attention, "eager"]))


def _check_plain(
    plain: torch.nn.Module, expected: Expected, attention: str | None, context: int
) -> Agreement:
    """Compare the plain modules of a hooked model with the plain model.

    Next to both prompts, the batch has the short one at the end of the context window: some rotary
    embeddings choose their frequencies by the largest position in a batch.
    """

    def run(batch: _Batch, **positions: Tensor) -> Tensor:
        return logits_of(plain, *batch, **positions)

    def beside_far(batch: _Batch) -> Tensor:
        tokens, at_row, at_position = batch
        rows = torch.arange(tokens.shape[1], device=tokens.device).repeat(3, 1)
        rows[2] += max(context - tokens.shape[1], 0)
        return run((torch.cat([tokens, tokens[:1]]), at_row, at_position), position_ids=rows)

    if not _disagreement(beside_far, expected, plain):
        return Agreement(attention=attention)
    alone = ""
    reason = _disagreement(run, expected, plain)
    if reason and not _disagreement(run, expected, plain, alone=True):
        reason, alone = "", "its numbers depend on the longest prompt of a batch"
    elif not reason and "position_ids" in inspect.signature(plain.forward).parameters:
        alone = "its positions depend on the longest prompt of a batch"
    return Agreement(plain=reason, alone=alone, attention=attention)


def _disagreement(
    run: Callable[[_Batch], Tensor], expected: Expected, model: Any, *, alone: bool = False
) -> str:
    """Read both prompts, in one batch or each by itself, and describe the difference."""
    device, ids = expected.long.device, expected.ids
    short = ids[:SHORT]
    ends, reads = [len(short) - 1], _read_positions(ids)
    try:
        if alone:
            logits = torch.cat(
                [
                    run(_batch([prompt], [(0, position) for position in positions], device))
                    for prompt, positions in ((short, ends), (ids, reads))
                ]
            )
        else:
            at = [*((0, position) for position in ends), *((1, position) for position in reads)]
            logits = run(_batch([short, ids], at, device))
    except Exception as error:  # an unknown architecture may fail in any way
        if is_out_of_memory(error):
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"it fails with {type(error).__name__} ({first[:120]})"
    logprobs = logits.float().log_softmax(-1).to(device)
    return _difference(logprobs, torch.cat([expected.short, expected.long]), model)


def _hooked_logits(model: Any, batch: _Batch, idle: Sequence[Any] = ()) -> Tensor:
    """Return the logits of a hooked model at given positions, as `hijacklens.probe.logits_at`."""
    tokens, at_row, at_position = batch

    def select(residual: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        return residual[at_row, at_position][None]

    with torch.inference_mode(), hooked(model, [*idle, ("unembed.hook_in", select)]):
        return model(tokens, use_cache=False)[0]


def _idle(value: Any, hook: Any) -> None:
    return None


def _switch(model: TransformerBridge) -> int | None:
    """Return the length at which the frequencies of rotary embeddings switch, if they do."""
    inner: Any = model.original_model
    parameters = getattr(inner.config.get_text_config(), "rope_parameters", None)
    parts = [parameters, *parameters.values()] if isinstance(parameters, dict) else []
    switches = [
        int(part["original_max_position_embeddings"])
        for part in parts
        if isinstance(part, dict) and part.get("rope_type") == "longrope"
    ]
    return min(switches, default=None)
