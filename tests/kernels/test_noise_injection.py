"""noise_injection on each backend against its formula, and its normals against unite_fast/randomness.py."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from unite_fast.kernels import backend, native, noise_injection
from unite_fast.kernels.noise_injection import noise_injection_op, noise_injection_ref
from unite_fast.randomness import Philox, Stream, box_muller, philox4x32

INTERPRETED = backend.interpreted() and not backend.why_missing("triton")
if INTERPRETED:
    import triton
    import triton.language as tl

    from unite_fast.kernels.triton_kernels import philox as triton_philox

    triton_words, triton_box_muller = triton_philox.words, triton_philox.box_muller

    # Kernels that store the results of the device functions.

    @triton.jit
    def words_kernel(out, position, step, tag, seed_low, seed_high, COUNT: tl.constexpr):
        o = tl.arange(0, COUNT)
        b_w0, b_w1, b_w2, b_w3 = triton_words(
            o, tl.cast(position, tl.int64) & 0xFFFFFFFF, step, tag, seed_low, seed_high
        )
        tl.store(out + 4 * o, b_w0.to(tl.int64))
        tl.store(out + 4 * o + 1, b_w1.to(tl.int64))
        tl.store(out + 4 * o + 2, b_w2.to(tl.int64))
        tl.store(out + 4 * o + 3, b_w3.to(tl.int64))

    @triton.jit
    def pair_kernel(words, out, COUNT: tl.constexpr):
        o = tl.arange(0, COUNT)
        b_0, b_1 = tl.load(words + 2 * o).to(tl.uint32), tl.load(words + 2 * o + 1).to(tl.uint32)
        b_first, b_second = triton_box_muller(b_0, b_1)
        tl.store(out + 2 * o, b_first)
        tl.store(out + 2 * o + 1, b_second)


UNITS = 2
"""Largest difference of a backend's normals from randomness.py, in units in the last place. Measured for C++: none in
10^7 normals. Its float64 functions differ by at most 2 units, which may turn a rounding to float32 the other way."""
WORD = 2**32 - 1
STREAM = Stream.FLOW_NOISE
SHAPES = {"native": [(1, 4, 6, 5), (3, 5, 41, 33), (2, 2, 16, 64)], "triton": [(1, 4, 3, 5), (3, 2, 8, 4)]}
SHAPES["reference"] = SHAPES["native"]


fast_backends = pytest.mark.parametrize("backend_name", ["native", "triton"], indirect=True)
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


def keys(samples: int, like: Tensor | None = None) -> Philox:
    """Keys that use both halves of every word, the top bit of some, and a step in a position. On the device of `like`,
    or the CPU."""
    positions = torch.tensor([3, WORD, 2**40 + 5, 2**31, 77])[:samples]
    return Philox(2**63 + 5, 2**32 - 2, positions if like is None else positions.to(like.device))


def make_inputs(draw, shape, dtype=torch.float32):
    """z, t, and a gate that is closed for every third sample, for a shape of F, B, N, C."""
    draws, samples, tokens, channels = shape
    t = draw(draws, samples).sigmoid()
    return draw(samples, tokens, channels, dtype=dtype), t, torch.arange(samples, device=t.device) % 3 > 0


def formula(t: Tensor, gate: Tensor | None, philox: Philox):
    """The op as a function of z, in z's precision or better, sample by sample."""
    with backend.using("reference"):
        noise = [philox.normal(STREAM, (10_000,), f) for f in range(len(t))]

    def op(z):
        rows = []
        for f in range(len(t)):
            for i in range(len(z)):
                e = noise[f][i, : z[i].numel()].reshape(z[i].shape)
                noisy = t[f, i].to(torch.promote_types(z.dtype, t.dtype)) * z[i] + (1 - t[f, i]) * e
                rows.append(z[i].to(noisy.dtype) if gate is not None and not gate[i] else noisy)
        return torch.stack(rows).unflatten(0, t.shape)

    return op


