"""Progress on stderr while steps are timed: one line, overwritten on a terminal, repeated at intervals in a pipe. Not
`utils.progress`, whose bar is drawn by a thread that would disturb the timing."""

import math
import sys
import time

TERMINAL_SECONDS, PIPE_SECONDS = 0.5, 5.0
"""Seconds between two lines. Writing one takes about 10 microseconds."""


class ProgressLine:
    def __init__(self, enabled: bool, batch_size: int, rate: str):
        """`enabled`: whether this process prints. `rate`: what it counts, images/s or molecules/s."""
        self.terminal = sys.stderr.isatty()
        self.every = TERMINAL_SECONDS if self.terminal else PIPE_SECONDS
        self.enabled, self.batch_size, self.rate = enabled, batch_size, rate
        self.printed = -self.every
        self.start()

    def start(self) -> None:
        """Start measuring the speed."""
        self.started = time.perf_counter()

    def show(self, text: str, done: int, left: int | None = None, force: bool = False) -> None:
        """Print `text` with speed and remaining time, unless the last line is recent.

        Args:
            done: steps since the start.
            left: remaining steps, if known.
        """
        now = time.perf_counter()
        if not self.enabled or (now - self.printed < self.every and not force):
            return
        self.printed = now
        if done and left is not None:
            seconds = (now - self.started) / done
            text += f"  {number(self.batch_size / seconds)} {self.rate}  {seconds * left:.0f} s left"
        sys.stderr.write(f"\r{text:<70}" if self.terminal else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Clear the line on a terminal."""
        if self.enabled and self.terminal:
            sys.stderr.write(f"\r{'':<70}\r")
            sys.stderr.flush()


def number(value: float) -> str:
    """At least three significant digits, without an exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 1
    return f"{value:.{min(max(digits, 0), 6)}f}"
