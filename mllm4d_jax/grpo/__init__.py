"""Reinforcement learning on completions (GRPO and its relatives)."""
