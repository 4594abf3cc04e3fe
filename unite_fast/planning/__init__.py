"""Predictions of memory, speed and cost, without a GPU."""
