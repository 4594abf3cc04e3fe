"""Implementations of attention, in `ATTEND` by name.

`sdpa` lets PyTorch choose. `sdpa_bfloat16` and `sdpa_float32` are PyTorch's attention on a CPU, in that precision. All
others are for CUDA. The other `sdpa_*` call one of PyTorch's operators directly instead of setting the flags of
`torch.nn.attention.sdpa_kernel`, for two reasons: PyTorch 2.10 to 2.13 leave the flags out of their compilation cache
keys, so a process could load what another compiled with other flags (https://github.com/pytorch/pytorch/pull/185511);
and flags that allow no backend fall back silently, where an operator says why it cannot run.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.kernels import flash

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q k^T / sqrt(K)) v: q [B, H, Q, K], k and v [B, H, T, K] -> [B, H, Q, K]."""


def _in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


ATTEND: dict[str, Attend] = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa_cudnn": _cudnn,
    "sdpa_flash": _flash,
    "sdpa_efficient": _efficient,
    "flash_attn": flash.attend,
    "sdpa_bfloat16": F.scaled_dot_product_attention,
    "sdpa_float32": _in_float32,
}
ON_CPU = ("sdpa_bfloat16", "sdpa_float32")
TAKES_FLOAT32 = ("sdpa", "sdpa_efficient", "sdpa_float32")


def masked(name: str, mask: Tensor) -> Attend:
    """An entry of `ATTEND` that reads only the keys at which the mask, bool [B, 1, 1, T], is True. On CUDA it is
    PyTorch's own choice whatever the name is: flash attention takes no mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = (x.float() for x in (q, k, v)) if name == "sdpa_float32" else (q, k, v)
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask).to(q.dtype)

    return attend


def why_missing(name: str, device: torch.device, dtype: torch.dtype, head_widths: Iterable[int]) -> str:
    """Why an entry of `ATTEND` cannot run on this device, in one line; empty if it can. Runs it once, forward
    and backward."""
    if name == "sdpa":
        return ""
    home = "cpu" if name in ON_CPU else "cuda"
    if device.type != home:
        return f"it is for {'a CPU' if home == 'cpu' else 'CUDA'}, and the device is {device.type}"
    if dtype == torch.float32 and name not in TAKES_FLOAT32:
        return "it takes no float32; set train.precision=bfloat16"
    if name == "flash_attn" and (missing := flash.why_missing()):
        return missing
    for width in sorted(set(head_widths)):
        q, k, v = (torch.zeros(1, 1, 64, width, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
        try:
            ATTEND[name](q, k, v).sum().backward()
        except Exception as error:  # every package raises its own types
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"with heads of width {width}: {first}"
    return ""
