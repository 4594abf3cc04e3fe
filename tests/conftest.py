"""What all tests share: a fixed number of threads, and no CUDA test without a CUDA device."""

import pytest
import torch


def pytest_configure() -> None:
    # The same split of float sums on every machine, and no crowding where tests run side by side.
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
