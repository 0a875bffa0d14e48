"""Rendered stereo worlds with exact truth, written as Stereo4D lays out its clips."""
