"""`import hijacklens` is fast: the heavy libraries are imported when they are used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import hijacklens

HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "pandas", "matplotlib", "scipy")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(code: str) -> set[str]:
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(python(f"{code}\n{report}").split())


def test_the_import_pulls_in_nothing_heavy():
    assert loaded_by("import hijacklens; dir(hijacklens)") == set()


@pytest.mark.parametrize(
    "code",
    ["from hijacklens import InputError", "import hijacklens; hijacklens.InputError"],
    ids=["from", "attribute"],
)
def test_a_light_name_stays_light(code):
    assert loaded_by(code) == set()


def test_facts_and_schemes_need_no_torch():
    code = "import hijacklens as hl; hl.atlas(); hl.schemes()"
    assert not loaded_by(code) & {"torch", "transformers", "transformer_lens", "datasets"}


def test_every_public_name_resolves():
    imported: dict[str, Any] = {}
    exec("from hijacklens import *", imported)
    assert len(hijacklens.__all__) >= 12
    for name in hijacklens.__all__:
        assert imported[name] is getattr(hijacklens, name), name
        assert imported[name].__doc__, name
        assert imported[name].__name__.split(".")[-1] == name, name


def test_no_public_name_is_replaced_by_a_submodule():
    # Importing a submodule sets the attribute of the same name.
    submodules = {module.name for module in pkgutil.iter_modules(hijacklens.__path__)}
    assert submodules & set(hijacklens.__all__) == {"views"}


def test_the_version_is_that_of_the_package():
    from importlib import metadata

    assert hijacklens.__version__ == metadata.version("hijacklens")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="hijak"):
        _ = hijacklens.hijak


def test_dir_lists_the_public_names():
    assert set(hijacklens.__all__) <= set(dir(hijacklens))


@pytest.mark.parametrize("package", ["probes", "analyses"])
def test_the_error_of_a_shadowed_package_says_so(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("mine = 1\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import hijacklens\nfrom {package} import mine\n"
        f"try:\n    from {package} import attention\n"
        "except ImportError as error:\n    print(error)"
    )
    assert f"{tmp_path / package} hides the package {package} of hijacklens" in python(code)
