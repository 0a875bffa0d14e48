"""What was trained, for other programs."""
