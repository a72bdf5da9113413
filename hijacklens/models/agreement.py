"""What a run may do with a model, by the check of it (`hijacklens.models.verification`).

Scores without probes come from the plain modules; probes are refused if the hooked model differs
from them. Both are compared again when the model or its weights may have changed, and on the
longest prompt of a run with hooks, since attention that the user wrote may act only on long ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.computation import computation_of
from hijacklens.models.device_memory import is_out_of_memory
from hijacklens.models.exclusive import made_for_run
from hijacklens.models.hooked import HookedModel, require_eval
from hijacklens.models.unhooked import (
    NO_PLAIN_BLOCKS,
    PlainBlocks,
    has_lost_hook_points,
    unhooked,
)
from hijacklens.models.verification import (
    KEPT,
    LONG,
    SHORT,
    Agreement,
    check,
    compare,
    prompt_of,
)

_ONCE = "_hijacklens_once"
"""Attribute of a model in a body of `comparing_once`: what was found out about it in the body."""
_COMPARED = "_hijacklens_compared"
"""Attribute of a model: the length of the longest prompt that was compared, by computation."""


def agreement_of(model: HookedModel) -> Agreement:
    """Return what the check of a model found; check it first if it computes something else now.

    Raises:
        InputError: As `check`.
    """
    kept: Agreement | None = vars(model).get(KEPT)
    if kept is None or kept.computation != _computation_now(model):
        return check(model)
    return kept


def require_agreement(model: HookedModel, *, operation: str) -> None:
    """Refuse a model in training mode, or one whose hook points are not on the plain computation.

    Raises:
        InputError: The model is in training mode, its hooked form differs from the plain model, or
            one of the two was changed since it was loaded.

    Note:
        Costs a description of the model, some 80 ms for 30 layers, and two forward passes over
        five tokens; in a body of `comparing_once` or `exclusive` both are done once.
    """
    require_eval(model, operation=operation)
    if reason := agreement_of(model).hooked:
        raise InputError(
            f"{operation} needs hooks, and with hook points this model is not the plain one: "
            f"{reason}. {_cure(model)} Scores without probes are right."
        )
    require_unchanged(model)


def plain_of(model: HookedModel, *, operation: str) -> torch.nn.Module | None:
    """Return the module to run without probes; None if that is the hooked model itself.

    Raises:
        InputError: As `require_agreement`.

    Note:
        Costs a copy of the modules, and for a model of whose weights TransformerLens has copies
        (GPT-NeoX, Falcon, Phi-3, ...) two forward passes over five tokens, once in a body of
        `comparing_once`.
    """
    require_eval(model, operation=operation)
    agreement = agreement_of(model)
    plain = None if agreement.plain else unhooked(model, agreement.attention)
    if plain is None:
        require_agreement(model, operation=operation)
        return None
    shared = {_storage(weight) for weight in plain.parameters()}
    if any(_storage(weight) not in shared for weight in model.parameters()):
        require_unchanged(model)
    return plain


def plain_blocks_of(model: HookedModel) -> PlainBlocks:
    """Return the plain blocks that may run in layers without hooks, next to hooked ones."""
    agreement = agreement_of(model)
    return NO_PLAIN_BLOCKS if agreement.plain_blocks else PlainBlocks.of(model, agreement.attention)


@contextmanager
def comparing_once(model: HookedModel) -> Iterator[None]:
    """Let a model be compared and described once in the body, in which it does not change.

    Unlike `exclusive`, it does not keep other threads waiting.
    """
    if _ONCE in vars(model):
        yield
        return
    vars(model)[_ONCE] = {}
    try:
        yield
    finally:
        vars(model).pop(_ONCE, None)


def _found_once(model: Any) -> dict[Any, Any]:
    """Return what was found out in a body of `comparing_once` or `exclusive`."""
    once = vars(model).get(_ONCE)
    return made_for_run(model) if once is None else once


def _computation_now(model: Any) -> str:
    """Return the digest of what a model computes."""
    found = _found_once(model)
    if KEPT not in found:
        if has_lost_hook_points(model):
            raise InputError(
                "this model has lost its hook points, since its Hugging Face model was loaded "
                "again. Use the result of the last hl.load_model."
            )
        found[KEPT] = computation_of(model).digest
    return found[KEPT]


def require_unchanged(model: HookedModel) -> None:
    """Refuse a model whose hooked form no longer computes what its plain modules compute.

    Raises:
        InputError: They differ, for example because a weight was changed of which TransformerLens
            has a copy.
    """
    found = _found_once(model)
    agreement = agreement_of(model)
    if _ONCE in found or agreement.plain or agreement.hooked:
        return
    plain = unhooked(model, agreement.attention)
    if plain is None:
        return
    prompt = torch.tensor(prompt_of(plain, model.tokenizer)[:SHORT])  # type: ignore[attr-defined]
    if reason := compare(model, plain, prompt):
        raise InputError(
            "the model was changed after loading in a way that only its hooked or only its plain "
            f"form follows: {reason}. Change the Hugging Face model first, and then load it with "
            "hl.load_model."
        )
    found[_ONCE] = True


def require_agreement_on(model: HookedModel, prompt: Int[Tensor, " pos"]) -> None:
    """Refuse to run a model with hooks on prompts that are long enough to show a difference.

    Args:
        model: A hooked model, which has passed `require_agreement`.
        prompt: The token ids of the longest prompt.

    Raises:
        InputError: The hooked form does not predict what the plain form does after this prompt.

    Note:
        Costs two forward passes over the prompt, unless one of its length was compared before.
    """
    agreement = agreement_of(model)
    compared: dict[str, int] = vars(model).setdefault(_COMPARED, {})
    if agreement.plain or len(prompt) <= compared.get(agreement.computation, LONG):
        return
    plain = unhooked(model, agreement.attention)
    if plain is None:
        return
    try:
        reason = compare(model, plain, prompt)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return  # the run itself says so, or needs less
        raise
    if reason:
        raise InputError(
            "probes need hooks, and with hook points this model is not the plain one after a "
            f"prompt of {len(prompt)} tokens: {reason}. {_cure(model)} Scores without probes, and "
            "probes on shorter prompts, are right."
        )
    compared[agreement.computation] = len(prompt)


def require_one_side(model: HookedModel, width: int, at_position: Int[Tensor, " read"]) -> None:
    """Refuse to read a short prompt next to one that is long enough to change its positions.

    Raises:
        InputError: The rotary frequencies of the model switch between the two lengths.
    """
    switch = agreement_of(model).switch
    if switch is not None and width > switch and bool((at_position < switch).any()):
        raise InputError(
            f"the rotary frequencies of this model switch at {switch} tokens (longrope), so "
            "shorter and longer prompts cannot be compared in one batch. Use prompts on one side."
        )


def _storage(weight: Tensor) -> int:
    """Return the memory of a weight; the parts of a joint matrix may be views of it."""
    if hasattr(weight, "__tensor_flatten__"):  # quantised: its parts have memory
        return id(weight)
    return weight.untyped_storage().data_ptr()


def _cure(model: Any) -> str:
    """Say what may be the reason that hook points change a model."""
    parts = list(model.original_model.modules())
    if any(type(part).__module__.startswith("peft.") for part in parts):
        return "It has adapters: merge them (merge_and_unload) before hl.load_model."
    return (
        "TransformerLens may not know an option of its configuration, or a hook or method that "
        "was put on it before loading; remove what you added, or put it into an hl.HookProbe."
    )
