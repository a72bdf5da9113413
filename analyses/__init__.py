"""Experiments made with the instrument and the probes, and the `hijacklens` command."""
