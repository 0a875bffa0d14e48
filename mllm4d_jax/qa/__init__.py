"""What a record, a question, an answer and a reward are. Never imports JAX."""
