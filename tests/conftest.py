"""What all tests share: one thread, no CUDA test without a CUDA device, and a UNITE of toy size."""

from collections.abc import Callable

import pytest
import torch

from unite_fast.config import Config, ModelConfig, from_tree
from unite_fast.model.unite import UNITE

# Every size differs from its neighbours, so that a mixed-up dimension cannot pass unseen.
TINY = {
    "name": "tiny",
    "model": {
        "image_size": 8,
        "patch_size": 4,
        "latent_channels": 6,
        "num_classes": 5,
        "encoder": {"width": 32, "depth": 3, "heads": 4, "in_context_tokens": 3, "in_context_start": 1},
        "decoder": {"width": 24, "depth": 2, "heads": 3, "mlp_width": 40, "embed_width": 20},
    },
    "schedule": {"lr": 1e-3, "lr_2": 5e-4, "reference_batch": 0, "warmup_steps": 2, "hold_until": 3, "decay_until": 9},
    "train": {"batch_size": 6, "steps": 10, "precision": "float32", "compile": False, "device": "cpu"},
}


def pytest_configure() -> None:
    # The same split of float sums on every machine, and no crowding where tests run side by side: two threads waiting for
    # each other on a busy two-core machine took 17 times the CPU time of one (1.7 s against 0.1 s a toy training step).
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def tiny_config() -> Config:
    """Every part of UNITE, at a size at which a step takes milliseconds."""
    return from_tree(Config, TINY)


@pytest.fixture
def make_model() -> Callable[[ModelConfig], UNITE]:
    """Makes a model whose parameters are its start values moved by N(0, 0.1): as created, modulation, gates and output
    are zero, which would hide mistakes."""

    def make(config: ModelConfig) -> UNITE:
        model = UNITE.create(config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@pytest.fixture
def tiny_model(make_model: Callable[[ModelConfig], UNITE], tiny_config: Config) -> UNITE:
    return make_model(tiny_config.model)
