"""Host time of a micro-batch: what Python, autograd and PyTorch's dispatcher take to start its kernels, without a GPU.

The real code of a training step runs at a recipe's depth with the backends of a GPU, but with tensors so small that
kernels take next to no time: one image of four patches, 16 channels, 32 in LPIPS. Launches of Triton
kernels go through Triton's own Python, up to the launch itself: arguments, specialisation, look-up of the compiled
kernel (compiled for `--arch` first, which takes a minute once). They start nothing, so the numbers are meaningless.

It is not a GPU's host time, but a part of it that changes with this code. PyTorch's kernels run on the CPU instead of
being launched. The CUDA driver's time is missing: 2 to 4 us for each of the launches that `launches.py` counts. The
host's clock also differs from that of this machine.

`--profile N` lists the N Python functions that take the longest.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median, quantiles
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
PARTS = "forward", "backward"


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


def measure(config: Config, steps: int, arch: int, profile: cProfile.Profile | None = None) -> dict[str, list[float]]:
    """Milliseconds of a micro-batch in each step, by part; "all" includes draws and what lies between the parts."""
    with as_on_a_gpu(arch), thin_lpips(config) as lpips:
        state = TrainState(UNITE.create(config.model, seed=0), config)
        side = config.model.image_size
        batch = Batch(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), [])
        times = {part: [] for part in (*PARTS, "all")}
        for number in range(-2, steps):  # the first compile kernels and create streams
            clock = HostClock()
            step = TrainStep(state, config, lpips=lpips, clock=clock)
            if profile and number >= 0:
                profile.enable()
            with clock.measure("all"):
                step.accumulate(batch)
            if profile:
                profile.disable()
            state.model.zero_grad(set_to_none=True)
            if number >= 0:
                for part, each in times.items():
                    each.append(1e3 * clock.seconds[part])
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="imagenet256_b", help="[imagenet256_b]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe setting")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="micro-batches to time [50]")
    parser.add_argument("--arch", type=int, default=90, choices=cross_compile.ARCHS, help="of the Triton kernels [90]")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also list N functions; slows all down")
    parser.add_argument("--json", action="store_true", help="print all times instead of the table")
    options = parser.parse_args()
    try:
        config = small(options.recipe, tuple(options.set))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    profile = cProfile.Profile(time.process_time) if options.profile else None
    times = measure(config, options.steps, options.arch, profile)
    if options.json:
        print(json.dumps(times, indent=1))
        return 0
    print(f"host time of a micro-batch, ms, median (20 % to 80 %) of {options.steps}; one thread, no GPU")
    for part, each in times.items():
        fifths = quantiles(each, n=5)
        print(f"{part:12}{median(each):8.2f}  ({fifths[0]:.2f} to {fifths[-1]:.2f})")
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
