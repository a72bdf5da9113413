"""hijacklens: measure, probe and explain context hijacking in language models.

`__init__.pyi` lists the public names. Each is imported on first use, so that `import hijacklens`
does not wait seconds for torch and TransformerLens.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lazy_loader

__version__ = version("hijacklens")

_own, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["defend"]


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__]


def __getattr__(name: str) -> Any:
    """Import a public name; `defend` alone is of a package above this one."""
    if name == "defend":
        return importlib.import_module("analyses.defence").defend
    return _own(name)


class _Shadowed:
    """Explains failed imports from a user's own package `probes` or `analyses`.

    Python asks it last, after the import of a module in such a package has failed.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        package = name.partition(".")[0]
        file = getattr(sys.modules.get(package), "__file__", None)
        if package in ("probes", "analyses") and file:
            folder, ours = Path(file).parent, Path(__file__).parent.with_name(package)
            if folder.resolve() != ours.resolve():
                raise ImportError(
                    f"cannot import {name}: {folder} hides the package {package} of hijacklens in "
                    f"{ours}. Rename that folder, or run Python from another one.",
                    name=package,
                )


sys.meta_path.append(_Shadowed)
