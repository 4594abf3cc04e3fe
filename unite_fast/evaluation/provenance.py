"""JSON entries that record the origin of a result: checkpoint, sampling settings, machine and versions."""

import platform
from dataclasses import asdict

import numpy as np
import torch

import unite_fast
from unite_fast.config import SamplingConfig
from unite_fast.distributed.process_group import Ranks
from unite_fast.sampling.pipeline import TrainedModel, weights_sha256
from unite_fast.sampling.solvers import ADAPTIVE_SOLVERS, TIME_GRID_SOLVERS


def checkpoint_info(model: TrainedModel, path: str) -> dict:
    """The checkpoint and its weights."""
    return {
        "path": path,
        "weights_sha256": weights_sha256(model),
        "weights": "EMA",
        "step": model.step,
        "name": model.config.name,
    }


def sampling_info(config: SamplingConfig) -> dict:
    """Sampling settings; None for those that the solver does not use."""
    settings = asdict(config)
    if config.solver in ADAPTIVE_SOLVERS:
        settings["steps"] = None
    if config.solver not in TIME_GRID_SOLVERS:
        settings["time_shift"] = None
    return settings


def machine_info(device: torch.device, ranks: Ranks) -> dict:
    """Number of ranks, device and versions."""
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
