"""Files that survive a killed writer; the lowest room: imports nothing of the house and no JAX."""
