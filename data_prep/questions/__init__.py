"""Questions about scenes, and which of them make a set."""
