"""Defences: what brings recall back under a hijack, and what it costs.

    result = hl.defend(model, hl.atlas(), schemes=["do-not-think", "relation"])
    result.defences            # undone, bare retention, helpful contexts, neutral text, tokens, p
    result.verdict             # which methods undo at least half at a loss of at most .02
    result.plot()              # undone against harm

`methods` has the registry, `decoding` and `interventions` what methods change, `evaluation` the
splits and runs, and `result` the tables.
"""

from analyses.defence.methods import METHODS, Method, add_method
from analyses.defence.result import DefenceResult, Protocol, defend

__all__ = ["METHODS", "DefenceResult", "Method", "Protocol", "add_method", "defend"]
