"""Read published weights that the user has downloaded: check size and SHA-256, then load without unpickling."""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.utils.files import home_path, open_regular


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights, and the settings that give its path."""

    key: str
    """The setting or option for its path, used in messages."""
    sha256_key: str
    """The setting or option that allows a file with another SHA-256."""
    variable: str
    """The environment variable for its path, read if the setting is empty."""
    needed_by: str
    """What needs the file, for messages: "FID"."""
    source: str
    """What the file is and where it comes from, for messages."""
    sha256: str
    """SHA-256 in hex, or its first digits."""
    size: int | None = None
    """Size in bytes, if known."""

    def named(self, path: str) -> bool:
        """Whether `path` or the environment variable is set; the file may be missing."""
        return bool(self._setting(path))

    def missing(self, path: str) -> str:
        """The setting or environment variable that names no file; empty if the file exists."""
        origin, path = self._origin(path), self._setting(path)
        return "" if path and home_path(path).is_file() else origin

    def path(self, path: str) -> Path:
        """The file at `path`; if that is empty, at the environment variable's path.

        Raises:
            UserError: neither is set, or no such file.
        """
        origin, path = self._origin(path), self._setting(path)
        if not path:
            raise UserError(
                f"{self.key} is not set: {self.needed_by} needs {self.source}; "
                f"download it and set {self.key} or the environment variable {self.variable} to its path"
            )
        resolved = home_path(path)
        if not resolved.is_file():
            raise UserError(f"{origin}: there is no file {path}; download {self.source} and set its path there")
        return resolved

    def load(self, path: str, sha256: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Check the file, then load the tensors in `shapes` to the CPU.

        Args:
            path: see `path`.
            sha256: the first digits of the file's SHA-256.
            shapes: name -> shape; other tensors in the file are ignored.

        Raises:
            UserError: no path, no such file, a wrong size or SHA-256, a file that torch.save did not write, or a
                tensor that is missing or has another shape.
        """
        origin, resolved = self._origin(path), self.path(path)
        try:
            self._check(resolved, sha256, origin)
            # mmap needs the zip format; published files may be older. map_location: vgg.pth holds CUDA tensors.
            tensors = torch.load(resolved, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(resolved))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{origin}: {resolved} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # torch.load raises errors of pickle, zip and others
            raise UserError(
                f"{origin}: {resolved} was not written by torch.save ({type(error).__name__}); expected {self.source}"
            ) from error

        if not isinstance(tensors, dict):
            raise UserError(
                f"{origin}: {resolved} holds a {type(tensors).__name__}, not named tensors; expected {self.source}"
            )
        for name, shape in shapes.items():
            if not isinstance(tensors.get(name), Tensor):
                raise UserError(f"{origin}: {resolved} has no tensor {name}; expected {self.source}")
            actual = tuple(tensors[name].shape)
            if actual != shape:
                raise UserError(
                    f"{origin}: {name} in {resolved} has shape {actual}, expected {shape} as in {self.source}"
                )
            if fault := fault_of(tensors[name]):
                raise UserError(f"{origin}: {name} in {resolved} is {fault}; expected {self.source}")
        return {name: tensors[name] for name in shapes}

    def _setting(self, path: str) -> str:
        """`path`; if that is empty, the environment variable's."""
        return path or os.environ.get(self.variable, "")

    def _origin(self, path: str) -> str:
        return self.key if path else self.variable

    def _check(self, path: Path, sha256: str, origin: str) -> None:
        """Check the size (if the published file is expected) and the SHA-256, or as many digits as `sha256` has."""
        expected = sha256.lower()
        size = path.stat().st_size
        if self.size is not None and self.sha256.startswith(expected) and size != self.size:
            raise UserError(
                f"{origin}: {path} has {size} bytes, {self.source} has {self.size}: a truncated download? "
                f"To use another file on purpose, set {self.sha256_key} to its SHA-256"
            )
        digest = file_sha256(path)
        if not digest.startswith(expected):
            raise UserError(
                f"{origin}: {path} has SHA-256 {digest}, expected {expected}: a broken download "
                f"of {self.source}? To use another file on purpose, set {self.sha256_key} to its SHA-256"
            )


def fault_of(value: object, whole: bool = False) -> str:
    """What a value from a file of torch.save is, if it is not a tensor of finite floating-point numbers; else empty.

    Args:
        whole: the file must hold each number. Else a few can be shown as a tensor of any shape.
    """
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_sparse or value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_quantized or not value.is_floating_point():
        return f"a tensor of {value.dtype}"
    if type(value) not in (Tensor, torch.nn.Parameter) or value.device.type != "cpu":
        return f"a {type(value).__name__} on {value.device.type}, without numbers"
    if whole and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of shape {list(value.shape)} with fewer numbers than that"
    return "" if value.isfinite().all() else "a tensor with values that are not finite"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
