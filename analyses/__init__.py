"""Experiments made with the instrument and the probes, and the `hijacklens` command.

`analyses.reproduce("fig3a", scale="quick")` reproduces a figure or statement of the paper;
`hijacklens reproduce --list` names them all.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
