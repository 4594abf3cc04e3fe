"""Shard sets: WebDataset tar files, an index for each, and one manifest."""
