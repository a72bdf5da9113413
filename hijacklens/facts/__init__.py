"""Facts: what a model is asked to recall, read from CounterFact in every published layout."""
