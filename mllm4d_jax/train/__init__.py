"""Training: one jitted step, its state, its checkpoints and its metrics."""
