"""The training step against "One training step" in docs/method.md, sample by sample in float64."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from unite_fast.kernels import backend, matmul
from unite_fast.objective import Losses, StepDraws
from unite_fast.training.train_step import MicroBatch, accumulate_gradients

LOSS_ROUNDING = 1e-6
"""Relative. The model runs in float64 here, but the losses are float32 by definition: a few roundings of 6e-8."""
FLOAT32_MODEL = 2e-5
"""Relative to a gradient's norm, all in float32: the same sums in two orders. Measured: 1e-6 to 4e-6."""

BATCH = 6


@pytest.fixture
def batch(tiny_config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(tiny_config.model.num_classes, (BATCH,), generator=generator)


def test_weights_are_cast_once_per_step(tiny_config, make_model, draws, batch, count_casts, bfloat16_matmuls):
    """For both passes of two micro-batches, forward and backward; also from bfloat16 back to float32, on a CPU without
    bfloat16 instructions. Autocast itself casts the patch embedding, once in each micro-batch."""
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, precision="bfloat16"))
    model = make_model(config.model)
    micro_batches = [MicroBatch(*batch, draws)] * 2
    counts = count_casts(model, lambda: accumulate_gradients(model, micro_batches, 2, config))
    patches = {number for (name, *_), number in counts.items() if name.startswith("encoder.patch_embed.")}
    assert patches == {2}
    rest = {key: number for key, number in counts.items() if not key[0].startswith("encoder.patch_embed.")}
    assert set(rest.values()) == {1}
    there, back = ({name for name, source, _ in rest if source == s} for s in (torch.float32, torch.bfloat16))
    assert len(there) > 40 and (not back if bfloat16_matmuls else len(back) > 30)


def in_float64(draws: StepDraws) -> StepDraws:
    parts = {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}
    return StepDraws(**{name: x.double() if x.is_floating_point() else x for name, x in parts.items()})


def micro_step(model, images, labels, draws, config, lpips=None, masks=None) -> Losses:
    """The losses of one micro-batch; its gradients are added to the model's."""
    return accumulate_gradients(model, [MicroBatch(images, labels, draws, masks)], 1, config, lpips)


