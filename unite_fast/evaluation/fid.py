"""Mean and covariance of features, the Frechet distance, and files of reference statistics.

n samples, D dimensions.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError, require
from unite_fast.utils.files import atomic_write, home_path, writing
from unite_fast.utils.npz import read_npz
from unite_fast.utils.parse_json import parse_as
from unite_fast.utils.pretrained import file_sha256


@dataclass(frozen=True)
class Statistics:
    mean: Tensor
    """float64 [D]."""
    covariance: Tensor
    """float64 [D, D], divided by n - 1."""


class Moments:
    """Running sums in float64; memory does not grow with the number of samples.

    Sums of products of float32 numbers are exact to about 1e-16 n (relative), so the order of samples and their
    distribution over ranks hardly matter.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.products = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """features: [n, D], any float dtype."""
        x = features.to(self.sum)
        self.count += len(x)
        self.sum += x.sum(dim=0)
        self.products.addmm_(x.T, x)

    def all_reduce(self, ranks: Ranks) -> None:
        """Sum over ranks. Call it once, at the end."""
        for tensor in (self.count, self.sum, self.products):
            ranks.sum(tensor)

    def statistics(self) -> Statistics:
        """On the CPU.

        Raises:
            UserError: fewer than two samples.
        """
        n = int(self.count)
        require(n >= 2, f"a covariance needs at least 2 images, there are {n}")
        mean = self.sum / n
        covariance = (self.products - n * torch.outer(mean, mean)) / (n - 1)
        return Statistics(mean.cpu(), ((covariance + covariance.T) / 2).cpu())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), the squared Frechet distance of two Gaussians (Dowson and
    Landau, 1982; Heusel et al., arXiv 1706.08500).

    With A = S S^T, the eigenvalues of A B are those of S^T B S, which is symmetric positive semi-definite; so no
    complex numbers appear and no ridge is needed, however singular A and B are. Directions in which a covariance is
    zero up to rounding are left out: the square root would raise their noise from 1e-16 to 1e-8.

    Raises:
        UserError: statistics of different dimensions.
    """
    require(
        a.mean.shape == b.mean.shape,
        f"statistics of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared: the features differ",
    )
    values, vectors = torch.linalg.eigh(a.covariance)
    nonzero = _above_rounding(values)
    root = vectors[:, nonzero] * values[nonzero].sqrt()
    product = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace_of_root = product[_above_rounding(product)].sqrt().sum()
    offset = (a.mean - b.mean).square().sum()
    return float(offset + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root)


def _above_rounding(eigenvalues: Tensor) -> Tensor:
    largest = eigenvalues.max().clamp(min=0) if len(eigenvalues) else 0.0
    return eigenvalues > largest * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


@dataclass
class Reference:
    """Statistics of real images and their origin.

    Files of other programs (for example ADM's or JiT's) have `mu` and `sigma` only, and leave the rest empty.
    """

    statistics: Statistics
    features: str = ""
    """Name of the features; empty if unknown."""
    count: int = 0
    """Images; 0 if unknown."""
    provenance: dict = field(default_factory=dict)
    """Data, their fingerprint, source of the features."""
    samples: Tensor | None = None
    """float32 [m, D]: features of some of the images, for KID, precision and recall."""
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    """Fitted parameters of the features by name (see pixel_features.py), to compute the same features again."""
    path: str = ""
    sha256: str = ""

    def info(self) -> dict:
        """Entry for the JSON of a result."""
        own = {"path": self.path, "sha256": self.sha256, "features": self.features, "images": self.count}
        return own | self.provenance | own


_Text = Annotated[str, Field(max_length=10_000)]
_Value = _Text | Annotated[int, Field(ge=0, lt=2**53)] | float | bool | None


@dataclass
class _Meta:
    """The entry meta_json of a statistics file."""

    features: Annotated[str, Field(pattern="^[a-z]{0,40}$")] = ""
    count: Annotated[int, Field(ge=0, lt=2**53)] = 0
    about: dict[str, _Value | list[_Text] | dict[str, _Value]] = field(default_factory=dict)


def save_reference(reference: Reference, path: Path) -> None:
    """Write a .npz with mu [D], sigma [D, D] and the other fields of the reference.

    Raises:
        UserError: no space left, or no permission.
    """
    arrays = {
        "mu": reference.statistics.mean,
        "sigma": reference.statistics.covariance,
        **({} if reference.samples is None else {"samples": reference.samples}),
        **{f"basis/{name}": tensor for name, tensor in reference.basis.items()},
    }
    meta = {"features": reference.features, "count": reference.count, "about": reference.provenance}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(file, **{"meta_json": text, **{name: tensor.numpy() for name, tensor in arrays.items()}})


def load_reference(path: str | Path) -> Reference:
    """Read a .npz with `mu` [D] and `sigma` [D, D], ours or another program's. Nothing is unpickled.

    Raises:
        UserError: no such file, not an .npz, or these arrays are missing.
    """
    path = home_path(path)
    require(
        path.is_file(),
        f"there is no statistics file {path}: make one with unite-fast stats DATA {path.name or 'OUT.npz'}",
    )
    try:
        # Other programs may store all their images in the same file.
        known = {"mu", "sigma", "samples", "meta_json"}
        arrays = read_npz(path, lambda name: name in known or name.startswith("basis/"))
        require(arrays.keys() >= {"mu", "sigma"}, f"{path} has no statistics (arrays mu and sigma)")
        meta = parse_as(_Meta, arrays.pop("meta_json", np.frombuffer(b"{}", np.uint8)).tobytes())
        if any(array.dtype.kind != "f" for array in arrays.values()):
            raise ValueError("an array that is not of floats")
        return _reference({name: torch.from_numpy(array) for name, array in arrays.items()}, meta, path)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable .npz of statistics: another kind of file, or damaged; download it again, or "
            "make one with unite-fast stats DATA OUT.npz"
        ) from error


def _reference(tensors: dict[str, Tensor], meta: _Meta, path: Path) -> Reference:
    """
    Raises:
        UserError: shapes that do not fit together, or values that no statistics have.
    """
    mean, covariance = tensors.pop("mu").double(), tensors.pop("sigma").double()
    d = len(mean) if mean.dim() == 1 else -1
    require(
        covariance.shape == (d, d) and d > 0,
        f"{path}: mu and sigma have shapes {list(mean.shape)} and {list(covariance.shape)}, expected [D] and [D, D]",
    )
    for name, tensor in {"mu": mean, "sigma": covariance, **tensors}.items():
        require(bool(tensor.isfinite().all()), f"{path}: the statistics have values that are not finite, in {name}")
    largest = covariance.abs().max()
    require(
        bool((covariance.diagonal() >= 0).all()) and bool(((covariance - covariance.T).abs() <= 1e-3 * largest).all()),
        f"{path}: sigma is no covariance: it is not symmetric, or has negative variances",
    )
    samples = tensors.pop("samples", None)
    require(
        samples is None or (samples.dim() == 2 and samples.shape[1] == d),
        f"{path}: samples do not have the shape [M, {d}]",
    )
    basis = {name.removeprefix("basis/"): tensor.float() for name, tensor in tensors.items()}
    if basis:
        side = math.isqrt(basis["mean"].numel() // 3) if "mean" in basis else 0
        shapes = {name: list(tensor.shape) for name, tensor in basis.items()}
        pixels = 3 * side**2
        fits = pixels > 0 and shapes == {"mean": [pixels], "components": [d, pixels]}
        require(fits, f"{path}: the pixel components do not fit: {shapes} for {d} features")
    return Reference(
        Statistics(mean, covariance),
        meta.features,
        meta.count,
        meta.about,
        None if samples is None else samples.float(),
        basis,
        str(path),
        file_sha256(path),
    )
