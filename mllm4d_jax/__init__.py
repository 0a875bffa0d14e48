"""MLLM-4D in JAX: video question answering with physically computed spatio-temporal supervision."""

__version__ = "0.1.0"  # pyproject.toml reads it here
