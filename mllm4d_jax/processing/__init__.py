"""Record -> Example, once: media, prompts, tokens, positions. NumPy, OpenCV and tokenizers only; never imports jax."""
