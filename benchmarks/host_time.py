"""Host time of a micro-batch: what Python, autograd and PyTorch's dispatcher take to start its kernels, without a GPU.

The real code of a training step runs at a recipe's depth with the backends of a GPU, on tensors so small that kernels
take next to no time: one image of four patches, 16 channels, 32 in LPIPS. Launches of Triton kernels go through
Triton's own Python: arguments, specialisation, look-up of the kernel, which the first micro-batch compiles in a minute.
The launch itself is left out, so the results are meaningless.

This is not the host time of a GPU, but the part of it that this code can change, on this machine's CPU. PyTorch's
kernels run on the CPU instead of being launched. The driver's time for each launch, some microseconds, comes on top;
`launches.py` counts the launches. Time is CPU time of the process; compare the least of two runs, or the calls from
Python, which do not depend on the machine.

`--profile N` lists the N functions that take the longest.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import NamedTuple
from unittest import mock

import cross_compile  # first: Triton's kernels are made for the compiler
import torch

from unite_fast import lpips as lpips_module
from unite_fast.config import Config
from unite_fast.data_pipeline import Batch
from unite_fast.errors import UserError
from unite_fast.kernels import backend, matmul
from unite_fast.lpips import LPIPS
from unite_fast.model.unite import UNITE
from unite_fast.recipes import load_config
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep

EXAMPLES = """examples:
  python benchmarks/host_time.py
  python benchmarks/host_time.py --recipe imagenet256_xl --steps 100 --json
  python benchmarks/host_time.py --profile 40
"""
WIDTH, CHANNELS = 16, 32
PARTS = "forward", "backward", "all"
PROFILED = 5


def small(recipe: str, changes: tuple[str, ...] = ()) -> Config:
    """A recipe with its depth and draws, and the least of everything else."""
    model = load_config(recipe, changes).model
    return load_config(
        recipe,
        (
            "model.image_size=16",
            "model.patch_size=8",
            "model.encoder.heads=1",
            f"model.encoder.width={WIDTH}",
            f"model.encoder.in_context_tokens={min(model.encoder.in_context_tokens, 1)}",
            "model.decoder.heads=1",
            f"model.decoder.width={WIDTH}",
            f"model.decoder.mlp_width={WIDTH}",
            f"model.decoder.embed_width={WIDTH}",
            f"model.latent_channels={WIDTH}",
            "train.batch_size=1",
            "train.micro_batch=1",
            *changes,
        ),
    )


@contextmanager
def as_on_a_gpu(arch: int) -> Iterator[None]:
    """CPU tensors run on the backends of a GPU, and Triton launches stop before the launch."""
    import triton

    cross_compile.StandIn.arch = arch
    triton.runtime.driver.set_active(cross_compile.StandIn())
    with ExitStack() as stack:
        why_missing = backend.why_missing
        answer = lambda name: "" if name == "triton" else why_missing(name)  # noqa: E731
        stack.enter_context(mock.patch.object(backend, "why_missing", answer))
        stack.enter_context(mock.patch.object(backend, "_interpreted", True))  # Triton takes CPU tensors
        stack.enter_context(mock.patch.object(matmul, "bfloat16_instructions", lambda: True))
        stack.enter_context(backend.using("triton"))
        stack.enter_context(launches_stop())
        yield


@contextmanager
def launches_stop() -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def prepare(self, *args, grid, warmup, **named):
        return run(self, *args, grid=grid, warmup=True, **named)

    with mock.patch.object(JITFunction, "run", prepare):
        yield


@contextmanager
def thin_lpips(config: Config) -> Iterator[LPIPS | None]:
    """LPIPS with the layers of VGG16 and few channels, if the recipe has LPIPS."""
    if not config.perceptual.weight:
        yield None
        return
    blocks = [
        [(index, min(inputs, CHANNELS), CHANNELS) for index, inputs, _ in block] for block in lpips_module.VGG_BLOCKS
    ]
    taps = (CHANNELS,) * len(blocks)
    with mock.patch.multiple(lpips_module, VGG_BLOCKS=blocks, _TAP_CHANNELS=taps):
        vgg = {}
        for index, inputs, outputs in (layer for block in blocks for layer in block):
            vgg[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3)
            vgg[f"features.{index}.bias"] = torch.zeros(outputs)
        linear = {name: torch.ones(1, CHANNELS, 1, 1) for name in lpips_module.LINEAR_SHAPES}
        yield LPIPS(vgg, linear, config.perceptual.input_range)


class HostClock:
    """CPU time of this process, by part; other programs on the machine hardly change it. Stands for `StepClock`."""

    def __init__(self) -> None:
        self.seconds = Counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start


class Measured(NamedTuple):
    times: dict[str, list[float]]
    """Milliseconds of each micro-batch, by part; "all" includes draws and what lies between the parts."""
    profile: cProfile.Profile
    """Of PROFILED micro-batches after those."""

    @property
    def calls(self) -> int:
        """Calls of Python functions, and of C functions from Python, in a micro-batch."""
        return pstats.Stats(self.profile).total_calls // PROFILED


def measure(config: Config, steps: int, arch: int) -> Measured:
    times, profile = {part: [] for part in PARTS}, cProfile.Profile(time.process_time)
    with as_on_a_gpu(arch), thin_lpips(config) as lpips:
        state = TrainState(UNITE.create(config.model, seed=0), config)
        side = config.model.image_size
        batch = Batch(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), [])

        def micro_batch(run: Callable[[Callable, Batch], object] = lambda step, batch: step(batch)) -> Counter:
            clock = HostClock()
            step = TrainStep(state, config, lpips=lpips, clock=clock)
            with clock.measure("all"):
                run(step.accumulate, batch)
            state.model.zero_grad(set_to_none=True)
            return clock.seconds

        for _ in range(2):  # compile kernels, fill caches
            micro_batch()
        for _ in range(steps):
            seconds = micro_batch()
            for part in PARTS:
                times[part].append(1e3 * seconds[part])
        for _ in range(PROFILED):
            micro_batch(profile.runcall)
    return Measured(times, profile)


def add_us() -> float:
    """Microseconds of a torch.add of 16 numbers on this machine, to compare it with others."""
    x = torch.zeros(16)
    return 1e6 * min(timeit.repeat(lambda: torch.add(x, 1), timer=time.process_time, number=1000, repeat=20)) / 1000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="imagenet256_b", help="[imagenet256_b]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe setting")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="micro-batches to time [50]")
    parser.add_argument("--arch", type=int, default=90, choices=cross_compile.ARCHS, help="of the Triton kernels [90]")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also list the N slowest functions")
    parser.add_argument("--json", action="store_true", help="print all times instead of the table")
    options = parser.parse_args()
    try:
        config = small(options.recipe, tuple(options.set))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    measured = measure(config, options.steps, options.arch)
    if options.json:
        print(json.dumps({"calls": measured.calls, "add_us": add_us(), "ms": measured.times}, indent=1))
        return 0
    print(f"CPU time of the host for a micro-batch, ms, of {options.steps}; a torch.add takes {add_us():.1f} us here")
    print(f"{'part':12}{'least':>8}{'median':>8}")
    for part, each in measured.times.items():
        print(f"{part:12}{min(each):8.1f}{median(each):8.1f}")
    print(f"{measured.calls} calls from Python a micro-batch")
    if options.profile:
        pstats.Stats(measured.profile).sort_stats("tottime").print_stats(options.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
