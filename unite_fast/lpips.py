"""LPIPS, the perceptual distance of the reconstruction loss, on VGG16.

Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a perceptual metric"
(arXiv 1801.03924, equation 1), on the 13 convolutions of VGG16 (Simonyan, Zisserman, arXiv 1409.1556, table 1, D):

    d(x, y) = sum_l mean_hw sum_c  w_lc m_lchw (x_lchw / |x_lhw| - y_lchw / |y_lhw|)^2

x_l and y_l are the features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, w_l >= 0 the learned linear weights
(version 0.1) and m_l the dropout mask of the released training (0 or 2), absent everywhere else.

The weights come from two files that the user names; nothing is downloaded. torchvision itself is not needed.
"""

import math

import torch
from torch import Tensor, nn

from unite_fast import kernels
from unite_fast.config import LPIPS_SHA256, VGG16_SHA256, PerceptualConfig
from unite_fast.kernels.casts import cast
from unite_fast.kernels.tap_distance import is_fused
from unite_fast.kernels.tensors import matmul_dtype, upcast
from unite_fast.randomness import Philox, Stream
from unite_fast.utils.pretrained import WeightFile

# The convolutions before each tap: (index in torchvision's `features`, channels in, channels out).
VGG_BLOCKS = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
_TAP_CHANNELS = tuple(block[-1][2] for block in VGG_BLOCKS)
SMALLEST_SIDE = 2 ** (len(VGG_BLOCKS) - 1)  # four poolings leave one pixel

# ImageNet's mean and deviation for pixels in [-1, 1], as LPIPS 0.1 rounds them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

VGG_SHAPES: dict[str, tuple[int, ...]] = {
    name: shape
    for block in VGG_BLOCKS
    for index, inputs, outputs in block
    for name, shape in (
        (f"features.{index}.weight", (outputs, inputs, 3, 3)),
        (f"features.{index}.bias", (outputs,)),
    )
}
"""The tensors that `LPIPS` reads from torchvision's VGG16 file, name -> shape."""

LINEAR_SHAPES: dict[str, tuple[int, ...]] = {
    f"lin{layer}.model.1.weight": (1, channels, 1, 1) for layer, channels in enumerate(_TAP_CHANNELS)
}
"""The tensors that `LPIPS` reads from the file of linear weights, name -> shape."""


_NEEDED_BY = "LPIPS (perceptual.weight above 0, or asked for by an evaluation)"
VGG_FILE = WeightFile(
    key="perceptual.vgg_path",
    sha256_key="perceptual.vgg_sha256",
    variable="UNITE_FAST_VGG16",
    needed_by=_NEEDED_BY,
    source="torchvision's vgg16-397923af.pth",
    size=553_433_881,
    sha256=VGG16_SHA256,
)
LPIPS_FILE = WeightFile(
    key="perceptual.lpips_path",
    sha256_key="perceptual.lpips_sha256",
    variable="UNITE_FAST_LPIPS",
    needed_by=_NEEDED_BY,
    source="vgg.pth from weights/v0.1 of the lpips package",
    size=7_289,
    sha256=LPIPS_SHA256,
)


class Convolution(nn.Conv2d):
    """A convolution and its ReLU in the autocast dtype of the caller, its weights rounded by `kernels.casts.cast`:
    autocast itself would round frozen ones at each use."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        if is_fused(x):
            return kernels.bias_relu(self.product(x), self.bias)
        x, dtype = _cast(x)
        # In place: no backward reads the convolution's output, only the ReLU's.
        return self._conv_forward(x, cast(self.weight, dtype), cast(self.bias, dtype)).relu_()

    def product(self, x: Tensor) -> Tensor:
        """The convolution alone, without bias and ReLU."""
        x, dtype = _cast(x)
        return self._conv_forward(x, cast(self.weight, dtype), None)


def _cast(x: Tensor) -> tuple[Tensor, torch.dtype]:
    dtype = matmul_dtype(x)
    return x.to(dtype), dtype


class Block(nn.Module):
    """The convolutions before a tap."""

    def __init__(self, convolutions: list[Convolution]) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(*convolutions[:-1]), convolutions[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `kernels.tap_distance` takes: the last convolution's output without bias and ReLU, and the bias; or,
        where that op is not fused, the features and None."""
        x = self.first(x)
        return (self.last.product(x), self.last.bias) if is_fused(x) else (self.last(x), None)


