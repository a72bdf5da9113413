"""hijacklens: measure, probe and explain context hijacking in language models.

`__init__.pyi` lists the public names. Each is imported on first use, so that `import hijacklens`
does not wait seconds for torch and TransformerLens.
"""

from __future__ import annotations

from importlib.metadata import version

import lazy_loader

__version__ = version("hijacklens")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
