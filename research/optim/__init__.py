"""Floor 3: optimizers and schedules, composed from optax."""
