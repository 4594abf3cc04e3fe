"""The table of GPUs."""

import pytest

from unite_fast.errors import UserError
from unite_fast.planning.gpus import GPUS, find_gpu, recognise


def test_the_table_is_plausible():
    assert len({gpu.key for gpu in GPUS}) == len(GPUS)
    names = [name for gpu in GPUS for name in gpu.names]
    assert len(set(names)) == len(names)
    for gpu in GPUS:
        assert gpu.source and min(gpu.tflops, gpu.memory, gpu.bandwidth, gpu.link, gpu.network) > 0
        # Wrong units would leave these ranges: FLOPs per byte of memory traffic, and a network slower than a link.
        assert 70 < gpu.tflops / gpu.bandwidth < 450
        assert gpu.network <= gpu.link


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_torch_s_names_are_known(name, key):
    assert recognise(name) is find_gpu(key)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100", "a CPU", ""]
)
def test_parts_and_relatives_of_a_gpu_are_not_that_gpu(name):
    assert recognise(name) is None


def test_an_unknown_gpu_is_named_with_the_known_ones(mentions):
    assert find_gpu("H100").tflops == 989
    with pytest.raises(UserError, match=mentions("'h1000'", "a100", "h100")):
        find_gpu("h1000")
