"""The three adaLN ops of a block: adaln_modulate at its start, gated_residual_adaln in its middle and
gated_residual_norm_adaln between two blocks. One C++ and one Triton kernel serve all three."""

from collections.abc import Callable

import torch
from torch import Tensor

from unite_fast.kernels import backend, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, native_backend, triton_backend
from unite_fast.kernels.registry import New, Size, register
from unite_fast.kernels.tensors import argument_error, modulate, rms_norm, upcast


def adaln_modulate_ref(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    return modulate(rms_norm(x, weight, eps), shift, scale).to(out_dtype or x.dtype)


def gated_residual_adaln_ref(x, branch, gate, weight, shift, scale, eps=1e-6, out_dtype=None, branch_bias=None):
    x = _gated_residual(x, branch, gate, branch_bias).to(x.dtype)
    return x, adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)


def gated_residual_norm_adaln_ref(
    x, branch, gate, norm_weight, weight, shift, scale, eps=1e-6, out_dtype=None, branch_bias=None
):
    x = rms_norm(_gated_residual(x, branch, gate, branch_bias), norm_weight, eps).to(x.dtype)
    return x, adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor, branch_bias: Tensor | None) -> Tensor:
    return upcast(x) + upcast(gate).unsqueeze(1) * tensors.containing(upcast(branch), branch_bias)


# The two functions below serve all three ops: branch, gate and norm_weight are None for an op without them, and so are
# the results that belong to them.


def _empty_outputs(x, branch, gate, norm_weight, weight, shift, scale, branch_bias, eps, out_dtype):
    """Uninitialised x_out, h and rstd of the norms."""
    b, t, _ = x.shape
    x_out = None if branch is None else tensors.empty_like(x)
    rstd = x.new_empty((b, t) if norm_weight is None else (2, b, t), dtype=torch.float32)
    return x_out, tensors.empty_like(x, out_dtype), rstd


def _empty_gradients(d_x_out, d_h, x, branch, gate, norm_weight, weight, scale, rstd, branch_bias_gradient):
    """Uninitialised gradients of x, branch, gate, norm_weight, weight, shift, scale and branch_bias."""
    gated, normed = branch is not None, norm_weight is not None
    return (
        tensors.empty_like(x),
        tensors.empty_gradient(branch) if gated else None,
        tensors.empty_gradient(gate) if gated else None,
        tensors.empty_weight_gradient(norm_weight, x) if normed else None,
        tensors.empty_weight_gradient(weight, x),
        tensors.empty_gradient(scale),
        tensors.empty_gradient(scale),
        tensors.empty_bias_gradient(x, branch_bias_gradient) if gated else None,
    )


