"""Checkpoints and exported model files."""
