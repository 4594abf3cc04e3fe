"""Synthetic images: as many as in ImageNet, all different, the same on every machine."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import torch

from unite_fast.data_pipeline import Loader, open_source


def test_every_image_is_a_function_of_split_and_number():
    train, test = (open_source("synthetic", "", 16, split, 7) for split in ("train", "test"))
    assert (len(train), len(test)) == (1_281_167, 50_000)
    for source in (train, test):
        numbers = [0, 1, 5, 1000, len(source) - 1]
        images, labels = source.read(numbers)
        assert images.dtype == torch.uint8 and images.shape == (5, 3, 16, 16)
        assert labels.tolist() == [number % 7 for number in numbers]
        assert len({image.numpy().tobytes() for image in images}) == 5
        for number, image in zip(numbers, images, strict=True):
            alone = np.empty((3, 16, 16), np.uint8)
            assert source.read_into(number, alone) == number % 7
            assert np.array_equal(alone, image)
    assert not torch.equal(train.read([0])[0], test.read([0])[0])
    # Noise: bytes are about equally frequent, and neighbouring images differ.
    first = train.read([0])[0]
    assert hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16] == "ae41a90a6bca0299"
    assert 100 < first.float().mean() < 155
    assert (first == train.read([1])[0]).float().mean() < 0.05


def test_class_counts_are_those_of_the_labels():
    source = open_source("synthetic", None, 8, "test", 9)
    assert source.class_names == [str(label) for label in range(9)]
    labels = source.read(range(len(source)))[1]
    assert source.class_counts() == labels.bincount(minlength=9).tolist()


def test_a_loader_reads_synthetic_images():
    with Loader(open_source("synthetic", "", 8, "train", 3), 4, seed=1) as loader:
        batch = next(loader)
        assert torch.equal(batch.labels, batch.ids % 3)
        assert torch.equal(batch.data, loader.source.read(batch.ids)[0])


def test_python_and_cpp_make_the_same_images(tmp_path):
    code = """
import hashlib
from unite_fast.kernels import native
native._missing = "no compiler was found"
from unite_fast.data_pipeline import open_source
images = open_source("synthetic", "", 16, "test", 7).read([0])[0]
print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    here = open_source("synthetic", "", 16, "test", 7).read([0])[0]
    assert ended.stdout.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest(), ended.stderr
