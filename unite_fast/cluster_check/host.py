"""Facts of one host: name, addresses, limits, versions, devices."""

import os
import platform
import resource
import shutil
import socket
from pathlib import Path

import torch
from torch.cuda import nccl

import unite_fast
from unite_fast.cluster_check import addresses
from unite_fast.errors import UserError
from unite_fast.utils.code_digest import code_digest, version_of
from unite_fast.utils.device import choose_device, host_memory

PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors", "nvidia-dali-cuda130", "flash-attn")
"""Packages whose version changes what is computed or how."""
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", "UNITE_FAST_")
"""Environment variables that change how processes compute or communicate."""


def rank_facts(kind: str) -> dict:
    """Facts of one rank: the device that it would take, or why there is none.

    Args:
        kind: train.device.
    """
    try:
        device, error = choose_device(kind).type, ""
    except UserError as reason:
        device, error = "", str(reason)
    return {"host": socket.gethostname(), "device": device, "device_error": error, "pid": os.getpid()}


def host_facts() -> dict:
    """Facts of this host, of types that JSON has. Sizes are bytes."""
    name, found = socket.gethostname(), addresses.interfaces()
    master = os.environ.get("MASTER_ADDR", "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "name": name,
        "interfaces": found,
        "infiniband": addresses.infiniband(),
        "own_addresses": addresses.resolve(name),
        "master": {"name": master, "addresses": addresses.resolve(master) if master else []},
        "descriptors": {"soft": soft, "hard": hard},
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": host_memory(),
        "shared_memory": _disk("/dev/shm"),
        "gpus": _gpus(),
        "software": _software(),
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key in ENVIRONMENT or key.startswith(PREFIXES)
        },
    }


def _software() -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release(), "unite_fast": unite_fast.__version__}
    found["unite_fast source"] = code_digest()
    for package in PACKAGES:
        found[package] = version_of(package)
    # With its build: 2.13.0+cpu and 2.13.0+cu130 have the same version for pip on some indices.
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda or ""
    found["nccl"] = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else ""
    found["driver"] = _driver()
    return found


def _driver() -> str:
    """Version of NVIDIA's kernel module; empty without one."""
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text().split() if file.exists() else []
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), "")


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _disk(folder: str) -> dict[str, int]:
    """Size and free space of a file system, bytes; empty if there is no such folder."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return {}
    return {"size": usage.total, "free": usage.free}
