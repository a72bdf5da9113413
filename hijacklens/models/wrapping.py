"""Putting TransformerLens hooks on a plain Hugging Face model."""

from __future__ import annotations

import copy
import logging
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    MLAAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hijacklens.errors import InputError
from hijacklens.models.additions import ATTENTION
from hijacklens.models.identity import OWN_TOKENIZER
from hijacklens.models.unhooked import remove_hook_points
from hijacklens.models.verification import Expected, check


class Bridge(TransformerBridge):
    """A `TransformerBridge` that prints as one line, also in a notebook."""

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"{cfg.model_name}: {type(self.original_model).__name__} as a TransformerBridge, "
            f"{cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, {cfg.dtype}"
        )

    __str__ = __repr__


def wrap(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, dtype: torch.dtype
) -> TransformerBridge:
    """Put hooks on a model in place; its tokenizer keeps its own default about special tokens.

    Both belong to the result: TransformerLens changes settings of the tokenizer.

    `TransformerBridge.boot_transformers` is not used: for a multimodal model it also loads an image
    processor, and runs pip to install torchvision if that fails. Text needs neither.

    The result is checked against the plain model (`hijacklens.models.verification`). If it is
    refused, the model is left without hook points.

    Raises:
        InputError: The model gives no logits or is not causal, TransformerLens does not know its
            architecture, or it cannot put hooks on this configuration of it.
    """
    remove_hook_points(plain)  # of an earlier call
    architecture = _architecture(plain, name)
    _refuse_shared_layers(plain, name)
    plain.eval()
    expected = Expected.of(plain, tokenizer)
    vars(plain)[ATTENTION] = expected.attention
    try:
        return _with_hook_points(plain, tokenizer, architecture, expected, name, dtype)
    except Exception:
        remove_hook_points(plain)
        raise


def _with_hook_points(
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    architecture: str,
    expected: Expected,
    name: str,
    dtype: torch.dtype,
) -> TransformerBridge:
    # TransformerLens re-creates a tokenizer from its path with add_bos_token=True, unless this
    # entry says that the tokenizer has it already.
    tokenizer.init_kwargs = {"name_or_path": name, **tokenizer.init_kwargs, "add_bos_token": True}
    plain.set_attn_implementation("eager")
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # no notes on aliases and dtypes, which are handled here
    try:
        bridge = build_bridge_from_module(
            plain,
            architecture,
            hf_config=copy.deepcopy(plain.config),
            tokenizer=tokenizer,
            dtype=dtype,
            model_name=name,
            post_adapter_hook=partial(_leave_out, plain),
        )
    except Exception as error:  # each architecture of TransformerLens fails in its own way
        detail = str(error).strip().split(". ")[0].splitlines() or [type(error).__name__]
        raise InputError(
            f"cannot load the model {name!r}: TransformerLens has no hooks for this configuration "
            f"of a {type(plain).__name__} ({detail[0]}). Use a model whose family and options are "
            "listed in docs/reference/families.md."
        ) from error
    finally:
        logger.setLevel(level)
    _split_latent_heads(bridge)
    _round_rotations(bridge, dtype)
    bridge.cfg.n_devices = len(set(getattr(plain, "hf_device_map", {"": 0}).values()))
    # Now `bridge.to_tokens(text)` equals `tokenizer(text)`.
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
    vars(bridge)[OWN_TOKENIZER] = True
    bridge.eval()
    check(bridge, expected)
    object.__setattr__(bridge, "__class__", Bridge)
    return bridge


def _leave_out(plain: PreTrainedModel, adapter: Any) -> None:
    """Leave out parts that an architecture may have and this model has not (rotary positions)."""
    for key, part in list(adapter.component_mapping.items()):
        if part.name and attrgetter(part.name)(plain) is None:
            del adapter.component_mapping[key]
            if key == "rotary_emb":
                adapter.cfg.positional_embedding_type = "none"


def _split_latent_heads(bridge: TransformerBridge) -> None:
    """Give latent attention hooks of the usual shape, [batch, pos, head, width].

    TransformerLens cuts z into heads of another width than its values have, so that a head of the
    hook would be parts of two, and it puts heads before positions in q, k and v.
    """
    for block in getattr(bridge, "blocks", ()):
        attn: Any = getattr(block, "attn", None)
        if isinstance(attn, MLAAttentionBridge):
            plain: Any = attn.original_component
            z = "b p (h e) -> b p h e"
            attn.o.hook_in.hook_conversion = RearrangeTensorConversion(z, h=plain.num_heads)
            for hook in (attn.hook_q, attn.hook_k, attn.hook_v):
                hook.hook_conversion = RearrangeTensorConversion("b h p e -> b p h e")
                hook.pos_dim = None


def _round_rotations(bridge: TransformerBridge, dtype: torch.dtype) -> None:
    """Give rotated queries and keys the dtype of the values, as transformers does.

    Some families (OLMo) rotate in float32, which TransformerLens does not undo in 16-bit models.
    """

    def rounded(tensor: torch.Tensor, *, hook: Any) -> torch.Tensor | None:
        return None if tensor.dtype == dtype else tensor.to(dtype)

    for block in getattr(bridge, "blocks", ()):
        attn: Any = getattr(block, "attn", None)
        if dtype != torch.float32 and isinstance(attn, PositionEmbeddingsAttentionBridge):
            for name in ("hook_rot_q", "hook_rot_k"):
                if hasattr(attn, name):  # a model without positions (Granite hybrid) has none
                    getattr(attn, name).add_hook(rounded, is_permanent=True)


def require_split_heads(model: Any) -> None:
    """Refuse a bridge with latent attention that `load_model` did not make, whose heads are mixed.

    Raises:
        InputError: As above.
    """
    for block in getattr(model, "blocks", ()):
        attn = getattr(block, "attn", None)
        if isinstance(attn, MLAAttentionBridge) and attn.hook_v.hook_conversion is None:
            raise InputError(
                "TransformerLens splits the latent attention of this model into heads of the wrong "
                "width; load the model with hijacklens.load_model, which mends that."
            )


def _refuse_shared_layers(plain: PreTrainedModel, name: str) -> None:
    """Refuse a model with one module in several places, whose hooks would be those of all."""
    for module in plain.modules():
        if isinstance(module, torch.nn.ModuleList) and len(set(module)) < len(module):
            raise InputError(
                f"cannot load the model {name!r}: it uses one layer in several places, so the "
                "layers cannot have separate hooks. Put copies there (copy.deepcopy)."
            )


def _architecture(plain: PreTrainedModel, name: str) -> str:
    """Return the architecture of TransformerLens that fits a model.

    It is that of the model's class or of a base class, since the configuration of a model made in
    memory names none; otherwise that of the configuration.
    """
    kind, config, refused = type(plain), plain.config, f"cannot load the model {name!r}:"
    outputs: Any = plain.get_output_embeddings
    if outputs() is None or config.is_encoder_decoder:
        lacks = "reads its text with an encoder" if outputs() else "has no layer that gives logits"
        raise InputError(
            f"{refused} a {kind.__name__} is no causal language model, since it {lacks}. Load one "
            "with transformers.AutoModelForCausalLM."
        )
    known = {name.lower(): name for name in SUPPORTED_ARCHITECTURES}
    for base in kind.__mro__:
        if base.__name__.lower() in known:
            return known[base.__name__.lower()]
    try:
        return determine_architecture_from_hf_config(config)
    except ValueError as error:
        raise InputError(
            f"{refused} TransformerLens has no bridge for its architecture, {kind.__name__}. The "
            "page docs/reference/families.md lists those that work."
        ) from error
