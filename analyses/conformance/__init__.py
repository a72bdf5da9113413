"""Compare everything that is computed with a model with plain Hugging Face forward passes."""
