"""The precision of attention in a bfloat16 run on a CPU, by measurement.

PyTorch's attention for CPUs can be slower in bfloat16 than in float32 even where matmuls are faster: on a CPU with AMX,
transformer blocks on short sequences took 2.4 to 4 times as long. So the first process of a run times both with the
model's own shapes. All processes use its choice, and so does the run after a resume: the choice changes the last bits.
"""

import time
from collections import Counter

import torch

from unite_fast import kernels
from unite_fast.config import Config
from unite_fast.kernels import backend, matmul
from unite_fast.kernels.attention_backends import ON_CPU
from unite_fast.planning.flops import tokens_per_block

CPU = torch.device("cpu")
SECONDS = 0.3
"""Time after which no further round of the measurement starts."""
ROUNDS = range(3, 20)
"""Rounds: at least the first number, at most the last. The minimum over them leaves out the first, slow calls."""

Shape = tuple[int, int]
"""Tokens, channels of a head."""


def choose(config: Config, saved: str) -> tuple[str, str]:
    """The attention backend of a bfloat16 run on a CPU with `attention=sdpa`.

    Args:
        saved: the backend in the checkpoint from which the run resumes; empty if there is none.

    Returns:
        One of `backend.ATTENTION_NAMES`, and a line about the measurement; empty if nothing was measured. The backend
        is sdpa without bfloat16 instructions, where it means float32 (kernels/matmul.py), and without native kernels.
    """
    if backend.backend_on(CPU) != "native" or not matmul.bfloat16_instructions():
        return "sdpa", ""
    if saved in ON_CPU:
        return saved, ""
    if config.train.deterministic:
        return "sdpa_bfloat16", ""
    times = measure(attention_shapes(config))
    fast, slow = sorted(times, key=lambda name: times[name])
    ratio = times[slow] / times[fast]
    return (
        fast,
        f"{fast} is {ratio:.2f} times as fast as {slow} here; attention={fast} keeps it in other runs",
    )


def attention_shapes(config: Config) -> Counter[Shape]:
    """How often a training image goes through attention of each shape."""
    model, counts = config.model, Counter()
    for with_image, passes in ((True, 1), (False, config.objective.flow_draws)):
        for tokens, _ in tokens_per_block(model, with_image):
            counts[tokens, model.encoder.width // model.encoder.heads] += passes
    counts[model.latent_tokens + 1, model.decoder.width // model.decoder.heads] += model.decoder.depth
    return counts


def measure(shapes: Counter[Shape]) -> dict[str, float]:
    """Seconds of attention, forward and backward, by backend: all passes of an image, one head each.

    PyTorch divides the heads of a batch among its threads. One head in one thread has the same ratio, and threads that
    wait for each other on a busy machine do not disturb it.
    """
    best = dict.fromkeys(((shape, name) for shape in shapes for name in ON_CPU), float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        for number in range(ROUNDS.stop):
            if number >= ROUNDS.start and time.perf_counter() - start > SECONDS:
                break
            # Interleaved, so that a busy moment of the machine meets both.
            for shape, name in best:
                best[shape, name] = min(best[shape, name], seconds(shape, name))
    finally:
        torch.set_num_threads(threads)
        backend.use_attention("sdpa", CPU)
    return {name: sum(passes * best[shape, name] for shape, passes in shapes.items()) for name in ON_CPU}


def seconds(shape: Shape, name: str) -> float:
    """Seconds of attention of this shape, forward and backward, once."""
    tokens, width = shape
    backend.use_attention(name, CPU, head_widths=())
    qkv = torch.ones(1, tokens, 3 * width, dtype=torch.bfloat16, requires_grad=True)
    start = time.perf_counter()
    out = kernels.attention(qkv, heads=1)
    out.backward(out.detach())
    return time.perf_counter() - start
