"""The figures, theorems and lemmas of the paper, a module for each group."""
