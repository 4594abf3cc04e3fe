"""One optimizer step of UNITE-B at 256 x 256, batch 1: the ImageNet recipe runs on a CPU, if slowly."""

import os

import pytest
import torch

from unite_fast.data_pipeline import Batch
from unite_fast.model.unite import UNITE
from unite_fast.optim import muon
from unite_fast.recipes import load_config
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep


@pytest.fixture
def all_cores():
    """Threads on all cores; other tests are small and run on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("all_cores")
def test_unite_b_takes_a_training_step(monkeypatch):
    monkeypatch.setattr(muon, "ITERATIONS", 1)  # five take most of the time, and have their own tests
    overrides = ("perceptual.weight=0", "train.batch_size=1", "train.micro_batch=1", "optim.muon_dtype=float32")
    config = load_config("imagenet256_b", (*overrides, "schedule.warmup_steps=0"))
    state = TrainState(UNITE.create(config.model, seed=0), config)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1, 3, 256, 256), generator=generator, dtype=torch.uint8)
    losses, norm = TrainStep(state, config)(Batch(images, torch.tensor([207]), torch.tensor([0])))
    assert losses.total.isfinite() and norm.isfinite() and norm > 0
    moved = {name for name, p in state.model.named_parameters() if not torch.equal(p, before[name])}
    # The final layer starts at zero, so the first step sends no gradient through it: only these must move.
    must_move = {name for name in before if name.startswith(("decoder.", "encoder.final_layer.linear"))}
    assert must_move <= moved
