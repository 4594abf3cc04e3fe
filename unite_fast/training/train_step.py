"""One optimizer step, from a batch of data to updated weights (docs/method.md, "One training step").

    for each micro-batch        draws = all random numbers of these samples
                                z, L_rec = tokenize, decode, compare        backward of L_rec
                                L_flow of z, F draws per sample             backward of flow_weight * L_flow
    in the last micro-batch     gradients are reduced over the ranks
    then                        clip, Muon and AdamW, EMA                   (TrainState.apply_gradients)

The terms of the loss are in objective.py, the passes over molecules in molecule_batches.py. The trainer, `unite-fast
bench`, parity with the released code and the tests all use this step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from unite_fast.config import MOLECULES, Config
from unite_fast.data_pipeline import Batch
from unite_fast.distributed.strategy import UNSHARDED, Strategy
from unite_fast.kernels.casts import cast_once
from unite_fast.kernels.float8 import float8_matmuls
from unite_fast.lpips import LPIPS
from unite_fast.model.layers import matmul_weights
from unite_fast.model.unite import UNITE
from unite_fast.objective import (
    Losses,
    MicroBatch,
    Reconstruction,
    draw_step,
    flow_losses,
    reconstruct,
    reconstruct_molecules,
)
from unite_fast.randomness import Philox, Stream, at_step
from unite_fast.training.cuda_graph import GraphedPasses
from unite_fast.training.gradients import foreach_accumulation
from unite_fast.training.molecule_batches import MoleculeBatches
from unite_fast.training.parallelize import reduce_gradients
from unite_fast.training.step_timer import StepClock
from unite_fast.training.train_state import TrainState


def accumulate_gradients(
    model: UNITE,
    micro_batches: Iterable[MicroBatch],
    count: int,
    config: Config,
    lpips: LPIPS | None = None,
    strategy: Strategy = UNSHARDED,
    clock: StepClock | None = None,
) -> Losses:
    """Add the gradients of the mean loss over `count` micro-batches to the model's (see `MicroBatch.divisor`).

    The reconstruction loss has its own backward pass, which frees the activations of tokenizer and decoder before the
    flow pass. Ranks reduce their gradients in the last micro-batch, the decoder's as soon as they are complete.

    Args:
        lpips: required if `perceptual.weight` is above 0.

    Returns:
        Mean losses over this rank's samples, detached.

    Raises:
        ValueError: `perceptual.weight` is above 0 without an LPIPS network.
    """
    if config.perceptual.weight and lpips is None:
        raise ValueError(f"perceptual.weight is {config.perceptual.weight}, but no LPIPS network was given")
    clock, sums = clock or StepClock(model.device), None
    # FSDP's hooks accumulate sharded gradients themselves.
    to_accumulate = None if isinstance(model, FSDPModule) else list(model.parameters())
    precision, in_float8 = config.train.network_precision, config.train.precision == "float8"
    with cast_once(weights_to_cast(model, lpips, precision)), float8_matmuls(in_float8):
        for number, batch in enumerate(micro_batches, 1):
            last = number == count
            # One autocast context per pass: it caches casts of weights, and with them the graph of its pass.
            with clock.measure("forward"), autocast(model.device, precision):
                reconstruction = reconstruct_batch(model, batch, config, lpips)
            divisor = count if batch.divisor is None else batch.divisor
            reduce_gradients(model, strategy, decoder=last, others=False)
            with clock.measure("backward"):
                backward(reconstruction.loss / divisor, to_accumulate)

            with clock.measure("forward"), autocast(model.device, precision):
                flow = flow_losses(model, reconstruction.z, batch.labels, batch.draws, batch.lengths)
            weighted_flow = config.objective.flow_weight * flow
            reduce_gradients(model, strategy, decoder=last, others=last)
            with clock.measure("backward"):
                backward(weighted_flow / divisor, to_accumulate)

            total = reconstruction.loss.detach() + weighted_flow.detach()
            terms = [reconstruction.l1, flow.detach(), reconstruction.lpips, reconstruction.cross_entropy]
            losses = torch.stack([total, *terms, reconstruction.latent_square]) / divisor
            sums = losses if sums is None else sums + losses
    assert sums is not None, "no micro-batches"
    return Losses(*sums.unbind())


def reconstruct_batch(model: UNITE, batch: MicroBatch, config: Config, lpips: LPIPS | None) -> Reconstruction:
    """The reconstruction loss of images or molecules."""
    if config.model.modality == MOLECULES:
        return reconstruct_molecules(model, batch.data, batch.lengths, batch.draws, config)
    return reconstruct(model, batch.data, batch.draws, config, lpips, batch.lpips_dropout)


class TrainStep:
    """One optimizer step on this rank's slice of the global batch: `losses, norm = train_step(batch)`.

    Args:
        state: weights, optimizers, averages and step number, all of which the step updates.
        config: settings of the run.
        batch_slice: this rank's slice of the global batch; None: all of it.
        micro_batch: samples per forward pass, a divisor of the slice's length; 0: all at once. Passes over molecules of
            one size may have fewer.
        lpips: required if `perceptual.weight` is above 0.
        strategy: how the model is sharded.
        clock: measures forward, backward and optimizer.
        before_micro_batch: called at the start of a step and before each micro-batch.
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        batch_slice: slice | None = None,
        micro_batch: int = 0,
        lpips: LPIPS | None = None,
        strategy: Strategy = UNSHARDED,
        clock: StepClock | None = None,
        before_micro_batch: Callable[[], None] = lambda: None,
    ):
        self.state, self.config, self.lpips, self.strategy = state, config, lpips, strategy
        self.batch_slice = batch_slice or slice(0, config.train.batch_size)
        self.micro_batch = micro_batch or self.batch_slice.stop - self.batch_slice.start
        self.device = state.model.device
        self.clock = clock or StepClock(self.device)
        self.before_micro_batch = before_micro_batch
        self.molecules = MoleculeBatches(config, self.device) if config.model.modality == MOLECULES else None
        self.passes: Callable[..., Losses] = self.run_passes
        if config.train.cuda_graph:
            self.passes = GraphedPasses(self.run_passes, state.parameters, self.device, self.clock)

    def __call__(self, batch: Batch) -> tuple[Losses, Tensor]:
        """
        Returns:
            Mean losses over this rank's images, and the norm of all gradients before clipping; float32 scalars on the
            device.
        """
        losses = self.accumulate(batch)
        with self.clock.measure("optimizer"):
            return losses, self.state.apply_gradients()

    def accumulate(self, batch: Batch) -> Losses:
        """Forward and backward over all micro-batches, without the optimizers."""
        self.before_micro_batch()  # replays of a CUDA graph do not call it
        # Draws depend on the position in the global batch, so they are the same for every number of ranks.
        positions = torch.arange(self.batch_slice.start, self.batch_slice.stop, device=self.device)
        inputs = batch.data, batch.labels, at_step(positions, self.state.step)
        if self.molecules is not None:
            inputs = *inputs, self.molecules.mean_atoms(batch.labels)
        return self.passes(*inputs)

    def run_passes(self, data: Tensor, labels: Tensor, positions: Tensor, *mean_atoms: Tensor) -> Losses:
        """`accumulate` for images uint8 [b, 3, S, S] or atoms float32 [b, T, 4], labels int64 [b], the samples'
        positions in this step, int64 [b], and of molecules `MoleculeBatches.mean_atoms`."""
        batch = data, labels, positions
        if self.molecules is not None:
            passes = self.molecules.passes(labels, self.micro_batch)
            micro_batches, count = (self.molecules.make(one, *batch, *mean_atoms) for one in passes), len(passes)
        else:
            micro_batches, count = self.micro_batches(*batch), len(labels) // self.micro_batch
        return accumulate_gradients(
            self.state.model, self.announced(micro_batches), count, self.config, self.lpips, self.strategy, self.clock
        )

    def micro_batches(self, *batch: Tensor) -> Iterator[MicroBatch]:
        for images, labels, positions in zip(*(part.split(self.micro_batch) for part in batch), strict=True):
            yield make_micro_batch(images, labels, Philox(self.config.seed, 0, positions), self.config)

    def announced(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in micro_batches:
            self.before_micro_batch()
            yield batch


def make_micro_batch(images: Tensor, labels: Tensor, philox: Philox, config: Config) -> MicroBatch:
    """
    Args:
        images: uint8 [b, 3, S, S], on any device.
        labels: int64 [b].
        philox: random numbers for this step and these positions, on the training device.
    """
    device = philox.positions.device
    images = images.to(device, non_blocking=True).float() / 255
    labels = labels.to(device, non_blocking=True)
    if config.data.flip:
        images = random_flip(images, philox)
    draws = draw_step(config.objective, philox, (config.model.latent_tokens, config.model.latent_channels))
    return MicroBatch(images, labels, draws, philox if config.perceptual.dropout else None)


def random_flip(images: Tensor, philox: Philox) -> Tensor:
    """Mirror each image of [b, 3, S, S] with probability 1/2."""
    flipped = philox.uniform(Stream.FLIP) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def weights_to_cast(model: UNITE, lpips: LPIPS | None, precision: str) -> list[Tensor]:
    """Weights to cast to bfloat16 once per step, for all its passes; none in float32."""
    if precision != "bfloat16":
        return []
    return [*matmul_weights(model), *(lpips.matmul_weights() if lpips else [])]


def backward(loss: Tensor, to_accumulate: list[nn.Parameter] | None) -> None:
    """Add the gradients of a loss to those of the parameters; None: hooks of the parameters do that."""
    with nullcontext() if to_accumulate is None else foreach_accumulation(to_accumulate):
        loss.backward()
