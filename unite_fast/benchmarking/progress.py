"""One line on stderr while steps are timed: on a terminal it is written over, in a pipe there is one now and then. Not
`data_pipeline.progress`: its bar is drawn by a thread, which would run beside the steps that are timed."""

import math
import sys
import time

TERMINAL_SECONDS, PIPE_SECONDS = 0.5, 5.0
"""Between two lines. Writing takes the trainer's thread some 10 microseconds."""


class ProgressLine:
    def __init__(self, speaks: bool, batch_size: int):
        """`speaks`: whether this process is the one that prints."""
        self.terminal = sys.stderr.isatty()
        self.every = TERMINAL_SECONDS if self.terminal else PIPE_SECONDS
        self.speaks, self.batch_size = speaks, batch_size
        self.said = -self.every
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self.begun = time.perf_counter()

    def show(self, what: str, done: int, left: int | None = None, force: bool = False) -> None:
        """
        Args:
            done: steps since the start.
            left: steps still to come, if it is known.
        """
        now = time.perf_counter()
        if not self.speaks or (now - self.said < self.every and not force):
            return
        self.said = now
        if done and left is not None:
            seconds = (now - self.begun) / done
            what += f"  {number(self.batch_size / seconds)} images/s  {seconds * left:.0f} s left"
        sys.stderr.write(f"\r{what:<70}" if self.terminal else what + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave an empty line on a terminal."""
        if self.speaks and self.terminal:
            sys.stderr.write(f"\r{'':<70}\r")
            sys.stderr.flush()


def number(value: float) -> str:
    """Three digits, and all before the point."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 1
    return f"{value:.{min(max(digits, 0), 6)}f}"
