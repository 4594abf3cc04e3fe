"""A torch.profiler trace of some steps, for chrome://tracing or https://ui.perfetto.dev."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from unite_fast.config import ProfileConfig
from unite_fast.utils.files import atomic_write, make_folder, private_folder, writing


class StepProfiler:
    """Traces the steps of `profile.steps` and writes RUN/profile/rank0_stepFIRST.json.gz.

    Call `before` and `after` around every step. `close` writes a trace that the end of the run cut short.
    """

    def __init__(self, config: ProfileConfig, folder: Path, device: torch.device, print_line: Callable[[str], None]):
        self.steps, self.device, self.print_line = config.traced, device, print_line
        self.use(folder)
        self.running: profile | None = None

    def use(self, folder: Path) -> None:
        """Write to this run folder from now on: it was moved."""
        self.folder = folder / "profile"

    def before(self, step: int) -> None:
        """Call before step `step`, 1-based."""
        if self.running is None and step in self.steps:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.first_step = step
            self.running = profile(activities=activities, record_shapes=True)
            self.running.start()

    def after(self, step: int) -> None:
        """Call after step `step`.

        Raises:
            UserError: the trace cannot be written.
        """
        if self.running is not None and step + 1 not in self.steps:
            self.close()

    def close(self) -> None:
        if self.running is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        trace, self.running = self.running, None
        trace.stop()
        path = self.folder / f"rank0_step{self.first_step}.json.gz"
        with writing(path):
            make_folder(self.folder)
        # torch compresses by the suffix .gz.
        with atomic_write(path) as partial, private_folder(partial) as private:
            trace.export_chrome_trace(str(private / path.name))
            os.replace(private / path.name, partial)
        self.print_line(f"profile: {path}; open it in chrome://tracing or https://ui.perfetto.dev")
