"""From stereo video to question-answer records. NumPy and OpenCV only; never imports jax."""
