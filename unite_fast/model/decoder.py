"""The pixel decoder: a plain pre-norm vision transformer from latents to an image.

Shapes: B batch, N latent tokens, C latent channels, D width, S image size, P patch size.
"""

import torch
from torch import Tensor, nn

from unite_fast import kernels
from unite_fast.config import ModelConfig
from unite_fast.model.layers import Linear, fill, sincos_2d

LAYER_NORM_EPS = 1e-12


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        branch_bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x = x + attn(norm1(x)); x = x + mlp(norm2(x)), with each addition left to the norm after it, as one kernel.

        Args:
            x: residual, [B, T, D].
            branch: MLP output of the previous layer, still to be added to x, [B, T, D]; None in the first layer.
            branch_bias: the bias in branch that still needs its gradient, [D], or None (`kernels.shared_bias`).
            mask: keys to attend to, bool [B, 1, 1, T]; None: all.

        Returns:
            x, branch and branch_bias for the next layer.
        """
        x, qkv, qkv_bias = norm_linear(x, branch, branch_bias, self.norm1, self.qkv)
        attended = kernels.attention(qkv, self.heads, qkv_bias=qkv_bias, mask=mask)
        bias, proj_bias = kernels.shared_bias(attended, self.proj.bias)
        attended = kernels.linear(attended, self.proj.weight, bias, wide=True)
        x, hidden, hidden_bias = norm_linear(x, attended, proj_bias, self.norm2, self.fc1)
        bias, branch_bias = kernels.shared_bias(hidden, self.fc2.bias)
        return x, kernels.gelu_linear(hidden, self.fc2.weight, bias, hidden_bias, wide=True), branch_bias


def norm_linear(
    x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: nn.LayerNorm, linear: nn.Linear
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + branch, linear(norm(x + branch)), and the bias in it that still needs its gradient."""
    bias, left = kernels.shared_bias(x, linear.bias)
    weights = norm.weight, norm.bias, linear.weight, bias, norm.eps
    if branch is None:
        return x, kernels.layer_norm_linear(x, *weights, wide=True), left
    return *kernels.residual_layer_norm_linear(x, branch, *weights, branch_bias, wide=True), left


class Decoder(nn.Module):
    """Linears, a class token, 2-D sin-cos positions, transformer layers, and a Linear from tokens to patches."""

    positions: Tensor
    """float32 [N, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.decoder
        self.patch_size = config.patch_size
        self.side = config.image_size // config.patch_size
        self.input_proj = Linear(config.latent_channels, size.embed_width)
        self.embed = Linear(size.embed_width, size.width)
        self.cls_token = nn.Parameter(torch.zeros(size.width))
        self.layers = nn.ModuleList(DecoderLayer(size.width, size.heads, size.mlp_width) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.pred = Linear(size.width, config.patch_size**2 * 3)
        with torch.device("cpu"):  # see GenerativeEncoder
            positions = sincos_2d(self.side, size.width)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, N, C] -> image [B, 3, S, S], not clamped."""
        x = self.embed(self.input_proj(z)) + self.positions
        x = torch.cat((self.cls_token.expand(len(x), 1, -1).to(x.dtype), x), dim=1)
        branch = branch_bias = None
        for layer in self.layers:
            x, branch, branch_bias = layer(x, branch, branch_bias)
        return unpatchify(self._patches(x, branch, branch_bias), self.side, self.patch_size)

    def _patches(self, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None) -> Tensor:
        """The last norm and Linear of all tokens but the class token."""
        if branch is not None and branch_bias is not None:
            # On a GPU, one kernel is worth more than the class token's share of the Linear.
            weights = self.norm.weight, self.norm.bias, self.pred.weight, self.pred.bias, self.norm.eps
            return kernels.residual_layer_norm_linear(x, branch, *weights, branch_bias)[1][:, 1:]
        return self.pred(self.norm(x if branch is None else x + branch)[:, 1:])

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialise as PyTorch does by default, and fill the table; see `GenerativeEncoder.initialize`."""
        initialize_by_default(self, generator)
        fill(self.cls_token, nn.init.zeros_)
        self.positions.copy_(sincos_2d(self.side, self.positions.shape[1]))


def initialize_by_default(decoder: nn.Module, generator: torch.Generator) -> None:
    """Initialise Linears and LayerNorms as PyTorch does by default."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            fill(module.weight, nn.init.uniform_, -bound, bound, generator=generator)
            fill(module.bias, nn.init.uniform_, -bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            fill(module.weight, nn.init.ones_)
            fill(module.bias, nn.init.zeros_)


def unpatchify(patches: Tensor, side: int, size: int) -> Tensor:
    """[B, side * side, size * size * 3], inner order row, column, channel -> [B, 3, side * size, side * size]."""
    grid = patches.view(len(patches), side, side, size, size, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, side * size, side * size)
