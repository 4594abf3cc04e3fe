"""qk_norm_rope: per-head RMSNorm and rotary embedding of packed q, k, v; and split_heads, without norm and rotation."""

import torch
from torch import Tensor

from unite_fast.kernels import backend, native, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend, triton_function
from unite_fast.kernels.registry import New, Size, register
from unite_fast.kernels.tensors import argument_error, rms_norm, upcast


def qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin, eps=1e-6, qkv_bias=None):
    q, k, v = split_heads_ref(qkv, heads, qkv_bias)
    return rotate(q, q_weight, cos, sin, eps), rotate(k, k_weight, cos, sin, eps), v


def split_heads_ref(qkv: Tensor, heads: int, qkv_bias: Tensor | None = None) -> tuple[Tensor, ...]:
    return split(tensors.containing(qkv, qkv_bias), heads)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v as views [B, H, T, K] of qkv."""
    # In this order, autograd assembles the gradient of qkv with one copy.
    return tuple(part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))


def rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm, if there is a weight, and rotation of q or k: x [B, H, T, K]."""
    normed = upcast(x) if weight is None else rms_norm(x, weight, eps)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _fake_forward(qkv, q_weight, k_weight, qkv_bias, cos, sin, heads, eps):
    b, t, packed = qkv.shape
    head_dim = packed // (3 * heads)
    if backend.fused_backend_on(qkv.device) == "triton":
        q, k = (qkv.new_empty((b, t, heads, head_dim)).transpose(1, 2) for _ in range(2))
    else:
        q, k = (qkv.new_empty((b, heads, t, head_dim)) for _ in range(2))
    return q, k, qkv.new_empty((b, t, 2, heads), dtype=torch.float32)


def view_of_v(qkv: Tensor, heads: int) -> Tensor:
    """v as a view [B, H, T, K] of qkv."""
    return qkv[..., qkv.shape[-1] // 3 * 2 :].unflatten(-1, (heads, -1)).transpose(1, 2)


def _native_forward(qkv, q_weight, k_weight, qkv_bias, cos, sin, heads, eps):
    b, t, packed = qkv.shape
    head_dim = packed // (3 * heads)
    qkv = tensors.dense(qkv)
    q_weight, k_weight, cos, sin = (tensors.as_float32(x) for x in (q_weight, k_weight, cos, sin))
    shape = (b, heads, t, head_dim)
    # Contiguous [B, H, T, K]: scaled_dot_product_attention is 0 to 8 % faster than with [B, T, H, K], which would be
    # easier to write. v is only summed there, so it stays a view of qkv.
    q, k = qkv.new_empty(shape), qkv.new_empty(shape)
    rstd = qkv.new_empty((b, t, 2, heads), dtype=torch.float32)
    native.run(
        "qk_norm_rope_forward",
        *(b, t, heads, head_dim, eps),
        *native.rows(qkv),
        *map(native.address, (q_weight, k_weight, cos, sin, rstd)),
        *native.heads(q),
        *native.heads(k),
    )
    return q, k, rstd


def _fake_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, rstd, bias_gradient):
    return (
        tensors.empty_like(qkv),
        tensors.empty_weight_gradient(q_weight, qkv),
        tensors.empty_weight_gradient(k_weight, qkv),
        tensors.empty_bias_gradient(qkv, bias_gradient),
    )


def _native_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, rstd, bias_gradient):
    (b, t, _), heads = qkv.shape, rstd.shape[3]
    head_dim = qkv.shape[2] // (3 * heads)
    d_q, d_k, d_v = (tensors.gradient_or_zeros(d, (b, heads, t, head_dim), qkv) for d in (d_q, d_k, d_v))
    if bias_gradient:
        # In float32, so that the sum is of unrounded numbers. On a CPU, the model does not ask for it.
        inputs = (x.float() for x in (d_q, d_k, d_v, qkv))
        d_qkv, *others = _native_backward(*inputs, q_weight, k_weight, cos, sin, rstd, False)
        return d_qkv.to(qkv.dtype), *others[:2], d_qkv.sum((0, 1))
    gradients = _fake_backward(d_q, d_k, d_v, qkv, q_weight, k_weight, cos, sin, rstd, False)
    d_qkv, d_q_weight, d_k_weight, _ = gradients
    qkv = tensors.dense(qkv)
    q_weight, k_weight, cos, sin = (tensors.as_float32(x) for x in (q_weight, k_weight, cos, sin))
    native.run(
        "qk_norm_rope_backward",
        *(b, t, heads, head_dim, 0.0),
        *native.rows(qkv),
        *map(native.address, (q_weight, k_weight, cos, sin, rstd)),
        *native.heads(d_q),
        *native.heads(d_k),
        *native.heads(d_v),
        *native.rows(d_qkv),
        d_q_weight.data_ptr(),
        d_k_weight.data_ptr(),
    )
    return gradients


