"""Floor 3: losses as pure functions of per-token values."""
