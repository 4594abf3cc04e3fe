"""Trace files: an .npz without pickles with inputs and results of the released code (docs/method.md, "The trace file").

Shapes: B images, N latent tokens, C latent channels, F flow draws, S image size.
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unite_fast.config import Config
from unite_fast.errors import UserError, require
from unite_fast.interop.official import released_model
from unite_fast.model.unite import UNITE
from unite_fast.objective import StepDraws
from unite_fast.recipes import from_tree
from unite_fast.sampling.solvers import DOPRI5_ATOL, DOPRI5_RTOL
from unite_fast.utils.npz import read_npz
from unite_fast.utils.parse_json import check_kind, parse_json

SOLVERS = {"euler": "euler", "heun2": "heun", "dopri5": "dopri5"}
"""torchdiffeq's name -> our name."""

DRAWS = {
    "registers": "registers",
    "recon_time": "recon_t",
    "decoder_noise_mask": "decoder_noise_mask",
    "decoder_noise_time": "decoder_noise_t",
    "decoder_noise": "decoder_noise",
    "flow_time": "flow_t",
    "flow_noise": "flow_noise",
    "label_drop": "label_drop",
}
"""Field of `StepDraws` -> its name in a trace."""


@dataclass
class _Losses:
    lr: Annotated[float, Field(ge=0, lt=1e6)]
    l1: Annotated[float, Field(ge=0, lt=1e30)]
    flow: Annotated[float, Field(ge=0, lt=1e30)]
    total: Annotated[float, Field(ge=0, lt=1e30)]
    grad_norm: Annotated[float, Field(gt=0, lt=1e30)]


@dataclass
class _Sampling:
    num_time_points: Annotated[int, Field(ge=2, le=10_000)]


@dataclass
class _Meta:
    """What meta_json has beside the settings that `from_tree` checks."""

    losses: Annotated[list[_Losses], Field(min_length=1, max_length=10_000)]
    sampling: _Sampling
    muon_params: list[str] = field(default_factory=list)
    adamw_params: list[str] = field(default_factory=list)


