"""noise_injection: latents between noise and data, with the noise drawn inside the kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from unite_fast.kernels import backend, native, tensors
from unite_fast.kernels.fused_op import Backend, FusedOp, triton_backend
from unite_fast.kernels.registry import register
from unite_fast.kernels.tensors import argument_error


def noise_injection_ref(z: Tensor, t: Tensor, philox, stream: int, gate: Tensor | None = None) -> Tensor:
    noise = torch.stack([philox.normal(stream, z.shape[1:], draw) for draw in range(len(t))])
    return mix(z, t, noise, gate)


def mix(z: Tensor, t: Tensor, noise: Tensor, gate: Tensor | None = None) -> Tensor:
    """The formula for a given noise, [F, B, N, C] or broadcastable to it."""
    t = t[..., None, None]
    noisy = t * z + (1 - t) * noise
    return noisy if gate is None else torch.where(gate[:, None, None], noisy, z)


def _fake_forward(z, t, positions, gate, seed_low, seed_high, step, stream):
    return (z.new_empty((*t.shape, *z.shape[1:]), dtype=torch.float32),)


def _native_forward(z, t, positions, gate, seed_low, seed_high, step, stream):
    (out,) = _fake_forward(z, t, positions, gate, seed_low, seed_high, step, stream)
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
        tensors.DTYPES[z.dtype],
        z.data_ptr(),
        out.data_ptr(),
    )
    return (out,)


def _fake_backward(d_out, t, gate):
    # Autograd rounds it to z's dtype.
    return (d_out.new_empty(d_out.shape[1:], dtype=torch.float32),)


def _native_backward(d_out, t, gate):
    (d_z,) = _fake_backward(d_out, t, gate)
    d_out = d_out.contiguous()
    sizes, t, gate = _native_sizes(d_out, t, gate)
    pointers = t.data_ptr(), native.address(gate), d_out.data_ptr(), d_z.data_ptr()
    native.run("noise_injection_backward", *sizes, *pointers)
    return (d_z,)


def _native_sizes(out: Tensor, t: Tensor, gate: Tensor | None):
    """Draws, samples and elements per sample, and t and gate, which the caller must keep while their addresses are in
    use."""
    draws, samples, tokens, channels = out.shape
    return (draws, samples, tokens * channels), tensors.as_float32(t), None if gate is None else gate.contiguous()


noise_injection_op = FusedOp(
    "noise_injection",
    inputs="Tensor z, Tensor t, Tensor positions, Tensor? gate, int seed_low, int seed_high, int step, int stream",
    fake_forward=_fake_forward,
    backward_inputs="Tensor d_out, Tensor t, Tensor? gate",
    backward_outputs=1,
    fake_backward=_fake_backward,
    saved=lambda inputs, outputs: (inputs[1], inputs[3]),
    backends={
        "native": Backend(_native_forward, _native_backward),
        "triton": triton_backend("noise_injection"),
    },
)


def noise_injection(z: Tensor, t: Tensor, philox, stream: int, gate: Tensor | None = None) -> Tensor:
    """Latents on the straight path from noise to data, F draws of one z.

        x_t = t z + (1 - t) e,   e ~ N(0, 1);   x_t = z for a sample whose gate is False

    e is `unite_fast.randomness.Philox.normal` to 2 units in the last place. The fast backends generate it in registers,
    so it is never written to memory, and z is never repeated; the gradient of z is the sum over the draws. All
    arithmetic is float32. Source: the straight path of Liu et al., arXiv 2209.03003.

    Args:
        z: float32 or bfloat16 [B, N, C]; the only argument with a gradient.
        t: float32 [F, B], the times.
        philox: a `unite_fast.randomness.Philox` with the positions of the B samples.
        stream: the random stream; draw f of it is the noise of x_t[f].
        gate: bool [B]; None is True for all.

    Returns:
        float32 [F, B, N, C].

    Raises:
        ValueError: shapes that do not match, seed or step out of range, or a t that requires a gradient.
    """
    _check(z, t, philox, gate)
    chosen = backend.choose(z, op="noise_injection")
    if chosen == "reference":
        return noise_injection_ref(z, t, philox, stream, gate)
    return noise_injection_op(chosen, *_op_inputs(z, t, philox, stream, gate))


def _op_inputs(z: Tensor, t: Tensor, philox, stream: int, gate: Tensor | None) -> tuple:
    # The integers of an operator schema are signed 64-bit numbers, too small for the seed.
    seed_low, seed_high = philox.seed & 0xFFFFFFFF, philox.seed >> 32
    return z, t, philox.positions, gate, seed_low, seed_high, philox.step, int(stream)


def _check(z: Tensor, t: Tensor, philox, gate: Tensor | None) -> None:
    op = "noise_injection"
    if z.dim() != 3:
        raise argument_error(op, f"z must be [B, N, C], got {list(z.shape)}")
    b = z.shape[0]
    if t.dim() != 2 or t.shape[1] != b or not 0 < t.shape[0] <= 2**16:
        raise argument_error(op, f"t must be [F, {b}] with F from 1 to 65536, got {list(t.shape)}")
    if t.requires_grad:
        raise argument_error(op, "t gets no gradient; detach it")
    positions = philox.positions
    if positions.shape != (b,) or positions.dtype != torch.int64 or positions.device != z.device:
        got = f"{positions.dtype} {list(positions.shape)} on {positions.device}"
        raise argument_error(op, f"the positions of philox must be int64 [{b}] on {z.device}, got {got}")
    if not (0 <= philox.seed < 2**64 and 0 <= philox.step < 2**32):
        raise argument_error(op, f"seed {philox.seed} must be in [0, 2**64) and step {philox.step} in [0, 2**32)")
    if gate is not None and (gate.shape != (b,) or gate.dtype != torch.bool):
        raise argument_error(op, f"gate must be bool [{b}], got {gate.dtype} {list(gate.shape)}")


class Keys(NamedTuple):
    """The fields of `unite_fast.randomness.Philox`, for the example: this package must not import that module."""

    seed: int
    step: int
    positions: Tensor


def _example(size, new):
    z, positions = new(size.batch, size.tokens, size.width, dtype=size.residual), torch.arange(size.batch)
    return {
        "z": z,
        "t": new(size.draws, size.batch).sigmoid(),
        "philox": Keys(seed=2**33 + 1, step=3, positions=positions.to(z.device)),
        "stream": 4,
        "gate": positions.to(z.device) >= 0,
    }


register(
    noise_injection,
    noise_injection_ref,
    noise_injection_op,
    example=_example,
    part="latents",
    op_inputs=_op_inputs,
)
