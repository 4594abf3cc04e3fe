"""Choosing a device, and how exactly PyTorch computes on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unite_fast.errors import require, require_choice

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS repeats its bits only with a workspace of fixed size (cuBLAS documentation, "Results reproducibility")."""


def use_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    require_choice("the device", name, ("auto", "cpu", "cuda"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name != "cuda" or torch.cuda.is_available(), "the device is cuda, but torch sees no CUDA device here")
    return torch.device(name)


def use_numerics(precision: str, deterministic: bool) -> None:
    """Set, for the whole process, what float32 means on CUDA and whether every result has the same bits each time.

    Args:
        precision: of training. In float32, convolutions and products must not round their inputs to TF32, which has 10
            bits of mantissa instead of 23; by default cuDNN does.
        deterministic: PyTorch then takes deterministic algorithms and fails where it has none. Attention is where it
            matters: cuDNN's backward pass is left out, flash's adds up in a fixed order. cuBLAS reads its setting when
            the process first multiplies, so this must come before.
    """
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        # Every tensor of ours is written whole before it is read: filling it first would cost a pass over memory.
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 convolutions and products on CUDA do not round to TF32 (see `use_numerics`)."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
