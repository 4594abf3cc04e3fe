"""Compare this implementation, quantity by quantity, with numbers that the released code produced.

A trace is an .npz without pickles; spec: "The trace file".
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unite_fast import sampling
from unite_fast.config import Config, from_tree
from unite_fast.errors import UserError
from unite_fast.interop.official import our_name, our_state
from unite_fast.model.unite import UNITE
from unite_fast.objective import Losses, StepDraws, training_losses
from unite_fast.training.state import TrainState

FORWARD, GRADIENT, SAMPLED, LOSS, RATE, FINAL = 1e-4, 1e-3, 1e-3, 1e-4, 1e-12, 1e-3
"""Largest relative error that passes, by kind of quantity. FINAL is wider than FORWARD because Muon orthogonalises in bfloat16,
whose rounding (4e-3 of an update) depends on how a library blocks its products. RATE allows for the order of two products."""


@dataclass
class Row:
    """One compared quantity."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Trace:
    """A trace file, opened and checked.

    Raises:
        UserError: not a trace, or one that lacks something.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with np.load(self.path, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in file.files}
        except FileNotFoundError as error:
            raise UserError(f"there is no trace {path}") from error
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise UserError(f"{path} is not a trace: it is not a readable .npz file without pickles") from error
        try:
            self.meta = json.loads(bytes(self["meta_json"]))
        except ValueError as error:
            raise UserError(f"{path} is not a trace: meta_json is not JSON") from error

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except KeyError as error:
            raise UserError(f"{self.path} is not a trace of the known format: it lacks {name}") from error

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self[name])

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): torch.from_numpy(a) for name, a in self.arrays.items() if name.startswith(prefix)
        }

    def config(self) -> Config:
        try:
            return self._config()
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.path} is not a trace of the known format: meta_json lacks {error}") from error

    def _config(self) -> Config:
        meta, released, optim = self.meta, self.meta["config"], self.meta["optim"]
        encoder, decoder, schedule = meta["encoder"], meta["decoder"], optim["schedule"]
        shape = self["in/images_uint8"].shape
        return from_tree(
            Config,
            {
                "name": f"parity-{meta['name']}",
                "model": {
                    "image_size": shape[-1],
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
                        "embed_width": self["state/up_sample_decoder.weight"].shape[0],
                    },
                },
                "objective": {
                    "flow_draws": released["flow_steps_per_recon"],
                    "flow_weight": released["loss"]["gen_loss_weight"],
                },
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
                "train": {"batch_size": shape[0], "precision": "float32", "steps": meta["steps"]},
                "sampling": {
                    "guidance": meta["sampling"]["cfg_scale"],
                    "interval": meta["sampling"]["cfg_interval"],
                    "order": meta["sampling"]["cfg_norm_order"],
                    "solver": meta["sampling"]["method"],
                    "steps": meta["sampling"]["num_time_points"] - 1,
                    "time_shift": released["timestep_shift_alpha"],
                },
            },
        )


def compare(trace: Trace) -> list[Row]:
    """Every quantity of the trace against ours, float32 on the CPU."""
    config = trace.config()
    model = UNITE(config.model)
    try:
        model.load_state_dict(our_state(trace.below("state/")))
    except RuntimeError as error:
        raise UserError(
            f"{trace.path}: weights and configuration disagree: {str(error).splitlines()[1].strip()}"
        ) from error
    return [*_forward_rows(trace, model, config), *_training_rows(trace, model, config)]


@torch.no_grad()
def _forward_rows(trace: Trace, model: UNITE, config: Config) -> list[Row]:
    images = trace.tensor("in/images_uint8").float() / 255
    labels = trace.tensor("in/labels")
    no_class = torch.full_like(labels, config.model.num_classes)
    registers, t = trace.tensor("tokenize/registers"), trace.tensor("tokenize/t")
    raw = model.encoder(registers, t, no_class, images)
    z = model.tokenize(images, registers, t)
    reconstruction = model.decode(z)
    denoised = model.denoise(trace.tensor("denoise/xt"), trace.tensor("denoise/t"), labels)
    latents = sampling.generate_latents(model, labels, trace.tensor("sample/noise"), config.sampling)
    pictures = model.decode(latents)
    return [
        Row("tokenize/z", relative_error(raw, trace.tensor("tokenize/z")), FORWARD),
        Row("tokenize/z_normed", relative_error(z, trace.tensor("tokenize/z_normed")), FORWARD),
        Row(
            "tokenize/reconstruction_f16",
            relative_error(reconstruction.half(), trace.tensor("tokenize/reconstruction_f16")),
            FORWARD,
        ),
        Row(
            "tokenize/reconstruction_l1",
            relative_error((reconstruction - images).abs().mean(), trace.tensor("tokenize/reconstruction_l1")),
            FORWARD,
        ),
        Row("denoise/x_pred", relative_error(denoised, trace.tensor("denoise/x_pred")), FORWARD),
        Row("sample/latents", relative_error(latents, trace.tensor("sample/latents")), SAMPLED),
        Row("sample/images_f16", relative_error(pictures.half(), trace.tensor("sample/images_f16")), SAMPLED),
    ]


def _training_rows(trace: Trace, model: UNITE, config: Config) -> list[Row]:
    state = TrainState(model, config)
    images = trace.tensor("in/images_uint8").float() / 255
    labels = trace.tensor("in/labels")
    rows = []
    for step, theirs in enumerate(trace.meta["losses"]):
        rate = state.learning_rate
        losses = training_losses(model, images, labels, _draws(trace, f"step{step}/"), config)
        losses.total.backward()
        if step == 0:
            rows += _gradient_rows(trace, model, config.optim.clip_norm)
        norm = state.apply_gradients()
        rows += _loss_rows(step, theirs, losses, norm, rate)
    return rows + _final_rows(trace, model)


def _draws(trace: Trace, prefix: str) -> StepDraws:
    names = {
        "registers": "registers",
        "recon_time": "recon_t",
        "decoder_noise_mask": "decoder_noise_mask",
        "decoder_noise_time": "decoder_noise_t",
        "decoder_noise": "decoder_noise",
        "flow_time": "flow_t",
        "flow_noise": "flow_noise",
        "label_drop": "label_drop",
    }
    return StepDraws(**{ours: trace.tensor(prefix + theirs) for ours, theirs in names.items()})


def _gradient_rows(trace: Trace, model: UNITE, clip_norm: float) -> list[Row]:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = trace.below("grad0norm/")
    scale = _recorded_scale(norms, trace.meta["losses"][0]["grad_norm"], clip_norm)
    rows = []
    for theirs, norm in norms.items():
        ours = scale * gradients[our_name(theirs)]
        rows.append(Row(f"grad0norm/{theirs}", relative_error(ours.norm(), norm), GRADIENT))
    for theirs, value in trace.below("grad0/").items():
        ours = scale * gradients[our_name(theirs)]
        rows.append(Row(f"grad0/{theirs}", relative_error(ours, value), GRADIENT))
    return rows


def _recorded_scale(norms: dict[str, Tensor], grad_norm: float, clip_norm: float) -> float:
    """1 for a trace whose gradients were recorded before clipping, the clipping factor for one that recorded them after.

    The format does not say which; the norm over all of them does.
    """
    clipped = min(1.0, clip_norm / grad_norm)
    recorded = sum(norm.item() ** 2 for norm in norms.values()) ** 0.5 / grad_norm
    return clipped if abs(recorded - clipped) < abs(recorded - 1.0) else 1.0


def _loss_rows(step: int, theirs: dict, losses: Losses, norm: Tensor, rate: float) -> list[Row]:
    ours = {"l1": losses.l1, "flow": losses.flow, "total": losses.total.detach(), "grad_norm": norm}
    rows = [
        Row(
            f"step{step}/{name}",
            relative_error(value, torch.tensor(theirs[name])),
            GRADIENT if name == "grad_norm" else LOSS,
        )
        for name, value in ours.items()
    ]
    error = abs(rate - theirs["lr"]) / (abs(theirs["lr"]) or 1.0)
    return [*rows, Row(f"step{step}/lr", error, RATE)]


def _final_rows(trace: Trace, model: UNITE) -> list[Row]:
    """Norm and first values of each tensor after the last step; tensors that we compute must not have moved in theirs."""
    ours = model.state_dict()
    start = trace.below("state/")
    rows = []
    for theirs, norm in trace.below("final_norm/").items():
        name = our_name(theirs)
        value = start[theirs] if name is None else ours[name].detach()
        head = trace.tensor(f"final_head/{theirs}")
        rows.append(Row(f"final_norm/{theirs}", relative_error(value.norm(), norm), FINAL))
        rows.append(Row(f"final_head/{theirs}", relative_error(value.flatten()[: len(head)], head), FINAL))
    return rows


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the truth (over 1 where the truth is zero)."""
    theirs = theirs.double()
    scale = theirs.norm().item()
    return ((ours.double() - theirs).norm() / (scale or 1.0)).item()
