"""What a probe runs over: prompts in batches, in pairs, and which of their tokens correspond."""
