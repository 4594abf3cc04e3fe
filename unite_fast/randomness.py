"""Random numbers as a function of (seed, step, position), without generator state.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
128-bit counter and a 64-bit key into four independent 32-bit words. The key is the seed of the run, the counter
identifies the draw:

    counter = (element // 4, position, step, stream * 2**16 + draw)        key = (seed low, seed high)

`position` is the sample's position in the global batch, `element` the position within the sample's tensor; `element`
gets word `element % 4`. So a step draws the same numbers on 1 process or 64, in one batch or eight micro-batches,
before or after a resume, on a CPU or a GPU.

A position from 2**32 on stands for later steps: its low word is the position, and its high word is added to `step`. So
one tensor can give a CUDA graph both.

Torch lacks unsigned 32-bit arithmetic on some devices, so words are stored as int64 in [0, 2**32).
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unite_fast.kernels import backend, native

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


class Stream(enum.IntEnum):
    """The purpose of a draw. The numbers determine the bits of every run: append, never renumber."""

    REGISTERS = 0
    RECON_TIME = 1
    DECODER_NOISE_MASK = 2
    DECODER_NOISE = 3
    DECODER_NOISE_TIME = 4
    FLOW_TIME = 5
    FLOW_NOISE = 6
    LABEL_DROP = 7
    FLIP = 8
    LPIPS_DROPOUT = 9
    SAMPLE_NOISE = 10
    EPOCH_ORDER = 11
    SYNTHETIC = 12
    ROTATION = 13
    ATOM_ORDER = 14
    MOLECULE_SIZE = 15


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 [..., 4], words in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        int64 [..., 4], words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32-bit product, from two 48-bit products that fit in int64."""
    upper = (word >> 16) * constant
    lower = (word & 0xFFFF) * constant
    middle = (upper & _MASK) + (lower >> 16)  # both terms below 2**33: no overflow
    low = ((middle << 16) | (lower & 0xFFFF)) & _MASK
    high = ((upper >> 32) << 16) + (middle >> 16)
    return high & _MASK, low


