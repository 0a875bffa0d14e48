"""Generation and what reinforcement learning adds to training."""
