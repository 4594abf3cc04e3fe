"""gated_residual_adaln: the middle of a block.

    x_out = x + gate * branch
    h     = adaln_modulate(x_out, weight, shift, scale)

Shapes: x and branch [B, T, D], gate, shift and scale [B, D], weight [D] -> x_out [B, T, D] in x's dtype, h [B, T, D].
All arithmetic is float32.
"""

import torch
from torch import Tensor

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.adaln_modulate import adaln_modulate_ref, check_modulation
from unite_fast.kernels.common import mistake, upcast
from unite_fast.kernels.op import Body, FusedOp, triton_body


def gated_residual_adaln_ref(x, branch, gate, weight, shift, scale, eps=1e-6, out_dtype=None):
    x = gated_residual(x, branch, gate).to(x.dtype)
    return x, adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return upcast(x) + upcast(gate).unsqueeze(1) * upcast(branch)


def _like_forward(x, branch, gate, weight, shift, scale, eps, out_dtype):
    b, t, _ = x.shape
    return layout.room(x), layout.room(x, out_dtype), x.new_empty((b, t), dtype=torch.float32)


def _native_forward(x, branch, gate, weight, shift, scale, eps, out_dtype):
    x_out, h, inverse = outputs = _like_forward(x, branch, gate, weight, shift, scale, eps, out_dtype)
    x, branch, gate = layout.dense(x), layout.typed(branch), layout.typed(gate)
    weight, shift, scale = layout.floats(weight), layout.typed(shift), layout.typed(scale)
    native.run(
        "gated_residual_adaln_forward",
        *x.shape,
        eps,
        *native.rows(x),
        *native.rows(branch),
        *native.vectors(gate),
        weight.data_ptr(),
        *native.vectors(shift),
        *native.vectors(scale),
        *native.rows(x_out),
        *native.rows(h),
        inverse.data_ptr(),
    )
    return outputs


def _like_backward(d_x_out, d_h, x_out, branch, gate, weight, scale, inverse):
    d_x, d_branch = layout.room(x_out), layout.room_typed(branch)
    d_gate, d_scale = layout.room_typed(gate), layout.room_typed(scale)
    return d_x, d_branch, d_gate, layout.room_floats(weight, x_out), layout.room_typed(scale), d_scale


def _native_backward(d_x_out, d_h, x_out, branch, gate, weight, scale, inverse):
    gradients = _like_backward(d_x_out, d_h, x_out, branch, gate, weight, scale, inverse)
    d_x, d_branch, d_gate, d_weight, d_shift, d_scale = gradients
    d_x_out, d_h = (layout.gradient(d, x_out.shape, x_out) for d in (d_x_out, d_h))
    x_out, branch, gate = layout.dense(x_out), layout.typed(branch), layout.typed(gate)
    weight, scale = layout.floats(weight), layout.typed(scale)
    native.run(
        "gated_residual_adaln_backward",
        *x_out.shape,
        *native.rows(d_x_out),
        *native.rows(d_h),
        *native.rows(x_out),
        *native.rows(branch),
        *native.vectors(gate),
        weight.data_ptr(),
        *native.vectors(scale),
        inverse.data_ptr(),
        *native.rows(d_x),
        *native.rows(d_branch),
        *native.vectors(d_gate),
        d_weight.data_ptr(),
        *native.vectors(d_shift),
        *native.vectors(d_scale),
    )
    return gradients


_fused = FusedOp(
    "gated_residual_adaln",
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor weight, Tensor shift, Tensor scale, float eps, "
    "ScalarType? out_dtype",
    outputs="Tensor, Tensor, Tensor",
    results=2,
    like_forward=_like_forward,
    backward_inputs="Tensor? d_x_out, Tensor? d_h, Tensor x_out, Tensor branch, Tensor gate, Tensor weight, "
    "Tensor scale, Tensor inverse",
    backward_outputs="Tensor, Tensor, Tensor, Tensor, Tensor, Tensor",
    like_backward=_like_backward,
    # x_out serves instead of x: the next op keeps it too.
    saved=lambda inputs, outputs: (outputs[0], *inputs[1:4], inputs[5], outputs[2]),
    bodies={
        "native": Body(_native_forward, _native_backward),
        "triton": triton_body("adaln", "gated_residual_adaln", again=True),
    },
)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gated branch, then normalise and modulate; see the module's docstring. h has `out_dtype`, or x's own.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_modulation("gated_residual_adaln", x, weight, shift, scale)
    check_branch("gated_residual_adaln", x, branch, gate)
    body = backend.choose(x, out_dtype)
    if body == "reference":
        return gated_residual_adaln_ref(x, branch, gate, weight, shift, scale, eps, out_dtype)
    return _fused(body, x, branch, gate, weight, shift, scale, eps, out_dtype)


def check_branch(op: str, x: Tensor, branch: Tensor, gate: Tensor) -> None:
    b, _, d = x.shape
    if branch.shape != x.shape:
        raise mistake(op, f"branch must be {list(x.shape)} like x, got {list(branch.shape)}")
    if gate.shape != (b, d):
        raise mistake(op, f"gate must be [{b}, {d}], got {list(gate.shape)}")
