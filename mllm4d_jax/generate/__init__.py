"""Prompts -> completions."""
