"""Published weights that the user fetches: found by setting or environment variable, checked, read without unpickling.

Nothing is downloaded.
"""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.errors import UserError


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights: how the user names it, what it is, and how to know it."""

    key: str
    """The setting or option that gives its path, for messages."""
    sha256_key: str
    """The setting or option that allows another file."""
    variable: str
    """The environment variable that gives its path where the setting is empty."""
    needed_by: str
    source: str
    sha256: str
    """In hex, or as many digits of it as are known."""
    size: int | None = None
    """Bytes, where known."""

    def named(self, path: str) -> bool:
        """Whether `path`, or the environment variable if that is empty, names a file, there or not."""
        return bool(path or os.environ.get(self.variable))

    def exists(self, path: str) -> bool:
        """Whether the file that `path` or the environment variable names exists."""
        path = path or os.environ.get(self.variable, "")
        return bool(path) and Path(path).expanduser().is_file()

    def path(self, path: str) -> Path:
        """The file that `path` names, or the environment variable if `path` is empty.

        Raises:
            UserError: neither is set, or there is no such file.
        """
        origin = self._origin(path)
        path = path or os.environ.get(self.variable, "")
        if not path:
            raise UserError(
                f"{self.key} is not set: {self.needed_by} needs {self.source}; "
                f"fetch it and give its path there or in the environment variable {self.variable}"
            )
        resolved = Path(path).expanduser()
        if not resolved.is_file():
            raise UserError(f"{origin}: there is no file {path}; fetch {self.source} and give its path there")
        return resolved

    def load(self, path: str, sha256: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors named in `shapes`, on the CPU, from a file that was checked first.

        Args:
            path: empty for the environment variable's.
            sha256: what the file's digest must start with.
            shapes: name -> shape; other tensors in the file are ignored.

        Raises:
            UserError: the path is not set, or its file is missing, of another size or SHA-256 than expected, no file
                of `torch.save`, or without these tensors.
        """
        origin, resolved = self._origin(path), self.path(path)
        try:
            self._check(resolved, sha256, origin)
            # Only zip files can be mapped, and published ones may be older; vgg.pth names a CUDA device.
            tensors = torch.load(resolved, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(resolved))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{origin}: {resolved} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # torch.load has none of its own: pickle's, zip's, EOFError, ...
            raise UserError(
                f"{origin}: {resolved} is no file of torch.save ({type(error).__name__}), not {self.source}"
            ) from error

        if not isinstance(tensors, dict):
            raise UserError(
                f"{origin}: {resolved} holds a {type(tensors).__name__} and no tensors by name, not {self.source}"
            )
        for name, shape in shapes.items():
            if not isinstance(tensors.get(name), Tensor):
                raise UserError(f"{origin}: {resolved} has no tensor {name}; expected {self.source}")
            found = tuple(tensors[name].shape)
            if found != shape:
                raise UserError(
                    f"{origin}: {name} in {resolved} has shape {found}, expected {shape} as in {self.source}"
                )
        return {name: tensors[name] for name in shapes}

    def _origin(self, path: str) -> str:
        return self.key if path else self.variable

    def _check(self, path: Path, sha256: str, origin: str) -> None:
        """Compares size (known of the published file only) and SHA-256, or as many digits of it as `sha256` has."""
        expected = sha256.lower()
        size = path.stat().st_size
        if self.size is not None and self.sha256.startswith(expected) and size != self.size:
            raise UserError(
                f"{origin}: {path} has {size} bytes, {self.source} has {self.size}: a truncated download? "
                f"To use another file on purpose, set {self.sha256_key} to its digest"
            )
        digest = file_sha256(path)
        if not digest.startswith(expected):
            raise UserError(
                f"{origin}: {path} has SHA-256 {digest}, expected {expected}: a broken or truncated download "
                f"of {self.source}? To use another file on purpose, set {self.sha256_key} to its digest"
            )


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
