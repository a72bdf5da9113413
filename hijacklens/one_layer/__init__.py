"""Latent concept association: the synthetic task and its one-layer transformer."""
