"""noise_injection: latents on their way from noise to data, the noise drawn where it is used.

    x_t = t z + (1 - t) e,   e ~ N(0, 1);   z itself for a sample whose gate is shut

Shapes: z [B, N, C], t float32 [F, B], gate bool [B] -> x_t float32 [F, B, N, C]: F draws from one z, which is never
repeated, and whose gradient is the sum over the draws. e is that of `unite_fast.randomness.Philox.normal`, to 2 units
in the last place; the fast bodies make it in registers from the keys, and it never lands in memory.
Source: the straight path of Liu et al., arXiv 2209.03003.
"""

import torch
from torch import Tensor

from unite_fast.kernels import backend, layout, native
from unite_fast.kernels.common import mistake
from unite_fast.kernels.op import Body, FusedOp, triton_body


def noise_injection_ref(z: Tensor, t: Tensor, philox, stream: int, gate: Tensor | None = None) -> Tensor:
    noise = torch.stack([philox.normal(stream, z.shape[1:], draw) for draw in range(len(t))])
    return mix(z, t, noise, gate)


def mix(z: Tensor, t: Tensor, noise: Tensor, gate: Tensor | None = None) -> Tensor:
    """The formula, with a noise that was given: [F, B, N, C] or what broadcasts to it."""
    t = t[..., None, None]
    noisy = t * z + (1 - t) * noise
    return noisy if gate is None else torch.where(gate[:, None, None], noisy, z)


def _like_forward(z, t, positions, gate, seed_low, seed_high, step, stream):
    return (z.new_empty((*t.shape, *z.shape[1:]), dtype=torch.float32),)


def _native_forward(z, t, positions, gate, seed_low, seed_high, step, stream):
    (out,) = _like_forward(z, t, positions, gate, seed_low, seed_high, step, stream)
    z, positions = z.contiguous(), positions.contiguous()
    sizes, t, gate = _native_sizes(out, t, gate)
    native.run(
        "noise_injection_forward",
        *sizes,
        t.data_ptr(),
        native.address(gate),
        seed_low,
        seed_high,
        step,
        stream,
        positions.data_ptr(),
        layout.TYPES[z.dtype],
        z.data_ptr(),
        out.data_ptr(),
    )
    return (out,)


def _like_backward(d_out, t, gate):
    # Autograd rounds it to z's own type.
    return (d_out.new_empty(d_out.shape[1:], dtype=torch.float32),)


def _native_backward(d_out, t, gate):
    (d_z,) = _like_backward(d_out, t, gate)
    d_out = d_out.contiguous()
    sizes, t, gate = _native_sizes(d_out, t, gate)
    pointers = t.data_ptr(), native.address(gate), d_out.data_ptr(), d_z.data_ptr()
    native.run("noise_injection_backward", *sizes, *pointers)
    return (d_z,)


def _native_sizes(out: Tensor, t: Tensor, gate: Tensor | None):
    """Draws, samples and elements of one, and t and gate to be kept for as long as their addresses are in use."""
    draws, samples, tokens, channels = out.shape
    return (draws, samples, tokens * channels), layout.floats(t), None if gate is None else gate.contiguous()


_fused = FusedOp(
    "noise_injection",
    inputs="Tensor z, Tensor t, Tensor positions, Tensor? gate, int seed_low, int seed_high, int step, int stream",
    outputs="Tensor",
    results=1,
    like_forward=_like_forward,
    backward_inputs="Tensor d_out, Tensor t, Tensor? gate",
    backward_outputs="Tensor",
    like_backward=_like_backward,
    saved=lambda inputs, outputs: (inputs[1], inputs[3]),
    bodies={
        "native": Body(_native_forward, _native_backward),
        "triton": triton_body("noise_injection", "noise_injection"),
    },
)


def noise_injection(z: Tensor, t: Tensor, philox, stream: int, gate: Tensor | None = None) -> Tensor:
    """Mix latents with noise; see the module's docstring.

    Args:
        z: float32 or bfloat16 [B, N, C]; alone has a gradient.
        t: float32 [F, B].
        philox: a `unite_fast.randomness.Philox` with the B positions of the samples.
        stream: what to draw for; draw f of it is F's f-th.
        gate: bool [B]; None for all open.

    Raises:
        ValueError: shapes that do not belong together, keys out of range, or a t that wants a gradient.
    """
    _check(z, t, philox, gate)
    body = backend.choose(z)
    if body == "reference":
        return noise_injection_ref(z, t, philox, stream, gate)
    # A schema's integers are signed, of 64 bits: the seed would not fit.
    seed_low, seed_high = philox.seed & 0xFFFFFFFF, philox.seed >> 32
    return _fused(body, z, t, philox.positions, gate, seed_low, seed_high, philox.step, int(stream))


def _check(z: Tensor, t: Tensor, philox, gate: Tensor | None) -> None:
    op = "noise_injection"
    if z.dim() != 3:
        raise mistake(op, f"z must be [B, N, C], got {list(z.shape)}")
    b = z.shape[0]
    if t.dim() != 2 or t.shape[1] != b or not 0 < t.shape[0] <= 2**16:
        raise mistake(op, f"t must be [F, {b}] with F from 1 to 65536, got {list(t.shape)}")
    if t.requires_grad:
        raise mistake(op, "t gets no gradient; detach it")
    positions = philox.positions
    if positions.shape != (b,) or positions.dtype != torch.int64 or positions.device != z.device:
        got = f"{positions.dtype} {list(positions.shape)} on {positions.device}"
        raise mistake(op, f"the positions of philox must be int64 [{b}] on {z.device}, got {got}")
    if not (0 <= philox.seed < 2**64 and 0 <= philox.step < 2**32):
        raise mistake(op, f"seed {philox.seed} must be in [0, 2**64) and step {philox.step} in [0, 2**32)")
    if gate is not None and (gate.shape != (b,) or gate.dtype != torch.bool):
        raise mistake(op, f"gate must be bool [{b}], got {gate.dtype} {list(gate.shape)}")
