"""4D scenes and what holds in them."""