qk_norm_rope_op = FusedOp(
    "qk_norm_rope",
    inputs="Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? qkv_bias, Tensor cos, Tensor sin, SymInt heads, "
    "float eps",
    outputs=3,
    results=2,
    views=lambda qkv, q_weight, k_weight, qkv_bias, cos, sin, heads, eps: (view_of_v(qkv, heads),),
    fake_forward=_fake_forward,
    backward_inputs="Tensor? d_q, Tensor? d_k, Tensor? d_v, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
    "Tensor cos, Tensor sin, Tensor rstd, bool bias_gradient",
    backward_outputs=4,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (*inputs[:3], *inputs[4:6], outputs[2], inputs[3] is not None),
    backends={"native": Backend(_native_forward, _native_backward), "triton": triton_backend("qk_norm_rope")},
)


def _fake_split_backward(d_q, d_k, d_v, qkv, heads, bias_gradient):
    return tensors.empty_like(qkv), tensors.empty_bias_gradient(qkv, bias_gradient)


def _native_split_backward(d_q, d_k, d_v, qkv, heads, bias_gradient):
    d_qkv, d_bias = _fake_split_backward(d_q, d_k, d_v, qkv, heads, bias_gradient)
    for part, gradient in zip(split(d_qkv, heads), (d_q, d_k, d_v), strict=True):
        part.copy_(part.new_zeros(()) if gradient is None else gradient)
    return d_qkv, d_qkv.sum((0, 1), dtype=torch.float32) if bias_gradient else d_bias


def _empty_output(qkv, qkv_bias, heads):
    """All results are views, but an operator must return a tensor."""
    return (qkv.new_empty(0),)


split_heads_op = FusedOp(
    "split_heads",
    inputs="Tensor qkv, Tensor? qkv_bias, SymInt heads",
    results=0,
    views=lambda qkv, qkv_bias, heads: split(qkv, heads),
    fake_forward=_empty_output,
    backward_inputs="Tensor? d_q, Tensor? d_k, Tensor? d_v, Tensor qkv, SymInt heads, bool bias_gradient",
    backward_outputs=2,
    fake_backward=_fake_split_backward,
    saved=lambda inputs, outputs: (inputs[0], inputs[2], inputs[1] is not None),
    backends={
        "native": Backend(_empty_output, _native_split_backward),
        "triton": Backend(_empty_output, triton_function("qk_norm_rope", "split_heads_backward")),
    },
)


