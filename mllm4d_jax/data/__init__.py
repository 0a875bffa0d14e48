"""Record files on disk -> a deterministic, resumable stream of batches."""
