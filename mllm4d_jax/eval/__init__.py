"""Questions to a checkpoint: single answers, and the comparison with a recorded reference."""
