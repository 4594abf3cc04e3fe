"""Attention backends at the model's shapes, forward and backward, with two layouts of q, k and v."""

import torch
from torch.nn import functional as F

from gpu_parts.context import Context
from unite_fast.kernels.attention_backends import ATTEND, Attend

SHAPES = {
    "tokenizer B": (64, 12, 544, 64),
    "flow B": (192, 12, 288, 64),
    "decoder B": (64, 12, 257, 64),
    "tokenizer XL": (64, 16, 544, 72),
}
"""B, heads, T, head dimension for 64 images."""
BACKENDS = ("sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient")


def measure(c: Context) -> None:
    shapes = {"tiny": (2, 2, 24, 64)} if c.tiny else SHAPES
    for name, shape in shapes.items():
        for layout in ("BHTK", "BTHK"):
            for backend in BACKENDS if c.cuda else BACKENDS[:1]:
                facts = {"shape": shape, "layout": layout, "backend": backend}
                try:
                    c.say(name, **facts, **one(c, shape, layout, ATTEND[backend]))
                except RuntimeError as error:  # the backend does not support this shape or device
                    c.say(name, **facts, refused=str(error)[:160])


def one(c: Context, shape: tuple[int, ...], layout: str, attend: Attend) -> dict:
    """Milliseconds of both passes, including the copy to [B, T, H K] as in the model, and the relative error."""
    b, heads, t, k = shape

    def random() -> torch.Tensor:
        if layout == "BHTK":
            x = torch.randn(b, heads, t, k, device=c.device, dtype=torch.bfloat16)
        else:
            x = torch.randn(b, t, heads, k, device=c.device, dtype=torch.bfloat16).transpose(1, 2)
        return x.requires_grad_()

    q, key, v = random(), random(), random()
    d_out = torch.randn(b, t, heads * k, device=c.device, dtype=torch.bfloat16)

    def run() -> tuple[torch.Tensor, ...]:
        out = attend(q, key, v).transpose(1, 2).flatten(2)
        return out, *torch.autograd.grad(out, (q, key, v), d_out)

    result = run()
    few = slice(0, 2)
    exact = F.scaled_dot_product_attention(*(x[few].detach().double() for x in (q, key, v))).transpose(1, 2).flatten(2)
    error = ((result[0][few].double() - exact).norm() / exact.norm()).item()
    del result, exact
    seconds = c.device_seconds(run, 3 if c.tiny else 12)
    flops = 3.5 * 4 * b * heads * t * t * k
    return {"ms": round(1e3 * seconds, 3), "tflops": round(flops / seconds / 1e12, 1), "error": float(f"{error:.1e}")}
