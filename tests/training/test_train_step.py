"""The step against docs/method.md's "One training step", sample by sample in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from unite_fast.kernels import backend
from unite_fast.objective import Losses, StepDraws
from unite_fast.training.train_step import MicroBatch, accumulate_gradients

LOSS_ROUNDING = 1e-6
"""Relative. The model runs in float64 here, but the losses are float32 by definition: a few roundings of 6e-8."""
FLOAT32_MODEL = 2e-5
"""Relative to a gradient's norm, float32 throughout: two orders of the same sums. Measured: 1e-6 to 4e-6."""

BATCH = 6


@pytest.fixture
def batch(tiny_config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(tiny_config.model.num_classes, (BATCH,), generator=generator)


def in_float64(draws: StepDraws) -> StepDraws:
    parts = {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}
    return StepDraws(**{name: x.double() if x.is_floating_point() else x for name, x in parts.items()})


def take(model, images, labels, draws, config, lpips=None, masks=None) -> Losses:
    """The losses of one micro-batch, whose gradients are added to the model's."""
    return accumulate_gradients(model, [MicroBatch(images, labels, draws, masks)], 1, config, lpips)


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


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
def test_losses_and_every_gradient_are_the_specs(flow_weight, tiny_model, tiny_config, batch, draws, with_numbers):
    model, images, labels = tiny_model.double(), batch[0].double(), batch[1]
    # Each branch must occur, or this test shows nothing of it.
    assert 0 < draws.decoder_noise_mask.sum() < BATCH
    draws.label_drop[0, 0], draws.flow_time[1, 2] = True, 0.99  # beyond the floor of 1 - t
    draws = in_float64(with_numbers(draws, (4, 6)))
    tiny_config.objective.flow_weight = flow_weight

    ours = take(model, images, labels, draws, tiny_config)
    got = gradients(model)
    l1, flow = spec_losses(model, images, labels, draws, tiny_config)
    (l1 + flow_weight * flow).backward()
    want = gradients(model)

    assert ours.l1.item() == pytest.approx(l1.item(), rel=LOSS_ROUNDING)
    assert ours.flow.item() == pytest.approx(flow.item(), rel=LOSS_ROUNDING)
    assert ours.total.item() == pytest.approx((l1 + flow_weight * flow).item(), rel=LOSS_ROUNDING)
    assert ours.lpips.item() == 0
    assert got.keys() == want.keys() == {name for name, _ in model.named_parameters()}
    for name in want:
        # The last term: gradients that are zero but for rounding, such as the keys' bias.
        assert (got[name] - want[name]).norm() <= LOSS_ROUNDING * (want[name].norm() + 1), name


def test_the_flow_loss_reaches_neither_decoder_nor_the_tokenizers_pass(tiny_model, tiny_config, batch, draws):
    def with_weight(weight: float) -> dict[str, Tensor]:
        tiny_config.objective.flow_weight = weight
        take(tiny_model, *batch, draws, tiny_config)
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


def test_the_shared_norm_gets_one_gradient_from_each_of_its_two_passes(tiny_model, tiny_config, batch, draws):
    """Passes through copies of the norm: the copies' gradients are the parts, their sum is the whole."""
    images, labels = batch
    take(tiny_model, images, labels, draws, tiny_config)
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
    take(tiny_model, images, labels, draws, tiny_config)
    for i, name in enumerate(("latent_norm.weight", "latent_norm.bias")):
        parts = [norms[kind][i].grad for kind in ("tokenize", "denoise")]
        assert all(part.norm() > 0 for part in parts)
        torch.testing.assert_close(sum(parts), whole[name])


@pytest.mark.parametrize("body", ["reference", "auto"])
def test_noise_as_keys_trains_as_its_numbers_do(body, tiny_model, tiny_config, batch, draws, with_numbers):
    def losses_and_gradients(draws: StepDraws) -> tuple[Tensor, dict[str, Tensor]]:
        losses = take(tiny_model, *batch, draws, tiny_config)
        return torch.stack((losses.total, losses.l1, losses.flow)), gradients(tiny_model)

    with backend.using(body):
        (got, found), (want, wanted) = map(losses_and_gradients, (draws, with_numbers(draws, (4, 6))))
    torch.testing.assert_close(got, want, rtol=FLOAT32_MODEL, atol=0)
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= FLOAT32_MODEL * (wanted[name].norm() + 1), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_losses_and_gradients_of_the_whole(
    size, tiny_model, tiny_config, batch, draws, draws_at
):
    images, labels = batch
    whole = take(tiny_model, images, labels, draws, tiny_config)
    want = gradients(tiny_model)
    parts = [
        MicroBatch(images[positions], labels[positions], draws_at(tiny_config, positions))
        for positions in torch.arange(BATCH).split(size)
    ]
    losses = accumulate_gradients(tiny_model, parts, len(parts), tiny_config)
    got = gradients(tiny_model)
    for name in ("total", "l1", "flow"):
        assert getattr(losses, name).item() == pytest.approx(getattr(whole, name).item(), rel=LOSS_ROUNDING)
    assert got.keys() == want.keys()
    scale = math.sqrt(sum(g.norm() ** 2 for g in want.values()) / len(want))
    for name in want:
        assert (got[name] - want[name]).norm() <= FLOAT32_MODEL * (want[name].norm() + scale), name


class Distance(torch.nn.Module):
    """Stands for LPIPS; remembers what it was given, and its gradient."""

    def forward(self, target, recon, dropout):
        self.target, self.recon, self.dropout = target, recon, dropout
        return (target - recon).square().mean((1, 2, 3))


def test_lpips_is_weighted_and_averaged_and_gets_images_reconstruction_and_masks(tiny_model, tiny_config, batch, draws):
    images, labels = batch
    without = take(tiny_model, images, labels, draws, tiny_config)
    plain = gradients(tiny_model)["decoder.pred.bias"]
    tiny_config.perceptual.weight = 0.7
    masks, lpips = [torch.ones(1)], Distance()
    losses = take(tiny_model, images, labels, draws, tiny_config, lpips, masks)
    assert lpips.target is images and lpips.dropout is masks
    assert lpips.recon.dtype == torch.float32 and lpips.recon.requires_grad
    error = lpips.recon.detach() - images
    assert losses.lpips.item() == pytest.approx(error.square().mean().item(), rel=LOSS_ROUNDING)
    assert losses.l1.item() == pytest.approx(error.abs().mean().item(), rel=LOSS_ROUNDING)
    assert losses.flow.item() == without.flow.item()
    want = losses.l1 + 0.7 * losses.lpips + losses.flow
    assert losses.total.item() == pytest.approx(want.item(), rel=LOSS_ROUNDING)
    # The gradient of the bias of a channel of a pixel is the sum of that of the pixels it is added to.
    moved = gradients(tiny_model)["decoder.pred.bias"] - plain
    size = tiny_config.model.patch_size
    pixels = 0.7 * 2 * error / error.numel()
    want = pixels.unfold(2, size, size).unfold(3, size, size).sum((0, 2, 3)).permute(1, 2, 0).flatten()
    assert (moved - want).norm() <= FLOAT32_MODEL * (want.norm() + plain.norm())


def test_a_weight_of_lpips_without_its_network_is_refused(tiny_model, tiny_config, batch, draws, mentions):
    tiny_config.perceptual.weight = 0.7
    with pytest.raises(ValueError, match=mentions("perceptual.weight", 0.7)):
        take(tiny_model, *batch, draws, tiny_config)
    assert gradients(tiny_model) == {}


def test_autocast_keeps_losses_and_gradients_float32_and_finite(tiny_model, tiny_config, batch, draws):
    want = take(tiny_model, *batch, draws, tiny_config)
    tiny_model.zero_grad()
    tiny_config.train.precision = "bfloat16"
    losses = take(tiny_model, *batch, draws, tiny_config)
    for name in ("total", "l1", "flow"):
        value = getattr(losses, name)
        assert value.dtype == torch.float32
        # bfloat16 has 8 bits: 4e-3 a rounding, and a loss averages many.
        assert value.item() == pytest.approx(getattr(want, name).item(), rel=0.02)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in tiny_model.parameters())
