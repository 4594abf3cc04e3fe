"""What the compiler makes of every Triton kernel, with no GPU: registers, spills, shared memory, width of global
accesses and occupancy, at the shapes of UNITE-B, L and XL.

The launchers of kernels/triton_bodies run on tensors without memory while a stand-in for the CUDA driver names the
target, and Triton compiles each launch as it would on that GPU (types, constants, strides, alignment) and starts
nothing. Registers and spills are ptxas' own, read by the cuobjdump that comes with Triton. Nothing is timed.
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
from dataclasses import dataclass
from pathlib import Path

import torch

from unite_fast.lpips import tap_shapes

BATCH = 64
TOKENS = (544, 288)
"""Of the tokenizer pass and of a flow draw, in-context tokens included."""
DRAWS, LATENT = 3, (256, 32)
LARGE = 0.1
"""A tensor of less than this share of a kernel's largest is statistics, weights or partial sums, not real traffic."""

EXAMPLES = """examples:
  python benchmarks/cross_compile.py
  python benchmarks/cross_compile.py --arch 90 --kernel swiglu
  python benchmarks/cross_compile.py --arch 90 --arch 100 --json > kernels.json
"""


@dataclass(frozen=True)
class Size:
    """Of an encoder block."""

    width: int
    heads: int
    hidden: int
    """Of SwiGLU, padded as the model pads it."""


SIZES = {"B": Size(768, 12, 2048), "L": Size(1024, 16, 2752), "XL": Size(1152, 16, 3072)}


@dataclass(frozen=True)
class Arch:
    """What a streaming multiprocessor holds at most; CUDA C++ programming guide, table of compute capabilities."""

    warps: int
    blocks: int
    shared: int
    """Bytes, 1024 of which each block loses to the system."""


