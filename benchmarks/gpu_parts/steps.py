"""Time training steps of UNITE-B, and of UNITE-S on molecules, with `unite-fast bench`, after filling the compiler
caches."""

import gc
import subprocess
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gpu_parts.context import Context
from unite_fast.benchmarking.candidate import bench_command, printed_row
from unite_fast.benchmarking.matmul_rate import synchronize
from unite_fast.benchmarking.measure import open_trainer, take_step
from unite_fast.benchmarking.run import read_recipe
from unite_fast.config import Config
from unite_fast.planning.memory import RUNTIME_BYTES, SLACK

RECIPE, MOLECULES = "imagenet256_b", "qm9_s"
TINY_SIZES = (
    *(f"model.{part}.{key}={value}" for part in ("encoder", "decoder") for key, value in (("width", 64), ("heads", 2))),
    "model.encoder.depth=2",
    "model.decoder.depth=1",
    "model.decoder.mlp_width=64",
    "data.workers=0",
    "train.threads=1",
)
TINY = {
    RECIPE: (
        *("model.image_size=32", "model.patch_size=8", "model.num_classes=10", "model.encoder.in_context_start=1"),
        *TINY_SIZES,
    ),
    MOLECULES: TINY_SIZES,
}
MEMORY_MARGIN = 0.1
"""Measured memory may exceed the prediction of `unite-fast plan` by this share."""


def settings(c: Context, backend_name: str, compiled: bool, images: int, recipe: str = RECIPE) -> tuple[str, ...]:
    images = 2 if c.tiny else images
    own = f"kernels={backend_name}", f"train.compile={str(compiled).lower()}", f"train.device={c.device.type}"
    return *own, f"train.batch_size={images}", f"train.micro_batch={images}", *(TINY[recipe] if c.tiny else ())


def config(c: Context, backend_name: str, compiled: bool, images: int) -> Config:
    return read_recipe([RECIPE, *settings(c, backend_name, compiled, images)], "", "")[0]


# `unite-fast bench` ---------------------------------------------------------------------------------------------------


def ours(compiled: bool, images: int, *more: str) -> Callable[[Context], bool]:
    """A part that runs `bench` with our kernels."""
    return lambda c: bench(c, c.backend_name, compiled, images, *more)


GRAPH = "train.cuda_graph=true"
bench_triton, bench_compiled, bench_graph = ours(False, 64), ours(True, 64), ours(False, 64, GRAPH)
bench_triton_8, bench_graph_8, bench_compiled_graph_8 = ours(False, 8), ours(False, 8, GRAPH), ours(True, 8, GRAPH)
bench_triton_128, bench_compiled_128 = ours(False, 128), ours(True, 128)
bench_float8 = ours(True, 64, "train.precision=float8")


def bench_molecules(c: Context) -> bool:
    # Eager on a CPU, where compiling takes longer than this part may.
    return bench(c, c.backend_name, not c.tiny, 512, recipe=MOLECULES)


def bench_reference(c: Context) -> None:
    if not bench(c, "reference", True, 64):
        bench(c, "reference", True, 32)


def bench(c: Context, backend_name: str, compiled: bool, images: int, *more: str, recipe: str = RECIPE) -> bool:
    """Run `unite-fast bench` with `more` settings; return whether memory sufficed."""
    window = ["--warmup", "1", "--steps", "3"] if c.tiny else ["--warmup", "4", "--steps", "20", "--seconds", "8"]
    words = [recipe, *settings(c, backend_name, compiled, images, recipe), *more, *window]
    process = subprocess.run(bench_command(*words), capture_output=True, text=True)
    print(process.stderr[-3000:])
    named = [recipe] if recipe != RECIPE else []
    named += [f"{backend_name} {'compiled' if compiled else 'eager'}", f"micro-batch {images}", *more]
    name = ", ".join(named)
    row = printed_row(process.stdout)
    if process.returncode or row is None:
        out_of_memory = "out of memory" in process.stderr
        c.say(name, ok=None if out_of_memory else False, error=(process.stderr or process.stdout)[-400:])
        return not out_of_memory
    c.say(name, ok=row["bad_step"] is None, **row)
    if predicted := row.get("predicted_memory_gb"):
        # Memory of tensors only: without the CUDA context and the allocator's slack.
        tensors = predicted / (1 + SLACK) - RUNTIME_BYTES / 1e9
        measured = row["memory_gb"]
        facts = {
            "measured_gb": measured,
            "predicted_gb": tensors,
            "measured_of_predicted": round(measured / tensors, 3),
        }
        c.say(f"memory, {name}", ok=measured <= (1 + MEMORY_MARGIN) * tensors, **facts)
    return True


# Caches ---------------------------------------------------------------------------------------------------------------


def warm_triton(c: Context) -> None:
    compile_layers(c, c.backend_name)
    gc.collect()
    torch.cuda.empty_cache()
    # Triton specialises on divisibility by 16, so 16 images use the same kernels as 64 and 128.
    with open_trainer(config(c, c.backend_name, False, 16)) as trainer:
        for _ in range(2):
            take_step(trainer)
        synchronize(c.device)
    c.say("Triton kernels", ready=True)


def warm_reference(c: Context) -> None:
    compile_layers(c, "reference")


def compile_layers(c: Context, backend_name: str, images: int = 64) -> None:
    """Compile all layers at their real shapes with the memory of one: each runs backward right after its forward, so no
    activations are kept and other parts can share the GPU."""
    tree = config(c, backend_name, True, images)
    tree.perceptual.weight = 0.0
    with open_trainer(tree) as trainer:
        model = trainer.state.model
        for layer in (*model.encoder.blocks, *model.decoder.layers):
            backward_at_once(layer)
        trainer.train_step.accumulate(trainer.read())
        synchronize(c.device)
        counters = torch._dynamo.utils.counters["stats"]
        c.say(f"layers compiled, {backend_name}", graphs=counters["unique_graphs"], peak_gb=peak_gb(c))


def backward_at_once(layer: nn.Module) -> None:
    """Make a compiled layer run its backward at the end of its forward."""
    compiled = layer._compiled_call_impl
    assert compiled is not None, "the layer is not compiled"

    def cut(x: torch.Tensor) -> torch.Tensor:
        # Leave parameters and tables alone: the code is compiled for them.
        return x if x.is_leaf else x.detach().requires_grad_()

    def call(*arguments):
        own = tree_map_only(torch.Tensor, cut, arguments)
        outputs = compiled(*own)
        results = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.grad_fn]
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])
        return tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(), outputs)

    layer._compiled_call_impl = call


def peak_gb(c: Context) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if c.cuda else None
