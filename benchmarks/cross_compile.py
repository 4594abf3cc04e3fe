"""Compile every Triton kernel without a GPU, at the shapes of UNITE-B, L and XL, and list registers, spills, shared
memory, width of global accesses, occupancy, barriers per row and bytes in flight.

The launchers of kernels/triton_kernels run on tensors without memory while a stand-in for the CUDA driver names the
target, and Triton compiles each launch as it would on that GPU (types, constants, strides, alignment) and starts
nothing. Registers and spills are ptxas' own, read by the cuobjdump that comes with Triton. Nothing is timed.

A turn is that of the kernel's loop over rows or tiles, in the machine code (machine_code.py). KB in flight are what all
programs on a multiprocessor load in one turn; an H100 needs 15 at all times, at 3.35 TB/s and a latency of 600 ns
(Little's law). "ahead": the loads of a later turn are in flight during a turn. Waves are the programs of a launch over
those that all multiprocessors of an H100 (132) hold at once.
"""

import os

# Kernels are made for the interpreter or for the compiler when they are imported.
os.environ.pop("TRITON_INTERPRET", None)

import argparse
import importlib
import json
import math
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import machine_code
import torch
from traffic import residual_dtypes

from unite_fast.kernels.registry import OPS, Op, Size, empty
from unite_fast.lpips import tap_shapes

BATCH = 64
TOKENS = (544, 288)
"""Tokens of the tokenizer pass and of a flow draw, in-context tokens included."""
DRAWS, LATENT = 3, (256, 32)
SIZES = {
    "B": Size(BATCH, TOKENS[0], 768, heads=12, head_dim=64, hidden=2048),
    "L": Size(BATCH, TOKENS[0], 1024, heads=16, head_dim=64, hidden=2752),
    "XL": Size(BATCH, TOKENS[0], 1152, heads=16, head_dim=72, hidden=3072),
}
"""Encoder blocks; hidden widths are padded as the model pads them."""
DECODERS = {"S": 384, "B": 768, "L": 1024}
"""Widths of the decoder, for the kernels of its norms."""
LARGE = 0.1
"""A tensor of less than this share of a kernel's largest is statistics, weights or partial sums, not real traffic."""
FLOAT8_KERNEL, FLOAT8_ARCH = "_quantise_kernel", 89
"""Older GPUs have no float8."""
IN_TABLE, TABLE_TENSORS = -1, "tensors of the table"
"""Stands for the number and the name of a parameter, where a kernel reads an address from a table on the device."""

EXAMPLES = """examples:
  python benchmarks/cross_compile.py
  python benchmarks/cross_compile.py --arch 90 --kernel swiglu
  python benchmarks/cross_compile.py --arch 90 --arch 100 --json > kernels.json
"""


@dataclass(frozen=True)
class Arch:
    """Limits of a streaming multiprocessor; CUDA C++ programming guide, table of compute capabilities."""

    warps: int
    blocks: int
    shared: int
    """Bytes of shared memory. The system takes 1024 of them for each block."""


ARCHS = {
    80: Arch(64, 32, 164 * 1024),
    90: Arch(64, 32, 228 * 1024),
    100: Arch(64, 32, 228 * 1024),
    120: Arch(48, 24, 100 * 1024),
}
REGISTERS = 65536
"""Registers of a multiprocessor; a warp gets a multiple of 256."""


