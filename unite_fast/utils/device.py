"""Choose a device and the numerics of PyTorch on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from unite_fast.config import DEVICES, MOST_THREADS, ModelConfig
from unite_fast.errors import require, require_choice
from unite_fast.kernels import float8

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS is deterministic only with a workspace of fixed size (cuBLAS documentation, "Results reproducibility")."""


def use_threads(threads: int) -> None:
    """Set the number of CPU threads of PyTorch; 0 keeps PyTorch's choice.

    Raises:
        UserError: more threads than any machine runs, for example in the settings of a received model. PyTorch would
            start them, and crash.
    """
    require(threads <= MOST_THREADS, f"train.threads is {threads}; it must be at most {MOST_THREADS}")
    if threads:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device "cpu" or "cuda"; "auto" is CUDA if there is a GPU.

    Raises:
        UserError: another name, or no GPU.
    """
    require_choice("the device", name, DEVICES)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name != "cuda" or torch.cuda.is_available(), "the device is cuda, but torch sees no CUDA device here")
    return torch.device(name)


def host_memory() -> int:
    """Bytes of memory of this machine, or of the control group (container) that it grants this process."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file; "max" means no limit
            memory = min(memory, int(Path(limit).read_text()))
    return memory


def use_numerics(precision: str, deterministic: bool) -> None:
    """Configure float32 on CUDA and determinism, for the whole process.

    Args:
        precision: precision of training. With float32, convolutions and matmuls must not round their inputs to TF32 (10
            mantissa bits instead of 23), which cuDNN does by default.
        deterministic: use deterministic algorithms, and fail where PyTorch has none. This matters for attention: it
            excludes cuDNN's backward pass and makes flash attention's deterministic. cuBLAS reads its setting at the
            first matmul of the process, so call this before.
    """
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        # Our kernels write every element before it is read, so filling new tensors would only cost time.
        # The type checker does not know this attribute of a module.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    # The call imports Inductor, which takes a second. Off is the default.
    if deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)


def check_float8(model: ModelConfig, device: torch.device) -> None:
    """Check that the Linears of encoder blocks and decoder layers can run in float8 (kernels/float8.py).

    Raises:
        UserError: a GPU without float8, or on CUDA a width that its matmuls do not take. A CPU emulates any width.
    """
    why = float8.why_missing(device)
    require(not why, f"train.precision is float8, but {why}; set train.precision=bfloat16")
    # SwiGLU's hidden width is padded to a multiple of 64.
    widths = {
        "model.encoder.width": model.encoder.width,
        "model.decoder.width": model.decoder.width,
        "model.decoder.mlp_width": model.decoder.mlp_width,
    }
    for key, width in widths.items():
        require(
            device.type != "cuda" or width % float8.MULTIPLE == 0,
            f"train.precision is float8, and {key} is {width}; on CUDA it must then be a multiple of {float8.MULTIPLE}",
        )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the context, float32 convolutions and matmuls on CUDA do not round to TF32 (see `use_numerics`)."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
