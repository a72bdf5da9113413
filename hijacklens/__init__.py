"""hijacklens: measure, probe and explain context hijacking in language models.

The public names are those of `__init__.pyi`, each imported when it is first used: importing torch
and TransformerLens takes seconds, `import hijacklens` does not.
"""

from __future__ import annotations

from importlib.metadata import version

import lazy_loader

__version__ = version("hijacklens")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
