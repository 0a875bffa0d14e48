"""Examples -> padded arrays. Never imports JAX."""
