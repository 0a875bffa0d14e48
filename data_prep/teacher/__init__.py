"""A vision language model behind an OpenAI-compatible endpoint: client, cache, naming and describing objects."""
