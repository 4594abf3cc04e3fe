"""Checkpoints of the released code, and parity with it."""
