"""Floor 4: models of other projects, in and out."""
