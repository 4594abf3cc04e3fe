"""One training step, whole: fast bodies against reference bodies, and what a step costs that is the same everywhere.

Counted, at a real step: bytes that autograd keeps for the backward pass (saved-tensor hooks; parameters and buffers
left out, each storage once), and operators and their bytes, inputs plus outputs (dispatch mode; views, detach and empty
tensors left out). Operators of ours count as one. What moves inside those that hold several passes is not in these
figures; docs/performance.md has it.

Timed: variants take turns, one step each, in one process; medians. `matmul_share` is the FLOPs of the step over its
time and over the rate at which this device multiplies bfloat16 matrices, as a Linear does. A CPU without bfloat16
instructions multiplies them in float32 in the fast step (kernels/product.py), which is why its share can pass 1; the
share of the float32 rate is beside it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unite_fast.config import Config
from unite_fast.kernels import backend
from unite_fast.model.unite import UNITE
from unite_fast.objective import draw_step, flow_losses, reconstruct
from unite_fast.randomness import Philox
from unite_fast.recipes import from_tree
from unite_fast.training.parallel import compile_blocks
from unite_fast.training.state import TrainState

EXAMPLES = """examples:
  python benchmarks/step.py --size bench                 # 2 cores: a quarter of an hour, most of it the reference
  python benchmarks/step.py --size bench --count-only    # what is the same on every machine
  python benchmarks/step.py --size tiny --repeats 5 --json
  python benchmarks/step.py --size B --batch 32 --compile
"""

SMALL = {"width": 384, "depth": 6, "heads": 6}
SIZES = {
    "tiny": {
        "image_size": 64,
        "encoder": {"width": 128, "depth": 4, "heads": 2, "in_context_tokens": 8, "in_context_start": 1},
        "decoder": {"width": 128, "depth": 2, "heads": 2, "mlp_width": 512},
    },
    "bench": {"encoder": SMALL, "decoder": SMALL | {"mlp_width": 1536}},
    "B": {"encoder": {"preset": "B"}, "decoder": {"preset": "B"}},
    "L": {"encoder": {"preset": "L"}, "decoder": {"preset": "B"}},
    "XL": {"encoder": {"preset": "XL"}, "decoder": {"preset": "B"}},
}
FREE = {
    "detach",
    "_unsafe_view",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "_local_scalar_dense",
}
"""Operators that move nothing, beside views."""


class Step:
    """A model, its optimizers and one batch, on which steps are taken again and again."""

    def __init__(self, size: str, batch: int, device: torch.device, body: str, precision: str, compiled: bool):
        tree = {"model": SIZES[size], "train": {"batch_size": batch}, "perceptual": {"weight": 0.0}}
        self.config, self.batch, self.device = from_tree(Config, tree), batch, device
        self.body, self.precision = body, getattr(torch, precision)
        model = UNITE.create(self.config.model, seed=0).to(device)
        if compiled:
            compile_blocks(model)
        self.state = TrainState(model, self.config)
        generator = torch.Generator().manual_seed(0)
        side = self.config.model.image_size
        self.images = torch.rand(batch, 3, side, side, generator=generator).to(device)
        self.labels = torch.randint(self.config.model.num_classes, (batch,), generator=generator).to(device)

    def loss(self) -> Tensor:
        philox = Philox(0, self.state.step, torch.arange(self.batch, device=self.device))
        latents = self.config.model.latent_tokens, self.config.model.latent_channels
        draws = draw_step(self.config.objective, philox, latents)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            found = reconstruct(self.state.model, self.images, draws, self.config)
            return found.loss + flow_losses(self.state.model, found.z, self.labels, draws)

    def __call__(self) -> None:
        with backend.using(self.body):
            self.loss().backward()
            self.state.apply_gradients()

    def saved_bytes(self) -> int:
        """Bytes that one forward pass keeps for the backward pass."""
        model, found = self.state.model, {}
        own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage  # held, so that its address is not given to another
            return x

        with backend.using(self.body), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = self.loss()
        size = sum(storage.nbytes() for storage in found.values())
        del loss
        return size

    def traffic(self) -> tuple[int, int]:
        """Operators of one step, and the bytes of their inputs and outputs."""
        with Traffic() as traffic:
            self()
        return traffic.ops, traffic.bytes

    def flops(self) -> int:
        """Of the matrix products and attention of one step; the counter sees those of the reference bodies."""
        before = self.body, self.precision
        self.body, self.precision = "reference", torch.float32
        with backend.using(self.body), FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.state.model.zero_grad(set_to_none=True)
        self.body, self.precision = before
        return counter.get_total_flops()

    def warm_optimizers(self) -> None:
        """They make their state in the first step."""
        for parameter in self.state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.state.apply_gradients()


class Traffic(TorchDispatchMode):
    """Counts operators and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.ops = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not (function.is_view or function.overloadpacket.__name__ in FREE):
            self.ops += 1
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(lambda: torch.nn.functional.linear(a, b), device))
    return 2 * side**3 / best


