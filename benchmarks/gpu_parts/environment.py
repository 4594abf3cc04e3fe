"""The machine: versions, missing packages, and the copy and matmul rates that other parts are compared with."""

import importlib
import os
import platform
import subprocess
from importlib.metadata import version

import torch
from torch.cuda import nccl
from torch.nn import functional as F

from gpu_parts.context import Context
from kernels import copy_bandwidth  # benchmarks/kernels.py
from unite_fast.benchmarking.machine import commit
from unite_fast.benchmarking.matmul_rate import matmul_rate
from unite_fast.kernels import backend, native

NEEDED = (
    "torch",
    "triton",
    "numpy",
    "torchdiffeq",
    "safetensors",
    "typer",
    "rich",
    "yaml",
    "matplotlib",
    "tensorboard",
)
OPTIONAL = ("webdataset", "flash_attn", "flash_attn.cute", "nvidia.dali")
"""Packages of single features: shards of JPEGs, other attention backends, decoding on the GPU."""
PRODUCTS = {"qkv": (768, 2304), "proj": (768, 768), "fc_in": (768, 4096), "fc_out": (2048, 768), "fc1": (768, 3072)}
"""Inputs and outputs of the Linears of UNITE-B."""
TOKENS = 64 * 544
"""Rows of a matmul: tokens of a tokenizer pass of 64 images, with in-context tokens."""


def measure(c: Context) -> None:
    c.say("machine", **machine(c))
    missing = {name: why for name in (*NEEDED, *OPTIONAL) if (why := why_missing(name))}
    c.say("packages", ok=not missing.keys() & set(NEEDED), missing=missing)
    c.say(
        "backends",
        ok=not backend.why_missing(c.backend_name),
        native=native.reason() or "built",
        triton=backend.why_missing("triton") or "can run",
    )
    c.say("copy", tb_per_s=float(f"{copy_bandwidth(c.device, 0.1 if c.tiny else 0.5) / 1e12:.4g}"))
    c.say("bfloat16 product", tflops=float(f"{matmul_rate(c.device) / 1e12:.4g}"))
    smaller = 16 if c.tiny else 1
    for name, (inputs, outputs) in PRODUCTS.items():
        c.say("products", linear=name, **linear(c, TOKENS // smaller**2, inputs // smaller, outputs // smaller))


def machine(c: Context) -> dict:
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None if why_missing("triton") else version("triton"),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
    if not c.cuda:
        return facts | {"card": "none: a CPU"}
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return facts | {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gb": round(total / 1e9, 2),
        "free_gb": round(free / 1e9, 2),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if torch.distributed.is_nccl_available() else None,
        "driver": driver(),
    }


def driver() -> str | None:
    """Driver version, maximum clock and power limit, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def why_missing(name: str) -> str:
    """Why a package cannot be imported; empty if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a package for another GPU or version may raise anything
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def linear(c: Context, rows: int, inputs: int, outputs: int) -> dict:
    """Microseconds and TFLOP/s of the passes of a Linear as in kernels/matmul.py."""
    x = torch.randn(rows, inputs, device=c.device, dtype=torch.bfloat16)
    d_y = torch.randn(rows, outputs, device=c.device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=c.device, dtype=torch.bfloat16)
    bias = torch.randn(outputs, device=c.device, dtype=torch.bfloat16)
    passes = {"forward": lambda: F.linear(x, weight, bias), "d_x": lambda: d_y @ weight, "d_weight": lambda: d_y.mT @ x}
    if c.cuda:  # on a CPU torch.mm has no out_dtype
        passes["d_weight"] = lambda: torch.mm(d_y.mT, x, out_dtype=torch.float32)
    result: dict = {"shape": [rows, inputs, outputs]}
    for name, run in passes.items():
        seconds = c.device_seconds(run, 3 if c.tiny else 20)
        result[name] = {"us": round(1e6 * seconds, 1), "tflops": round(2 * rows * inputs * outputs / seconds / 1e12, 1)}
    seconds = c.device_seconds(lambda: d_y.sum(0, dtype=torch.float32), 3 if c.tiny else 20)
    return result | {"d_bias": {"us": round(1e6 * seconds, 1), "tb_per_s": float(f"{d_y.nbytes / seconds / 1e12:.4g}")}}
