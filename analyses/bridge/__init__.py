"""Analyses that compare language models with the one-layer model, which the paper does not do."""
