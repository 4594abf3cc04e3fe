"""Forward and backward of a Linear, for the ops in linear.py, norm_linear.py and attention.py.

    y = x W^T + b,    dx = dy W,  dW = dy^T x,  db = sum of dy over the rows

A bias that needs no gradient has no sum: on a GPU the op that reads y makes it together with dy (`linear.shared_bias`).

x, y, dx and dy have the dtype of the matmul (bfloat16 or float32). W and b are float32 parameters, and their gradients
are float32 too: a bfloat16 sum over all tokens of a batch would lose digits without saving anything.

A CPU without bfloat16 instructions runs bfloat16 matmuls ten times slower than float32 ones. There, the operands are
rounded to bfloat16 and multiplied in float32: the product of two bfloat16 numbers is exact in float32, and sums are
float32 in both cases.

With `in_float8`, y and dx are float8 matmuls, and dW is not; see float8.py.
"""

import torch
from torch import Tensor

from unite_fast.kernels import float8, tensors
from unite_fast.kernels.casts import cast, derived


def bfloat16_instructions() -> bool:
    """Whether PyTorch has fast bfloat16 matmuls on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_float32(x: Tensor) -> bool:
    """Whether matmuls of tensors like x run in float32 after an (exact) cast."""
    return x.dtype == torch.bfloat16 and x.is_cpu and not bfloat16_instructions()


def sums_in_float32(x: Tensor) -> bool:
    """Whether x's device can return a bfloat16 matmul in float32, so that no pass is needed to cast it."""
    return x.is_cuda and x.dtype == torch.bfloat16


def matmul(x: Tensor, weight: Tensor, bias: Tensor, in_float8: bool = False) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N] in x's dtype; weight and bias are rounded to it."""
    bias = _operand(bias, x)
    if in_float8:
        return _float8_matmul(x, derived(weight, x.dtype, float8.quantise), bias)
    return _matmul(x, _operand(weight, x), bias)


def _operand(weight: Tensor, x: Tensor) -> Tensor:
    """A weight or bias rounded to x's dtype, in the dtype in which x is multiplied."""
    return derived(weight, x.dtype, Tensor.float) if in_float32(x) else cast(weight, x.dtype)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`matmul` of operands that are rounded to x's dtype."""
    if in_float32(x):
        return torch.nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _float8_matmul(x: Tensor, weight: float8.Quantised, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K], bias an `_operand` [N] -> [..., N] in x's dtype."""
    quantised = float8.quantise(x)
    if x.is_cuda:
        y = float8.scaled_matmul(quantised, weight, bias)
    else:
        y = _matmul(float8.dequantise(quantised, x.dtype), float8.dequantise(weight, x.dtype), bias)
    return y.unflatten(0, x.shape[:-1])


def fake_matmul(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`matmul` on tensors without data."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype or x.dtype)


def matmul_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, with_bias: bool, in_float8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """d_y [..., N], x [..., K], weight [N, K] -> d_x [..., K] in d_y's dtype, d_weight and d_bias in float32."""
    return input_gradient(d_y, weight, in_float8), *weight_gradients(d_y, x, with_bias)


def input_gradient(d_y: Tensor, weight: Tensor, in_float8: bool = False) -> Tensor:
    """d_y [..., N], weight [N, K] -> d_x [..., K] in d_y's dtype."""
    if in_float8:
        return _float8_matmul(d_y, derived(weight, d_y.dtype, float8.quantise_columns), None)
    weight = _operand(weight, d_y)
    return (d_y.float() @ weight).to(d_y.dtype) if in_float32(d_y) else d_y @ weight


def weight_gradients(d_y: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """d_y [..., N], x [..., K] -> d_weight [N, K] and d_bias [N] in float32; d_bias is empty unless `with_bias`."""
    d_y, x = d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1])
    if in_float32(x):
        d_y = d_y.float()
        d_weight = d_y.mT @ x.float()
    elif sums_in_float32(x):
        d_weight = torch.mm(d_y.mT, x, out_dtype=torch.float32)
    else:
        d_weight = (d_y.mT @ x).float()
    d_bias = d_y.sum(0, dtype=torch.float32) if with_bias else d_weight.new_empty(0)
    return d_weight, d_bias


def fake_weight_gradients(weight: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """`weight_gradients` on tensors without data."""
    d_bias = weight.new_empty(weight.shape[0] if with_bias else 0, dtype=torch.float32)
    return tensors.empty_like(weight, torch.float32), d_bias
