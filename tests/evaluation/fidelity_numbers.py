"""Numbers that torch-fidelity computes, stored in `data/torch_fidelity.npz`, so that tests need not install it.

The file was made with torch-fidelity 0.4.0 and torch 2.13.0 (CPU) by

    pip install torch-fidelity tqdm --no-deps && python tests/evaluation/fidelity_numbers.py

torchvision, which torch-fidelity imports but does not need here, is replaced by an empty module.
"""

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "data" / "torch_fidelity.npz"
SIZES = ((32, 32), (64, 64), (256, 256), (299, 299), (40, 75))
KID = {"kid_subsets": 20, "kid_subset_size": 50}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights under which activations keep their size from layer to layer; by numpy's frozen generator."""
    random = np.random.RandomState(0)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("conv.weight"):
            values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            values = random.uniform(0.5, 1.5, shape)
        else:
            values = random.standard_normal(shape) * 0.1
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def random_image(height: int, width: int) -> torch.Tensor:
    """uint8 [1, 3, height, width]: noise, so that every pixel matters."""
    values = np.random.RandomState(height * 1000 + width).randint(0, 256, (1, 3, height, width))
    return torch.from_numpy(values.astype(np.uint8))


def random_features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Generated and real features, float32 [203, 12] and [151, 12], and logits [203, 7], all of several clusters."""
    random = np.random.RandomState(1)
    clusters = random.standard_normal((5, 12)) * 2
    generated = clusters[random.randint(0, 5, 203)] + random.standard_normal((203, 12))
    real = clusters[random.randint(0, 4, 151)] + 1.2 * random.standard_normal((151, 12))
    logits = 2 * random.standard_normal((203, 7))
    return tuple(torch.from_numpy(array.astype(np.float32)) for array in (generated, real, logits))


class _Torchvision(types.ModuleType):
    """Has every name that torch-fidelity's modules import; none of them runs here."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", object)


def main() -> None:
    for name in ("", ".transforms", ".datasets", ".transforms.functional"):
        sys.modules[f"torchvision{name}"] = _Torchvision(f"torchvision{name}")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    from unite_fast.evaluation.inception import inception_shapes

    torch.set_num_threads(1)
    arrays = {}
    weights = random_weights(inception_shapes())
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        # We do not read the bias of the logits and batch normalisation's counters.
        counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in weights}
        counters = {name: value for name, value in counters.items() if name.endswith("num_batches_tracked")}
        torch.save({**weights, **counters, "fc.bias": torch.zeros(1008)}, file.name)
        layers = ["2048", "logits_unbiased"]
        exact, rounded = (FeatureExtractorInceptionV3("inception", layers, file.name) for _ in range(2))
    # By hand: in 0.4.0 its own setting "float64" means float32.
    exact.double().feature_extractor_internal_dtype = torch.float64
    for height, width in SIZES:
        image = random_image(height, width)
        for name, a, b in zip(("pool", "logits"), exact(image), rounded(image), strict=True):
            arrays[f"{name}/{height}x{width}"] = a[0].numpy()
            arrays[f"{name}_error/{height}x{width}"] = float((b.double() - a.double()).norm() / a.double().norm())
    generated, real, logits = random_features()
    # In float64: torch.cdist's errors in float32 decide which points lie inside a ball.
    arrays |= isc_features_to_metric(logits, 10, shuffle=False)
    arrays |= kid_features_to_metric(generated.double(), real.double(), **KID)
    arrays |= prc_features_to_metric(generated.double(), real.double())
    FILE.parent.mkdir(exist_ok=True)
    np.savez(FILE, **arrays)
    print({name: value for name, value in arrays.items() if np.ndim(value) == 0}, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
