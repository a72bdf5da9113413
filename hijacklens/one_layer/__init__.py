"""Latent concept association: the synthetic task, its one-layer transformer, and its training.

`task` draws contexts, `model` is equation 4.1, `memory` equation 5.1 and `embeddings` equation 5.2;
`training` trains models by a `recipe`, and `evaluation` compares them with the Bayes rule.
"""
