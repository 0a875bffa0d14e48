"""Qwen-VL models as Flax NNX modules, their adapters, and the reading and writing of published checkpoints."""
