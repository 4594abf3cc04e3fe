"""adaln_modulate: RMSNorm, weight, scale and shift.

    out = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift

Shapes: x [B, T, D], weight [D], shift and scale [B, D] -> out [B, T, D]. The mean and all products are float32.
Source: adaLN of DiT (Peebles and Xie, arXiv 2212.09748) on RMSNorm.
"""

import torch
from torch import Tensor

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.common import mistake, modulate, rms_norm
from unite_fast.kernels.op import Body, FusedOp, triton_body


def adaln_modulate_ref(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    return modulate(rms_norm(x, weight, eps), shift, scale).to(out_dtype or x.dtype)


def _like_forward(x, weight, shift, scale, eps, out_dtype):
    b, t, _ = x.shape
    return layout.room(x, out_dtype), x.new_empty((b, t), dtype=torch.float32)


def _native_forward(x, weight, shift, scale, eps, out_dtype):
    out, inverse = _like_forward(x, weight, shift, scale, eps, out_dtype)
    x, weight, shift, scale = layout.dense(x), layout.floats(weight), layout.typed(shift), layout.typed(scale)
    native.run(
        "adaln_modulate_forward",
        *x.shape,
        eps,
        *native.rows(x),
        weight.data_ptr(),
        *native.vectors(shift),
        *native.vectors(scale),
        *native.rows(out),
        inverse.data_ptr(),
    )
    return out, inverse


def _like_backward(d_out, x, weight, scale, inverse):
    d_weight = layout.room_floats(weight, x)
    return layout.room(x), d_weight, layout.room_typed(scale), layout.room_typed(scale)


def _native_backward(d_out, x, weight, scale, inverse):
    d_x, d_weight, d_shift, d_scale = gradients = _like_backward(d_out, x, weight, scale, inverse)
    d_out, x, weight, scale = layout.dense(d_out), layout.dense(x), layout.floats(weight), layout.typed(scale)
    native.run(
        "adaln_modulate_backward",
        *x.shape,
        *native.rows(d_out),
        *native.rows(x),
        weight.data_ptr(),
        *native.vectors(scale),
        inverse.data_ptr(),
        *native.rows(d_x),
        d_weight.data_ptr(),
        *native.vectors(d_shift),
        *native.vectors(d_scale),
    )
    return gradients


_fused = FusedOp(
    "adaln_modulate",
    inputs="Tensor x, Tensor weight, Tensor shift, Tensor scale, float eps, ScalarType? out_dtype",
    outputs="Tensor, Tensor",
    results=1,
    like_forward=_like_forward,
    backward_inputs="Tensor d_out, Tensor x, Tensor weight, Tensor scale, Tensor inverse",
    backward_outputs="Tensor, Tensor, Tensor, Tensor",
    like_backward=_like_backward,
    saved=lambda inputs, outputs: (inputs[0], inputs[1], inputs[3], outputs[1]),
    bodies={"native": Body(_native_forward, _native_backward), "triton": triton_body("adaln", "adaln_modulate")},
)


def adaln_modulate(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise and modulate; see the module's docstring. The result has `out_dtype`, or x's own.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_modulation("adaln_modulate", x, weight, shift, scale)
    body = backend.choose(x, out_dtype)
    if body == "reference":
        return adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)
    return _fused(body, x, weight, shift, scale, eps, out_dtype)


def check_modulation(op: str, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> None:
    if x.dim() != 3:
        raise mistake(op, f"x must be [B, T, D], got {list(x.shape)}")
    b, _, d = x.shape
    if weight.shape != (d,):
        raise mistake(op, f"weight must be [{d}], got {list(weight.shape)}")
    if shift.shape != (b, d):
        raise mistake(op, f"shift must be [{b}, {d}], got {list(shift.shape)}")
    if scale.shape != (b, d):
        raise mistake(op, f"scale must be [{b}, {d}], got {list(scale.shape)}")
