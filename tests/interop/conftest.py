"""Traces of the released code and of its plain restatement `released.py`."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from unite_fast.interop.trace import Trace

OFFICIAL = Path(__file__).parents[1] / "data" / "official_tiny_a.npz"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes a second thread costs more than it saves, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def released() -> ModuleType:
    spec = importlib.util.spec_from_file_location("released", Path(__file__).with_name("released.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def official() -> Trace:
    return Trace(OFFICIAL)


@pytest.fixture
def write_trace(tmp_path: Path) -> Callable[..., Path]:
    """Writes arrays as a trace; `meta` replaces their settings."""

    def write(arrays: dict[str, np.ndarray], meta: dict | None = None) -> Path:
        if meta is not None:
            arrays = arrays | {"meta_json": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
        path = tmp_path / "trace.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture(scope="session")
def small(released: ModuleType) -> dict[str, np.ndarray]:
    """Arrays of a trace that takes less than a second to compare: 4 x 4 patches, Euler steps."""
    meta = released.new_meta("small", method="euler", num_time_points=8, warmup_steps=1, hold_1_until=1)
    return released.record(meta, size=32)
