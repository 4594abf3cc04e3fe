"""The machine behind a measurement: GPU, versions, commit."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import unite_fast


def describe(device: torch.device) -> dict[str, str]:
    """Date (UTC), commit or version of this package, GPU or CPU, and versions of libraries."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "card": card(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "" if device.type == "cuda" else "",
        "triton": version("triton"),
        "python": platform.python_version(),
    }


def card(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {usable_cores()} cores"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The git commit of this code, with + if files were changed; the version of the package outside a repository."""
    here = Path(unite_fast.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        # Fails if the package is installed in an environment inside another repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return unite_fast.__version__
