"""Inception v3 for FID as in TensorFlow: the network behind every published FID.

Szegedy et al., "Rethinking the Inception architecture" (arXiv 1512.00567), with the weights of TensorFlow's graph of
2015-12-05. It differs from torchvision's network in four ways: images are resized to 299 x 299 by TensorFlow 1's
bilinear rule, which does not align pixel centres; pixels become (x - 128) / 128; average pooling excludes the padding
from the mean; pooling in the last block takes the maximum. Features are the mean over the last 8 x 8 positions, and
logits have no bias ("unbiased"), as for the Inception Score.

The user provides torch-fidelity's weight file. Batch normalisation is folded into the convolutions in float64, with one
rounding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unite_fast.config import INCEPTION_SHA256
from unite_fast.evaluation.features import FeatureBatch
from unite_fast.utils.device import exact_float32
from unite_fast.utils.pretrained import WeightFile, file_sha256

SIDE = 299
DIMENSION, CLASSES = 2048, 1008
_BN_EPS = 1e-3

INCEPTION_FILE = WeightFile(
    key="--inception",
    sha256_key="--inception-sha256",
    variable="UNITE_FAST_INCEPTION",
    needed_by="features inception",
    source="torch-fidelity's weights-inception-2015-12-05-6726825d.pth (release v0.2.0 on GitHub)",
    sha256=INCEPTION_SHA256,
)

# A step is a convolution (name, channels, kernel, stride), a pooling, or a list of branches with the same input, whose
# outputs are concatenated. Convolutions of stride 1 keep the size unless "valid"; those of stride 2 have no padding.
_STEM = (
    ("Conv2d_1a_3x3", 32, 3, 2),
    ("Conv2d_2a_3x3", 32, 3, 1, "valid"),
    ("Conv2d_2b_3x3", 64, 3, 1),
    "max/2",
    ("Conv2d_3b_1x1", 80, 1, 1),
    ("Conv2d_4a_3x3", 192, 3, 1, "valid"),
    "max/2",
)


def _block_a(pool_channels: int) -> list:
    return [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
        ["mean", ("branch_pool", pool_channels, 1, 1)],
    ]


def _block_b() -> list:
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        ["max/2"],
    ]


def _block_c(c: int) -> list:
    return [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", c, 1, 1), ("branch7x7_2", c, (1, 7), 1), ("branch7x7_3", 192, (7, 1), 1)],
        [
            ("branch7x7dbl_1", c, 1, 1),
            ("branch7x7dbl_2", c, (7, 1), 1),
            ("branch7x7dbl_3", c, (1, 7), 1),
            ("branch7x7dbl_4", c, (7, 1), 1),
            ("branch7x7dbl_5", 192, (1, 7), 1),
        ],
        ["mean", ("branch_pool", 192, 1, 1)],
    ]


def _block_d() -> list:
    return [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        ["max/2"],
    ]


def _block_e(pooling: str) -> list:
    def both(name: str) -> list:
        return [[(f"{name}a", 384, (1, 3), 1)], [(f"{name}b", 384, (3, 1), 1)]]

    return [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), both("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1), both("branch3x3dbl_3")],
        [pooling, ("branch_pool", 192, 1, 1)],
    ]


_MIXED = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class InceptionFeatures(nn.Module):
    """Features `pool` [n, 2048] and unbiased logits [n, 1008] of images of any size.

    Args:
        weights: tensors with the names and shapes of `inception_shapes()`; others are ignored.
        source: origin of the weights, for the JSON of a result.
    """

    name = "inception"
    title = "FID"
    dimension = DIMENSION
    classes = CLASSES
    classifier: Tensor
    """float32 [1008, 2048]."""

    def __init__(self, weights: dict[str, Tensor], source: dict | None = None) -> None:
        super().__init__()
        self.source = source or {}
        self.backbone = _network(lambda name, shape: weights[name])
        # Copy: the tensor may be a view of a memory-mapped file.
        self.register_buffer("classifier", weights["fc.weight"].to(torch.float32, copy=True), persistent=False)
        # pyright: torch's stubs lack the overload with memory_format alone
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    @torch.no_grad()
    def forward(self, images: Tensor) -> FeatureBatch:
        """images: uint8 [n, 3, H, W]."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}")
        x = resize_like_tensorflow(images.to(self.classifier), SIDE)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        # By default convolutions on CUDA use TF32; published FIDs were measured in float32.
        with exact_float32():
            pool = self.backbone(x).mean(dim=(2, 3))
        return FeatureBatch(pool, pool @ self.classifier.T)


