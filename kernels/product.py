"""The two passes of a Linear, as the ops in linear.py and attention.py need them.

    y = x W^T + b,    dx = dy W,  dW = dy^T x,  db = sum of dy over the rows

x, y, dx and dy are in the precision of the products (bfloat16 or float32), W and b are parameters in float32 and so are
their gradients: a bfloat16 sum over all tokens of a batch would lose digits for nothing.

A CPU without bfloat16 instructions takes bfloat16 products ten times slower than float32 ones. There, the same rounded
operands are multiplied in float32: products of two bfloat16 numbers are exact in it, and sums are float32 either way.
"""

import torch
from torch import Tensor


def bfloat16_instructions() -> bool:
    """Whether PyTorch has fast bfloat16 products on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_float32(x: Tensor) -> bool:
    """Whether products of tensors like x are taken in float32 after a cast, which is exact."""
    return x.dtype == torch.bfloat16 and x.is_cpu and not bfloat16_instructions()


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N] in x's dtype; weight and bias are rounded to it."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if in_float32(x):
        return torch.nn.functional.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def product_backward(d_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_y [..., N], x [..., K], weight [N, K] -> d_x [..., K] in x's dtype, d_weight and d_bias in float32."""
    shape, weight = x.shape, weight.to(x.dtype)
    d_y, x = d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, shape[-1])
    if in_float32(x):
        d_y, x, weight = d_y.float(), x.float(), weight.float()
        d_x, d_weight = (d_y @ weight).to(torch.bfloat16), d_y.mT @ x
    elif x.is_cuda and x.dtype == torch.bfloat16:
        d_x, d_weight = d_y @ weight, torch.mm(d_y.mT, x, out_dtype=torch.float32)
    else:
        d_x, d_weight = d_y @ weight, (d_y.mT @ x).float()
    return d_x.view(shape), d_weight, d_y.sum(0, dtype=torch.float32)
