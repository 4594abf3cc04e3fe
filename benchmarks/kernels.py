"""How long the ops of `unite_fast.kernels` take, beside plain PyTorch (`eager`) and the same under torch.compile.

All bodies of a case run in one process on the same numbers, a round of each in turn. A round is the forward pass on
each of several copies of the inputs, then the backward pass on each: together the copies are larger than the cache,
and the backward pass finds as little there as in a training step. `both` is their sum. A forward pass keeps what its
backward pass needs, and making room for results is part of the time, as it is in training. The eager and the compiled
noise_injection take their random words from C++ or, on a CUDA device, from PyTorch.

The share is that of the bandwidth of a large copy on the same threads, by the bytes that the op must move (traffic.py),
whatever the body moves beyond them. latents are those of 3 flow draws, 256 tokens of 32 channels.

On a CUDA device the clock is that of CUDA events; each round begins behind a long wait, so that the host is ahead. No
machine with such a device has run this yet.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import traffic
from torch import Tensor

from unite_fast import kernels
from unite_fast.flow import MIN_TIME_LEFT
from unite_fast.kernels import backend
from unite_fast.randomness import Philox, Stream

EXAMPLES = """examples:
  python benchmarks/kernels.py
  python benchmarks/kernels.py --op swiglu --op qk_norm_rope --shape 2x288x768 --threads 1
  python benchmarks/kernels.py --device cuda --shape 64x544x768 --json > kernels.json
  python benchmarks/kernels.py --block
"""

SEQUENCE_OPS = ("adaln_modulate", "gated_residual_adaln", "gated_residual_norm_adaln", "qk_norm_rope", "swiglu")
LATENT_OPS = ("noise_injection", "flow_loss")
SHAPES = {"cpu": "8x544x384", "cuda": "64x544x768"}
HEAD_DIM = 64
DRAWS, LATENT_TOKENS, CHANNELS = 3, 256, 32
ROTATED = 2**27
"""Bytes of all copies of a case, at least. The caches of the machines meant here hold 32 to 60 MB."""
COPIED = 2**28
"""Bytes of the tensor that measures the bandwidth."""
WARM_UP = 0.5
"""Seconds for each body, after its first round, which may compile."""
WAYS = ("forward", "backward", "both")


class Case(NamedTuple):
    """An op at a shape, in types."""

    op: str
    shape: str
    dtypes: str
    bytes: traffic.Traffic
    draw: Callable[[], tuple]
    """New arguments of the op; those that need a gradient have requires_grad."""
    options: dict

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {self.dtypes}"

    def bodies(self, device: torch.device, compiled: bool = True) -> dict[str, tuple[Callable, str]]:
        """By name: what to call, and the setting of `backend` in which to call it; `compiled` among them or not."""
        module = importlib.import_module(f"unite_fast.kernels.{self.op}")
        reference = partial(getattr(module, f"{self.op}_ref"), **self.options)
        ours = "triton" if device.type == "cuda" else "native"
        found = {"eager": (reference, "reference")}
        if compiled:
            found["compiled"] = torch.compile(reference, dynamic=False), "reference"
        return found | {ours: (partial(getattr(kernels, self.op), **self.options), ours)}


class Copy(NamedTuple):
    """One set of the numbers that a case works on."""

    arguments: tuple
    leaves: list[Tensor]
    """Those of the arguments that get a gradient."""
    incoming: list[Tensor]
    """The gradient of each result."""


def cases(ops: list[str], shapes: list[tuple[int, int, int]], device: torch.device) -> Iterator[Case]:
    for op in ops:
        for shape in shapes:
            if op in LATENT_OPS:
                yield latent_case(op, shape[0], device)
                continue
            for residual in (torch.float32, torch.bfloat16) if "adaln" in op else (torch.bfloat16,):
                yield sequence_case(op, *shape, residual, device)


def sequence_case(op: str, b: int, t: int, d: int, residual: torch.dtype, device: torch.device) -> Case:
    """bfloat16 but for the residual, weights and tables."""
    other = torch.bfloat16
    sizes = traffic.Sizes(b, t, d, heads=d // HEAD_DIM, hidden=8 * d // 3, residual=residual, other=other)

    def draw() -> tuple:
        rows, number = partial(leaf, device, b, t), partial(leaf, device)
        # Modulation is one product for all of a block's vectors, so each is a view of it.
        shift, scale, gate = (x.detach().requires_grad_() for x in number(b, 3 * d, dtype=other).chunk(3, dim=-1))
        adaln = number(d), shift, scale
        if op == "adaln_modulate":
            return rows(d, dtype=residual), *adaln
        if op == "gated_residual_adaln":
            return rows(d, dtype=residual), rows(d, dtype=other), gate, *adaln
        if op == "gated_residual_norm_adaln":
            return rows(d, dtype=residual), rows(d, dtype=other), gate, number(d), *adaln
        if op == "qk_norm_rope":
            angle = number(t, HEAD_DIM // 2).detach()
            norms = number(HEAD_DIM), number(HEAD_DIM)
            return rows(3 * d, dtype=other), sizes.heads, *norms, angle.cos(), angle.sin()
        return (rows(2 * sizes.hidden, dtype=other),)

    modulates = "adaln" in op
    dtypes = f"{name(residual)} residual, {name(other)}" if modulates and residual != other else name(other)
    options = {"out_dtype": other} if modulates else {}
    return Case(op, f"{b}x{t}x{d}", dtypes, getattr(traffic, op)(sizes), draw, options)


def latent_case(op: str, b: int, device: torch.device) -> Case:
    sizes = traffic.Latents(DRAWS, b, LATENT_TOKENS, CHANNELS, torch.bfloat16)
    philox = Philox(seed=1, step=2, positions=torch.arange(b, device=device))

    def draw() -> tuple:
        z = leaf(device, b, LATENT_TOKENS, CHANNELS, dtype=sizes.dtype)
        t = torch.rand(DRAWS, b, device=device)
        if op == "noise_injection":
            return z, t, philox, int(Stream.FLOW_NOISE), torch.ones(b, dtype=torch.bool, device=device)
        y = leaf(device, DRAWS, b, LATENT_TOKENS, CHANNELS, dtype=sizes.dtype)
        return y, leaf(device, CHANNELS), leaf(device, CHANNELS), z.detach(), t, MIN_TIME_LEFT

    shape = f"latents {DRAWS}x{b}x{LATENT_TOKENS}x{CHANNELS}"
    return Case(op, shape, name(sizes.dtype), getattr(traffic, op)(sizes), draw, {})


def leaf(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copies(case: Case) -> list[Copy]:
    """So many that all of them together are larger than the cache, and no fewer than three."""
    made, held = [], 0
    while held < ROTATED or len(made) < 3:
        arguments = case.draw()
        leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        if not made:
            results = as_tuple(getattr(kernels, case.op)(*arguments, **case.options))
        incoming = [torch.randn_like(result) for result in results]
        made.append(Copy(arguments, leaves, incoming))
        held += sum(x.nbytes for x in (*leaves, *incoming))
    return made


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def one_round(body: tuple[Callable, str], rotated: list[Copy]) -> tuple[list[float], list[float]]:
    """Milliseconds of the forward and of the backward pass on each copy."""
    call, setting = body
    device = rotated[0].leaves[0].device
    results, marks = [], {"forward": [], "backward": []}
    with backend.using(setting):
        if device.type == "cuda":
            torch.cuda._sleep(40_000_000)
        for copy in rotated:
            start = mark(device)
            results.append(as_tuple(call(*copy.arguments)))
            marks["forward"].append((start, mark(device)))
        for i, copy in enumerate(rotated):
            start = mark(device)
            torch.autograd.grad(results[i], copy.leaves, copy.incoming)
            marks["backward"].append((start, mark(device)))
            # Memory goes back pass by pass, as in training.
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
    case: Case, device: torch.device, seconds: float, compiled: bool = True, warm_up: float = WARM_UP
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of all calls, by body and way."""
    torch.compiler.reset()
    rotated, bodies = copies(case), case.bodies(device, compiled)
    for body in bodies.values():
        one_round(body, rotated[:1])
        until(warm_up, lambda body=body: one_round(body, rotated))
    times = {body: {way: [] for way in WAYS} for body in bodies}

    def each_in_turn() -> None:
        for body, ways in times.items():
            forward, backward = one_round(bodies[body], rotated)
            ways["forward"] += forward
            ways["backward"] += backward
            ways["both"] += map(sum, zip(forward, backward, strict=True))

    until(seconds, each_in_turn)
    return times


