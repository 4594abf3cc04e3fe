"""Machine-independent costs of one training step: saved bytes, operators and bytes moved. `unite-fast bench` measures
times.

Counted on the trainer's own step (unite_fast/training/train_step.py), eager: bytes that autograd saves for each of the
two backward passes (saved-tensor hooks; without parameters and buffers, each storage once), and operators with the
bytes of their inputs and outputs (dispatch mode; without views, detach and empty tensors). Each of our ops counts as
one operator; docs/performance.md has the traffic inside them.
"""

import argparse
import json

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unite_fast.config import Config
from unite_fast.data_pipeline import Batch, open_source
from unite_fast.kernels import backend
from unite_fast.lpips import random_lpips
from unite_fast.model.unite import UNITE
from unite_fast.planning import flops
from unite_fast.recipes import from_tree
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import TrainStep

EXAMPLES = """examples:
  python benchmarks/step.py --size bench                        # the fast backends
  python benchmarks/step.py --size bench --kernels reference
  python benchmarks/step.py --size tiny --batch 4 --lpips --json
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
"""Operators that move no data, besides views."""


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


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that forward passes save for backward, without the parameters and buffers of a module.

    Attributes:
        passes: bytes of each forward pass; a new one starts after a backward pass.
    """

    def __init__(self, module: torch.nn.Module):
        self.own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
        self.passes: list[int] = []
        self.backward = True
        super().__init__(self.pack, self.unpack)

    def pack(self, x: Tensor) -> Tensor:
        if self.backward:
            self.passes.append(0)
            self.backward, self.storages = False, {}
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own and storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
            self.passes[-1] += storage.nbytes()
        return x

    def unpack(self, x: Tensor) -> Tensor:
        self.backward = True
        return x


def make_step(size: str, batch: int, lpips: bool, device: torch.device) -> tuple[TrainStep, Batch]:
    """The trainer's step in bfloat16, and a batch for it."""
    tree = {
        "model": SIZES[size],
        "train": {"batch_size": batch, "compile": False},
        "perceptual": {"weight": float(lpips)},
    }
    config = from_tree(Config, tree)
    state = TrainState(UNITE.create(config.model, seed=0).to(device), config)
    network = random_lpips(config.perceptual).to(device) if lpips else None
    ids = torch.arange(batch)
    images, labels = open_source("synthetic", "", config.model.image_size, "test", config.model.num_classes).read(ids)
    return TrainStep(state, config, lpips=network), Batch(images, labels, ids)


def count(step: TrainStep, batch: Batch) -> dict:
    step(batch)  # allocates the optimizer state
    with Traffic() as traffic:
        step(batch)
    saved = Saved(step.state.model)
    with saved:
        step.accumulate(batch)
    step.state.model.zero_grad(set_to_none=True)
    images = len(batch.labels)
    reconstruction, flow = (size / images / 1e6 for size in saved.passes)
    return {
        "saved_mb_per_image": reconstruction + flow,
        "saved_reconstruction_mb_per_image": reconstruction,
        "saved_flow_mb_per_image": flow,
        "moved_mb_per_image": traffic.bytes / images / 1e6,
        "ops_per_step": traffic.ops,
        "gflop_per_image": flops.image_flops(step.config) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="bench", help="encoder, decoder and image size [bench]")
    parser.add_argument("--batch", type=int, default=8, help="images per step [8]")
    parser.add_argument("--kernels", choices=backend.available(), default="auto", help="which backend runs [auto]")
    parser.add_argument("--lpips", action="store_true", help="with LPIPS, random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    with backend.using(options.kernels):
        counts = {
            "size": options.size,
            "batch": options.batch,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "kernels": backend.backend_on(device),
            "lpips": options.lpips,
            "torch": torch.__version__,
            **count(*make_step(options.size, options.batch, options.lpips, device)),
        }
    if options.json:
        print(json.dumps(counts, indent=1))
        return
    for name, value in counts.items():
        print(f"{name:<36}{f'{value:.1f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
