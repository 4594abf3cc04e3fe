"""Shard sets: WebDataset tar files with an index each and one manifest, made once and read ever after."""
