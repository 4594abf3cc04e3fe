"""The learning rate as a function of the optimizer step."""

import math

from unite_fast.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, batch_size: int, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based), for both optimizers. It scales with the batch size."""
    scale = batch_size / config.reference_batch if config.reference_batch else 1.0
    lr, lr_2, lr_final = (scale * rate for rate in (config.lr, config.lr_2, config.lr_final))
    if step < config.warmup_steps:
        return lr * (step / config.warmup_steps)
    if step < config.hold_until or not config.decay_until:
        return lr
    if step < config.decay_until:
        return cosine(lr, lr_2, step, config.hold_until, config.decay_until)
    if not config.final_until or step < config.final_from:
        return lr_2
    if step < config.final_until:
        return cosine(lr_2, lr_final, step, config.final_from, config.final_until)
    return lr_final


def cosine(start: float, end: float, step: int, first: int, last: int) -> float:
    """Half a cosine from `start` at step `first` to `end` at step `last`."""
    progress = (step - first) / (last - first)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
