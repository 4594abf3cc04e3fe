"""A plain restatement of training, from raw images to weights, averages and rows of metrics.

Written from docs/method.md, not from `unite_fast/training`. The network is the one in tests/interop/released.py. Only
the random numbers (tested in tests/test_randomness.py) and the names of the settings come from `unite_fast`.

Shapes: B global batch, N latent tokens, C latent channels, F flow draws, S image size.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from unite_fast.randomness import Philox, Stream

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
"""Configuration D of arXiv 1409.1556: channels of the convolutions. M: LPIPS taps the features, then max-pooling."""


class Restated:
    """
    Args:
        released: the module tests/interop/released.py.
        config: the settings of the run.
        weights: initial values under the released names, including untrained tensors.
        vgg, linear: LPIPS weights under the names in their files.
        dtype: dtype of all computations.
        autocast: bfloat16 matmuls and convolutions, as in bfloat16 training.
    """

    def __init__(self, released, config, weights: dict[str, Tensor], vgg, linear, dtype, autocast: bool = False):
        self.config, self.dtype, self.autocast = config, dtype, autocast
        model = config.model
        meta = {
            "encoder": {"depth": model.encoder.depth, "num_heads": model.encoder.heads},
            "decoder": {"depth": model.decoder.depth, "num_heads": model.decoder.heads},
            "num_classes": model.num_classes,
            "config": {
                "patch_size": model.patch_size,
                "in_content_len": model.encoder.in_context_tokens,
                "in_content_start": model.encoder.in_context_start,
                "use_qknorm_encoder": True,
            },
        }
        self.weights = {name: w.to(dtype) for name, w in weights.items()}
        self.trained = {
            n: w.requires_grad_() for n, w in self.weights.items() if not n.endswith(released.NEVER_TRAINED)
        }
        self.model = _in_float32(released.Released)(meta, self.weights)
        self.muon, self.adamw = released.parameter_groups(self.trained)
        self.learning_rate = released.learning_rate
        self.vgg, self.linear = ({n: w.to(dtype) for n, w in part.items()} for part in (vgg, linear))
        self.averages = {n: w.detach().clone() for n, w in self.trained.items()}
        self.moments = {n: [torch.zeros_like(w), torch.zeros_like(w)] for n, w in self.averages.items()}
        self.steps, self.rows = 0, []
        # Where |reconstruction - image| is close to 0, rounding can flip the sign of its gradient.
        self.min_pixel_error = math.inf

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on raw images, uint8 [B, 3, S, S], and labels [B]."""
        config = self.config
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            l1, lpips, flow = self.losses(images, labels)
        total = l1 + config.perceptual.weight * lpips + config.objective.flow_weight * flow
        gradients = dict(zip(self.trained, torch.autograd.grad(total, self.trained.values()), strict=True))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        rate = self.rate()
        for name, weight in self.trained.items():
            g = gradients[name] * min(1.0, config.optim.clip_norm / (norm + 1e-6))
            with torch.no_grad():
                weight -= rate * (self.muon_update(name, g) if name in self.muon else self.adamw_update(name, g))
                decay = config.optim.ema_decay
                self.averages[name].mul_(decay).add_((1 - decay) * weight)
        self.steps += 1
        row = {"total": total, "l1": l1, "lpips": lpips, "flow": flow}
        self.rows.append({n: x.item() for n, x in row.items()} | {"grad_norm": norm, "lr": rate, "step": self.steps})

    def losses(self, raw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, model = self.config, self.model
        objective, b = config.objective, len(raw)
        philox = Philox(config.seed, self.steps, torch.arange(b))
        latents = config.model.latent_tokens, config.model.latent_channels

        def uniform(stream: Stream, draw: int = 0) -> Tensor:
            return philox.uniform(stream, (), draw).to(self.dtype)

        def normal(stream: Stream, draw: int = 0) -> Tensor:
            return philox.normal(stream, latents, draw).to(self.dtype)

        images = raw.to(self.dtype) / 255
        if config.data.flip:
            flipped = uniform(Stream.FLIP) < 0.5
            images = torch.stack([x.flip(-1) if f else x for x, f in zip(images, flipped, strict=True)])
        z = model.norm(
            model.tokenize(
                images, normal(Stream.REGISTERS), objective.tokenize_time_max * uniform(Stream.RECON_TIME)
            ).to(self.dtype)
        )
        noisy = uniform(Stream.DECODER_NOISE_MASK) < objective.decoder_noise_probability
        low = objective.decoder_noise_time_min
        t = (low + (1 - low) * uniform(Stream.DECODER_NOISE_TIME))[:, None, None]
        mixed = torch.where(noisy[:, None, None], t * z + (1 - t) * normal(Stream.DECODER_NOISE), z)
        recon = model.decode(mixed).to(self.dtype)
        self.min_pixel_error = min(self.min_pixel_error, (recon - images).abs().min().item())
        l1 = (recon - images).abs().mean()
        lpips = self.lpips(images, recon, philox) if config.perceptual.weight else torch.zeros(())

        clean, flow = z.detach(), 0.0
        for draw in range(objective.flow_draws):
            u = philox.normal(Stream.FLOW_TIME, (), draw).to(self.dtype)
            s = torch.sigmoid(objective.time_mean + objective.time_std * u)
            t = objective.time_shift * s / (1 + (objective.time_shift - 1) * s)
            dropped = uniform(Stream.LABEL_DROP, draw) < objective.label_drop
            y = torch.where(dropped, config.model.num_classes, labels)
            at = t[:, None, None]
            x_t = at * clean + (1 - at) * normal(Stream.FLOW_NOISE, draw)
            predicted = model.norm(model.encoder(x_t, t, y).to(self.dtype))
            flow = flow + ((clean - predicted) / (1 - at).clamp(min=0.05)).square().mean()
        return l1, lpips, flow

    def lpips(self, images: Tensor, recon: Tensor, philox: Philox) -> Tensor:
        """Equation 1 of arXiv 1801.03924, with half of the squared differences dropped (see `lpips.dropout_masks`)."""
        total = 0.0
        for layer, (x, y) in enumerate(zip(self.features(images), self.features(recon), strict=True)):
            x, y = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x.to(self.dtype), y.to(self.dtype)))
            b, c, h, w = x.shape
            squared = (x.detach() - y).square()
            if self.config.perceptual.dropout:
                words = philox.words(Stream.LPIPS_DROPOUT, (h, w, c // 32), layer)
                bits = torch.stack([(words >> bit) & 1 for bit in range(32)], -1)
                squared = squared * (2 * bits.reshape(b, h, w, c).permute(0, 3, 1, 2))
            weight = self.linear[f"lin{layer}.model.1.weight"].reshape(1, c, 1, 1)
            total = total + (squared * weight).sum(1).mean()
        return total

    def features(self, pixels: Tensor) -> list[Tensor]:
        mean = torch.tensor([-0.030, -0.088, -0.188]).to(self.dtype).view(1, 3, 1, 1)
        std = torch.tensor([0.458, 0.448, 0.450]).to(self.dtype).view(1, 3, 1, 1)
        x, taps, index = (pixels - mean) / std, [], 0
        for entry in VGG16:
            if entry == "M":
                taps.append(x)
                x = F.max_pool2d(x, 2)
                index += 1
            else:
                x = F.conv2d(x, self.vgg[f"features.{index}.weight"], self.vgg[f"features.{index}.bias"], padding=1)
                x = x.clamp(min=0)
                index += 2
        return [*taps, x]

    def muon_update(self, name: str, g: Tensor) -> Tensor:
        momentum = self.config.optim.muon_momentum
        m = self.moments[name][0]
        m.mul_(momentum).add_((1 - momentum) * g)
        x = (1 - momentum) * g + momentum * m
        x = x / max(x.norm().item(), self.config.optim.eps)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return 0.2 * math.sqrt(max(x.shape)) * (x.T if tall else x)

    def adamw_update(self, name: str, g: Tensor) -> Tensor:
        (beta1, beta2), (m, v) = self.config.optim.adamw_betas, self.moments[name]
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g.square())
        count = self.steps + 1
        return (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + self.config.optim.eps)

    def rate(self) -> float:
        schedule = self.config.schedule
        lr_scale = self.config.train.batch_size / schedule.reference_batch
        stages = {
            "warmup_steps": schedule.warmup_steps,
            "hold_1_until": schedule.hold_until,
            "decay_1_until": schedule.decay_until,
            "base_lr_1": lr_scale * schedule.lr,
            "base_lr_2": lr_scale * schedule.lr_2,
        }
        return self.learning_rate(stages, self.steps)


def _in_float32(released: type) -> type:
    """The network with norms and time embedding outside autocast, as docs/method.md specifies."""

    class Network(released):
        def rms_norm(self, name: str, x: Tensor) -> Tensor:
            return super().rms_norm(name, x.to(self.w["latent_tokens"].dtype))

        def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().layer_norm(name, x.to(self.w["latent_tokens"].dtype), eps)

        def time(self, t: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().time(t)

    return Network
