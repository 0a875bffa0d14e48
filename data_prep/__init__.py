"""Clips to 4D scenes to questions with computed answers (NumPy and OpenCV; never imports JAX)."""
