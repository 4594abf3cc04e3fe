"""Forward and backward passes of a step as one CUDA graph (`train.cuda_graph`).

The host launches more than a thousand kernels for a micro-batch. With few images per GPU, that takes longer than the
kernels do. A CUDA graph contains all of them, and the host launches only the graph.

    first WARMUP steps      run as usual: kernels are compiled, libraries allocate their workspaces
    next step               is captured, then replayed
    the step after it       is replayed and also run as usual, and both must agree
    all other steps         are replayed

A graph reads and writes the same memory each time. So it contains the passes from the images, labels and random keys of
a batch, which are copied to fixed places, to the gradients, which stay where they are. All that changes from step to
step must be in these inputs or in the weights: a number that Python computes is the same in every replay. The
optimizers run after the graph, as usual.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from unite_fast.distributed.dtensor import local
from unite_fast.distributed.process_group import current_ranks
from unite_fast.errors import UserError
from unite_fast.objective import Losses
from unite_fast.training.step_timer import StepClock

WARMUP = 3
SETTLED = WARMUP + 2
"""Steps before those that are only replayed."""
TOLERANCE = 0.01
"""Largest difference of a replay's losses and gradients from a usual step's, relative to the norm of all of them. The
same code computes both; attention's backward pass sums in any order. Other random numbers would differ by about 1."""

Passes = Callable[..., Losses]
"""(images, labels, positions) -> losses. Sets the gradients of the model's parameters."""


class Recorder:
    """Captures functions as a CUDA graph. They run on its stream before too: autograd and libraries keep state per
    stream, which a capture must not create."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def run(self, function: Callable[[], Losses]) -> Losses:
        """Run a function as usual."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Losses]) -> Losses:
        """Record the kernels of a function, without running them. `replay` fills the tensors of the result."""
        # thread_local: threads that load images may allocate pinned memory meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self.graph.replay()


class GraphedPasses:
    """`passes` as a CUDA graph, after some usual steps.

    Args:
        passes: the function to record. Its inputs have the same shapes in every step.
        parameters: whose gradients it sets, from None.
        clock: counts the time of a replay as "backward"; the graph is one launch.
    """

    def __init__(
        self, passes: Passes, parameters: Iterable[nn.Parameter], device: torch.device, clock: StepClock
    ) -> None:
        self.passes, self.parameters, self.device, self.clock = passes, list(parameters), device, clock
        self.recorder = Recorder(device)
        self.steps = 0
        self.inputs: list[Tensor] = []
        self.losses: Losses | None = None
        self.gradients: list[Tensor | None] = []

    def __call__(self, *inputs: Tensor) -> Losses:
        """The inputs of `passes` -> losses; sets the parameters' gradients.

        Raises:
            UserError: a replay differs from a usual step.
            ValueError: a parameter has a gradient already. A replay could not add to it.
        """
        if any(parameter.grad is not None for parameter in self.parameters):
            raise ValueError("a CUDA graph sets gradients and cannot add to earlier ones; clear them first")
        self.steps += 1
        if self.steps <= WARMUP:
            return self.recorder.run(lambda: self.passes(*inputs))
        if self.losses is None:
            self.capture(inputs)
        for place, value in zip(self.inputs, inputs, strict=True):
            assert place.shape == value.shape, "a step's batch has another shape than the captured one"
            place.copy_(value, non_blocking=True)
        with self.clock.measure("backward"):
            self.recorder.replay()
        if self.steps == SETTLED:
            self.check()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        if self.steps == SETTLED and self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the usual step: the graph has memory of its own
        assert self.losses is not None
        return Losses(*(loss.clone() for loss in values(self.losses)))

    def capture(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [value.to(self.device, copy=True) for value in inputs]
        with self.clock.paused():
            self.losses = self.recorder.capture(lambda: self.passes(*self.inputs))
        self.gradients = [parameter.grad for parameter in self.parameters]

    def check(self) -> None:
        """Compare the last replay with a usual step on the same inputs, which the graph was not captured with."""
        assert self.losses is not None
        for parameter in self.parameters:
            parameter.grad = None
        with self.clock.paused():
            expected = self.recorder.run(lambda: self.passes(*self.inputs))
        pairs = list(zip(self.gradients, (parameter.grad for parameter in self.parameters), strict=True))
        if any((one is None) != (other is None) for one, other in pairs):
            raise UserError("train.cuda_graph: the CUDA graph and a usual step give gradients to other parameters")
        gradients = [(local(one), local(other)) for one, other in pairs if one is not None and other is not None]
        differences = {
            "losses": relative_difference(list(zip(values(self.losses), values(expected), strict=True))),
            "gradients": relative_difference(gradients),
        }
        for name, difference in differences.items():
            # The worst of all ranks, so that all stop together.
            worst = max(current_ranks().gather(difference))
            if worst > TOLERANCE:
                raise UserError(
                    f"train.cuda_graph: {name} of the CUDA graph differ by {worst:.1%} from those of a usual step; set "
                    "train.cuda_graph=false, and please report it"
                )


def values(losses: Losses) -> tuple[Tensor, ...]:
    return losses.total, losses.l1, losses.flow, losses.lpips, losses.cross_entropy, losses.latent_square


def relative_difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Norm of all differences over the norm of all second tensors. 0 if both sides contain numbers that are not finite,
    which is for the trainer to report; infinite if one does. Overwrites the second tensors."""
    actual, expected = (list(side) for side in zip(*pairs, strict=True))
    norms = [float(get_total_norm(side)) for side in (actual, expected)]
    if not any(math.isfinite(norm) for norm in norms):
        return 0.0
    torch._foreach_sub_(expected, actual)
    ratio = float(get_total_norm(expected)) / max(norms[1], 1e-30)
    return ratio if math.isfinite(ratio) else math.inf
