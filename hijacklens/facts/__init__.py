"""Facts that models should recall, read from CounterFact in every published layout."""
