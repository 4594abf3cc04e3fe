"""The commands of `unite-fast`, by what they work on: thin calls, nothing else."""
