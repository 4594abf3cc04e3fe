"""For the JSON of a result: the checkpoint, sampling settings, machine and versions behind it."""

import platform
from dataclasses import asdict

import numpy as np
import torch

import unite_fast
from unite_fast.config import SamplingConfig
from unite_fast.distributed.process_group import Ranks
from unite_fast.sampling.pipeline import TrainedUNITE, weights_sha256


def described_checkpoint(model: TrainedUNITE, path: str) -> dict:
    """For the JSON of a result: which weights it is of."""
    return {
        "path": path,
        "weights_sha256": weights_sha256(model),
        "weights": "EMA",
        "step": model.step,
        "name": model.config.name,
    }


def described_sampling(config: SamplingConfig) -> dict:
    """For the JSON of a result: the settings, None for those that the solver does not use."""
    settings = asdict(config)
    if config.solver == "dopri5":
        settings["steps"] = None
    if config.solver not in ("euler", "heun"):
        settings["time_shift"] = None
    return settings


def described_machine(device: torch.device, ranks: Ranks) -> dict:
    """For the JSON of a result: what computed it."""
    return {"processes": ranks.world, "device": device_name(device), "versions": versions()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def versions() -> dict[str, str]:
    return {
        "unite_fast": unite_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