def cases(op: str) -> Iterator[tuple[dict, tuple]]:
    """The shapes at which an op is compiled: labels in the table, and the inputs of its forward pass."""
    half = torch.bfloat16
    if op == "draws":
        yield {"shape": f"images {BATCH}x256x256", "dtypes": "float32"}, ()
    elif op == "optimizer":
        yield {"shape": "matrices 4x768x768", "dtypes": "float32"}, ()
    elif op == "float8":
        for name, size in SIZES.items():
            for width in (size.width, size.hidden):
                shape = f"{name} {BATCH}x{TOKENS[0]}x{width}"
                yield {"shape": shape, "dtypes": "bfloat16"}, (empty(BATCH * TOKENS[0], width, dtype=half),)
    elif op.endswith("layer_norm"):
        for name, width in DECODERS.items():
            x, weight = empty(BATCH, 257, width), empty(width)
            branch = (empty(BATCH, 257, width, dtype=half),) if op.startswith("residual") else ()
            inputs = x, *branch, weight, weight, 1e-12, half
            yield {"shape": f"decoder-{name} {BATCH}x257", "dtypes": "float32"}, inputs
    else:
        for shape, size in sizes(OPS[op]):
            dtypes = str(size.residual).removeprefix("torch.")
            for variant, example in OPS[op].examples.items():
                label = {"shape": f"{variant} {shape}".lstrip(), "dtypes": dtypes}
                inputs = OPS[op].inputs(example(size, empty))
                yield label, inputs
            if op == "qk_norm_rope" and size is SIZES["B"]:
                qkv, _, _, *others = inputs
                yield label, (qkv, None, None, *others)  # without a norm


def sizes(op: Op) -> Iterator[tuple[str, Size]]:
    """The sizes of an op by name. Everything is bfloat16 except the residual, weights and tables."""
    half = torch.bfloat16
    if op.part == "latents":
        draws, (tokens, channels) = DRAWS, LATENT
        size = Size(BATCH, tokens, channels, draws=draws, residual=half)
        yield f"latents {draws}x{BATCH}x{tokens}x{channels}", size
    elif op.part == "lpips":
        # The last tap of LPIPS has no pooling, which is less work than the kernels compiled here.
        for layer, (channels, height, width) in enumerate(tap_shapes(256, 256)):
            size = Size(BATCH, height * width, channels, residual=half)
            yield f"tap{layer} {BATCH}x{channels}x{height}x{width}", size
    else:
        for name, size in SIZES.items():
            for tokens in TOKENS:
                for residual in residual_dtypes(op):
                    yield f"{name} {BATCH}x{tokens}", replace(size, tokens=tokens, residual=residual)


def triton_modules() -> dict:
    """The modules of kernels/triton_kernels by name."""
    package = importlib.import_module("unite_fast.kernels.triton_kernels")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def ops(arch: int) -> list[str]:
    """Everything with a Triton kernel of its own that this GPU can run: ops, the norms inside Linears, rounding to
    float8, the draws, and the optimizers."""
    with_kernels = (name for name, op in OPS.items() if op.part != "composed" and "triton" in op.fused.backends)
    others = ["layer_norm", "residual_layer_norm", "draws", "optimizer", *(["float8"] if arch >= FLOAT8_ARCH else [])]
    return [*with_kernels, *others]


def all_kernels() -> set[str]:
    """Names of the kernels that kernels/triton_kernels defines."""
    from triton.runtime.jit import JITFunction

    functions = (f for module in triton_modules().values() for f in vars(module).values())
    return {f.__name__ for f in functions if isinstance(f, JITFunction) and f.__name__.endswith("_kernel")}


