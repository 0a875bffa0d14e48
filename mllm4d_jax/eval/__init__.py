"""Questions to a checkpoint: benchmarks and single answers, and how they are scored and compared."""
