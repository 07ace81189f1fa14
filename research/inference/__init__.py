"""Floor 5: from a model and a prompt to text."""
