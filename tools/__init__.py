"""Commands beside run.py: recording a reference with transformers, writing random checkpoints in published format."""
