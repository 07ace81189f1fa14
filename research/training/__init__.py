"""Floor 5: state, step, the one loop, checkpoints, metrics."""
