"""The released UNITE restated as plainly as possible: an independent check of our model, and a source of small traces.

Written from the description of the released code; it does not import `unite_fast`. Weights are a dictionary with the
released names. Heads and flow draws are computed one at a time. Optimizers are from torch, the solver from torchdiffeq.

Shapes: B batch, N latent tokens, C latent channels, D width, F flow draws, S image size, P patch size.
"""

import json
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchdiffeq import odeint

NEVER_TRAINED = ("freqs_cos", "freqs_sin", "pos_embed", "position_embeddings", "t_embedder.W")
ADAMW_NAMES = ("patch_embed", "final_layer", "in_context_posemb", "latent_tokens")
LARGE_GRADIENTS = (
    "latent_tokens",
    "encoder.blocks.0.attn.qkv.weight",
    "encoder_layer_norm.weight",
    "up_sample_decoder.weight",
)
"""Recorded in full, not only their norms."""


class Released:
    def __init__(self, meta: dict, state: dict[str, Tensor]):
        self.meta, self.config, self.w = meta, meta["config"], state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def encoder(self, x: Tensor, t: Tensor, y: Tensor, images: Tensor | None = None) -> Tensor:
        """x [B, N, C], t [B], y [B], images [B, 3, S, S] -> [B, N, C]."""
        n = x.shape[1]
        positions = tuple(range(n))
        x = self.linear("encoder.up_sample", x) + self.w["latent_tokens"]
        if images is not None:
            kernel = "patch_embed.patch_embeddings.projection"
            grid = F.conv2d(
                images, self.w[f"{kernel}.weight"], self.w[f"{kernel}.bias"], stride=self.config["patch_size"]
            )
            patches = grid.flatten(2).transpose(1, 2)
            positions += tuple(range(n, n + patches.shape[1]))
            x = torch.cat([x, patches], dim=1)
        label = self.w["encoder.y_embedder.embedding_table.weight"][y]
        c = self.time(t) + label
        context = self.config["in_content_len"]
        for i in range(self.meta["encoder"]["depth"]):
            if context and i == self.config["in_content_start"]:
                x = torch.cat([label[:, None] + self.w["encoder.in_context_posemb"], x], dim=1)
                positions = (None,) * context + positions
            x = self.block(f"encoder.blocks.{i}", x, c, positions)
        if None in positions:
            x = x[:, context:]
        shift, scale = self.linear("encoder.final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
        x = self.rms_norm("encoder.final_layer.norm_final", x[:, :n]) * (1 + scale) + shift
        return self.linear("encoder.final_layer.linear", x)

    def time(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.w["encoder.t_embedder.W"] * 2 * math.pi
        hidden = self.linear("encoder.t_embedder.mlp.0", torch.cat([angle.sin(), angle.cos()], -1))
        return self.linear("encoder.t_embedder.mlp.2", F.silu(hidden))

    def block(self, name: str, x: Tensor, c: Tensor, positions: tuple) -> Tensor:
        parts = self.linear(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.rms_norm(f"{name}.norm1", x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(f"{name}.attn", h, positions)
        h = self.rms_norm(f"{name}.norm2", x) * (1 + scale2) + shift2
        u, w = self.linear(f"{name}.mlp.w12", h).chunk(2, -1)
        x = x + gate2 * self.linear(f"{name}.mlp.w3", F.silu(u) * w)
        return self.rms_norm(f"{name}.norm3", x)

    def attention(self, name: str, x: Tensor, positions: tuple) -> Tensor:
        count = self.meta["encoder"]["num_heads"]
        qkv = self.linear(f"{name}.qkv", x).chunk(3, -1)
        heads = []
        for q, k, v in zip(*(part.chunk(count, -1) for part in qkv), strict=True):
            if self.config["use_qknorm_encoder"]:
                q, k = self.rms_norm(f"{name}.q_norm", q), self.rms_norm(f"{name}.k_norm", k)
            q, k = rotate(q, positions), rotate(k, positions)
            heads.append(((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        return self.linear(f"{name}.proj", torch.cat(heads, -1))

    def norm(self, z: Tensor) -> Tensor:
        return self.layer_norm("encoder_layer_norm", z, 1e-5)

    def tokenize(self, images: Tensor, registers: Tensor, t: Tensor) -> Tensor:
        """The latents before LayerNorm."""
        return self.encoder(registers, t, torch.full((len(images),), self.meta["num_classes"]), images)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, N, C] -> [B, 3, S, S]."""
        decoder, size = self.meta["decoder"], self.config["patch_size"]
        x = self.linear("decoder.decoder_embed", self.linear("up_sample_decoder", z))
        cls = self.w["decoder.trainable_cls_token"].expand(len(z), 1, -1)
        x = torch.cat([cls, x], 1) + self.w["decoder.decoder_pos_embed"]
        for i in range(decoder["depth"]):
            name = f"decoder.decoder_layers.{i}"
            qkv = self.linear(f"{name}.qkv", self.layer_norm(f"{name}.layernorm_before", x, 1e-12)).chunk(3, -1)
            heads = []
            for q, k, v in zip(*(part.chunk(decoder["num_heads"], -1) for part in qkv), strict=True):
                heads.append(((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
            x = x + self.linear(f"{name}.attn_proj", torch.cat(heads, -1))
            h = self.linear(f"{name}.ffn_up", self.layer_norm(f"{name}.layernorm_after", x, 1e-12))
            x = x + self.linear(f"{name}.ffn_down", F.gelu(h))
        pixels = self.linear("decoder.decoder_pred", self.layer_norm("decoder.decoder_norm", x, 1e-12))[:, 1:]
        side = math.isqrt(z.shape[1])
        rows = []
        for row in range(side):
            patches = [pixels[:, row * side + column].reshape(-1, size, size, 3) for column in range(side)]
            rows.append(torch.cat(patches, 2))
        return torch.cat(rows, 1).permute(0, 3, 1, 2)

    def sample(self, noise: Tensor, y: Tensor) -> Tensor:
        sampling, a = self.meta["sampling"], self.config["timestep_shift_alpha"]
        scale, (low, high) = sampling["cfg_scale"], sampling["cfg_interval"]
        no_class = torch.full_like(y, self.meta["num_classes"])
        # Unguided, the released code skips LayerNorm in either order.
        normed = self.norm if sampling["cfg_norm_order"] == "norm_first" and scale != 1 else lambda z: z

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            times = t.float().expand(len(x))
            with_label, without = (normed(self.encoder(x, times, labels)) for labels in (y, no_class))
            w = scale if t < high and (low == 0 or t > low) else 1.0
            return (without + w * (with_label - without) - x) / max(1 - float(t), 0.05)

        s = torch.linspace(0, 1, sampling["num_time_points"])
        times = a * s / (1 + (a - 1) * s)
        return odeint(velocity, noise, times, rtol=1e-3, atol=1e-6, method=sampling["method"])[-1]

    def losses(self, images: Tensor, labels: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L1 and the flow loss, summed over the draws."""
        z = self.norm(self.tokenize(images, draws["registers"], draws["recon_t"]))
        t = draws["decoder_noise_t"][:, None, None]
        noisy = t * z + (1 - t) * draws["decoder_noise"]
        recon = self.decode(
            torch.stack([n if m else c for m, n, c in zip(draws["decoder_noise_mask"], noisy, z, strict=True)])
        )
        clean, flow = z.detach(), 0.0
        for t, noise, drop in zip(draws["flow_t"], draws["flow_noise"], draws["label_drop"], strict=True):
            y = torch.tensor(
                [self.meta["num_classes"] if d else int(label) for d, label in zip(drop, labels, strict=True)]
            )
            at = t[:, None, None]
            predicted = self.norm(self.encoder(at * clean + (1 - at) * noise, t, y))
            flow = flow + ((clean - predicted) / (1 - at).clamp(min=0.05)).square().mean()
        return (recon - images).abs().mean(), flow


def rotate(x: Tensor, positions: tuple) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [B, T, K] by position * 10000^(-2i / K); position None is not rotated."""
    cos, sin = rope_tables(positions, x.shape[-1])
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, 0::2], sin[:, 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


@cache
def rope_tables(positions: tuple, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K], each column twice; a token at position None is not rotated."""
    rates = 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width))
    angles = torch.stack([(0 if p is None else p) * rates for p in positions]).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def sincos(position: int, width: int) -> list[float]:
    rates = [10000.0 ** (-i / (width // 2)) for i in range(width // 2)]
    return [math.sin(position * r) for r in rates] + [math.cos(position * r) for r in rates]


def grid_table(side: int, width: int) -> Tensor:
    """2-D positions [1, side * side, width]: column, then row."""
    return torch.tensor([[sincos(i % side, width // 2) + sincos(i // side, width // 2) for i in range(side * side)]])


def new_state(meta: dict, size: int, seed: int) -> dict[str, Tensor]:
    """Every tensor of a released checkpoint, with random values such that each part of the network has an effect."""
    random = torch.Generator().manual_seed(seed)
    config, encoder, decoder = meta["config"], meta["encoder"], meta["decoder"]
    d, c, p, side = (
        encoder["hidden_size"],
        config["diffusion_input_dim"],
        config["patch_size"],
        size // config["patch_size"],
    )
    n, head, wide, context = side * side, d // encoder["num_heads"], decoder["hidden_size"], config["in_content_len"]
    w = {}

    def put(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        w[name] = mean + std * torch.randn(shape, generator=random)

    def linear(name: str, rows: int, columns: int, std: float | None = None) -> None:
        put(f"{name}.weight", rows, columns, std=columns**-0.5 if std is None else std)
        put(f"{name}.bias", rows, std=0.05)

    def layer_norm(name: str, width: int) -> None:
        put(f"{name}.weight", width, std=0.1, mean=1.0)
        put(f"{name}.bias", width, std=0.05)

    put("latent_tokens", 1, n, d, std=0.5)
    w["patch_embed.position_embeddings"] = torch.zeros(1, n + 1, d)
    put("patch_embed.patch_embeddings.projection.weight", d, 3, p, p, std=1 / p)
    put("patch_embed.patch_embeddings.projection.bias", d, std=0.05)
    w["encoder.pos_embed"] = grid_table(side, d)
    linear("encoder.up_sample", d, c)
    put("encoder.t_embedder.W", 256, std=1.0)
    put("encoder.t_embedder.special_time_emb", d, std=0.02)
    linear("encoder.t_embedder.mlp.0", d, 512)
    linear("encoder.t_embedder.mlp.2", d, d)
    put("encoder.y_embedder.embedding_table.weight", meta["num_classes"] + 2, d, std=0.5)
    tables = {"feat_rope": tuple(range(2 * n))}
    if context:
        put("encoder.in_context_posemb", 1, context, d, std=0.5)
        tables["feat_rope_incontext"] = (None,) * context + tuple(range(2 * n))
    for name, positions in tables.items():
        w[f"encoder.{name}.freqs_cos"], w[f"encoder.{name}.freqs_sin"] = rope_tables(positions, head)
    for i in range(encoder["depth"]):
        name, hidden = f"encoder.blocks.{i}", int(2 / 3 * 4 * d)
        for norm in ("norm1", "norm2", "norm3"):
            put(f"{name}.{norm}.weight", d, std=0.1, mean=1.0)
        linear(f"{name}.attn.qkv", 3 * d, d)
        if config["use_qknorm_encoder"]:
            put(f"{name}.attn.q_norm.weight", head, std=0.1, mean=1.0)
            put(f"{name}.attn.k_norm.weight", head, std=0.1, mean=1.0)
        linear(f"{name}.attn.proj", d, d)
        linear(f"{name}.mlp.w12", 2 * hidden, d)
        linear(f"{name}.mlp.w3", d, hidden)
        linear(f"{name}.adaLN_modulation.1", 6 * d, d, std=0.3 * d**-0.5)
    put("encoder.final_layer.norm_final.weight", d, std=0.1, mean=1.0)
    linear("encoder.final_layer.linear", c, d)
    linear("encoder.final_layer.adaLN_modulation.1", 2 * d, d, std=0.3 * d**-0.5)
    layer_norm("encoder_layer_norm", c)
    linear("up_sample_decoder", 768, c)
    linear("decoder.decoder_embed", wide, 768)
    w["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, wide), grid_table(side, wide)], 1)
    put("decoder.trainable_cls_token", wide, std=0.5)
    for i in range(decoder["depth"]):
        name = f"decoder.decoder_layers.{i}"
        layer_norm(f"{name}.layernorm_before", wide)
        linear(f"{name}.qkv", 3 * wide, wide)
        linear(f"{name}.attn_proj", wide, wide)
        layer_norm(f"{name}.layernorm_after", wide)
        linear(f"{name}.ffn_up", decoder["mlp_size"], wide)
        linear(f"{name}.ffn_down", wide, decoder["mlp_size"])
    layer_norm("decoder.decoder_norm", wide)
    linear("decoder.decoder_pred", p * p * 3, wide)
    return w


def new_inputs(meta: dict, size: int, seed: int) -> dict[str, Tensor]:
    """Weights, images, labels and every random draw of a trace."""
    random = torch.Generator().manual_seed(seed + 1)
    config, batch, steps = meta["config"], meta["batch"], meta["steps"]
    flow_draws, latents = (
        config["flow_steps_per_recon"],
        ((size // config["patch_size"]) ** 2, config["diffusion_input_dim"]),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    inputs = {f"state/{name}": value for name, value in new_state(meta, size, seed).items()}
    inputs["in/images_uint8"] = torch.randint(0, 256, (batch, 3, size, size), generator=random, dtype=torch.uint8)
    inputs["in/labels"] = torch.randint(0, meta["num_classes"], (batch,), generator=random)
    inputs |= {"tokenize/registers": normal(batch, *latents), "tokenize/t": 0.01 * uniform(batch)}
    inputs |= {
        "denoise/xt": normal(batch, *latents),
        "denoise/t": uniform(batch),
        "sample/noise": normal(batch, *latents),
    }
    a = config["timestep_shift_alpha"]
    for k in range(steps):
        s = normal(flow_draws, batch).sigmoid()
        inputs |= {
            f"step{k}/registers": normal(batch, *latents),
            f"step{k}/recon_t": 0.01 * uniform(batch),
            f"step{k}/decoder_noise_mask": uniform(batch) < 0.5,
            f"step{k}/decoder_noise": normal(batch, *latents),
            f"step{k}/decoder_noise_t": 0.7 + 0.3 * uniform(batch),
            f"step{k}/flow_t": a * s / (1 + (a - 1) * s),
            f"step{k}/flow_noise": normal(flow_draws, batch, *latents),
            f"step{k}/label_drop": uniform(flow_draws, batch) < 0.3,
        }
    return inputs


def learning_rate(schedule: dict, step: int) -> float:
    warmup, hold, decay = schedule["warmup_steps"], schedule["hold_1_until"], schedule["decay_1_until"]
    first, second = schedule["base_lr_1"], schedule["base_lr_2"]
    if step < warmup:
        return first * step / warmup
    if step < hold:
        return first
    if step < decay:
        return second + (first - second) * (1 + math.cos(math.pi * (step - hold) / (decay - hold))) / 2
    return second


def run(meta: dict, inputs: dict[str, Tensor], sampling: bool = True, clipped: bool = True) -> tuple[dict, list[dict]]:
    """Outputs of the released code for these inputs, by their names in a trace, and the losses of each step.

    Args:
        clipped: record the gradients after clipping, as `official_tiny_a.npz` does.
    """
    state = {name.removeprefix("state/"): value.clone() for name, value in inputs.items() if name.startswith("state/")}
    model = Released(meta, state)
    images, labels = inputs["in/images_uint8"].float() / 255, inputs["in/labels"]
    out = {}
    with torch.no_grad():
        out["tokenize/z"] = model.tokenize(images, inputs["tokenize/registers"], inputs["tokenize/t"])
        out["tokenize/z_normed"] = model.norm(out["tokenize/z"])
        reconstruction = model.decode(out["tokenize/z_normed"])
        out["tokenize/reconstruction_f16"] = reconstruction.half()
        out["tokenize/reconstruction_l1"] = (reconstruction - images).abs().mean()
        out["denoise/x_pred"] = model.norm(model.encoder(inputs["denoise/xt"], inputs["denoise/t"], labels))
        if sampling:
            out["sample/latents"] = model.sample(inputs["sample/noise"], labels)
            out["sample/images_f16"] = model.decode(out["sample/latents"]).half()

    weights = {name: w.requires_grad_() for name, w in state.items() if not name.endswith(NEVER_TRAINED)}
    muons, adamws = parameter_groups(weights)
    optim = meta["optim"]
    muon = torch.optim.Muon(
        [weights[n] for n in muons], lr=0.0, weight_decay=0.0, momentum=0.95, eps=1e-6, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([weights[n] for n in adamws], lr=0.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    losses = []
    for step in range(meta["steps"]):
        rate = learning_rate(optim["schedule"], step)
        draws = {name.split("/")[1]: value for name, value in inputs.items() if name.startswith(f"step{step}/")}
        l1, flow = model.losses(images, labels, draws)
        total = l1 + meta["config"]["loss"]["gen_loss_weight"] * flow
        total.backward()
        if step == 0 and not clipped:
            out |= recorded_gradients(weights)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), optim["clip_grad"])
        if step == 0 and clipped:
            out |= recorded_gradients(weights)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(dict(lr=rate, l1=l1.item(), flow=flow.item(), total=total.item(), grad_norm=norm.item()))
    for name, value in state.items():
        if not name.endswith(("freqs_cos", "freqs_sin")):
            out[f"final_norm/{name}"] = value.detach().norm()
            out[f"final_head/{name}"] = value.detach().flatten()[:8]
    return out, losses


def recorded_gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
    norms = {f"grad0norm/{name}": g.norm() for name, g in gradients.items()}
    return norms | {f"grad0/{name}": gradients[name] for name in LARGE_GRADIENTS}


def parameter_groups(weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names of Muon's and of AdamW's parameters."""
    muon = [n for n, w in weights.items() if w.dim() >= 2 and not any(part in n for part in ADAMW_NAMES)]
    return muon, [n for n in weights if n not in muon]


def record(meta: dict, size: int, seed: int = 0, clipped: bool = True) -> dict[str, np.ndarray]:
    """A trace in the format of the released code."""
    inputs = new_inputs(meta, size, seed)
    out, losses = run(meta, inputs, clipped=clipped)
    weights = {
        n.removeprefix("state/"): w
        for n, w in inputs.items()
        if n.startswith("state/") and not n.endswith(NEVER_TRAINED)
    }
    muon, adamw = parameter_groups(weights)
    arrays = {name: value.numpy() for name, value in (inputs | out).items()}
    text = json.dumps(meta | {"losses": losses, "muon_params": muon, "adamw_params": adamw})
    return arrays | {"meta_json": np.frombuffer(text.encode(), np.uint8)}


def new_meta(name: str, **changes) -> dict:
    """Settings of a small trace. `changes` replace keys in config, sampling, schedule or loss, or at the top."""
    meta = {
        "name": name,
        "encoder": {"depth": 3, "hidden_size": 32, "num_heads": 2},
        "decoder": {"depth": 2, "hidden_size": 32, "num_heads": 2, "mlp_size": 48},
        "num_classes": 5,
        "batch": 2,
        "flow_steps": 3,
        "config": {
            "diffusion_input_dim": 6,
            "patch_size": 8,
            "flow_steps_per_recon": 3,
            "flow_mini_batch": 2,
            "timestep_shift_mode": "manual",
            "timestep_shift_alpha": 0.5,
            "modulation_recon_timestep_max": 0.01,
            "noising_t_start": 0.7,
            "lognorm_mu": 0.0,
            "lognorm_sigma": 1.0,
            "in_content_len": 4,
            "in_content_start": 1,
            "use_qknorm_encoder": True,
            "loss": {"perceptual_weight": 1.0, "gen_loss_weight": 1.0},
        },
        "steps": 3,
        "sampling": {
            "cfg_scale": 3.0,
            "cfg_interval": [0.1, 1.0],
            "cfg_norm_order": "norm_first",
            "method": "dopri5",
            "atol": 1e-6,
            "rtol": 1e-3,
            "num_time_points": 50,
        },
        "optim": {
            "clip_grad": 3.0,
            "adamw": {"betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0},
            "muon": {"momentum": 0.95, "weight_decay": 0.0, "eps": 1e-6, "adjust_lr_fn": "match_rms_adamw"},
            "schedule": {
                "warmup_steps": 2,
                "hold_1_until": 3,
                "decay_1_until": 5,
                "base_lr_1": 1e-3,
                "base_lr_2": 5e-4,
            },
        },
    }
    config, optim = meta["config"], meta["optim"]
    for key, value in changes.items():
        places = (meta, config, config["loss"], meta["sampling"], optim, optim["schedule"])
        holder = next(place for place in places if key in place)
        holder[key] = holder[key] | value if isinstance(value, dict) else value
    meta["flow_steps"] = config["flow_steps_per_recon"]
    return meta
