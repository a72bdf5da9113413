"""What the name of a language model means, and why it cannot be loaded; needs no large library."""

from __future__ import annotations

import hashlib
from difflib import get_close_matches
from pathlib import Path

from hijacklens.errors import InputError
from hijacklens.files import named_path
from hijacklens.hub import commit_of, hub_problem
from hijacklens.models.packaged import PACKAGED

DTYPES = ("float32", "bfloat16", "float16")


def resolve(model: str | Path, revision: str | None) -> tuple[str, str, str | None]:
    """Return where to load a model from, its name for results, and its commit on the hub.

    The first is a packaged name, a folder, a GGUF file or a hub id.

    Raises:
        InputError: A folder is missing or holds no model, a package is not installed, a name is
            nearly that of a packaged model, or the hub refuses or cannot be reached.
    """
    name, path = str(model), named_path(model, "model")
    packaged, folder = PACKAGED.get(name), path.is_dir()
    if packaged or folder or (path.suffix == ".gguf" and path.is_file()):
        if revision is not None:
            what = "packaged model" if packaged else "folder" if folder else "file"
            version = f" ({packaged.package})" if packaged else ""
            raise InputError(f"the {what} {name!r} has no revisions{version}. Leave revision out.")
        if packaged:
            packaged.require()
            return name, name, None
        if not folder:
            return str(path), path.stem, None
    if folder:
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
        return str(path), path.resolve().name, None
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
    try:
        return name, name, commit_of(name, revision)
    except Exception as error:
        raise InputError(explained(name, error, revision)) from error


def content_of(model: str | Path, revision: str | None) -> str:
    """Return what changes with the files of a model: a hash of them, or its commit on the hub.

    Raises:
        InputError: As for `resolve`.

    Note:
        Reads all files in a folder, not those in folders below: about 1 s per GB.
    """
    found, _, commit = resolve(model, revision)
    if packaged := PACKAGED.get(found):
        return packaged.sha256
    path, digest = Path(found), hashlib.sha256()
    if not path.exists():
        return commit or ""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in filter(Path.is_file, files):
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def explained(name: str, error: Exception, revision: str | None = None) -> str:
    """Turn an exception of the libraries into a message that says what to do."""
    text = str(error).strip()
    detail = text.splitlines()[0] if text else type(error).__name__
    instead = "Name a local folder, or use a packaged model, which needs no hub: "
    instead += ", ".join(PACKAGED) + "."
    if near := get_close_matches(name, PACKAGED, n=1):
        instead += f" Did you mean the packaged {near[0]!r}?"
    advice = [
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
        (
            type(error).__name__ in ("SafetensorError", "JSONDecodeError"),
            f"one of its files is damaged ({detail.rstrip('.')}). Copy it again; remove a model of "
            "the hub from the local cache (`hf cache rm`) and load it again.",
        ),
        (True, f"{detail} ({type(error).__name__})"),
    ]
    reason = hub_problem(error, instead) or next(text for fits, text in advice if fits)
    version = f" at the revision {revision!r}" if revision else ""
    return f"cannot load the model {name!r}{version}: {reason}"