def load_inception(
    path: str = "", sha256: str = INCEPTION_SHA256, device: torch.device | str = "cpu"
) -> InceptionFeatures:
    """Load the network from `path`, or from the environment variable UNITE_FAST_INCEPTION if that is empty.

    Raises:
        UserError: no path, or another file than expected; the message says where to get it.
    """
    weights = INCEPTION_FILE.load(path, sha256, inception_shapes())
    file = INCEPTION_FILE.path(path)
    return InceptionFeatures(weights, {"path": str(file), "sha256": file_sha256(file)}).to(device)


def inception_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors to read from the weight file."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, DIMENSION)}

    def record(name: str, shape: tuple[int, ...]) -> Tensor:
        shapes[name] = shape
        return torch.empty(shape, device="meta")

    _network(record)
    return shapes


def resize_like_tensorflow(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear` without `align_corners`: output pixel i samples at i * (size / side), without a
    half-pixel offset. float [n, c, H, W] -> [n, c, side, side]."""

    def neighbours(size: int) -> tuple[Tensor, Tensor, Tensor]:
        # TensorFlow's scale is float32, whatever the dtype of the pixels.
        position = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
        low = position.long()
        return low.to(x.device), (low + 1).clamp(max=size - 1).to(x.device), (position - low).to(x)

    top, bottom, down = neighbours(x.shape[2])
    left, right, across = neighbours(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * across
    upper, lower = x[:, :, top], x[:, :, bottom]
    return upper + (lower - upper) * down[:, None]


GetTensor = Callable[[str, tuple[int, ...]], Tensor]
"""(name, shape) -> the tensor with this name."""


def _network(get_tensor: GetTensor) -> nn.Sequential:
    stem, channels = _sequence(_STEM, 3, "", get_tensor)
    blocks = [stem]
    for name, branches in _MIXED.items():
        block, channels = _parallel(branches, channels, f"{name}.", get_tensor)
        blocks.append(block)
    return nn.Sequential(*blocks)


def _parallel(branches: Sequence, channels: int, prefix: str, get_tensor: GetTensor) -> tuple[nn.Module, int]:
    built = [_sequence(steps, channels, prefix, get_tensor) for steps in branches]
    return _Parallel([module for module, _ in built]), sum(outputs for _, outputs in built)


def _sequence(steps: Sequence, channels: int, prefix: str, get_tensor: GetTensor) -> tuple[nn.Module, int]:
    modules: list[nn.Module] = []
    for step in steps:
        if isinstance(step, str):
            modules.append(_POOLINGS[step]())
        elif isinstance(step, list):
            module, channels = _parallel(step, channels, prefix, get_tensor)
            modules.append(module)
        else:
            name, outputs, kernel, stride, *valid = step
            conv = _conv(f"{prefix}{name}", channels, outputs, kernel, stride, bool(valid), get_tensor)
            # In place: only the ReLU reads the convolution's output.
            modules += [conv, nn.ReLU(inplace=True)]
            channels = outputs
    return nn.Sequential(*modules), channels


def _conv(name: str, inputs: int, outputs: int, kernel, stride: int, valid: bool, get_tensor: GetTensor) -> nn.Conv2d:
    """A convolution with folded batch normalisation: gamma (w x - mean) / sqrt(var + eps) + beta."""
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = (0, 0) if valid or stride == 2 else tuple(side // 2 for side in sides)
    conv = nn.Conv2d(inputs, outputs, sides, stride, padding, device="meta")
    weight = get_tensor(f"{name}.conv.weight", tuple(conv.weight.shape)).double()
    gamma, beta, mean, variance = (
        get_tensor(f"{name}.bn.{part}", (outputs,)).double()
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / (variance + _BN_EPS).sqrt()
    conv.weight = nn.Parameter((weight * scale[:, None, None, None]).float())
    conv.bias = nn.Parameter((beta - mean * scale).float())
    return conv


class _Parallel(nn.Module):
    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "max/2": lambda: nn.MaxPool2d(3, stride=2),
    "max": lambda: nn.MaxPool2d(3, stride=1, padding=1),
    # The mean over positions inside the image.
    "mean": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
}