def _adaln_op(
    name: str, expand: Callable[..., tuple], expand_backward: Callable[..., tuple], recompute: bool = False, **schema
) -> FusedOp:
    """One of the three ops. `expand` inserts None for the inputs that it does not have."""

    def present(results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        return tuple(result for result in results if result is not None)

    def fake_forward(*inputs):
        return present(_empty_outputs(*expand(*inputs)))

    def fake_backward(*inputs):
        return present(_empty_gradients(*expand_backward(*inputs)))

    native = _native_with_bias if "branch_bias" in schema["inputs"] else native_backend
    return FusedOp(
        name,
        fake_forward=fake_forward,
        fake_backward=fake_backward,
        backends={
            "native": native(name, fake_forward, fake_backward),
            "triton": triton_backend("adaln", name, recompute),
        },
        **schema,
    )


def _native_with_bias(name: str, fake_forward: Callable, fake_backward: Callable) -> Backend:
    """`native_backend` of an op with branch_bias. Only on a GPU does the model leave the gradient of a bias to these
    ops, so it has no C++."""
    native = native_backend(
        name,
        lambda *inputs: fake_forward(*inputs[:-2], None, *inputs[-2:]),
        lambda *inputs: fake_backward(*inputs, False)[:-1],
    )

    def forward(*inputs):
        *others, _, eps, out_dtype = inputs
        return native.forward(*others, eps, out_dtype)

    def backward(d_x_out, d_h, x, branch, *others):
        *vectors, branch_bias_gradient = others
        if not branch_bias_gradient:
            gradients = native.backward(d_x_out, d_h, x, branch, *vectors)
            return *gradients, tensors.empty_bias_gradient(x, False)
        # The bias is float32, so the gradient of the branch is summed before it is rounded.
        d_x, d_branch, *d_vectors = native.backward(d_x_out, d_h, x, branch.float(), *vectors)
        return d_x, d_branch.to(tensors.empty_gradient(branch).dtype), *d_vectors, d_branch.flatten(0, 1).sum(0)

    return Backend(forward, backward)


adaln_modulate_op = _adaln_op(
    "adaln_modulate",
    lambda x, weight, shift, scale, *options: (x, None, None, None, weight, shift, scale, None, *options),
    lambda d_h, x, weight, scale, rstd: (None, d_h, x, None, None, None, weight, scale, rstd, False),
    inputs="Tensor x, Tensor weight, Tensor shift, Tensor scale, float eps, ScalarType? out_dtype",
    outputs=2,
    backward_inputs="Tensor d_out, Tensor x, Tensor weight, Tensor scale, Tensor rstd",
    backward_outputs=4,
    saved=lambda inputs, outputs: (inputs[0], inputs[1], inputs[3], outputs[1]),
)

gated_residual_adaln_op = _adaln_op(
    "gated_residual_adaln",
    lambda x, branch, gate, *vectors: (x, branch, gate, None, *vectors),
    lambda d_x_out, d_h, x_out, branch, gate, *vectors: (d_x_out, d_h, x_out, branch, gate, None, *vectors),
    recompute=True,
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor weight, Tensor shift, Tensor scale, "
    "Tensor? branch_bias, float eps, ScalarType? out_dtype",
    outputs=3,
    results=2,
    backward_inputs="Tensor? d_x_out, Tensor? d_h, Tensor x_out, Tensor branch, Tensor gate, Tensor weight, "
    "Tensor scale, Tensor rstd, bool branch_bias_gradient",
    backward_outputs=7,
    # x_out instead of x: the next op saves it as well, so it costs no memory.
    saved=lambda inputs, outputs: (outputs[0], *inputs[1:4], inputs[5], outputs[2], inputs[6] is not None),
)

gated_residual_norm_adaln_op = _adaln_op(
    "gated_residual_norm_adaln",
    lambda *inputs: inputs,
    lambda *inputs: inputs,
    inputs="Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, Tensor weight, Tensor shift, Tensor scale, "
    "Tensor? branch_bias, float eps, ScalarType? out_dtype",
    outputs=3,
    results=2,
    backward_inputs="Tensor? d_x_out, Tensor? d_h, Tensor x, Tensor branch, Tensor gate, Tensor norm_weight, "
    "Tensor weight, Tensor scale, Tensor rstd, bool branch_bias_gradient",
    backward_outputs=8,
    # Not x_out: recomputing it takes less time than reading it.
    saved=lambda inputs, outputs: (*inputs[:5], inputs[6], outputs[2], inputs[7] is not None),
)


def adaln_modulate(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """RMSNorm with weight, then scale and shift per sample.

        out = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift

    The mean and all products are float32. Source: adaLN of DiT (Peebles and Xie, arXiv 2212.09748) on RMSNorm.

    Args:
        x: [B, T, D]. The mean is over D.
        weight: [D].
        shift: [B, D].
        scale: [B, D].
        eps: added to the mean square.
        out_dtype: dtype of the result; x's own by default.

    Returns:
        [B, T, D].

    Raises:
        ValueError: shapes that do not match.
    """
    check_modulation("adaln_modulate", x, weight, shift, scale)
    chosen = backend.choose(x, out_dtype, "adaln_modulate")
    if chosen == "reference":
        return adaln_modulate_ref(x, weight, shift, scale, eps, out_dtype)
    return adaln_modulate_op(chosen, x, weight, shift, scale, eps, out_dtype)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The middle of a block: add the gated branch to the residual, then `adaln_modulate`.

        x_out = x + gate * branch
        h     = adaln_modulate(x_out, weight, shift, scale)

    All arithmetic is float32; h is computed from x_out as rounded to its dtype. Source: DiT (Peebles and Xie, arXiv
    2212.09748).

    Args:
        x: [B, T, D], the residual.
        branch: [B, T, D], the result of attention or the MLP.
        gate: [B, D].
        weight: [D], of the RMSNorm.
        shift: [B, D].
        scale: [B, D].
        eps: added to the mean square.
        out_dtype: dtype of h; x's own by default.
        branch_bias: [D], the bias that branch contains, or None; gets the sum of branch's gradient
            (`linear.shared_bias`).

    Returns:
        x_out [B, T, D] in x's dtype, and h [B, T, D].

    Raises:
        ValueError: shapes that do not match.
    """
    check_modulation("gated_residual_adaln", x, weight, shift, scale)
    check_branch("gated_residual_adaln", x, branch, gate, branch_bias)
    chosen = backend.choose(x, out_dtype, "gated_residual_adaln")
    if chosen == "reference":
        return gated_residual_adaln_ref(x, branch, gate, weight, shift, scale, eps, out_dtype, branch_bias)
    return gated_residual_adaln_op(chosen, x, branch, gate, weight, shift, scale, branch_bias, eps, out_dtype)


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
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The boundary of two blocks: gated residual and final norm of one, then `adaln_modulate` of the next.

        x_out = rms_norm(x + gate * branch, norm_weight)
        h     = adaln_modulate(x_out, weight, shift, scale)

    All arithmetic is float32; h is computed from x_out as rounded to its dtype. Source: DiT (Peebles and Xie, arXiv
    2212.09748), with the third norm of UNITE's block.

    Args:
        x: [B, T, D], the residual.
        branch: [B, T, D], the result of the MLP.
        gate: [B, D].
        norm_weight: [D], norm3 of the block that ends.
        weight: [D], norm1 of the block that begins, or of the final layer; likewise shift and scale.
        shift: [B, D].
        scale: [B, D].
        eps: added to the mean squares of both norms.
        out_dtype: dtype of h; x's own by default.
        branch_bias: [D], the bias that branch contains, or None; gets the sum of branch's gradient
            (`linear.shared_bias`).

    Returns:
        x_out [B, T, D] in x's dtype, and h [B, T, D].

    Raises:
        ValueError: shapes that do not match.
    """
    op = "gated_residual_norm_adaln"
    check_modulation(op, x, weight, shift, scale)
    check_branch(op, x, branch, gate, branch_bias)
    if norm_weight.shape != weight.shape:
        raise argument_error(op, f"norm_weight must be {list(weight.shape)}")
    chosen = backend.choose(x, out_dtype, op)
    vectors = gate, norm_weight, weight, shift, scale
    if chosen == "reference":
        return gated_residual_norm_adaln_ref(x, branch, *vectors, eps, out_dtype, branch_bias)
    return gated_residual_norm_adaln_op(chosen, x, branch, *vectors, branch_bias, eps, out_dtype)


def check_modulation(op: str, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> None:
    if x.dim() != 3:
        raise argument_error(op, f"x must be [B, T, D], got {list(x.shape)}")
    b, _, d = x.shape
    if weight.shape != (d,):
        raise argument_error(op, f"weight must be [{d}], got {list(weight.shape)}")
    if shift.shape != (b, d):
        raise argument_error(op, f"shift must be [{b}, {d}], got {list(shift.shape)}")
    if scale.shape != (b, d):
        raise argument_error(op, f"scale must be [{b}, {d}], got {list(scale.shape)}")


def check_branch(op: str, x: Tensor, branch: Tensor, gate: Tensor, branch_bias: Tensor | None) -> None:
    b, _, d = x.shape
    if branch.shape != x.shape:
        raise argument_error(op, f"branch must be {list(x.shape)} like x, got {list(branch.shape)}")
    if gate.shape != (b, d):
        raise argument_error(op, f"gate must be [{b}, {d}], got {list(gate.shape)}")
    tensors.check_contained(op, "branch_bias", branch, branch_bias)


def adaln_inputs(size: Size, new: New, names: str) -> dict[str, Tensor]:
    """The named inputs of an adaLN op, by name."""
    b, t, d = size.batch, size.tokens, size.width
    # One Linear computes all modulation vectors of a block, so each is a strided view of its result.
    shift, scale, gate = new(b, 3 * d, dtype=size.other).chunk(3, dim=-1)
    inputs = {
        # The residual stream is larger than a branch.
        "x": 3 * new(b, t, d, dtype=size.residual),
        "branch": new(b, t, d, dtype=size.other),
        "gate": gate,
        "norm_weight": new(d, dtype=size.weights, around=1.0),
        "weight": new(d, dtype=size.weights, around=1.0),
        "shift": shift,
        "scale": scale,
        "branch_bias": new(d, dtype=size.weights),
    }
    return {name: inputs[name] for name in names.split()}


def _example(names: str) -> Callable[[Size, New], dict]:
    def example(size, new):
        return {**adaln_inputs(size, new, names), "eps": 1e-6, "out_dtype": size.other}

    return example


register(adaln_modulate, adaln_modulate_ref, adaln_modulate_op, example=_example("x weight shift scale"))
# Three roundings: of x_out, before h is computed from it, of the result, and of the gradient of x_out.
register(
    gated_residual_adaln,
    gated_residual_adaln_ref,
    gated_residual_adaln_op,
    example=_example("x branch gate weight shift scale branch_bias"),
    roundings=3,
)
register(
    gated_residual_norm_adaln,
    gated_residual_norm_adaln_ref,
    gated_residual_norm_adaln_op,
    example=_example("x branch gate norm_weight weight shift scale branch_bias"),
    roundings=3,
)
