"""Host time of a step of one micro-batch: what Python, autograd and PyTorch's dispatcher take to start its kernels,
without a GPU.

The real code of a training step runs at a recipe's depth with the backends of a GPU, on tensors so small that kernels
take next to no time: one image of four patches, 16 channels, 32 in LPIPS. Launches of Triton kernels go through
Triton's own Python: arguments, specialisation, look-up of the kernel, which the first micro-batch compiles in a minute.
The launch itself is left out, so the results are meaningless.

This is not the host time of a GPU, but the part of it that this code can change, on this machine's CPU. PyTorch's
kernels run on the CPU instead of being launched. The driver's time for each launch, some microseconds, comes on top;
`launches.py` counts the launches. Time is CPU time of the process; compare the least of two runs, or the calls from
Python, which do not depend on the machine.

With `--set train.cuda_graph=true`, a replay of the graph is left out like a launch: what remains are the copies of its
inputs and the optimizers.

With `--ranks N`, FSDP runs as on the first of N GPUs, in a process group whose collectives do nothing.

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
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import median
from typing import NamedTuple
from unittest import mock

import cross_compile  # first: Triton's kernels are made for the compiler
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from unite_fast import lpips as lpips_module
from unite_fast.config import Config
from unite_fast.data_pipeline import Batch
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.kernels import backend, matmul
from unite_fast.lpips import LPIPS
from unite_fast.objective import Losses
from unite_fast.recipes import load_config
from unite_fast.training import cuda_graph
from unite_fast.training.parallelize import build_model
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep

EXAMPLES = """examples:
  python benchmarks/host_time.py
  python benchmarks/host_time.py --set train.cuda_graph=true
  python benchmarks/host_time.py --ranks 8 --set parallel.strategy=fsdp
  python benchmarks/host_time.py --recipe imagenet256_xl --steps 100 --json
  python benchmarks/host_time.py --profile 40
"""
WIDTH, CHANNELS = 16, 32
PARTS = "forward", "backward", "passes", "optimizer"
PROFILED = 5


def small(recipe: str, changes: tuple[str, ...] = (), ranks: int = 1) -> Config:
    """A recipe with its depth and draws, and the least of everything else: an image on each rank."""
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
            "optim.muon_dtype=float32",  # a CPU may take longer for bfloat16 matmuls than a host to launch them
            f"train.batch_size={ranks}",
            "train.micro_batch=1",
            "train.compile=false",
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

    def paused(self) -> nullcontext:
        """A capture runs as usual here."""
        return nullcontext()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start


class EmptyGraph:
    """Stands for `cuda_graph.Recorder`: a replay does nothing."""

    def __init__(self, device: torch.device) -> None:
        pass

    def run(self, function: Callable[[], Losses]) -> Losses:
        return function()

    capture = run

    def replay(self) -> None:
        pass


@contextmanager
def empty_graphs() -> Iterator[None]:
    nothing = lambda self: None  # noqa: E731
    with (
        mock.patch.object(cuda_graph, "Recorder", EmptyGraph),
        mock.patch.object(cuda_graph.GraphedPasses, "check", nothing),
    ):
        yield


class Measured(NamedTuple):
    times: dict[str, list[float]]
    """Milliseconds of each step, by part; "passes" are forward, backward, the draws and what lies between them."""
    profiles: dict[str, cProfile.Profile]
    """Of the passes and of the optimizer, in PROFILED steps after those."""

    def calls(self, part: str) -> int:
        """Calls of Python functions, and of C functions from Python, in a step."""
        return pstats.Stats(self.profiles[part]).total_calls // PROFILED


def make_step(config: Config, ranks: int, lpips: LPIPS | None, clock: HostClock) -> TrainStep:
    """The step of a process alone, or of the first of several ranks, whose collectives do nothing."""
    if ranks > 1:
        distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model, strategy = build_model(config, Ranks(0, ranks, 0, ranks), torch.device("cpu"))
    return TrainStep(TrainState(model, config), config, slice(0, 1), 1, lpips, strategy, clock)


def measure(config: Config, steps: int, arch: int, ranks: int = 1) -> Measured:
    times = {part: [] for part in PARTS}
    profiles = {part: cProfile.Profile(time.process_time) for part in ("passes", "optimizer")}
    with as_on_a_gpu(arch), thin_lpips(config) as lpips, empty_graphs():
        clock = HostClock()
        step = make_step(config, ranks, lpips, clock)
        state = step.state
        side = config.model.image_size
        batch = Batch(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), [])

        def take_step() -> None:
            clock.seconds.clear()
            with clock.measure("passes"):
                step.accumulate(batch)
            with clock.measure("optimizer"):
                state.apply_gradients()

        for _ in range(max(2, cuda_graph.SETTLED)):  # compile kernels, fill caches
            take_step()
        for _ in range(steps):
            take_step()
            for part in PARTS:
                times[part].append(1e3 * clock.seconds[part])
        for _ in range(PROFILED):
            profiles["passes"].runcall(step.accumulate, batch)
            profiles["optimizer"].runcall(state.apply_gradients)
    return Measured(times, profiles)


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
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="GPUs of the machine [1]")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps to time [50]")
    parser.add_argument("--arch", type=int, default=90, choices=cross_compile.ARCHS, help="of the Triton kernels [90]")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also list the N slowest functions")
    parser.add_argument("--json", action="store_true", help="print all times instead of the table")
    options = parser.parse_args()
    try:
        config = small(options.recipe, tuple(options.set), options.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    measured = measure(config, options.steps, options.arch, options.ranks)
    if options.json:
        calls = {part: measured.calls(part) for part in measured.profiles}
        print(json.dumps({"calls": calls, "add_us": add_us(), "ms": measured.times}, indent=1))
        return 0
    print(f"CPU time of the host for a step, ms, of {options.steps}; a torch.add takes {add_us():.1f} us here")
    print(f"{'part':12}{'least':>8}{'median':>8}  calls from Python")
    for part, each in measured.times.items():
        calls = measured.calls(part) if part in measured.profiles else ""
        print(f"{part:12}{min(each):8.1f}{median(each):8.1f}  {calls}")
    if options.profile:
        for profile in measured.profiles.values():
            pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
