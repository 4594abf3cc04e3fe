"""The learning rate as a function of the optimizer step."""

import math

from unite_fast.config import LINEAR, NONE, ScheduleConfig


def learning_rate(config: ScheduleConfig, batch_size: int, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based), for both optimizers. It follows the batch size."""
    scale = batch_scale(config, batch_size)
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


def batch_scale(config: ScheduleConfig, batch_size: int) -> float:
    """Factor of the rates at this batch size: batch / reference (linear: Goyal et al., arXiv 1706.02677), its square
    root (for adaptive optimizers: Malladi et al., arXiv 2205.10287) or 1."""
    if not config.reference_batch or config.batch_rule == NONE:
        return 1.0
    ratio = batch_size / config.reference_batch
    return ratio if config.batch_rule == LINEAR else math.sqrt(ratio)


def describe_rate(config: ScheduleConfig, batch_size: int) -> str:
    """The peak rate and where it comes from, in a line for people."""
    peak = config.lr * batch_scale(config, batch_size)
    if not config.reference_batch or config.batch_rule == NONE:
        return f"learning rate {peak:.3g}, the same at every batch size"
    ratio = f"{batch_size} / {config.reference_batch}"
    ratio = ratio if config.batch_rule == LINEAR else f"sqrt({ratio})"
    return f"learning rate {peak:.3g}: {config.lr:.3g} x {ratio} ({config.batch_rule})"


def cosine(start: float, end: float, step: int, first: int, last: int) -> float:
    """Half a cosine from `start` at step `first` to `end` at step `last`."""
    progress = (step - first) / (last - first)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
