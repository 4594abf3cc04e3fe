"""Time of each op of `unite_fast.kernels`, next to plain PyTorch (`eager`) and the same under torch.compile.

All backends of a case run in one process on the same numbers, a round of each in turn. A round is the forward pass on
each of several copies of the inputs, then the backward pass on each. Together the copies exceed the cache, so backward
finds as little of its data there as in a training step. `both` is the sum of the two. As in training, a forward pass
saves what backward needs, and the times include allocations. The eager and the compiled noise_injection take their
random words from C++ or, on a CUDA device, from PyTorch.

The share is that of the bandwidth of a large copy on the same threads. It counts the bytes that the op must move
(traffic.py), even if a backend moves more. Latents are of 3 flow draws, with 256 tokens of 32 channels.

On a CUDA device, CUDA events take the time, and each round is queued behind a long wait, so that launch overhead is
not measured. This has not been run on a CUDA device yet.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import traffic
from torch import Tensor

from unite_fast.benchmarking import machine
from unite_fast.errors import UserError
from unite_fast.kernels import backend, measured, registry
from unite_fast.kernels.fused_op import as_tuple
from unite_fast.randomness import Philox

EXAMPLES = """examples:
  python benchmarks/kernels.py
  python benchmarks/kernels.py --op swiglu --op qk_norm_rope --shape 2x288x768 --threads 1
  python benchmarks/kernels.py --device cuda --shape 64x544x768 --json > kernels.json
  python benchmarks/kernels.py --block
  python benchmarks/kernels.py --record kernels.json   # add a GPU's times to the table that kernels=auto reads
"""

OPS = {name: op for part in ("block", "latents") for name, op in registry.OPS.items() if op.part == part}
SHAPES = {"cpu": "8x544x384", "cuda": "64x544x768"}
HEAD_DIM = 64
LATENT_TOKENS, CHANNELS = 256, 32
ROTATED = 2**27
"""Minimum bytes of all copies of a case together. The caches of the target machines hold 32 to 60 MB."""
COPIED = 2**28
"""Bytes of the tensor that measures the bandwidth."""
WARM_UP = 0.5
"""Seconds for each backend, after its first round, which may compile."""
WAYS = ("forward", "backward", "both")


class Case(NamedTuple):
    """An op at a size."""

    op: registry.Op
    size: registry.Size
    shape: str
    dtypes: str
    device: torch.device

    @property
    def title(self) -> str:
        return f"{self.op.name} {self.shape} {self.dtypes}"

    @property
    def bytes(self) -> traffic.Traffic:
        return traffic.op_traffic(self.op, self.size)

    def draw(self) -> dict:
        """New arguments of the op; those that get a gradient require it."""
        example = self.op.example(self.size, partial(normal, self.device))
        if "philox" in example:
            example["philox"] = Philox(*example["philox"])
        return example | {name: example[name].detach().requires_grad_() for name in self.op.gradients}

    def backends(self, compiled: bool = True) -> dict[str, tuple[Callable, str]]:
        """By name: the function to call, and the setting of `backend` for the call."""
        ours = "triton" if self.device.type == "cuda" else "native"
        calls = {"eager": (self.op.reference, "reference")}
        if compiled:
            calls["compiled"] = torch.compile(self.op.reference, dynamic=False), "reference"
        return calls | {ours: (self.op.function, ours)}


class Copy(NamedTuple):
    """One set of a case's inputs."""

    arguments: dict
    leaves: list[Tensor]
    """The arguments that get a gradient."""
    incoming: list[Tensor]
    """The gradient of each result."""


def cases(names: Iterable[str], shapes: list[tuple[int, int, int]], device: torch.device) -> Iterator[Case]:
    """The ops at these shapes [B, T, D], in bfloat16 but for the residual, weights and tables. Ops on latents use only
    B of a shape."""
    half = torch.bfloat16
    for op in map(OPS.get, names):
        for b, t, d in shapes:
            if op.part == "latents":
                size = registry.Size(b, LATENT_TOKENS, CHANNELS, residual=half)
                shape = f"latents {size.draws}x{b}x{LATENT_TOKENS}x{CHANNELS}"
                yield Case(op, size, shape, name(half), device)
                continue
            for residual in traffic.residual_dtypes(op):
                size = registry.Size(b, t, d, d // HEAD_DIM, HEAD_DIM, hidden=8 * d // 3, residual=residual)
                dtypes = name(half) if residual == half else f"{name(residual)} residual, {name(half)}"
                yield Case(op, size, f"{b}x{t}x{d}", dtypes, device)


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, around: float = 0.0) -> Tensor:
    return (around + torch.randn(shape, device=device)).to(dtype)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copies(case: Case) -> list[Copy]:
    """At least three copies of a case's inputs, and enough to exceed the cache together."""
    rotated, size = [], 0
    while size < ROTATED or len(rotated) < 3:
        arguments = case.draw()
        leaves = [arguments[name] for name in case.op.gradients]
        if not rotated:
            results = as_tuple(case.op.function(**arguments))
        incoming = [torch.randn_like(result) for result in results]
        rotated.append(Copy(arguments, leaves, incoming))
        size += sum(x.nbytes for x in (*leaves, *incoming))
    return rotated


