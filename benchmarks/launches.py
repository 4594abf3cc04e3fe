"""How many kernels one micro-batch starts on a GPU, counted without one.

The real code of a training step (unite_fast/training/train_step.py: draws, both passes forward and backward)
runs on tensors without memory, and two things are counted:

- every operator of PyTorch that reaches a device, as PyTorch's dispatcher sees it, autograd's own additions among them.
  Views and allocations start nothing. Most operators are one kernel; `SEVERAL` names those that are more, at the larger
  number where it depends on shapes, and `_foreach_*` start one for each `FOREACH_CHUNKS` chunks of 2^16 elements and
  each `FOREACH_TENSORS` tensors.
- every launch of a Triton kernel of ours. The launchers of kernels/triton_kernels run as they are, inside our operators
  too (through the eager path of kernels/fused_op.py), and a stub takes the launch.

Eager mode: torch.compile would fuse some of the operators. Left out are copies from the host (the batch, and four
tables of addresses in the optimizers' step) and the memsets that cuBLAS, cuDNN and sums over many rows may add. Where
torch sees no CUDA device, the tensors are on the CPU instead (autograd asks even a tensor without memory for its
device's streams), with the backends and matmuls that a GPU has; the output says which. The optimizers' step is shown
apart, and is not part of a micro-batch.

`--step N` counts the N micro-batches of a step and shows their mean; those after the first add to existing gradients.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

if not torch.cuda.is_available():
    # Triton looks at it when it is imported: without a GPU, its kernels are made for the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unite_fast.config import Config
from unite_fast.data_pipeline import Batch
from unite_fast.errors import UserError
from unite_fast.kernels import backend, fused_op, matmul
from unite_fast.kernels.casts import cast_once
from unite_fast.lpips import LINEAR_SHAPES, LPIPS, VGG_SHAPES
from unite_fast.model.layers import SwiGLU
from unite_fast.model.unite import UNITE
from unite_fast.optim import muon
from unite_fast.recipes import load_config
from unite_fast.training import train_step
from unite_fast.training.train_state import TrainState

EXAMPLES = """examples:
  python benchmarks/launches.py
  python benchmarks/launches.py --recipe imagenet256_xl --micro-batch 32
  python benchmarks/launches.py --set perceptual.weight=0 --json > launches.json
