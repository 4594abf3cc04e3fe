"""The fused ops of UNITE, one file per op or family of ops: elementwise work and norms, attention, Linears.

Each op has a public function, which checks its arguments. Elementwise ops and norms have a reference `OP_ref` in plain
PyTorch, float32 inside: it is the specification, and what torch.compile fuses. Attention and the Linears include
some of these. docs/adding-a-kernel.md shows how to add an op.
"""

from unite_fast.kernels.adaln import adaln_modulate, gated_residual_adaln, gated_residual_norm_adaln
from unite_fast.kernels.attention import attention
from unite_fast.kernels.bias_relu import bias_relu
from unite_fast.kernels.flow_loss import flow_loss
from unite_fast.kernels.gelu import gelu
from unite_fast.kernels.linear import gelu_linear, linear, linears, shared_bias, swiglu_linear
from unite_fast.kernels.noise_injection import noise_injection
from unite_fast.kernels.norm_linear import gated_residual_adaln_linear, layer_norm_linear, residual_layer_norm_linear
from unite_fast.kernels.qk_norm_rope import qk_norm_rope, split_heads
from unite_fast.kernels.swiglu import swiglu
from unite_fast.kernels.tap_distance import tap_distance

__all__ = [
    "adaln_modulate",
    "attention",
    "bias_relu",
    "flow_loss",
    "gated_residual_adaln",
    "gated_residual_adaln_linear",
    "gated_residual_norm_adaln",
    "gelu",
    "gelu_linear",
    "layer_norm_linear",
    "linear",
    "linears",
    "noise_injection",
    "qk_norm_rope",
    "residual_layer_norm_linear",
    "shared_bias",
    "split_heads",
    "swiglu",
    "swiglu_linear",
    "tap_distance",
]