CASES = [(backend_name, shape) for backend_name, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend_name", "shape"), CASES, indirect=["backend_name"])
def test_output_and_gradient_against_float64(backend_name, shape, dtype, gated, judge, draw):
    z, t, gate = make_inputs(draw, shape, dtype)
    gate, philox = gate if gated else None, keys(shape[1], z)

    def op(z):
        return noise_injection(z, t, philox, STREAM, gate)

    judge(op, formula(t, gate, philox), {"z": z}, (torch.float32,))


@pytest.mark.parametrize("layout", ["tokens", "batch", "channels", "transposed", "expanded"])
def test_strided_inputs(backend_name, layout, judge, draw):
    z, t, _ = make_inputs(draw, (2, 3, 4, 5))
    philox = Philox(1, 2, torch.arange(12, device=t.device)[::4])
    z = {
        "tokens": z.new_zeros(3, 8, 5)[:, ::2].copy_(z),
        "batch": z.transpose(0, 1).contiguous().transpose(0, 1),
        "channels": z.new_zeros(3, 4, 10)[..., ::2].copy_(z),
        "transposed": z.mT.contiguous().mT,
        "expanded": z[:1].expand(3, 4, 5),
    }[layout]
    t = t.t().contiguous().t()
    gate = torch.tensor([True, False] * 3, device=t.device)[::2]
    judge(lambda z: noise_injection(z, t, philox, STREAM, gate), formula(t, gate, philox), {"z": z}, (torch.float32,))


def test_the_ends_of_the_path_are_noise_and_latents(backend_name, draw):
    z = draw(2, 3, 4)
    philox = keys(2, z)
    x = noise_injection(z, z.new_tensor([[0.0, 1.0], [1.0, 0.0]]), philox, STREAM)
    with backend.using("reference"):
        noise = [philox.normal(STREAM, (3, 4), f) for f in range(2)]
    assert torch.equal(x[0, 1], z[1]) and torch.equal(x[1, 0], z[0])
    torch.testing.assert_close(x[0, 0], noise[0][0], rtol=UNITS * 2.0**-23, atol=0)
    torch.testing.assert_close(x[1, 1], noise[1][1], rtol=UNITS * 2.0**-23, atol=0)


def test_a_closed_gate_returns_the_latents_bit_for_bit(backend_name, draw):
    z = draw(2, 3, 4)
    gate = torch.tensor([False, True], device=z.device)
    x = noise_injection(z, z.new_full((2, 2), 0.3), keys(2, z), STREAM, gate)
    assert torch.equal(x[0, 0], z[0]) and torch.equal(x[1, 0], z[0])
    assert not torch.isclose(x[:, 1], z[1]).any()


@fast_backends
def test_repeated_calls_give_the_same_bits(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 2, 8, 5))
    runs = [run(z, t, keys(2, z), gate) for _ in range(2)]
    assert_same(*runs)


@needs_native
def test_any_number_of_threads_gives_the_same_bits(draw):
    z, t, gate = make_inputs(draw, (3, 5, 70, 63))
    before = torch.get_num_threads()
    try:
        with backend.using("native"):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(z, t, keys(5), gate))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


def test_a_sample_does_not_depend_on_its_batch(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 4, 3, 5))
    whole, philox = noise_injection(z, t, keys(4, z), STREAM, gate), keys(4, z)
    part = torch.tensor([2, 0], device=z.device)
    philox = Philox(philox.seed, philox.step, philox.positions[part])
    assert torch.equal(noise_injection(z[part], t[:, part], philox, STREAM, gate[part]), whole[:, part])


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4), (1, 3, 2, 0)])
def test_empty_batches_and_empty_latents(backend_name, shape, draw):
    z, t, gate = make_inputs(draw, shape)
    x, d_z = run(z, t, keys(shape[1], z), gate)
    assert (x.shape, d_z.shape) == (shape, z.shape)


def test_nonfinite_inputs_affect_only_their_element(backend_name, draw):
    z, t, _ = make_inputs(draw, (2, 2, 3, 4))
    for bad in (float("nan"), float("inf")):
        z[1, 2, 3] = bad
        x = noise_injection(z, t, keys(2, z), STREAM)
        assert (~x.isfinite()).nonzero().tolist() == [[0, 1, 2, 3], [1, 1, 2, 3]]


def test_z_is_not_changed_and_bfloat16_is_upcast(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 4), torch.bfloat16)
    copy = z.clone()
    assert torch.equal(run(z, t, keys(2, z), gate)[0], run(z.float(), t, keys(2, z), gate)[0])
    assert torch.equal(z, copy)


def run(z: Tensor, t: Tensor, philox: Philox, gate: Tensor | None, op=noise_injection) -> tuple[Tensor, Tensor]:
    """Output and gradient of z."""
    z = z.detach().requires_grad_()
    x = op(z, t, philox, STREAM, gate)
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    return x.detach(), torch.autograd.grad(x, z, incoming)[0]


