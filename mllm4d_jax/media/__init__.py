"""Files -> frames: which frames of a clip, decoded in processes that can be killed. Never imports JAX."""
