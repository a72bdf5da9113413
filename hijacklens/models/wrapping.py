"""Putting TransformerLens hooks on a plain Hugging Face model."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hijacklens.errors import InputError
from hijacklens.models.identity import OWN_TOKENIZER
from hijacklens.models.verification import Expected, check


def wrap(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, dtype: torch.dtype
) -> TransformerBridge:
    """Put hooks on a model in place; its tokenizer keeps its own default about special tokens.

    Both belong to the result: TransformerLens changes settings of the tokenizer.

    `TransformerBridge.boot_transformers` is not used: for a multimodal model it also loads an image
    processor, and runs pip to install torchvision if that fails. Text needs neither.

    The result is checked against the plain model (`hijacklens.models.verification`).

    Raises:
        InputError: The model gives no logits or is not causal, TransformerLens does not know its
            architecture, or it cannot put hooks on this configuration of it.
    """
    architecture = _architecture(plain, name)
    plain.eval()
    expected = Expected.of(plain, tokenizer)
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
    bridge.cfg.n_devices = len(set(getattr(plain, "hf_device_map", {"": 0}).values()))
    # Now `bridge.to_tokens(text)` equals `tokenizer(text)`.
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
    vars(bridge)[OWN_TOKENIZER] = True
    bridge.eval()
    check(bridge, expected)
    return bridge


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
