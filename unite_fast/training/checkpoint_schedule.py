"""When a run saves a checkpoint: by steps, by minutes, or by whichever comes first."""

from unite_fast.config import TrainConfig


class CheckpointSchedule:
    """Steps are the same on all ranks, clocks are not: rank 0 alone asks `minutes_due`, and all ranks save at the step
    for which it tells them.

    Attributes:
        saved_step: step of this process's last save; None before the first.
    """

    def __init__(self, config: TrainConfig, now: float):
        """
        Args:
            now: seconds of a clock that never goes back, such as `time.monotonic`; so in the other methods.
        """
        self.every, self.seconds = config.checkpoint_every, 60 * config.checkpoint_minutes
        self.saved_step: int | None = None
        self.saved_at = now

    def due(self, step: int) -> bool:
        """Whether the steps call for a checkpoint after this one (train.checkpoint_every)."""
        return self.every > 0 and step % self.every == 0

    def minutes_due(self, now: float) -> bool:
        """Whether train.checkpoint_minutes have passed since the last checkpoint, or since the start."""
        return self.seconds > 0 and now - self.saved_at >= self.seconds

    def saved(self, step: int, now: float) -> None:
        """Note a save, whatever called for it."""
        self.saved_step, self.saved_at = step, now
