"""What a figure was measured with: card, versions, commit."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import unite_fast


def describe(device: torch.device) -> dict[str, str]:
    """Date (UTC), commit or version of this package, card, and the versions that a speed depends on."""
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
    """The GPU's name, or the processor's and how many of its cores this process may use."""
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
    """The commit that this code is, with + if files differ from it; the package's version where git does not know."""
    here = Path(unite_fast.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed in an environment within another repository
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return unite_fast.__version__