def assert_same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


# As a PyTorch operator


@fast_backends
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend_name, dtype, gated, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 5), dtype)
    gate = gate if gated else None
    torch.library.opcheck(
        noise_injection_op.op, (z.requires_grad_(), t, keys(2, z).positions, gate, WORD, 2**31, 3, int(STREAM))
    )
    torch.library.opcheck(noise_injection_op.backward_op, (draw(2, 2, 3, 5), t, gate))


@fast_backends
def test_it_compiles_to_one_graph(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 5))
    philox = Philox(5, 6, torch.arange(2, device=z.device))
    torch._dynamo.reset()
    compiled = torch.compile(noise_injection, fullgraph=True, backend="aot_eager")
    assert_same(run(z, t, philox, gate, compiled), run(z, t, philox, gate))


@fast_backends
def test_activation_checkpointing_draws_the_same_noise(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 5))

    def checkpointed(*arguments):
        return checkpoint(lambda *x: noise_injection(*x).square(), *arguments, use_reentrant=False)

    def plain(*arguments):
        return noise_injection(*arguments).square()

    assert_same(run(z, t, keys(2, z), gate, checkpointed), run(z, t, keys(2, z), gate, plain))


@fast_backends
def test_autocast_casts_nothing(backend_name, device, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 5))
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = run(z, t, keys(2, z), gate)
    assert_same(under_autocast, run(z, t, keys(2, z), gate))


@fast_backends
def test_fake_tensors_give_shapes_and_dtypes(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 5), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = noise_injection(mode.from_tensor(z), t, keys(2, z), STREAM, gate)
    assert (x.shape, x.dtype) == ((2, 2, 3, 5), torch.float32)


