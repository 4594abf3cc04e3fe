"""Numbers of torch-fidelity, and models whose scores are known."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.data_pipeline import open_source
from unite_fast.evaluation import evaluate
from unite_fast.evaluation.inception import INCEPTION_FILE
from unite_fast.sampling.distributed_sampler import Samples
from unite_fast.sampling.pipeline import TrainedUNITE


@pytest.fixture(scope="session")
def fidelity() -> ModuleType:
    """The inputs of torch-fidelity's numbers; `numbers` holds the numbers."""
    spec = importlib.util.spec_from_file_location("fidelity", Path(__file__).with_name("fidelity_numbers.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(module.FILE) as file:
        module.numbers = {name: file[name] for name in file.files}
    return module


@pytest.fixture(autouse=True)
def no_weights_in_the_environment(monkeypatch):
    for variable in (INCEPTION_FILE.variable, "UNITE_FAST_VGG16", "UNITE_FAST_LPIPS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def model(trained_folder):
    return unite_fast.load(trained_folder)


class PerfectModel:
    """Reconstructs every value one level off, and "generates" real images of the requested classes; without guidance,
    zeros only."""

    precision_and_compile = TrainedUNITE.precision_and_compile

    def __init__(self, trained):
        self.config, self.network, self.step = trained.config, trained.network, trained.step
        self.class_names = trained.class_names
        images, labels = open_source("digits", "", 8, "train").read(range(1437))
        self.examples = {label: images[labels == label] for label in range(10)}

    def reconstruct(self, images, seed, batch, first):
        return torch.where(images < 128, images + 1, images - 1)

    def sample_distributed(self, network, generation, ranks):
        def example(i: int, label: int):
            kind = self.examples[label if generation.sampling.guidance > 1 else 0]
            return kind[i // 10 % len(kind)]

        indices = torch.arange(len(generation.labels))
        for i, labels in zip(indices.split(generation.batch), generation.labels.split(generation.batch), strict=True):
            images = [example(int(index), int(label)) for index, label in zip(i, labels, strict=True)]
            yield Samples(i, torch.stack(images), labels, 1)


@pytest.fixture
def perfect(model, monkeypatch):
    stand_in = PerfectModel(model)
    monkeypatch.setattr(evaluate, "sample_distributed", stand_in.sample_distributed)
    return stand_in