class LPIPS(nn.Module):
    """LPIPS 0.1 on VGG16, frozen.

    No parameter takes a gradient, and there is no training mode: dropout happens exactly when its random numbers are
    given. The convolutions run in channels-last and in the autocast dtype of the caller; normalisation, squares and
    sums run in float32.

    Args:
        vgg: tensors with the names and shapes of `VGG_SHAPES`; others are ignored.
        linear: tensors with the names and shapes of `LINEAR_SHAPES`; others are ignored.
        input_range: "unit" or "signed", see `PerceptualConfig`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: dict[str, Tensor], linear: dict[str, Tensor], input_range: str = "unit") -> None:
        super().__init__()
        self.input_range = input_range
        self.blocks = nn.ModuleList(_block(vgg, layer) for layer in range(len(VGG_BLOCKS)))
        self.linear = nn.ParameterList(_frozen(linear[name].reshape(-1, 1, 1)) for name in LINEAR_SHAPES)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Does nothing: the module stays in evaluation mode when a parent is switched to training."""
        return super().train(False)

    def matmul_weights(self) -> list[nn.Parameter]:
        """Weights and biases of the convolutions, for `kernels.casts.cast_once`."""
        return list(self.blocks.parameters())

    def forward(self, image: Tensor, recon: Tensor, dropout: Philox | None = None) -> Tensor:
        """The distance of each reconstruction from its image.

        Args:
            image: [B, 3, H, W], values in [0, 1], any float dtype, H and W at least 16. Gets no gradient.
            recon: [B, 3, H, W], like `image` but not clamped.
            dropout: random numbers of this step and these samples; draw l of `Stream.LPIPS_DROPOUT` is the mask of
                tap l, see `kernels.tap_distance.dropout_mask`. None: no dropout.

        Returns:
            float32 [B]; float64 [B] once the module and the images are float64, to check gradients with.

        Raises:
            ValueError: for another shape than these.
        """
        if image.shape != recon.shape or image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image and recon must both be [B, 3, H, W], got {image.shape} and {recon.shape}")
        if min(image.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(f"VGG16 needs sides of {SMALLEST_SIDE} pixels or more, got {tuple(image.shape[2:])}")

        # Block by block, so that a target feature is freed as soon as its successor and its distance exist.
        x, y = self._scaled(image.detach()), self._scaled(recon)
        distances = []
        for layer, (block, weight) in enumerate(zip(self.blocks, self.linear, strict=True)):
            with torch.no_grad():
                x, _ = block(x)
            y, bias = block(y)
            last = layer == len(VGG_BLOCKS) - 1
            tap = kernels.tap_distance(
                y, x, weight.flatten(), bias, dropout, Stream.LPIPS_DROPOUT, draw=layer, pool=not last
            )
            distances.append(tap.distance)
            x, y = tap.x, tap.y
        return torch.stack(distances).sum(dim=0)

    def _scaled(self, image: Tensor) -> Tensor:
        image = upcast(image)
        if self.input_range == "signed":
            image = 2 * image - 1
        return ((image - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)


def tap_shapes(height: int, width: int) -> list[tuple[int, int, int]]:
    """The shapes (C, H, W) of an image's five features: each pooling halves both sides, rounding down."""
    return [(channels, height >> layer, width >> layer) for layer, channels in enumerate(_TAP_CHANNELS)]


def load_lpips(config: PerceptualConfig) -> LPIPS:
    """LPIPS with the weights of the two files that `config` or the environment names, on the CPU in float32.

    Raises:
        UserError: a path is not set, or its file is missing, has another size or SHA-256 than expected, was not
            written by `torch.save`, or lacks tensors of VGG16 or LPIPS.
    """
    vgg = VGG_FILE.load(config.vgg_path, config.vgg_sha256, VGG_SHAPES)
    linear = LPIPS_FILE.load(config.lpips_path, config.lpips_sha256, LINEAR_SHAPES)
    return LPIPS(vgg, linear, config.input_range)


def has_weights(config: PerceptualConfig) -> bool:
    """Whether `config` or the environment gives a path of weights; the file may be missing."""
    return VGG_FILE.named(config.vgg_path) or LPIPS_FILE.named(config.lpips_path)


def random_lpips(config: PerceptualConfig) -> LPIPS:
    """LPIPS with random weights, to time a training step: the same work, but meaningless distances."""
    position = torch.zeros(1, dtype=torch.int64)
    tensors = {}
    for draw, (name, shape) in enumerate((VGG_SHAPES | LINEAR_SHAPES).items()):
        # He initialisation: features neither grow nor vanish over the 13 layers.
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) == 4 else 0.0
        tensors[name] = scale * Philox(0, 0, position).normal(Stream.SYNTHETIC, shape, draw)[0]
    return LPIPS(tensors, {name: tensors[name].abs() for name in LINEAR_SHAPES}, config.input_range)


def _block(vgg: dict[str, Tensor], layer: int) -> Block:
    convolutions = []
    for index, inputs, outputs in VGG_BLOCKS[layer]:
        # On the meta device: no initial values are drawn for weights that are replaced below.
        conv = Convolution(inputs, outputs, 3, padding=1, device="meta")
        conv.weight = _frozen(vgg[f"features.{index}.weight"], torch.channels_last)
        conv.bias = _frozen(vgg[f"features.{index}.bias"])
        convolutions.append(conv)
    return Block(convolutions)


def _frozen(weight: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Parameter:
    # A copy, since the tensor may be a view of a mapped file.
    copy = weight.detach().to(torch.float32, copy=True).contiguous(memory_format=memory_format)
    return nn.Parameter(copy, requires_grad=False)
