"""Reasoning for questions that are there already: Algorithm 1 of MLLM-4D."""