def until(seconds: float, work: Callable[[], None]) -> None:
    """Repeat for so long, and twice at least."""
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
    """Lines of the table, a way after the other."""
    found = []
    moved = {**case.bytes._asdict(), "both": sum(case.bytes)}
    for way in WAYS:
        middle = {body: median(ways[way]) for body, ways in times.items()}
        for body, ways in times.items():
            fifths = quantiles(ways[way], n=5)
            row = {
                "op": case.op,
                "shape": case.shape,
                "dtypes": case.dtypes,
                "way": way,
                "body": body,
                "ms_p20": fifths[0],
                "ms_p50": middle[body],
                "ms_p80": fifths[-1],
                "bytes": moved[way],
                "bandwidth_share": moved[way] / (middle[body] * 1e-3) / bandwidth,
                "vs_eager": middle["eager"] / middle[body],
                "vs_compiled": middle["compiled"] / middle[body] if "compiled" in middle else None,
                "calls": len(ways[way]),
            }
            found.append(row | facts)
    return found


def surroundings(device: torch.device, bandwidth: float) -> dict:
    """What a figure depends on besides its case."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of these sources, with `-dirty` where they were changed; None where git does not know them."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() or None


def table(found: list[dict]) -> str:
    header = ["op", "shape", "dtypes", "way", "body", "ms", "p20 - p80", "MB", "share", "vs eager", "vs compiled"]
    lines = [header]
    for row in found:
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
    all_ops, defaults = [*SEQUENCE_OPS, *LATENT_OPS], [f"{device} {shape}" for device, shape in SHAPES.items()]
    parser.add_argument("--op", action="append", choices=all_ops, help="only this op; may be repeated [all]")
    parser.add_argument(
        "--shape", action="append", type=parse_shape, metavar="BxTxD", help=f"may be repeated {defaults}"
    )
    parser.add_argument("--device", default="cpu", choices=SHAPES, help="[cpu]")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring a case, all its bodies together [3]")
    parser.add_argument("--no-compiled", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU [as torch has them]")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    parser.add_argument("--block", action="store_true", help="print the bytes of one encoder block; time nothing")
    options = parser.parse_args()
    if options.block:
        print(traffic.block_report())
        return 0
    device = torch.device(options.device)
    if missing := backend.why_missing("triton" if device.type == "cuda" else "native"):
        parser.error(missing)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    bandwidth = copy_bandwidth(device)
    facts, found = surroundings(device, bandwidth), []
    shapes = options.shape or [parse_shape(SHAPES[options.device])]
    for case in cases(options.op or all_ops, shapes, device):
        print(case.title, file=sys.stderr)
        found += rows(case, measure(case, device, options.seconds, not options.no_compiled), bandwidth, facts)
    print(json.dumps(found, indent=1) if options.json else table(found))
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
