"""Saved runs of `hijacklens hijack` in the forms that other tools read.

Each kind is a module whose `files` returns path -> content. `run` has what they share: the scores
of the summary with their intervals, and the texts of each item.
"""