def gradients(model) -> dict[str, Tensor]:
    """The model's gradients, which are then cleared."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def spec_losses(model, images, labels, draws, config) -> tuple[Tensor, Tensor]:
    """(L1, flow loss) in plain loops over samples and draws."""
    no_class = config.model.num_classes
    l1, flow = [], []
    for i in range(len(images)):
        z = model.tokenize(images[i : i + 1], draws.registers[i : i + 1], draws.recon_time[i : i + 1])
        decoder_input = z
        if draws.decoder_noise_mask[i]:
            t = draws.decoder_noise_time[i]
            decoder_input = t * z + (1 - t) * draws.decoder_noise[i]
        l1.append((model.decode(decoder_input)[0] - images[i]).abs().mean())
        z = z.detach()
        for f in range(config.objective.flow_draws):
            t = draws.flow_time[f, i]
            x_t = t * z + (1 - t) * draws.flow_noise[f, i]
            label = no_class if draws.label_drop[f, i] else int(labels[i])
            x_hat = model.denoise(x_t, t[None], torch.tensor([label]))
            flow.append((((z - x_hat) / max(1 - t.item(), 0.05)) ** 2).mean())
    return torch.stack(l1).mean(), torch.stack(flow).sum() / len(images)


@pytest.mark.parametrize("flow_weight", [1.0, 0.3])
def test_losses_and_every_gradient_match_the_spec(flow_weight, tiny_model, tiny_config, batch, draws, with_numbers):
    model, images, labels = tiny_model.double(), batch[0].double(), batch[1]
    # Every branch must occur to be tested.
    assert 0 < draws.decoder_noise_mask.sum() < BATCH
    draws.label_drop[0, 0], draws.flow_time[1, 2] = True, 0.99  # 1 - t below its floor
    draws = in_float64(with_numbers(draws, (4, 6)))
    tiny_config.objective.flow_weight = flow_weight

    ours = micro_step(model, images, labels, draws, tiny_config)
    actual = gradients(model)
    l1, flow = spec_losses(model, images, labels, draws, tiny_config)
    (l1 + flow_weight * flow).backward()
    expected = gradients(model)

    assert ours.l1.item() == pytest.approx(l1.item(), rel=LOSS_ROUNDING)
    assert ours.flow.item() == pytest.approx(flow.item(), rel=LOSS_ROUNDING)
    assert ours.total.item() == pytest.approx((l1 + flow_weight * flow).item(), rel=LOSS_ROUNDING)
    assert ours.lpips.item() == 0
    assert actual.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name in expected:
        # + 1 for gradients that are zero up to rounding, such as that of the keys' bias.
        assert (actual[name] - expected[name]).norm() <= LOSS_ROUNDING * (expected[name].norm() + 1), name


def test_the_flow_loss_sends_no_gradient_to_decoder_or_patch_embedding(tiny_model, tiny_config, batch, draws):
    def with_weight(weight: float) -> dict[str, Tensor]:
        tiny_config.objective.flow_weight = weight
        micro_step(tiny_model, *batch, draws, tiny_config)
        return gradients(tiny_model)

    without, with_flow = with_weight(0.0), with_weight(1.0)
    only_reconstruction = [name for name in with_flow if name.startswith(("decoder.", "encoder.patch_embed."))]
    assert len(only_reconstruction) > 10
    for name in only_reconstruction:
        assert torch.equal(with_flow[name], without[name]), name
    assert not torch.allclose(with_flow["latent_norm.weight"], without["latent_norm.weight"])
    assert not torch.allclose(
        with_flow["encoder.blocks.0.attn.qkv.weight"], without["encoder.blocks.0.attn.qkv.weight"]
    )


def test_the_shared_norm_gets_gradients_from_both_passes(tiny_model, tiny_config, batch, draws):
    """Each pass runs through its own copy of the norm. The gradients of the copies add up to the whole."""
    images, labels = batch
    micro_step(tiny_model, images, labels, draws, tiny_config)
    whole = gradients(tiny_model)

    norms = {}

    def pass_through_copy(kind: str, call):
        def run(*arguments):
            norms[kind] = [p.detach().clone().requires_grad_() for p in tiny_model.latent_norm.parameters()]
            names = ("latent_norm.weight", "latent_norm.bias")
            return torch.func.functional_call(
                Wrapped(tiny_model, call), dict(zip(names, norms[kind], strict=True)), arguments
            )

        return run

    class Wrapped(torch.nn.Module):
        def __init__(self, model, call):
            super().__init__()
            self.latent_norm, self.__dict__["call"] = model.latent_norm, call

        def forward(self, *arguments):
            return self.call(*arguments)

    tokenize, denoise = type(tiny_model).tokenize, type(tiny_model).denoising_loss
    tiny_model.tokenize = pass_through_copy("tokenize", lambda *a: tokenize(tiny_model, *a))
    tiny_model.denoising_loss = pass_through_copy("denoise", lambda *a: denoise(tiny_model, *a))
    micro_step(tiny_model, images, labels, draws, tiny_config)
    for i, name in enumerate(("latent_norm.weight", "latent_norm.bias")):
        parts = [norms[kind][i].grad for kind in ("tokenize", "denoise")]
        assert all(part.norm() > 0 for part in parts)
        torch.testing.assert_close(sum(parts), whole[name])


@pytest.mark.parametrize("backend_name", ["reference", "auto"])
def test_noise_keys_train_like_the_noise_itself(backend_name, tiny_model, tiny_config, batch, draws, with_numbers):
    def losses_and_gradients(draws: StepDraws) -> tuple[Tensor, dict[str, Tensor]]:
        losses = micro_step(tiny_model, *batch, draws, tiny_config)
        return torch.stack((losses.total, losses.l1, losses.flow)), gradients(tiny_model)

    with backend.using(backend_name):
        (losses, actual), (expected_losses, expected) = map(losses_and_gradients, (draws, with_numbers(draws, (4, 6))))
    torch.testing.assert_close(losses, expected_losses, rtol=FLOAT32_MODEL, atol=0)
    for name in expected:
        assert (actual[name] - expected[name]).norm() <= FLOAT32_MODEL * (expected[name].norm() + 1), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_match_the_whole_batch(size, tiny_model, tiny_config, batch, draws, draws_at):
    images, labels = batch
    whole = micro_step(tiny_model, images, labels, draws, tiny_config)
    expected = gradients(tiny_model)
    parts = [
        MicroBatch(images[positions], labels[positions], draws_at(tiny_config, positions))
        for positions in torch.arange(BATCH).split(size)
    ]
    losses = accumulate_gradients(tiny_model, parts, len(parts), tiny_config)
    actual = gradients(tiny_model)
    for name in ("total", "l1", "flow"):
        assert getattr(losses, name).item() == pytest.approx(getattr(whole, name).item(), rel=LOSS_ROUNDING)
    assert actual.keys() == expected.keys()
    scale = math.sqrt(sum(g.norm() ** 2 for g in expected.values()) / len(expected))
    for name in expected:
        assert (actual[name] - expected[name]).norm() <= FLOAT32_MODEL * (expected[name].norm() + scale), name


class RecordingDistance(torch.nn.Module):
    """Stands in for LPIPS and records its arguments."""

    def forward(self, target, recon, dropout):
        self.target, self.recon, self.dropout = target, recon, dropout
        return (target - recon).square().mean((1, 2, 3))


def test_lpips_gets_images_reconstruction_and_masks_and_is_weighted(tiny_model, tiny_config, batch, draws):
    images, labels = batch
    without = micro_step(tiny_model, images, labels, draws, tiny_config)
    plain = gradients(tiny_model)["decoder.pred.bias"]
    tiny_config.perceptual.weight = 0.7
    masks, lpips = [torch.ones(1)], RecordingDistance()
    losses = micro_step(tiny_model, images, labels, draws, tiny_config, lpips, masks)
    assert lpips.target is images and lpips.dropout is masks
    assert lpips.recon.dtype == torch.float32 and lpips.recon.requires_grad
    error = lpips.recon.detach() - images
    assert losses.lpips.item() == pytest.approx(error.square().mean().item(), rel=LOSS_ROUNDING)
    assert losses.l1.item() == pytest.approx(error.abs().mean().item(), rel=LOSS_ROUNDING)
    assert losses.flow.item() == without.flow.item()
    expected = losses.l1 + 0.7 * losses.lpips + losses.flow
    assert losses.total.item() == pytest.approx(expected.item(), rel=LOSS_ROUNDING)
    # The gradient of each bias is summed over the pixels it is added to.
    change = gradients(tiny_model)["decoder.pred.bias"] - plain
    size = tiny_config.model.patch_size
    pixels = 0.7 * 2 * error / error.numel()
    expected = pixels.unfold(2, size, size).unfold(3, size, size).sum((0, 2, 3)).permute(1, 2, 0).flatten()
    assert (change - expected).norm() <= FLOAT32_MODEL * (expected.norm() + plain.norm())


def test_an_lpips_weight_without_a_network_is_refused(tiny_model, tiny_config, batch, draws, mentions):
    tiny_config.perceptual.weight = 0.7
    with pytest.raises(ValueError, match=mentions("perceptual.weight", 0.7)):
        micro_step(tiny_model, *batch, draws, tiny_config)
    assert gradients(tiny_model) == {}


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_autocast_keeps_losses_and_gradients_float32_and_finite(precision, tiny_model, tiny_config, batch, draws):
    expected = micro_step(tiny_model, *batch, draws, tiny_config)
    tiny_model.zero_grad()
    tiny_config.train.precision = precision
    losses = micro_step(tiny_model, *batch, draws, tiny_config)
    for name in ("total", "l1", "flow"):
        value = getattr(losses, name)
        assert value.dtype == torch.float32
        # bfloat16 has 8 bits: 4e-3 per rounding, and a loss averages many. float8 has 4.
        assert value.item() == pytest.approx(getattr(expected, name).item(), rel=0.02)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in tiny_model.parameters())


def test_float8_runs_the_linears_of_blocks_and_layers_alone(tiny_model, tiny_config, batch, draws, monkeypatch):
    multiplied, run = [], matmul._float8_matmul

    def record(x, weight, bias):
        multiplied.append((tuple(weight.values.shape), bias is not None))
        return run(x, weight, bias)

    monkeypatch.setattr(matmul, "_float8_matmul", record)
    tiny_config.train.precision = "bfloat16"
    micro_step(tiny_model, *batch, draws, tiny_config)
    assert multiplied == []
    tiny_config.train.precision = "float8"
    micro_step(tiny_model, *batch, draws, tiny_config)
    wide = [m for part in (*tiny_model.encoder.blocks, *tiny_model.decoder.layers) for m in part.modules()]
    shapes = [tuple(m.weight.shape) for m in wide if isinstance(m, torch.nn.Linear)]
    encoder = shapes[: 4 * len(tiny_model.encoder.blocks)]
    expected = shapes + encoder  # the flow draws are one more pass of the encoder
    assert Counter(shape for shape, forward in multiplied if forward) == Counter(expected)
    assert Counter(shape[::-1] for shape, forward in multiplied if not forward) == Counter(expected)
    # Sampling, pictures and evaluation call the model outside of a step.
    multiplied.clear()
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model.decode(torch.zeros(1, tiny_config.model.latent_tokens, tiny_config.model.latent_channels))
    assert multiplied == []
