"""Prompts: schemes of hijacking sentences, spans, and their positions in tokens."""
