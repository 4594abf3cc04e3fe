"""Sampling on one process or several gives the same bits."""

from dataclasses import replace

import pytest
import torch

import unite_fast
from unite_fast.config import SamplingConfig
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.sampling.distributed_sampler import Generation, sample_distributed

SAMPLING = SamplingConfig(solver="multistep", steps=3, guidance=2.0, interval=(0.2, 0.9))


@pytest.fixture(scope="module")
def model(trained_folder):
    return unite_fast.load(trained_folder)


@pytest.fixture
def generation() -> Generation:
    return Generation(torch.arange(23) % 10, SAMPLING, seed=5, batch=4)


def test_batches_equal_the_images_of_generate(model, generation):
    samples = list(sample_distributed(model.network, generation))
    assert [len(part.indices) for part in samples] == [4, 4, 4, 4, 4, 3]
    assert {part.evaluations for part in samples} == {2 + 2 * 3 + 1}, "before, inside and after guidance's interval"
    indices, images, labels = (torch.cat(parts) for parts in list(zip(*samples, strict=True))[:3])
    assert torch.equal(indices, torch.arange(23)) and torch.equal(labels, generation.labels)
    expected = model.generate(generation.labels, 5, 4, solver="multistep", steps=3, guidance=2.0, interval=(0.2, 0.9))
    assert torch.equal(images, expected)


@pytest.mark.parametrize("solver", ["multistep", "dopri5"])
@pytest.mark.parametrize("world", [2, 4])
def test_neither_the_number_of_processes_nor_finished_batches_change_a_bit(model, generation, world, solver):
    generation = replace(generation, sampling=replace(SAMPLING, solver=solver))
    alone = {int(part.indices[0]): part.images for part in sample_distributed(model.network, generation)}
    shares = [
        list(sample_distributed(model.network, generation, Ranks(rank, world), done={1, 4})) for rank in range(world)
    ]
    assert [len(share) for share in shares] == [-(-4 // world)] * world
    together = {int(part.indices[0]): part.images for share in shares for part in share}
    assert together.keys() == alone.keys() - {4, 16}
    assert all(torch.equal(images, alone[first]) for first, images in together.items())


def test_in_a_short_last_round_some_ranks_get_an_empty_item(model, generation):
    share = list(sample_distributed(model.network, generation, Ranks(3, 4)))
    assert [part.indices.tolist() for part in share] == [[12, 13, 14, 15], []]
    assert share[1].images.shape == (0, 3, 8, 8) and share[1].images.dtype == torch.uint8
    assert share[1].labels.tolist() == []


def test_a_longer_generation_starts_with_the_shorter_one(model, generation):
    longer = replace(generation, labels=torch.arange(40) % 10)
    short, long = (
        torch.cat([part.images for part in sample_distributed(model.network, g)]) for g in (generation, longer)
    )
    assert torch.equal(long[:23], short)


def test_an_unknown_class_is_refused_before_sampling(model, generation, mentions):
    with pytest.raises(UserError, match=mentions("class", 10, "0..9")):
        sample_distributed(model.network, replace(generation, labels=torch.tensor([3, 10])))