def timed(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def variants(options: argparse.Namespace, device: torch.device) -> dict[str, Step]:
    """What takes turns, by name. The float32 ones tell what the bodies bring apart from the precision of products."""
    fast = "triton" if device.type == "cuda" else "native"
    made = {fast: (fast, "bfloat16", False), "reference": ("reference", "bfloat16", False)}
    if not options.short:
        made |= {f"{fast} float32": (fast, "float32", False), "reference float32": ("reference", "float32", False)}
    if options.compile:
        made |= {f"{fast} compiled": (fast, "bfloat16", True), "reference compiled": ("reference", "bfloat16", True)}
    return {
        name: Step(options.size, options.batch, device, body, precision, compiled)
        for name, (body, precision, compiled) in made.items()
    }


def count(step: Step) -> dict:
    step.warm_optimizers()
    ops, moved = step.traffic()
    return {
        "saved_activation_mb_per_image": step.saved_bytes() / step.batch / 1e6,
        "moved_mb_per_image": moved / step.batch / 1e6,
        "ops_per_step": ops,
    }


def measure(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    steps = variants(options, device)
    fast, reference = list(steps)[:2]
    rows = {name: count(steps[name]) for name in (fast, reference)}
    flops = steps[fast].flops()
    shared = {
        "size": options.size,
        "batch": options.batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gflop_per_image": flops / options.batch / 1e9,
    }
    if not options.count_only:
        rates = {dtype: product_rate(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
        shared |= {f"{str(dtype).removeprefix('torch.')}_gflop_per_s": rate / 1e9 for dtype, rate in rates.items()}
        for name, seconds in take_turns(steps, set(rows), options.repeats, device).items():
            rows[name] = rows.get(name, {}) | {
                "seconds": seconds,
                "images_per_s": options.batch / seconds,
                "matmul_share": flops / seconds / rates[torch.bfloat16],
                "float32_matmul_share": flops / seconds / rates[torch.float32],
            }
        for row in rows.values():
            row["speedup_vs_reference"] = rows[reference]["seconds"] / row["seconds"]
    others = {name: row for name, row in rows.items() if name != fast}
    return {"fast": fast, **shared, **rows[fast], "reference": others.pop(reference), "others": others}


def take_turns(steps: dict[str, Step], counted: set[str], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step of each; those that were counted have done one already."""
    for name, step in steps.items():
        if name not in counted:
            step()
    times = {name: [] for name in steps}
    for turn in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, device))
            print(f"turn {turn + 1}/{repeats}: {name} {times[name][-1]:.2f} s", file=sys.stderr)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(found: dict) -> str:
    rows = {found["fast"]: found, "reference": found["reference"], **found["others"]}
    columns = {
        "saved_activation_mb_per_image": ("saved MB/image", "{:.1f}"),
        "moved_mb_per_image": ("moved MB/image", "{:.0f}"),
        "ops_per_step": ("ops/step", "{}"),
        "images_per_s": ("images/s", "{:.3f}"),
        "speedup_vs_reference": ("vs reference", "{:.2f}x"),
        "matmul_share": ("of bf16 rate", "{:.0%}"),
        "float32_matmul_share": ("of f32 rate", "{:.0%}"),
    }
    lines = [["", *(title for title, _ in columns.values())]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) if key in row else "" for key, (_, form) in columns.items())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = [f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()]
    head = [
        word for word in head if word.split()[0] in ("size", "batch", "device", "threads", "torch") or "gflop" in word
    ]
    return "\n".join([", ".join(head), *("  ".join(map(str.rjust, line, widths)) for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="bench", help="encoder, decoder and image size [bench]")
    parser.add_argument("--batch", type=int, default=8, help="images a step [8]")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each variant [2]")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU [torch's choice]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="both bodies with compiled blocks too: minutes on a CPU")
    parser.add_argument("--short", action="store_true", help="leave the float32 variants out")
    parser.add_argument("--count-only", action="store_true", help="no times: only what is the same on every machine")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found, indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