@dataclass(frozen=True)
class Philox:
    """The draws of one step for some samples of the global batch.

    Attributes:
        seed: the run's seed, in [0, 2**64).
        step: the optimizer step, in [0, 2**32).
        positions: int64 [b], the samples' positions in the global batch, on the device where to draw; see `at_step`.
    """

    seed: int
    step: int
    positions: Tensor

    def words(self, stream: Stream, shape: tuple[int, ...] = (), draw: int | range = 0) -> Tensor:
        """Raw 32-bit words, int64 [b, *shape].

        `draw` (below 2**16) numbers repeated draws of one stream. A range of draws with step 1 gives
        [draws, b, *shape], in one launch on a CUDA device. All backends give the same words.
        """
        return self._draw(stream, shape, draw, "philox_words", self._words)

    def uniform(self, stream: Stream, shape: tuple[int, ...] = (), draw: int | range = 0) -> Tensor:
        """U(0, 1) without the end points, float32 [b, *shape] or [draws, b, *shape].

        The 23 high bits of a word choose one of 2**23 equal cells; the result is its midpoint. With 24 bits the last
        midpoint would round to 1.
        """
        return self._draw(stream, shape, draw, "philox_uniforms", self._uniforms)

    def normal(self, stream: Stream, shape: tuple[int, ...] = (), draw: int | range = 0) -> Tensor:
        """N(0, 1), float32 [b, *shape] or [draws, b, *shape], by Box and Muller (1958).

        Words 0 and 1 of a block give normals 0 and 1, words 2 and 3 give normals 2 and 3. They are computed in float64
        and rounded once.

        Backends: C++ on a CPU, Triton on CUDA, PyTorch if the setting `kernels` is reference (the words come from C++
        even then). Their float64 functions differ from PyTorch's by one or two units in the last place. After rounding
        to float32 that should change one normal in about 10^8, by one unit; in a test of 10^7 normals, C++ and PyTorch
        agreed on all.
        """
        return self._draw(stream, shape, draw, "philox_normals", self._normals)

    def _draw(
        self,
        stream: Stream,
        shape: tuple[int, ...],
        draw: int | range,
        name: str,
        one: Callable[[Stream, int, int], Tensor],
    ) -> Tensor:
        """One draw or a range of draws: by the Triton function `name`, or by a call of `one` for each."""
        draws = draw if isinstance(draw, range) else range(draw, draw + 1)
        self._check(draws)
        elements = math.prod(shape)
        if self.on_triton:
            from unite_fast.kernels.triton_kernels import philox

            numbers = getattr(philox, name)(self.seed, self.step, int(stream), draws, self.positions, elements)
        elif isinstance(draw, range):
            numbers = torch.stack([one(stream, elements, draw) for draw in draws])
        else:
            numbers = one(stream, elements, draw).unsqueeze(0)
        numbers = numbers.reshape(len(draws), len(self.positions), *shape)
        return numbers if isinstance(draw, range) else numbers[0]

    @property
    def on_triton(self) -> bool:
        """Whether the Triton kernels draw."""
        device = self.positions.device
        runs_triton = device.type == "cuda" or backend.interpreted()
        return runs_triton and backend.backend_on(device) == "triton"

    def _words(self, stream: Stream, elements: int, draw: int) -> Tensor:
        """int64 [b, elements]."""
        b = len(self.positions)
        # torch.compile cannot trace C++.
        on_cpu = self.positions.device.type == "cpu"
        if on_cpu and native.available() and not torch.compiler.is_compiling():
            return native.philox_words(self.seed, self.step, int(stream), draw, self.positions, elements)
        blocks = -(-elements // 4)
        counter = self.positions.new_empty(b, blocks, 4)
        counter[..., 0] = torch.arange(blocks, device=self.positions.device)
        counter[..., 1] = (self.positions & _MASK)[:, None]
        counter[..., 2] = ((self.step + (self.positions >> 32)) & _MASK)[:, None]
        counter[..., 3] = (int(stream) << 16) + draw
        words = philox4x32(counter, (self.seed & _MASK, self.seed >> 32))
        return words.reshape(b, blocks * 4)[:, :elements]

    def _uniforms(self, stream: Stream, elements: int, draw: int) -> Tensor:
        return ((self._words(stream, elements, draw) >> 9).float() + 0.5) * 2.0**-23

    def _normals(self, stream: Stream, elements: int, draw: int) -> Tensor:
        if self.positions.device.type == "cpu" and backend.backend_on(self.positions.device) == "native":
            return native.philox_normals(self.seed, self.step, int(stream), draw, self.positions, elements)
        words = self._words(stream, -(-elements // 4) * 4, draw)
        return box_muller(words.unflatten(1, (-1, 2))).flatten(1)[:, :elements]

    def _check(self, draws: range) -> None:
        if not (0 <= self.seed < 2**64 and 0 <= self.step < 2**32):
            raise ValueError(f"Philox: seed {self.seed} or step {self.step} is out of range")
        if draws.step != 1 or not 0 <= draws.start < draws.stop <= 2**16:
            raise ValueError(f"Philox: draws must be some of 0 to 65535, in steps of one, got {draws}")


def box_muller(words: Tensor) -> Tensor:
    """Pairs of words, int64 [..., 2] in [0, 2**32) -> pairs of normals N(0, 1), float32 [..., 2]."""
    pairs = words.double()
    radius = ((pairs[..., 0] + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = pairs[..., 1] * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).float()


def at_step(positions: Tensor, step: int) -> Tensor:
    """Positions int64 [b] of step 0, in [0, 2**32) -> those of `step`, in [0, 2**31)."""
    if not 0 <= step < 2**31:
        raise ValueError(f"Philox: step {step} must be in [0, 2**31)")
    return positions + (step << 32)


@dataclass(frozen=True)
class NoiseKeys:
    """Key of N(0, 1) noise that a kernel draws where it uses it, so that the noise is never stored."""

    philox: Philox
    stream: Stream


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of one epoch: a uniformly random permutation, int64 [length]."""
    words = Philox(seed, epoch, torch.arange(length)).words(Stream.EPOCH_ORDER, (2,))
    # 63 random bits per sample; the stable sort breaks ties by index.
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)
