"""A folder of checkpoints, and a checkpoint without ranks and tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest

from unite_fast.checkpoint import folders
from unite_fast.checkpoint import format as files
from unite_fast.config import Config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def progress() -> dict:
    return {"averages": {"sums": [0.1 + 0.2, 1e-300], "count": 3}, "loader": {"batch": 7, "skipped": [["a", "b"]]}}


@pytest.fixture
def write(progress: dict) -> Callable[..., Path]:
    """`write(folder, step)` writes a checkpoint as a save does."""

    def write(folder: Path, step: int, content: bytes = b"numbers", config: Config | None = None) -> Path:
        path = folders.step_path(folder, step)
        partial = folders.partial_path(path)
        folders.make_empty(partial)
        (partial / "shard").write_bytes(content)
        shards = [files.read_shard(partial / "shard")]
        files.write_manifest(partial, files.Manifest(config or Config(), step, progress, shards))
        folders.commit(partial, path)
        return path

    return write
