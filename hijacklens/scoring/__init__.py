"""Scores of facts under hijacking: reading log-probabilities, and what is made of them."""
