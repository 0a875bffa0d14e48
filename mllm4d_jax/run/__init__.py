"""What every training run needs: start, checkpoint, checks, log."""
