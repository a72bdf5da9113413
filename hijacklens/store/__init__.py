"""Finished readings on disk, so that no run computes again what an earlier run has computed."""
