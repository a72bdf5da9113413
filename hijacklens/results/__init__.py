"""Results: fields that save themselves, provenance, folders of earlier versions, what is shown."""
