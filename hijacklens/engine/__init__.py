"""The engine: log-probabilities of requested next tokens, computed in as few tokens as pays."""
