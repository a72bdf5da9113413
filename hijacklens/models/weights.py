"""The weights of a plain Hugging Face model: exactly those that its configuration has a place for.

Transformers draws missing weights at random, leaves out surplus ones, and says so in a log that
scripts do not show. Each would be another model than the one that the user means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as IMAGE_TEXT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from hijacklens.errors import InputError

USUAL_LAYERS = 1_000
"""Up to this number, layers are not compared with the number of weights."""
PACKED = 16
"""A file may pack at most this many weights of a quantised model into one number."""
HARMLESS = re.compile(
    r"rotary_emb\.|inv_freq|masked_bias|attn\.bias$|attention\.bias$|position_ids|_cached$|alibi"
)
"""Names of buffers that older files hold and that models compute."""


def load_weights(name: str, *, dtype: torch.dtype, **origin: Any) -> PreTrainedModel:
    """Load the plain model; refuse weights that are not those of the configuration.

    Missing ones would be drawn at random, and surplus ones left out.
    """
    config = AutoConfig.from_pretrained(
        name, revision=origin["revision"], trust_remote_code=origin["trust_remote_code"]
    )
    _refuse_sizes(name, config)
    # Models of text and images are listed under another class of transformers.
    images = type(config) in IMAGE_TEXT and type(config) not in CAUSAL
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # The fused attention of older transformers leaves out the cap and does not say so.
        origin["attn_implementation"] = "eager"
    loaded: Any = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_pretrained(
        name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **origin
    )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the model {name!r} lacks {len(missing)} weights that its architecture has, such as "
            f"{missing[0]}; they would be random. The file is incomplete, or is not a causal "
            "language model."
        )
    for weight, there, here in sorted(info["mismatched_keys"]):
        raise InputError(
            f"the model {name!r} has the weight {weight} with the shape {tuple(there)} in its file "
            f"and {tuple(here)} by its config.json. Restore the config.json of these weights."
        )
    if surplus := _without_place(info["unexpected_keys"], model):
        raise InputError(
            f"the model {name!r} has {len(surplus)} weights for which its config.json has no "
            f"place, such as {surplus[0]}; without them it would be another model. Restore the "
            "config.json of these weights (number of layers, biases, norms), or merge what was "
            "added to them."
        )
    return model


def _refuse_sizes(name: str, config: Any) -> None:
    """Refuse sizes far beyond the weights in a folder; building such a model would take hours."""
    shapes: list[list[int]] = []
    for path in Path(name).glob("*.safetensors"):
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            shapes += [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    if not shapes:
        return
    widest = max((size for shape in shapes for size in shape), default=0)
    most = {"num_hidden_layers": max(USUAL_LAYERS, len(shapes))}
    most |= dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), PACKED * widest)
    for key, limit in most.items():
        value = getattr(config.get_text_config(), key, None)
        if isinstance(value, int) and value > limit:
            raise InputError(
                f"the model {name!r} has {key} = {value:,} in its config.json, which its "
                f"{len(shapes)} weights cannot have. Restore the config.json of these weights."
            )


def _without_place(names: Iterable[str], model: Any) -> list[str]:
    """Return the weights of a file that belong to parts of the model and were not loaded into them.

    Parts that the model does not have at all (a vision tower, a value head, extra layers for
    predicting several tokens), buffers and the parameters of a quantiser are not among them.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return []
    text = model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    ahead = getattr(text, "num_nextn_predict_layers", None) or 0
    # Files of the model without its head lack the prefix.
    prefix = f"{model.base_model_prefix}."
    modules = {module.removeprefix(prefix) for module, _ in model.named_modules()}
    surplus = []
    for name in sorted(names):
        parts = name.removeprefix(prefix).split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        predicts_ahead = parts[number].isdigit() and layers <= int(parts[number]) < layers + ahead
        inside = ".".join(parts[:number]) in modules - {""}
        if inside and not predicts_ahead and not HARMLESS.search(name):
            surplus.append(name)
    return surplus
