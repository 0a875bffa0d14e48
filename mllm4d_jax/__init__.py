"""MLLM-4D in JAX: video question answering with physically computed spatio-temporal supervision."""