def launch(op: str, inputs: tuple) -> None:
    """Run the Triton kernels of an op, forward and backward, the draws of a micro-batch, or an optimizer step."""
    run = {name: function for module in triton_modules().values() for name, function in vars(module).items()}
    if op == "draws":
        positions = empty(BATCH, dtype=torch.int64)
        for name in ("philox_uniforms", "philox_normals", "philox_words"):
            run[name](1, 3, 4, range(1), positions, LATENT[0] * LATENT[1])
        return
    if op == "float8":
        run["quantise"](*inputs)
        return
    if op == "optimizer":
        a, b, c, d, e = ([empty(768, 768) for _ in range(4)] for _ in range(5))
        half, steps, one = (
            [empty(768, 768, dtype=torch.bfloat16) for _ in range(4)],
            [empty() for _ in range(4)],
            empty(),
        )
        run["gradient_norm"](a)
        run["muon_momentum"](a, b, half, one, 1.0, 0.95, one)
        run["muon_update"](a, b, half, [0.1] * 4, 0.99, one)
        run["adamw_update"](a, b, c, (d, e), steps, one, 1.0, 0.1, (0.9, 0.99), 1e-8, 0.99, one)
        return
    # split_heads has no kernel in its forward pass.
    outputs = run[f"{op}_forward"](*inputs) if f"{op}_forward" in run else ()
    if op == "layer_norm":  # a part of layer_norm_linear
        out, *statistics = outputs
        run["layer_norm_backward_recompute"](out, *inputs[:3], *statistics)
        return
    if op == "residual_layer_norm":
        x_out, out, *statistics = outputs
        run["residual_layer_norm_backward_recompute"](x_out, out, x_out, *inputs[2:4], *statistics, out.dtype, True)
        return
    fused = OPS[op].fused
    into_backward = *fused.all_results(inputs, outputs), *fused.saved(inputs, outputs)
    run[f"{op}_backward"](*into_backward)
    if recompute := run.get(f"{op}_backward_recompute"):
        if op == "gated_residual_adaln":
            into_backward = *into_backward[:6], inputs[4], *into_backward[6:]  # and shift
        recompute(*into_backward)


class StandIn:
    """As much of a Triton driver as compiling needs."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(kernel_filter: str) -> Iterator[list]:
    """Within the `with` block, launches only compile. Each appends (kernel name, compiled kernel, tensors by name,
    programs) to the list that this yields."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **named):
        if kernel_filter in self.__name__:
            tensors = {name: x for name, x in zip(self.arg_names, args, strict=False) if isinstance(x, torch.Tensor)}
            compiled = run(self, *args, grid=grid, warmup=True, **named)
            launches.append((self.__name__, compiled, tensors, math.prod(grid)))

    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_op(arch: int, op: str, kernel_filter: str) -> list[dict]:
    """Rows of the table for all launches of an op."""
    import triton

    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    StandIn.arch = arch
    triton.runtime.driver.set_active(StandIn())
    processors = triton_modules()["rows"].PROCESSORS["meta"]
    rows, known = [], {}
    for label, inputs in cases(op):
        with compiling(kernel_filter) as launches:
            launch(op, inputs)
        for kernel, compiled, tensors, programs in launches:
            if compiled.hash not in known:
                known[compiled.hash] = examine(compiled, arch)
            row = {"kernel": kernel, "op": op, "arch": f"sm_{arch}", **label, **known[compiled.hash]}
            row["waves"] = round(programs / row["resident"] / processors, 2)
            rows.append(row | narrowest(row["accesses"], tensors))
    return rows


