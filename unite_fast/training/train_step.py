"""One optimizer step, from uint8 images to new weights (docs/method.md, "One training step").

    for each micro-batch    z, L_rec = tokenize and decode;  backward of L_rec;
                            L_flow of z;                     backward of flow_weight * L_flow
    then                    clip, Muon and AdamW, EMA        (TrainState.apply_gradients)

All that trains goes through here: the trainer, `unite-fast bench`, parity with the released code, the tests.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from unite_fast.config import Config
from unite_fast.data_pipeline import Batch
from unite_fast.distributed.strategy import UNSHARDED, Strategy
from unite_fast.kernels.casts import cast_once
from unite_fast.lpips import LPIPS, dropout_masks, tap_shapes
from unite_fast.model.layers import product_weights
from unite_fast.model.unite import UNITE
from unite_fast.objective import Losses, StepDraws, draw_step, flow_losses, reconstruct
from unite_fast.randomness import Philox, Stream
from unite_fast.training.gradients import added_at_once
from unite_fast.training.parallelize import reduce_gradients
from unite_fast.training.step_timer import StepClock
from unite_fast.training.train_state import TrainState


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, on the device that trains."""

    images: Tensor
    """float32 [b, 3, S, S] in [0, 1], flipped where the step says so."""
    labels: Tensor
    """int64 [b]."""
    draws: StepDraws
    lpips_dropout: list[Tensor] | None = None
    """See `perceptual.dropout_masks`; None: no dropout."""


def make_micro_batch(images: Tensor, labels: Tensor, philox: Philox, config: Config) -> MicroBatch:
    """
    Args:
        images: uint8 [b, 3, S, S], on any device.
        labels: int64 [b].
        philox: the step's draws for these images, on the device that trains.
    """
    device = philox.positions.device
    images = images.to(device, non_blocking=True).float() / 255
    labels = labels.to(device, non_blocking=True)
    if config.data.flip:
        images = random_flip(images, philox)
    draws = draw_step(config.objective, philox, (config.model.latent_tokens, config.model.latent_channels))
    masks = None
    if config.perceptual.weight and config.perceptual.dropout:
        masks = dropout_masks(philox, tap_shapes(*images.shape[2:]))
    return MicroBatch(images, labels, draws, masks)


def random_flip(images: Tensor, philox: Philox) -> Tensor:
    """Mirror half of the images [b, 3, S, S], chosen by their places in the global batch."""
    flipped = philox.uniform(Stream.FLIP) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def accumulate_gradients(
    model: UNITE,
    micro_batches: Iterable[MicroBatch],
    count: int,
    config: Config,
    lpips: LPIPS | None = None,
    strategy: Strategy = UNSHARDED,
    clock: StepClock | None = None,
) -> Losses:
    """Add to the model's gradients those of the mean loss over `count` micro-batches of one size.

    Tokenizer and decoder go back first, which frees their activations; the flow follows. Processes add their gradients
    up in the last micro-batch, the decoder's as soon as they are complete.

    Args:
        lpips: needed where `perceptual.weight` is above 0.

    Returns:
        Mean losses of this process's images, without a gradient.

    Raises:
        ValueError: LPIPS has a weight and no network.
    """
    if config.perceptual.weight and lpips is None:
        raise ValueError(f"perceptual.weight is {config.perceptual.weight}, but no LPIPS network was given")
    clock, sums = clock or StepClock(model.device), None
    with cast_once(weights_of_products(model, lpips, config.train.precision)):
        for number, batch in enumerate(micro_batches, 1):
            last = number == count
            # Two contexts: autocast keeps weights that it has cast, and with them the first pass's graph.
            with clock.part("forward"), autocast(model.device, config.train.precision):
                reconstruction = reconstruct(model, batch.images, batch.draws, config, lpips, batch.lpips_dropout)
            reduce_gradients(model, strategy, decoder=last, rest=False)
            with clock.part("backward"):
                backward(model, reconstruction.loss / count)
            with clock.part("forward"), autocast(model.device, config.train.precision):
                flow = flow_losses(model, reconstruction.z, batch.labels, batch.draws)
            weighted = config.objective.flow_weight * flow
            reduce_gradients(model, strategy, decoder=last, rest=last)
            with clock.part("backward"):
                backward(model, weighted / count)
            total = reconstruction.loss.detach() + weighted.detach()
            losses = torch.stack([total, reconstruction.l1, flow.detach(), reconstruction.lpips]) / count
            sums = losses if sums is None else sums + losses
    total, l1, flow, lpips_loss = sums.unbind()
    return Losses(total=total, l1=l1, flow=flow, lpips=lpips_loss)


def weights_of_products(model: UNITE, lpips: LPIPS | None, precision: str) -> list[Tensor]:
    """What a step rounds to bfloat16, once for all its passes."""
    if precision != "bfloat16":
        return []
    return product_weights(model) + (lpips.product_weights() if lpips else [])


def backward(model: UNITE, loss: Tensor) -> None:
    """Add a loss's gradients to the model's."""
    # Sharded gradients are exchanged by hooks, each for itself.
    at_once = nullcontext() if isinstance(model, FSDPModule) else added_at_once(model.parameters())
    with at_once:
        loss.backward()


class TrainStep:
    """One optimizer step on this process's part of the global batch: `losses, norm = train_step(batch)`.

    Args:
        state: what the step changes.
        config: settings of the run.
        places: this process's places in the global batch; None: all of them.
        micro_batch: images of one forward pass, a divisor of the places; 0: all at once.
        lpips: needed where `perceptual.weight` is above 0.
        strategy: how the model is shared among processes.
        clock: told what each part of a step takes.
        before_micro_batch: called before each one.
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        places: slice | None = None,
        micro_batch: int = 0,
        lpips: LPIPS | None = None,
        strategy: Strategy = UNSHARDED,
        clock: StepClock | None = None,
        before_micro_batch: Callable[[], None] = lambda: None,
    ):
        self.state, self.config, self.lpips, self.strategy = state, config, lpips, strategy
        self.places = places or slice(0, config.train.batch_size)
        self.micro_batch = micro_batch or self.places.stop - self.places.start
        self.device = state.model.device
        self.clock = clock or StepClock(self.device)
        self.before_micro_batch = before_micro_batch

    def __call__(self, batch: Batch) -> tuple[Losses, Tensor]:
        """
        Returns:
            Mean losses of this process's images, and the norm of all gradients before clipping; on the device.
        """
        losses = self.accumulate(batch)
        with self.clock.part("optimizer"):
            return losses, self.state.apply_gradients()

    def accumulate(self, batch: Batch) -> Losses:
        """The gradients of a batch, which the optimizers have yet to apply."""
        count = len(batch.labels) // self.micro_batch
        return accumulate_gradients(
            self.state.model, self.micro_batches(batch), count, self.config, self.lpips, self.strategy, self.clock
        )

    def micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        for start in range(0, len(batch.labels), self.micro_batch):
            self.before_micro_batch()
            own = slice(start, start + self.micro_batch)
            places = self.places.start + torch.arange(own.start, own.stop, device=self.device)
            philox = Philox(self.config.seed, self.state.step, places)
            yield make_micro_batch(batch.images[own], batch.labels[own], philox, self.config)
