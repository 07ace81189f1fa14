"""Floor 6: what held-out text costs a model, and what it costs simpler ones."""