"""

NOTHING = {"detach", "_unsafe_view", "_reshape_alias", "alias", "lift_fresh", "empty", "new_empty", "empty_like"} | {
    "empty_strided", "new_empty_strided"
}  # fmt: skip
"""Operators that start nothing, beside views."""
SEVERAL = {
    # A multiplication and an addition of the bias; see `kernels_of`, as for its backward pass.
    "convolution": 1,
    # d_x, then the partial sums of d_weight and d_bias and the sum of each.
    "native_layer_norm_backward": 4,
    # FlashAttention's: sums of d_out * out, the main kernel, d_q to its own type. cuDNN's has as many.
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "_scaled_dot_product_cudnn_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
    # Zeros, then what is put into them.
    "max_pool2d_with_indices_backward": 2,
    "embedding_dense_backward": 2,
    "slice_backward": 2,
    "select_backward": 2,
    "constant_pad_nd": 2,
    # A scalar becomes a tensor first.
    "where.ScalarSelf": 2,
    "where.ScalarOther": 2,
    "where.Scalar": 3,
}
"""Kernels of the operators that start more than one."""
FOREACH_CHUNKS, FOREACH_TENSORS = 320, 30
"""What one launch of a `_foreach_*` operator takes at most: chunks, and tensors of the operator with the most lists."""

PARTS = (
    "draws",
    "casts of weights",
    "tokenizer forward",
    "decoder forward",
    "LPIPS forward",
    "reconstruction backward",
    "flow forward",
    "flow backward",
    "the rest",
)


class Launches(TorchDispatchMode):
    """Counts, by part of the step and name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.part = "the rest"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if number := kernels_of(function, args, kwargs or {}, out):
            self.add(function.overloadpacket.__name__, number)
        return out

    def add(self, name: str, number: int = 1) -> None:
        self.counts[self.part, name] += number

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count as `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


def kernels_of(function: torch._ops.OpOverload, args: tuple, kwargs: dict, out: object) -> int:
    """The kernels that one call of an operator starts; see the module's docstring."""
    name = function.overloadpacket.__name__
    if function.namespace == "unite_fast":
        raise AssertionError(f"{function} was counted as one launch: its backend did not run")
    results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    computes = any(x.numel() for x in results) if results else function._schema.is_mutable
    if function.is_view or name in NOTHING or not computes:
        return 0
    if name == "convolution":
        return 1 + (args[2] is not None)
    if name == "convolution_backward":
        return sum(args[-1])
    if name.startswith("_foreach_"):
        tensors = next(x for x in args if isinstance(x, (list, tuple)))
        chunks = sum(math.ceil(x.numel() / 2**16) for x in tensors)
        return max(math.ceil(chunks / FOREACH_CHUNKS), math.ceil(len(tensors) / FOREACH_TENSORS))
    return SEVERAL.get(f"{name}.{function._overloadname}", SEVERAL.get(name, 1))


@contextmanager
def triton_stubbed(launches: Launches) -> Iterator[None]:
    """Launches of Triton kernels are counted and do nothing."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(self, *args, grid, warmup, **named):
        # Fake tensors hold no numbers that a kernel could write.
        launches.add(self.__name__)

    with mock.patch.object(InterpretedFunction, "run", run), mock.patch.object(JITFunction, "run", run):
        yield


@contextmanager
def as_on_a_gpu(device: str) -> Iterator[None]:
    """Tensors on the CPU run on the backends and matmuls of a GPU."""
    from unite_fast.kernels.triton_kernels import optimizer

    weights = SwiGLU.weights
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.using("triton"))
        # Else each op is one operator, whose backend does not run.
        stack.enter_context(mock.patch.object(fused_op, "needs_dispatcher", lambda x: False))
        stack.enter_context(mock.patch.object(muon, "_operator", muon._newton_schulz))
        # Tensors without memory have no address.
        stack.enter_context(mock.patch.object(optimizer, "address", lambda x: 0))
        stack.enter_context(mock.patch.object(optimizer, "upload", lambda rows, device: torch.empty(rows.shape)))
        if device == "cpu":
            # `in_float32` asks it. Patching `in_float32` would miss the modules that import it by name.
            stack.enter_context(mock.patch.object(matmul, "bfloat16_instructions", lambda: True))
            stack.enter_context(mock.patch.object(matmul, "sums_in_float32", lambda x: x.dtype == torch.bfloat16))
            stack.enter_context(mock.patch.object(SwiGLU, "weights", lambda self, padded: weights(self, True)))
        yield


@contextmanager
def parts_of_the_step(launches: Launches, model: UNITE, lpips: LPIPS | None) -> Iterator[None]:
    """Within the `with` block, count the launches of each function under its part of the step."""

    def counted(part: str | Iterator[str], function: Callable) -> Callable:
        def call(*args, **kwargs):
            if launches.part != "the rest":  # torch calls some a second time inside
                return function(*args, **kwargs)
            with launches.within(part if isinstance(part, str) else next(part)):
                return function(*args, **kwargs)

        return call

    backward = itertools.cycle(("reconstruction backward", "flow backward"))
    targets = [
        (train_step, "draw_step", "draws"),
        (model, "tokenize", "tokenizer forward"),
        (model, "decode", "decoder forward"),
        (train_step, "flow_losses", "flow forward"),
        (torch.Tensor, "backward", backward),
    ]
    if lpips is not None:
        targets.append((lpips, "forward", "LPIPS forward"))

    @contextlib.contextmanager
    def casts_apart(weights):
        with contextlib.ExitStack() as stack:
            with launches.within("casts of weights"):
                stack.enter_context(cast_once(weights))
            yield

    with contextlib.ExitStack() as stack:
        for owner, name, part in targets:
            stack.enter_context(mock.patch.object(owner, name, counted(part, getattr(owner, name))))
        stack.enter_context(mock.patch.object(train_step, "cast_once", casts_apart))
        yield


def count(config: Config, micro_batch: int, micro_batches: int = 1) -> dict:
    """Launches of the first `micro_batches` of a step, and of the optimizers' step after them.

    Returns:
        "device"; "micro_batch", part -> name -> mean number per micro-batch; "optimizer", name -> number.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, images = config.model.image_size, micro_batch * micro_batches
    # FakeTensorMode is entered first, so that it handles the calls that `launches` passes on.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), as_on_a_gpu(device):
        model = UNITE(config.model)
        lpips = None
        if config.perceptual.weight:
            shapes = (VGG_SHAPES, LINEAR_SHAPES)
            weights = ({name: torch.empty(shape) for name, shape in each.items()} for each in shapes)
            lpips = LPIPS(*weights, config.perceptual.input_range)
        state = TrainState(model, config)
        step = train_step.TrainStep(state, config, slice(0, images), micro_batch, lpips)
        batch = Batch(torch.empty(images, 3, side, side, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64), [])
        with Launches() as launches, triton_stubbed(launches), parts_of_the_step(launches, model, lpips):
            step.accumulate(batch)
        with Launches() as optimizer, triton_stubbed(optimizer):
            state.apply_gradients()
    by_part = {part: {} for part in PARTS}
    for (part, name), number in launches.counts.most_common():
        by_part[part][name] = number / micro_batches
    return {
        "device": device,
        "micro_batch": by_part,
        "optimizer": dict(Counter({name: n for (_, name), n in optimizer.counts.items()}).most_common()),
    }


def total(counts: dict) -> float:
    """Launches of a micro-batch."""
    return sum(sum(names.values()) for names in counts["micro_batch"].values())


def table(counts: dict, largest: int) -> str:
    parts = {part: names for part, names in counts["micro_batch"].items() if names}
    where = "tensors without memory on a CUDA device"
    if counts["device"] == "cpu":
        where = "no CUDA device: tensors without memory on the CPU, with a GPU's backends and matmuls"
    lines = [where, "", f"{'part':28}{'launches':>9}  most of them"]
    for part, names in parts.items():
        most = ", ".join(f"{name} {number:g}" for name, number in list(names.items())[:6])
        lines.append(f"{part:28}{sum(names.values()):9g}  {most}")
    lines.append(f"{'a micro-batch':28}{total(counts):9g}")
    lines.append(f"{'the optimizers, apart':28}{sum(counts['optimizer'].values()):9g}")
    names = Counter()
    for each in parts.values():
        names.update(each)
    lines += ["", f"{'operator or kernel':44}{'launches':>9}  of a micro-batch"]
    lines += [f"{name:44}{number:9g}" for name, number in names.most_common(largest)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="imagenet256_b", help="[imagenet256_b]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe setting")
    parser.add_argument("--micro-batch", type=int, default=64, metavar="N", help="images of a forward pass [64]")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="micro-batches of the step [1]")
    parser.add_argument("--largest", type=int, default=25, metavar="N", help="operators to show [25]")
    parser.add_argument("--json", action="store_true", help="print all counts instead of the table")
    options = parser.parse_args()
    try:
        config = load_config(options.recipe, tuple(options.set))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = count(config, options.micro_batch, options.step)
    print(json.dumps({"total": total(counts)} | counts, indent=1) if options.json else table(counts, options.largest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
