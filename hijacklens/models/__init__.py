"""Language models: loading them with hooks, identifying them, choosing their device."""