def examine(compiled, arch: int) -> dict:
    """Figures of one compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    loop = machine_code.loop(machine_code.disassemble(compiled.asm["cubin"]))
    resident = occupancy(ARCHS[arch], used["REG"], shared, warps)
    return {
        "registers": used["REG"],
        # No kernel here has arrays of its own, so what is in local memory was spilled.
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": shared,
        "warps": warps,
        **resident,
        "barriers": loop.barriers,
        "in_flight_kb": round(loop.loaded_bytes * 32 * warps * resident["resident"] / 1e3, 1),
        "ahead": loop.ahead,
        "accesses": accesses(compiled.asm["ptx"], compiled.src.signature),
    }


def occupancy(arch: Arch, registers: int, shared: int, warps: int) -> dict:
    """Programs that a multiprocessor holds at once, the share of its warps, and what limits it."""
    per_warp = math.ceil(registers * 32 / 256) * 256
    blocks = {
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
        "registers": REGISTERS // per_warp // warps,
        "shared memory": arch.shared // (shared + 1024),
    }
    limit = min(blocks, key=blocks.get)
    return {"resident": blocks[limit], "occupancy": round(blocks[limit] * warps / arch.warps, 3), "limit": limit}


def accesses(ptx: str, signature: dict[str, str]) -> dict[str, int]:
    """Bytes of the narrowest global access to each tensor argument, by following addresses back to the arguments."""
    arguments = [name for name, kind in signature.items() if kind != "constexpr"]
    made_from, touched = defaultdict(set), []
    for operation, operands in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]+)\s+(.*?);", ptx, re.MULTILINE):
        if operation == "ld.global.b64":  # an address, from a table of addresses
            made_from[re.search(r"%\w+", operands).group()].add(IN_TABLE)
        if wide := re.match(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)$", operation):
            address = re.search(r"\[\s*(%\w+)", operands).group(1)
            touched.append((address, int(wide[1] or 1) * int(wide[2]) // 8))
        elif operation.startswith("ld.param"):
            target, parameter = re.match(r"(%\w+), \[\w+_param_(\d+)", operands).groups()
            made_from[target].add(int(parameter))
        elif not operation.startswith(("ld.", "st.")):
            target, *sources = re.findall(r"%\w+", operands) or [""]
            made_from[target].update(sources)
    narrow: dict[str, int] = {}
    for address, width in touched:
        numbers = reached(made_from, address)
        names = [arguments[i] for i in numbers if 0 <= i < len(arguments)]
        pointers = [name for name in names if signature[name].startswith("*")]
        for name in pointers or [TABLE_TENSORS] * (IN_TABLE in numbers):
            narrow[name] = min(width, narrow.get(name, width))
    return narrow


def reached(made_from: dict[str, set], register: str) -> set[int]:
    """Numbers of the parameters that a register was made from."""
    seen, waiting = set(), [register]
    while waiting:
        new = made_from.get(waiting.pop(), set()) - seen
        seen |= new
        waiting.extend(source for source in new if isinstance(source, str))
    return {source for source in seen if isinstance(source, int)}


def narrowest(widths: dict[str, int], tensors: dict[str, torch.Tensor]) -> dict:
    """The narrowest access to a large tensor, and to which."""
    if TABLE_TENSORS in widths:
        return {"access_bytes": widths[TABLE_TENSORS], "narrowest": TABLE_TENSORS}
    size = {name: tensors[name].numel() * tensors[name].element_size() for name in widths}
    large = [name for name in widths if size[name] >= LARGE * max(size.values())]
    least = min(widths[name] for name in large)
    return {"access_bytes": least, "narrowest": ", ".join(name for name in large if widths[name] == least)}


def table(rows: list[dict]) -> str:
    """The rows as text; rows that differ only in the number of tokens become one line."""
    columns = {
        "kernel": "kernel",
        "op": "op",
        "arch": "arch",
        "size": "size",
        "dtypes": "residual",
        "registers": "regs",
        "spill_bytes": "spill",
        "shared_bytes": "shared",
        "access_bytes": "access",
        "warps": "warps",
        "occupancy": "occupancy",
        "limit": "limited by",
        "barriers": "barriers",
        "in_flight_kb": "KB in flight",
        "ahead": "ahead",
        "waves": "waves",
        "narrow": "below 16 bytes",
    }
    lines = {}
    for row in rows:
        narrow = (f"{name} {width}" for name, width in row["accesses"].items() if width < 16)
        line = row | {"size": row["shape"].split()[0], "narrow": ", ".join(narrow)}
        line["occupancy"] = f"{row['occupancy']:.0%}"
        lines[tuple(str(line[column]) for column in columns)] = None
    lines = [tuple(columns.values()), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="compute capability times ten [all]")
    parser.add_argument("--kernel", default="", metavar="PART", help="only kernels with this in their name")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    options = parser.parse_args()
    archs = options.arch or list(ARCHS)
    tasks = [(arch, op, options.kernel) for arch in archs for op in ops(arch)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for op_rows in pool.map(compile_op, *zip(*tasks, strict=True)) for row in op_rows]
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    expected = all_kernels() - ({FLOAT8_KERNEL} if max(archs) < FLOAT8_ARCH else set())
    missing = {name for name in expected if options.kernel in name} - {row["kernel"] for row in rows}
    if missing:
        print(f"error: no launch reached {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
