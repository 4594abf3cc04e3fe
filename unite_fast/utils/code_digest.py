"""What code runs here: a digest of the package's sources, and versions of libraries."""

import hashlib
import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PARTS = ("unite_fast", "unite_fast.kernels", "unite_fast.data_pipeline")
"""In a checkout the last two are folders of their own."""


def code_digest() -> str:
    """SHA-256 of all Python files of the package by name and content, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in PARTS:
        folder = Path(str(importlib.import_module(part).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            name = f"{part}/{path.relative_to(folder)}"
            # In an installed package the first part holds the others.
            if part != PARTS[0] or path.relative_to(folder).parts[0] not in ("kernels", "data_pipeline"):
                digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def version_of(library: str) -> str:
    """The version of an installed library; empty if it is not there."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
