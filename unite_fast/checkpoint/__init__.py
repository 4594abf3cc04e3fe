"""Checkpoints of runs, and exported model files."""