class Trace:
    """A checked trace file.

    Args:
        device: device of its tensors.

    Attributes:
        arrays: all arrays by name.
        meta: settings and losses.

    Raises:
        UserError: not a trace, or an incomplete one.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        self.path, self.device = Path(path), torch.device(device)
        require(self.path.is_file(), f"there is no trace {path}")
        require(zipfile.is_zipfile(self.path), f"{path} is not a trace: it is not an .npz file, or is incomplete")
        try:
            self.arrays = read_npz(self.path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not a trace, a readable .npz file without pickles: {error}") from error
        try:
            self.meta = parse_json(self["meta_json"].tobytes())
        except ValueError as error:
            raise UserError(f"{path} is not a trace: meta_json is not JSON") from error

    def __getitem__(self, name: str) -> np.ndarray:
        require(name in self.arrays, f"{self.path} is not a trace of the known format: it lacks {name}")
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        try:
            return torch.from_numpy(self[name]).to(self.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path}: {name} is not an array of numbers that torch knows") from error

    def shaped(self, name: str, *shape: int) -> Tensor:
        tensor = self.tensor(name)
        require(tuple(tensor.shape) == shape, f"{self.path}: {name} is {list(tensor.shape)}, not {list(shape)}")
        return tensor

    def numbers(self, name: str, *shape: int) -> Tensor:
        """An input of the network: float32."""
        tensor = self.shaped(name, *shape)
        require(tensor.dtype == torch.float32, f"{self.path}: {name} is {tensor.dtype}, not float32")
        require(bool(tensor.isfinite().all()), f"{self.path}: {name} has values that are not finite")
        return tensor

    def mask(self, name: str, *shape: int) -> Tensor:
        """bool, from values that are 0 or 1."""
        tensor = self.shaped(name, *shape)
        require(bool(((tensor == 0) | (tensor == 1)).all()), f"{self.path}: {name} has values other than 0 and 1")
        return tensor.bool()

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All arrays whose name starts with `prefix`, by the rest of the name; at least one."""
        tensors = {name.removeprefix(prefix): self.tensor(name) for name in self.arrays if name.startswith(prefix)}
        require(bool(tensors), f"{self.path} is not a trace of the known format: it lacks {prefix}...")
        return tensors

    def images(self) -> Tensor:
        """float32 [B, 3, S, S] in [0, 1]."""
        pixels = self.tensor("in/images_uint8")
        square = pixels.dim() == 4 and pixels.shape[1] == 3 and pixels.shape[2] == pixels.shape[3]
        require(square and len(pixels) > 0, f"{self.path}: in/images_uint8 is {list(pixels.shape)}, not [B, 3, S, S]")
        require(pixels.dtype == torch.uint8, f"{self.path}: in/images_uint8 is {pixels.dtype}, not uint8")
        return pixels.float() / 255

    def labels(self, config: Config) -> Tensor:
        """int64 [B]."""
        labels = self.shaped("in/labels", config.train.batch_size)
        require(not labels.is_floating_point(), f"{self.path}: in/labels is {labels.dtype}, not whole numbers")
        labels = labels.long()
        inside = bool(((labels >= 0) & (labels < config.model.num_classes)).all())
        require(inside, f"{self.path}: in/labels holds a class that is not one of 0..{config.model.num_classes - 1}")
        return labels

    def draws(self, step: int, config: Config) -> StepDraws:
        batch, latents = config.train.batch_size, (config.model.latent_tokens, config.model.latent_channels)
        flow_draws = config.objective.flow_draws
        shapes = {
            "registers": (batch, *latents),
            "decoder_noise": (batch, *latents),
            "flow_time": (flow_draws, batch),
            "flow_noise": (flow_draws, batch, *latents),
            "label_drop": (flow_draws, batch),
        }
        draws = {}
        for ours, name in DRAWS.items():
            read = self.mask if ours in ("decoder_noise_mask", "label_drop") else self.numbers
            draws[ours] = read(f"step{step}/{name}", *shapes.get(ours, (batch,)))
        return StepDraws(**draws)

    def model(self, config: Config) -> UNITE:
        """The model with the weights before the first step."""
        return released_model(config.model, self.below("state/"), str(self.path)).to(self.device)

    def config(self) -> Config:
        """The settings of the trace as our `Config`.

        Raises:
            UserError: a setting is missing or not supported.
        """
        try:
            self._check_supported()
            config = self._config()
            check_kind(_Meta, self.meta)
            return config
        except ValueError as error:
            raise UserError(f"{self.path} is not a trace of the known format: {error}") from error
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{self.path} is not a trace of the known format: meta_json lacks {error}") from error

    def _check_supported(self) -> None:
        released, optim, sampling = self.meta["config"], self.meta["optim"], self.meta["sampling"]
        muon, adamw = optim["muon"], optim["adamw"]
        method = sampling["method"]
        facts = {
            "config.timestep_shift_mode": (released.get("timestep_shift_mode", "manual"), ("manual",)),
            "sampling.method": (method, tuple(SOLVERS)),
            "optim.adamw.weight_decay": (adamw.get("weight_decay", 0.0), (0.0,)),
            "optim.muon.weight_decay": (muon.get("weight_decay", 0.0), (0.0,)),
            "optim.muon.adjust_lr_fn": (muon.get("adjust_lr_fn", "match_rms_adamw"), ("match_rms_adamw",)),
            "optim.muon.eps": (muon.get("eps", adamw["eps"]), (adamw["eps"],)),
            "optim.muon.nesterov": (muon.get("nesterov", True), (True,)),
            "optim.muon.ns_steps": (muon.get("ns_steps", 5), (5,)),
        }
        if method == "dopri5":
            facts["sampling.rtol"] = (sampling.get("rtol", DOPRI5_RTOL), (DOPRI5_RTOL,))
            facts["sampling.atol"] = (sampling.get("atol", DOPRI5_ATOL), (DOPRI5_ATOL,))
        for name, (value, supported) in facts.items():
            known = " or ".join(str(choice) for choice in supported)
            require(value in supported, f"{self.path}: {name} is {value!r}; supported: {known}")
        losses = self.meta["losses"]
        require(isinstance(losses, list) and bool(losses), f"{self.path} is not a trace of the known format: no losses")
        for theirs in losses:
            lacking = ", ".join(sorted({"lr", "l1", "flow", "total", "grad_norm"} - set(theirs)))
            require(not lacking, f"{self.path} is not a trace of the known format: losses lack {lacking}")

    def _config(self) -> Config:
        meta, released, optim = self.meta, self.meta["config"], self.meta["optim"]
        encoder, decoder, schedule, sampling = meta["encoder"], meta["decoder"], optim["schedule"], meta["sampling"]
        batch, _, _, size = self.images().shape
        return from_tree(
            Config,
            {
                "name": f"parity-{meta['name']}",
                "model": {
                    "image_size": size,
                    "patch_size": released["patch_size"],
                    "latent_channels": released["diffusion_input_dim"],
                    "num_classes": meta["num_classes"],
                    "encoder": {
                        "width": encoder["hidden_size"],
                        "depth": encoder["depth"],
                        "heads": encoder["num_heads"],
                        "in_context_tokens": released["in_content_len"],
                        "in_context_start": released["in_content_start"],
                        "qk_norm": released["use_qknorm_encoder"],
                    },
                    "decoder": {
                        "width": decoder["hidden_size"],
                        "depth": decoder["depth"],
                        "heads": decoder["num_heads"],
                        "mlp_width": decoder["mlp_size"],
                        "embed_width": len(self["state/up_sample_decoder.weight"]),
                    },
                },
                "objective": {
                    "flow_draws": released["flow_steps_per_recon"],
                    "flow_weight": released["loss"]["gen_loss_weight"],
                },
                "perceptual": {"weight": 0.0},
                "schedule": {
                    "lr": schedule["base_lr_1"],
                    "lr_2": schedule["base_lr_2"],
                    "lr_final": schedule.get("final_lr", 0.0),
                    "reference_batch": 0,
                    "warmup_steps": schedule["warmup_steps"],
                    "hold_until": schedule["hold_1_until"],
                    "decay_until": schedule["decay_1_until"],
                    "final_from": schedule.get("hold_2_until", 0),
                    "final_until": schedule.get("decay_2_until", 0),
                },
                "optim": {
                    "clip_norm": optim["clip_grad"],
                    "muon_momentum": optim["muon"]["momentum"],
                    "adamw_betas": optim["adamw"]["betas"],
                    "eps": optim["adamw"]["eps"],
                },
                "train": {"batch_size": batch, "precision": "float32", "steps": len(meta["losses"])},
                "sampling": {
                    "guidance": sampling["cfg_scale"],
                    "interval": sampling["cfg_interval"],
                    # Without guidance the released code skips LayerNorm in both orders; ours skips it in cfg_first.
                    "order": "cfg_first" if sampling["cfg_scale"] == 1 else sampling["cfg_norm_order"],
                    "solver": SOLVERS[sampling["method"]],
                    "steps": sampling["num_time_points"] - 1,
                    "time_shift": released["timestep_shift_alpha"],
                },
            },
        )
