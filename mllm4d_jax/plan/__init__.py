"""Whether a run fits the devices it is meant for, before there are any."""