ARCHS = {
    80: Arch(64, 32, 164 * 1024),
    90: Arch(64, 32, 228 * 1024),
    100: Arch(64, 32, 228 * 1024),
    120: Arch(48, 24, 100 * 1024),
}
REGISTERS = 65536
"""Of a multiprocessor, handed out to warps in units of 256."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def block_inputs(op: str, size: Size, tokens: int, residual: torch.dtype) -> tuple:
    """Arguments of unite_fast::OP in an encoder block: bfloat16 but for the residual, weights and tables."""
    d, head_dim, eps = size.width, size.width // size.heads, 1e-6
    x, branch = empty(BATCH, tokens, d, dtype=residual), empty(BATCH, tokens, d)
    # Modulation is one product for all of a block's vectors, so each is a view of it.
    shift, scale, gate = empty(BATCH, 6 * d).chunk(6, dim=-1)[:3]
    weight = empty(d, dtype=torch.float32)
    adaln = weight, shift, scale, eps, torch.bfloat16
    norms, tables = ([empty(*shape, dtype=torch.float32)] * 2 for shape in ((head_dim,), (tokens, head_dim // 2)))
    return {
        "adaln_modulate": (x, *adaln),
        "gated_residual_adaln": (x, branch, gate, *adaln),
        "gated_residual_norm_adaln": (x, branch, gate, weight, *adaln),
        "qk_norm_rope": (empty(BATCH, tokens, 3 * d), *norms, *tables, size.heads, eps),
        "swiglu": (empty(BATCH, tokens, 2 * size.hidden),),
    }[op]


def latent_inputs(op: str) -> tuple:
    """Arguments of unite_fast::OP on the latents of all flow draws."""
    z, channels = empty(BATCH, *LATENT), empty(LATENT[1], dtype=torch.float32)
    t = empty(DRAWS, BATCH, dtype=torch.float32)
    positions, gate = empty(BATCH, dtype=torch.int64), empty(BATCH, dtype=torch.bool)
    return {
        "noise_injection": (z, t, positions, gate, 1, 2, 3, 4),
        "flow_loss": (empty(DRAWS, *z.shape), channels, channels, z, t, 0.05, 1e-5),
    }[op]


def cases(op: str) -> Iterator[tuple[dict, tuple]]:
    """What to call a launch in the table, and its arguments."""
    if op == "draws":
        yield {"shape": f"images {BATCH}x256x256", "dtypes": "float32"}, ()
        return
    if op == "tap_distance":
        for layer, (channels, height, width) in enumerate(tap_shapes(256, 256)):
            features = empty(BATCH, channels, height, width).to(memory_format=torch.channels_last)
            mask = features.to(torch.uint8)
            given = features, features, empty(channels, dtype=torch.float32), mask
            yield {"shape": f"tap{layer} {BATCH}x{channels}x{height}x{width}", "dtypes": "bfloat16"}, given
        return
    if op.endswith("layer_norm"):
        x, weight = empty(BATCH, 257, 768, dtype=torch.float32), empty(768, dtype=torch.float32)
        branch = (empty(BATCH, 257, 768),) if op.startswith("residual") else ()
        given = x, *branch, weight, weight, 1e-12, torch.bfloat16
        yield {"shape": f"decoder {BATCH}x257", "dtypes": "float32"}, given
        return
    if op in ("noise_injection", "flow_loss"):
        yield {"shape": "latents {}x{}x{}x{}".format(DRAWS, BATCH, *LATENT), "dtypes": "bfloat16"}, latent_inputs(op)
        return
    for name, size in SIZES.items():
        for tokens in TOKENS:
            for residual in (torch.bfloat16, torch.float32) if "adaln" in op else (torch.bfloat16,):
                label = {"shape": f"{name} {BATCH}x{tokens}", "dtypes": str(residual).removeprefix("torch.")}
                yield label, block_inputs(op, size, tokens, residual)


def triton_modules() -> dict:
    """The modules of kernels/triton_bodies by name."""
    package = importlib.import_module("unite_fast.kernels.triton_bodies")
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def ops() -> dict[str, str]:
    """The module of kernels/triton_bodies for each op that has a Triton body, and for the draws."""
    functions = ((function, name) for name, module in triton_modules().items() for function in vars(module))
    found = {f.removesuffix("_forward"): name for f, name in functions if f.endswith("_forward") and f[0] != "_"}
    return found | {"draws": "philox"}


def all_kernels() -> set[str]:
    """Names of the kernels that kernels/triton_bodies defines."""
    from triton.runtime.jit import JITFunction

    functions = (f for module in triton_modules().values() for f in vars(module).values())
    return {f.__name__ for f in functions if isinstance(f, JITFunction) and f.__name__.endswith("_kernel")}


def launch(op: str, given: tuple) -> None:
    """Run the Triton body of an op, forward and backward, or those of a micro-batch's draws."""
    if op == "draws":
        philox, positions = triton_modules()["philox"], empty(BATCH, dtype=torch.int64)
        keys = 1, 3, 4, range(1), positions, LATENT[0] * LATENT[1]
        philox.philox_uniforms(*keys)
        philox.philox_normals(*keys)
        philox.philox_words(*keys)
        philox.philox_dropout(1, 3, 4, 0, positions, 256 * 256 * 64 // 32)
        return
    body = triton_modules()[ops()[op]]
    outputs = getattr(body, f"{op}_forward")(*given)
    if op == "layer_norm":  # a part of layer_norm_linear
        body.layer_norm_backward_again(outputs[0], *given[:3], *outputs[1:])
        return
    if op == "residual_layer_norm":
        x_out, out, *statistics = outputs
        body.residual_layer_norm_backward_again(x_out, out, x_out, out.dtype, *given[2:4], *statistics)
        return
    fused = importlib.import_module(f"unite_fast.kernels.{op}")._fused
    into_backward = *outputs[: fused.results], *fused.saved(given, outputs)
    getattr(body, f"{op}_backward")(*into_backward)
    if op == "swiglu":
        body.swiglu_backward_again(*into_backward)
    if op == "gated_residual_adaln":
        shift = given[4]
        body.gated_residual_adaln_backward_again(*into_backward[:6], shift, *into_backward[6:])


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
    """Within, launches compile only; gives the list to which they add (kernel, what was compiled, tensors by name)."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **named):
        if kernel_filter in self.__name__:
            tensors = {name: x for name, x in zip(self.arg_names, args, strict=False) if isinstance(x, torch.Tensor)}
            launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **named), tensors))

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
    rows, known = [], {}
    for label, given in cases(op):
        with compiling(kernel_filter) as launches:
            launch(op, given)
        for kernel, compiled, tensors in launches:
            if compiled.hash not in known:
                known[compiled.hash] = examine(compiled, arch)
            row = {"kernel": kernel, "op": op, "arch": f"sm_{arch}", **label, **known[compiled.hash]}
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
    return {
        "registers": used["REG"],
        # No kernel here has arrays of its own, so what is in local memory was spilled.
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": shared,
        "warps": warps,
        **occupancy(ARCHS[arch], used["REG"], shared, warps),
        "accesses": accesses(compiled.asm["ptx"], compiled.src.signature),
    }


def occupancy(arch: Arch, registers: int, shared: int, warps: int) -> dict:
    """Share of a multiprocessor's warps that can be there at once, and what keeps more away."""
    per_warp = math.ceil(registers * 32 / 256) * 256
    blocks = {
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
        "registers": REGISTERS // per_warp // warps,
        "shared memory": arch.shared // (shared + 1024),
    }
    limit = min(blocks, key=blocks.get)
    return {"occupancy": round(blocks[limit] * warps / arch.warps, 3), "limit": limit}


def accesses(ptx: str, signature: dict[str, str]) -> dict[str, int]:
    """Bytes of the narrowest global access to each tensor argument, by following addresses back to the arguments."""
    arguments = [name for name, kind in signature.items() if kind != "constexpr"]
    made_from, touched = defaultdict(set), []
    for operation, operands in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]+)\s+(.*?);", ptx, re.MULTILINE):
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
        for name in (arguments[i] for i in reached(made_from, address) if i < len(arguments)):
            if signature[name].startswith("*"):
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
    size = {name: tensors[name].numel() * tensors[name].element_size() for name in widths}
    large = [name for name in widths if size[name] >= LARGE * max(size.values())]
    least = min(widths[name] for name in large)
    return {"access_bytes": least, "narrowest": ", ".join(name for name in large if widths[name] == least)}


def table(rows: list[dict]) -> str:
    """Lines that differ in nothing but the number of tokens are one."""
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
    tasks = [(arch, op, options.kernel) for arch in options.arch or ARCHS for op in ops()]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(compile_op, *zip(*tasks, strict=True)) for row in found]
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    missing = {name for name in all_kernels() if options.kernel in name} - {row["kernel"] for row in rows}
    if missing:
        print(f"error: no launch reached {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
