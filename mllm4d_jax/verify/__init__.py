"""Comparison with what a reference implementation recorded."""
