"""Scores of molecules: reconstructed ones against the truth, and generated ones by themselves."""
