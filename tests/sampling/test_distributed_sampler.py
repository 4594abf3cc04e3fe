"""Many images by one process or several: the same bits every time."""

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
def made() -> Generation:
    return Generation(torch.arange(23) % 10, SAMPLING, seed=5, batch=4)


def test_a_batch_is_what_generate_gives_for_its_places(model, made):
    drawn = list(sample_distributed(model.network, made))
    assert [len(part.indices) for part in drawn] == [4, 4, 4, 4, 4, 3]
    assert {part.evaluations for part in drawn} == {2 + 2 * 3 + 1}, "before, inside and after guidance's interval"
    indices, images, labels = (torch.cat(parts) for parts in list(zip(*drawn, strict=True))[:3])
    assert torch.equal(indices, torch.arange(23)) and torch.equal(labels, made.labels)
    want = model.generate(made.labels, 5, 4, solver="multistep", steps=3, guidance=2.0, interval=(0.2, 0.9))
    assert torch.equal(images, want)


@pytest.mark.parametrize("solver", ["multistep", "dopri5"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_and_what_was_done_before_change_no_bit(model, made, world, solver):
    made = replace(made, sampling=replace(SAMPLING, solver=solver))
    alone = {int(part.indices[0]): part.images for part in sample_distributed(model.network, made)}
    shares = [list(sample_distributed(model.network, made, Ranks(rank, world), done={1, 4})) for rank in range(world)]
    assert [len(share) for share in shares] == [-(-4 // world)] * world
    together = {int(part.indices[0]): part.images for share in shares for part in share}
    assert together.keys() == alone.keys() - {4, 16}
    assert all(torch.equal(images, alone[first]) for first, images in together.items())


def test_where_the_last_round_is_short_some_get_an_empty_item(model, made):
    share = list(sample_distributed(model.network, made, Ranks(3, 4)))
    assert [part.indices.tolist() for part in share] == [[12, 13, 14, 15], []]
    assert share[1].images.shape == (0, 3, 8, 8) and share[1].images.dtype == torch.uint8
    assert share[1].labels.tolist() == []


def test_a_longer_generation_begins_with_the_shorter_one(model, made):
    longer = replace(made, labels=torch.arange(40) % 10)
    short, long = (torch.cat([part.images for part in sample_distributed(model.network, g)]) for g in (made, longer))
    assert torch.equal(long[:23], short)


def test_a_class_that_does_not_exist_is_refused_before_anything_is_drawn(model, made, mentions):
    with pytest.raises(UserError, match=mentions("class", 10, "0..9")):
        sample_distributed(model.network, replace(made, labels=torch.tensor([3, 10])))