def one_round(call: Callable, setting: str, rotated: list[Copy]) -> tuple[list[float], list[float]]:
    """Milliseconds of the forward and of the backward pass on each copy."""
    device = rotated[0].leaves[0].device
    results, marks = [], {"forward": [], "backward": []}
    with backend.using(setting):
        if device.type == "cuda":
            torch.cuda._sleep(40_000_000)
        for copy in rotated:
            start = mark(device)
            results.append(as_tuple(call(**copy.arguments)))
            marks["forward"].append((start, mark(device)))
        for i, copy in enumerate(rotated):
            start = mark(device)
            torch.autograd.grad(results[i], copy.leaves, copy.incoming)
            marks["backward"].append((start, mark(device)))
            # Free each result after its backward pass, as in training.
            results[i] = None
    return tuple([milliseconds(*pair) for pair in marks[way]] for way in ("forward", "backward"))


def mark(device: torch.device) -> float | torch.cuda.Event:
    """This moment on the device."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def measure(
    case: Case, seconds: float, compiled: bool = True, warm_up: float = WARM_UP
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of all calls, by backend and way."""
    torch.compiler.reset()
    rotated, backends = copies(case), case.backends(compiled)
    for call, setting in backends.values():
        one_round(call, setting, rotated[:1])
        until(warm_up, partial(one_round, call, setting, rotated))
    times = {backend_name: {way: [] for way in WAYS} for backend_name in backends}

    def each_in_turn() -> None:
        for backend_name, ways in times.items():
            forward, backward = one_round(*backends[backend_name], rotated)
            ways["forward"] += forward
            ways["backward"] += backward
            ways["both"] += map(sum, zip(forward, backward, strict=True))

    until(seconds, each_in_turn)
    return times


def until(seconds: float, work: Callable[[], object]) -> None:
    """Call `work` repeatedly for `seconds`, at least twice."""
    end, done = time.perf_counter() + seconds, 0
    while done < 2 or time.perf_counter() < end:
        work()
        done += 1


def copy_bandwidth(device: torch.device, seconds: float = 2.0) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target, times = torch.zeros_like(source), []

    def copy() -> None:
        start = mark(device)
        target.copy_(source)
        times.append(milliseconds(start, mark(device)))

    until(seconds, copy)
    return 2 * COPIED / (median(times) * 1e-3)


def rows(case: Case, times: dict[str, dict[str, list[float]]], bandwidth: float, facts: dict) -> list[dict]:
    """Rows of the table: all backends forward, then backward, then both."""
    measured = []
    moved = {**case.bytes._asdict(), "both": sum(case.bytes)}
    for way in WAYS:
        middle = {backend_name: median(ways[way]) for backend_name, ways in times.items()}
        for backend_name, ways in times.items():
            fifths = quantiles(ways[way], n=5)
            row = {
                "op": case.op.name,
                "shape": case.shape,
                "dtypes": case.dtypes,
                "way": way,
                "backend": backend_name,
                "ms_p20": fifths[0],
                "ms_p50": middle[backend_name],
                "ms_p80": fifths[-1],
                "bytes": moved[way],
                "bandwidth_share": moved[way] / (middle[backend_name] * 1e-3) / bandwidth,
                "vs_eager": middle["eager"] / middle[backend_name],
                "vs_compiled": middle["compiled"] / middle[backend_name] if "compiled" in middle else None,
                "calls": len(ways[way]),
            }
            measured.append(row | facts)
    return measured


def surroundings(device: torch.device, bandwidth: float) -> dict:
    """The machine, and how fast it copies."""
    return machine.describe(device) | {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
    }


def table(measured: list[dict]) -> str:
    header = ["op", "shape", "dtypes", "way", "backend", "ms", "p20 - p80", "MB", "share", "vs eager", "vs compiled"]
    lines = [header]
    for row in measured:
        spread = f"{row['ms_p20']:.3f} - {row['ms_p80']:.3f}"
        case = (row[column] for column in header[:5])
        figures = f"{row['ms_p50']:.3f}", spread, f"{row['bytes'] / 1e6:.1f}", f"{row['bandwidth_share']:.0%}"
        vs_compiled = "" if row["vs_compiled"] is None else f"{row['vs_compiled']:.2f}"
        lines.append([*case, *figures, f"{row['vs_eager']:.2f}", vs_compiled])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def parse_shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes) or int(sizes[2]) % HEAD_DIM:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 8x544x384, with a width that {HEAD_DIM} divides")
    return tuple(map(int, sizes))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = [f"{device} {shape}" for device, shape in SHAPES.items()]
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated [all]")
    parser.add_argument(
        "--shape", action="append", type=parse_shape, metavar="BxTxD", help=f"may be repeated {defaults}"
    )
    parser.add_argument("--device", default="cpu", choices=SHAPES, help="[cpu]")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per case, all backends together [3]")
    parser.add_argument("--no-compiled", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads [torch's default]")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    parser.add_argument("--block", action="store_true", help="print the bytes of a block and of a step; time nothing")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help=f"add what --json wrote to {measured.FILE.name}; time nothing"
    )
    options = parser.parse_args()
    if options.record:
        try:
            rows_added = measured.record(options.record)
        except UserError as error:
            parser.error(str(error))
        print(f"{len(rows_added)} rows added to {measured.FILE}")
        return 0
    if options.block:
        print(f"{traffic.block_report()}\n\n{traffic.step_report()}")
        return 0
    device = torch.device(options.device)
    if missing := backend.why_missing("triton" if device.type == "cuda" else "native"):
        parser.error(missing)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    bandwidth = copy_bandwidth(device)
    facts, results = surroundings(device, bandwidth), []
    shapes = options.shape or [parse_shape(SHAPES[options.device])]
    for case in cases(options.op or OPS, shapes, device):
        print(case.title, file=sys.stderr)
        results += rows(case, measure(case, options.seconds, not options.no_compiled), bandwidth, facts)
    print(json.dumps(results, indent=1) if options.json else table(results))
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
