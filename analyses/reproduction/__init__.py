"""Running analyses: catalogue, settings, checks, drawing, the workbench and the ledger."""