@fast_backends
def test_no_noise_is_saved_for_backward(backend_name, draw):
    z, t, gate = make_inputs(draw, (2, 2, 3, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        noise_injection(z.requires_grad_(), t, keys(2, z), STREAM, gate)
    assert {x.data_ptr() for x in saved} == {t.data_ptr(), gate.data_ptr()}


# Normals


def difference_in_units(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, in units in the last place of `expected`."""
    ours, expected = ours.double().numpy().ravel(), expected.numpy().ravel()
    return float((np.abs(ours - expected) / np.spacing(np.abs(expected))).max())


def reference_normals(philox: Philox, elements: int, draw: int = 0) -> Tensor:
    with backend.using("reference"):
        return philox.normal(STREAM, (elements,), draw)


@needs_native
def test_native_normals_agree_in_the_last_places():
    philox = keys(5)
    for draw in (0, 1, 2**16 - 1):
        expected = reference_normals(philox, 100_001, draw)
        actual = native.philox_normals(philox.seed, philox.step, STREAM, draw, philox.positions, 100_001)
        assert actual.dtype == torch.float32
        assert difference_in_units(actual, expected) <= UNITS


EDGES = [0, 1, 2**29 - 1, 2**29, *(k * 2**30 + d for k in (1, 2, 3) for d in (-1, 0, 1)), 2**31 + 2**29, WORD - 1, WORD]
"""Both ends of a word. As angles: the zeros of cosine and sine, their neighbours, and points halfway between zeros."""


def counters_of(words: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """The counters that give these words, by inverse rounds of Philox. uint64 [..., 4] -> [..., 4]."""
    low, shift = np.uint64(WORD), np.uint64(32)
    multipliers = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    inverses = [np.uint64(pow(int(m), -1, 2**32)) for m in multipliers]
    c0, c1, c2, c3 = np.moveaxis(words.astype(np.uint64), -1, 0)
    for round_number in reversed(range(10)):
        k0 = np.uint64((key[0] + round_number * 0x9E3779B9) & WORD)
        k1 = np.uint64((key[1] + round_number * 0xBB67AE85) & WORD)
        before0, before2 = c3 * inverses[0] & low, c1 * inverses[1] & low
        c1, c3 = c0 ^ (before2 * multipliers[1] >> shift) ^ k0, c2 ^ (before0 * multipliers[0] >> shift) ^ k1
        c0, c2 = before0, before2
    return np.stack((c0, c1, c2, c3), axis=-1)


@needs_native
def test_native_normals_of_extreme_words():
    """Inverse Philox finds counters for each pair of words, with many choices of the block's other pair. One of these
    counters is near the start of a sample."""
    seed, others = 2**40 + 9, np.random.default_rng(0).integers(0, 2**32, (2**17, 2))
    key = seed & WORD, seed >> 32
    for length in (0, 2**31, WORD):
        for angle in EDGES:
            words = np.concatenate((np.broadcast_to([length, angle], others.shape), others), axis=-1)
            counters = counters_of(words, key)
            block, position, step, tag = (int(word) for word in counters[counters[:, 0].argmin()])
            assert block < 2**19
            arguments = seed, step, tag >> 16, tag & 0xFFFF, torch.tensor([position]), 4 * (block + 1)
            assert native.philox_words(*arguments)[0, -4:-2].tolist() == [length, angle]
            actual = native.philox_normals(*arguments)[0, -4:-2]
            assert difference_in_units(actual, box_muller(torch.tensor([length, angle]))) <= UNITS, (length, angle)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off or missing")


@interpreted
@pytest.mark.parametrize("counter", [(0, 0, 0), (WORD, 1, 2**31), (2**31 - 1, WORD, WORD)])
@pytest.mark.parametrize("key", [(0, 0), (WORD, 2**31)])
def test_triton_words_equal_the_reference(counter, key):
    actual = torch.empty(1024, 4, dtype=torch.int64)
    words_kernel[(1,)](actual, *triton_philox.as_int32(*counter, *key), COUNT=1024)
    blocks = torch.tensor([[block, *counter] for block in range(1024)])
    assert torch.equal(actual, philox4x32(blocks, key))


@interpreted
def test_triton_normals_of_extreme_words():
    words = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES))
    words = torch.cat((words, torch.zeros(256 - len(words), 2, dtype=torch.int64)))
    actual = torch.empty(words.shape)
    pair_kernel[(1,)](words, actual, COUNT=256)
    assert difference_in_units(actual, box_muller(words)) <= UNITS


@interpreted
def test_triton_normals_agree_in_the_last_places():
    philox = keys(4)
    actual = triton_philox.philox_normals(philox.seed, philox.step, int(STREAM), range(7, 8), philox.positions, 4001)[0]
    assert actual.dtype == torch.float32
    assert difference_in_units(actual, reference_normals(philox, 4001, 7)) <= UNITS


# Errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"z": torch.zeros(2, 3)}, r"z must be \[B, N, C\], got \[2, 3\]"),
        ({"t": torch.zeros(2)}, r"t must be \[F, 2\] with F from 1 to 65536, got \[2\]"),
        ({"t": torch.zeros(3, 1)}, r"t must be \[F, 2\] with F from 1 to 65536, got \[3, 1\]"),
        ({"t": torch.zeros(0, 2)}, r"t must be \[F, 2\] with F from 1 to 65536, got \[0, 2\]"),
        ({"t": torch.zeros(1, 2, requires_grad=True)}, "t gets no gradient; detach it"),
        (
            {"philox": Philox(0, 0, torch.arange(3))},
            r"positions of philox must be int64 \[2\] on cpu, got torch.int64 \[3",
        ),
        (
            {"philox": Philox(0, 0, torch.zeros(2))},
            r"positions of philox must be int64 \[2\] on cpu, got torch.float32",
        ),
        ({"philox": Philox(2**64, 0, torch.arange(2))}, r"seed 18446744073709551616 must be in \[0, 2\*\*64\)"),
        ({"philox": Philox(0, -1, torch.arange(2))}, r"step -1 in \[0, 2\*\*32\)"),
        ({"gate": torch.ones(2)}, r"gate must be bool \[2\], got torch.float32 \[2\]"),
        ({"gate": torch.ones(3).bool()}, r"gate must be bool \[2\], got torch.bool \[3\]"),
    ],
)
def test_inconsistent_arguments_are_refused(wrong, message):
    right = {"z": torch.zeros(2, 3, 4), "t": torch.zeros(1, 2), "philox": Philox(0, 0, torch.arange(2)), "stream": 0}
    with pytest.raises(ValueError, match=f"noise_injection: .*{message}"):
        noise_injection(**(right | wrong))


def test_the_reference_is_the_formula(draw):
    z, t, gate = make_inputs(draw, (2, 3, 4, 5))
    assert torch.equal(noise_injection_ref(z, t, keys(3), STREAM, gate), formula(t, gate, keys(3))(z))
