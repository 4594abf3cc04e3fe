"""gated_residual_norm_adaln: the boundary between two blocks.

    x_out = rms_norm(x + gate * branch, norm_weight)
    h     = adaln_modulate(x_out, weight, shift, scale)

Shapes: x and branch [B, T, D], gate, shift and scale [B, D], norm_weight and weight [D] -> x_out [B, T, D] in x's
dtype, h [B, T, D]. `norm_weight` is norm3 of the block that ends; `weight`, `shift` and `scale` belong to norm1 of the
block that begins, or to the final layer. All arithmetic is float32.
"""

import torch
from torch import Tensor

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.adaln_modulate import adaln_modulate_ref, check_modulation
from unite_fast.kernels.common import mistake, rms_norm
from unite_fast.kernels.gated_residual_adaln import check_branch, gated_residual
from unite_fast.kernels.op import Body, FusedOp, triton_body


def gated_residual_norm_adaln_ref(x, branch, gate, norm_weight, weight, shift, scale, eps=1e-6, out_dtype=None):
    x = rms_norm(gated_residual(x, branch, gate), norm_weight, eps).to(x.dtype)
    return x, adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)


def _like_forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype):
    b, t, _ = x.shape
    return layout.room(x), layout.room(x, out_dtype), x.new_empty((2, b, t), dtype=torch.float32)


def _native_forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype):
    outputs = _like_forward(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype)
    x_out, h, inverses = outputs
    x, branch, gate = layout.dense(x), layout.typed(branch), layout.typed(gate)
    norm_weight, weight = layout.floats(norm_weight), layout.floats(weight)
    shift, scale = layout.typed(shift), layout.typed(scale)
    native.run(
        "gated_residual_norm_adaln_forward",
        *x.shape,
        eps,
        *native.rows(x),
        *native.rows(branch),
        *native.vectors(gate),
        norm_weight.data_ptr(),
        weight.data_ptr(),
        *native.vectors(shift),
        *native.vectors(scale),
        *native.rows(x_out),
        *native.rows(h),
        inverses.data_ptr(),
    )
    return outputs


def _like_backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, inverses):
    d_norm_weight, d_weight = layout.room_floats(norm_weight, x), layout.room_floats(weight, x)
    d_gate, d_shift, d_scale = layout.room_typed(gate), layout.room_typed(scale), layout.room_typed(scale)
    return layout.room(x), layout.room_typed(branch), d_gate, d_norm_weight, d_weight, d_shift, d_scale


def _native_backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, inverses):
    gradients = _like_backward(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, inverses)
    d_x, d_branch, d_gate, d_norm_weight, d_weight, d_shift, d_scale = gradients
    d_x_out, d_h = (layout.gradient(d, x.shape, x) for d in (d_x_out, d_h))
    x, branch, gate = layout.dense(x), layout.typed(branch), layout.typed(gate)
    norm_weight, weight, scale = layout.floats(norm_weight), layout.floats(weight), layout.typed(scale)
    native.run(
        "gated_residual_norm_adaln_backward",
        *x.shape,
        *native.rows(d_x_out),
        *native.rows(d_h),
        *native.rows(x),
        *native.rows(branch),
        *native.vectors(gate),
        norm_weight.data_ptr(),
        weight.data_ptr(),
        *native.vectors(scale),
        inverses.data_ptr(),
        *native.rows(d_x),
        *native.rows(d_branch),
        *native.vectors(d_gate),
        d_norm_weight.data_ptr(),
        d_weight.data_ptr(),
        *native.vectors(d_shift),
        *native.vectors(d_scale),
    )
    return gradients


_fused = FusedOp(
    "gated_residual_norm_adaln",
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, Tensor weight, Tensor shift, Tensor scale, "
    "float eps, ScalarType? out_dtype",
    outputs="Tensor, Tensor, Tensor",
    results=2,
    like_forward=_like_forward,
    backward_inputs="Tensor? d_x_out, Tensor? d_h, Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, "
    "Tensor weight, Tensor scale, Tensor inverses",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor",
    like_backward=_like_backward,
    # x_out follows from these by less work than it takes to read it.
    saved=lambda inputs, outputs: (*inputs[:5], inputs[6], outputs[2]),
    bodies={
        "native": Body(_native_forward, _native_backward),
        "triton": triton_body("adaln", "gated_residual_norm_adaln"),
    },
)


def gated_residual_norm_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """End one block and begin the next; see the module's docstring. h has `out_dtype`, or x's own.

    Raises:
        ValueError: shapes that do not belong together.
    """
    op = "gated_residual_norm_adaln"
    check_modulation(op, x, weight, shift, scale)
    check_branch(op, x, branch, gate)
    if norm_weight.shape != weight.shape:
        raise mistake(op, f"norm_weight must be {list(weight.shape)}")
    body = backend.choose(x, out_dtype)
    if body == "reference":
        return gated_residual_norm_adaln_ref(x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype)
    return _fused(body, x, branch, gate, norm_weight, weight, shift, scale, eps, out_dtype)
