"""Conversation -> example: prompts, tokens, patches, positions. Never imports JAX."""
