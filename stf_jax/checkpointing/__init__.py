"""Checkpoints of runs and folders of imported weights, with checksums."""
