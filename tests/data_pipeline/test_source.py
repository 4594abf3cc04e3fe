"""Sources of images in memory, and the error for a broken sample."""

import numpy as np
import torch

from unite_fast.data_pipeline import UnreadableSample
from unite_fast.data_pipeline.source import MemorySource


def test_a_memory_source_repeats_grey_and_keeps_the_order_of_the_indices():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 4, 4)
    source = MemorySource("dot", images, torch.arange(5) * 10, ["a", "b"])
    assert (len(source), source.image_size, source.class_names, source.workers) == (5, 4, ["a", "b"], "none")
    assert source.name(3) == "dot 3"
    for indices in ([4, 0, 4], torch.tensor([4, 0, 4])):
        actual, labels = source.read(indices)
        assert actual.dtype == torch.uint8 and actual.shape == (3, 3, 4, 4) and actual.is_contiguous()
        assert labels.dtype == torch.int64 and labels.tolist() == [40, 0, 40]
        assert actual[:, 2, 1, 1].tolist() == [4, 0, 4]
        assert (actual[:, :1] == actual).all()


def test_read_into_agrees_with_read():
    source = MemorySource("dot", torch.arange(80, dtype=torch.uint8).reshape(5, 4, 4), torch.arange(5), ["a"])
    image = np.empty((3, 4, 4), np.uint8)
    assert source.read_into(2, image) == 2
    assert torch.equal(torch.from_numpy(image), source.read([2])[0][0])


def test_an_unreadable_sample_has_name_and_reason():
    error = UnreadableSample("a/b.jpg", "truncated")
    assert (error.name, error.reason, str(error)) == ("a/b.jpg", "truncated", "a/b.jpg: truncated")