def qk_norm_rope(
    qkv: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    qkv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed q, k, v; normalise and rotate q and k.

        q = rotate(rms_norm(q, q_weight)),  k = rotate(rms_norm(k, k_weight)),  v unchanged
        rotate: (a, b) -> (a cos - b sin, b cos + a sin) for each interleaved pair (2i, 2i + 1)

    Norm and rotation are float32. Sources: RoPE (Su et al., arXiv 2104.09864), q/k norm (Dehghani et al., arXiv
    2302.05442).

    Args:
        qkv: [B, T, 3 H K]: all of q, then all of k, then all of v.
        heads: H.
        q_weight: [K], or None for no norm.
        k_weight: [K], or None for no norm.
        cos: float32 [T, K / 2], 1 for a token that is not rotated; gets no gradient.
        sin: float32 [T, K / 2], 0 for a token that is not rotated; gets no gradient.
        eps: added to the mean square.
        qkv_bias: [3 H K], the bias that qkv contains, or None; gets the sum of qkv's gradient (`linear.shared_bias`).

    Returns:
        q, k and v, each [B, H, T, K] in qkv's dtype, as scaled_dot_product_attention reads them; v is a view of qkv.
        The Triton backend stores q and k as [B, T, H, K]: attention on a GPU returns its result in the
        layout of q, so that no copy is needed to read it as [B, T, H K].

    Raises:
        ValueError: shapes that do not match, or a cos or sin that requires a gradient.
    """
    check("qk_norm_rope", qkv, heads, q_weight, k_weight, cos, sin)
    tensors.check_contained("qk_norm_rope", "qkv_bias", qkv, qkv_bias)
    chosen = backend.choose(qkv, op="qk_norm_rope")
    if chosen == "reference":
        return qk_norm_rope_ref(qkv, heads, q_weight, k_weight, cos, sin, eps, qkv_bias)
    return qk_norm_rope_op(chosen, qkv, q_weight, k_weight, qkv_bias, cos, sin, heads, eps)


def split_heads(qkv: Tensor, heads: int, qkv_bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split packed q, k, v into views. The backward pass assembles the gradient of qkv.

    Args:
        qkv: [B, T, 3 H K]: all of q, then all of k, then all of v.
        heads: H.
        qkv_bias: [3 H K], the bias that qkv contains, or None; gets the sum of qkv's gradient (`linear.shared_bias`).

    Returns:
        q, k and v, each [B, H, T, K].

    Raises:
        ValueError: shapes that do not match.
    """
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads):
        raise argument_error("split_heads", f"qkv must be [B, T, 3 x {heads} heads x K], got {list(qkv.shape)}")
    tensors.check_contained("split_heads", "qkv_bias", qkv, qkv_bias)
    chosen = backend.choose(qkv, op="split_heads")
    return (
        split_heads_ref(qkv, heads, qkv_bias) if chosen == "reference" else split_heads_op(chosen, qkv, qkv_bias, heads)
    )


def check(op: str, qkv, heads, q_weight, k_weight, cos, sin) -> None:
    if qkv.dim() != 3:
        raise argument_error(op, f"qkv must be [B, T, 3 * heads * head_dim], got {list(qkv.shape)}")
    t, packed = qkv.shape[1:]
    if packed % (6 * heads):
        raise argument_error(op, f"width {packed} is not 3 x {heads} heads of even size")
    head_dim = packed // (3 * heads)
    if (q_weight is None) != (k_weight is None):
        raise argument_error(op, "q_weight and k_weight must both be given or both be None")
    if q_weight is not None and not q_weight.shape == k_weight.shape == (head_dim,):
        raise argument_error(op, f"q_weight and k_weight must be [{head_dim}]")
    if not cos.shape == sin.shape == (t, head_dim // 2):
        raise argument_error(op, f"cos and sin must be [{t}, {head_dim // 2}]")
    if cos.requires_grad or sin.requires_grad:
        raise argument_error(op, "cos and sin get no gradient; detach them")


def qk_inputs(size: Size, new: New) -> dict:
    """Example inputs that qk_norm_rope and attention share."""
    angle = 3 * new(size.tokens, size.head_dim // 2)
    return {
        "qkv": new(size.batch, size.tokens, 3 * size.heads * size.head_dim, dtype=size.other),
        "heads": size.heads,
        "q_weight": new(size.head_dim, dtype=size.weights, around=1.0),
        "k_weight": new(size.head_dim, dtype=size.weights, around=1.0),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }


def _bias(size: Size, new: New) -> dict:
    return {"qkv_bias": new(3 * size.heads * size.head_dim, dtype=size.weights)}


register(
    qk_norm_rope,
    qk_norm_rope_ref,
    qk_norm_rope_op,
    example=lambda size, new: qk_inputs(size, new) | {"eps": 1e-6} | _bias(size, new),
)
register(
    split_heads,
    split_heads_ref,
    split_heads_op,
    example=lambda size, new: (
        {name: value for name, value in qk_inputs(size, new).items() if name in ("qkv", "heads")} | _bias(size, new)
    ),
)
