"""One training step against spec.md's "One training step", sample by sample in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from unite_fast.config import ObjectiveConfig
from unite_fast.kernels import backend
from unite_fast.objective import StepDraws, draw_step, training_losses
from unite_fast.randomness import NoiseKeys, Philox

LOSS_ROUNDING = 1e-6
"""Relative. The model runs in float64 here, but the losses are float32 by definition: a few roundings of 6e-8."""
FLOAT32_MODEL = 2e-5
"""Relative to a gradient's norm, float32 throughout: two orders of the same sums. Measured: 1e-6 to 4e-6."""
SIGMAS = 5
"""Of an estimate from a fixed seed: a fault moves it by far more, chance passes it once in 1.7 million."""

BATCH = 6


@pytest.fixture
def batch(tiny_config) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(tiny_config.model.num_classes, (BATCH,), generator=generator)


@pytest.fixture
def draws(tiny_config) -> StepDraws:
    return draws_at(tiny_config, torch.arange(BATCH))


def draws_at(config, positions: Tensor, seed: int = 9, step: int = 3) -> StepDraws:
    latents = (config.model.latent_tokens, config.model.latent_channels)
    return draw_step(config.objective, Philox(seed, step, positions), latents)


def with_numbers(draws: StepDraws, latents: tuple[int, int]) -> StepDraws:
    """The same draws, the noise no longer as keys; `latents` is (N, C)."""

    def drawn(keys: NoiseKeys, count: int) -> Tensor:
        return torch.stack([keys.philox.normal(keys.stream, latents, draw) for draw in range(count)])

    return dataclasses.replace(
        draws,
        decoder_noise=drawn(draws.decoder_noise, 1)[0],
        flow_noise=drawn(draws.flow_noise, len(draws.flow_time)),
    )


def in_float64(draws: StepDraws) -> StepDraws:
    parts = {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}
    return StepDraws(**{name: x.double() if x.is_floating_point() else x for name, x in parts.items()})


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
def test_losses_and_every_gradient_are_the_specs(flow_weight, tiny_model, tiny_config, batch, draws):
    model, images, labels = tiny_model.double(), batch[0].double(), batch[1]
    # Each branch must occur, or this test shows nothing of it.
    assert 0 < draws.decoder_noise_mask.sum() < BATCH
    draws.label_drop[0, 0], draws.flow_time[1, 2] = True, 0.99  # beyond the floor of 1 - t
    draws = in_float64(with_numbers(draws, (4, 6)))
    tiny_config.objective.flow_weight = flow_weight

    ours = training_losses(model, images, labels, draws, tiny_config)
    ours.total.backward()
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
        training_losses(tiny_model, *batch, draws, tiny_config).total.backward()
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
    training_losses(tiny_model, images, labels, draws, tiny_config).total.backward()
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
    training_losses(tiny_model, images, labels, draws, tiny_config).total.backward()
    for i, name in enumerate(("latent_norm.weight", "latent_norm.bias")):
        parts = [norms[kind][i].grad for kind in ("tokenize", "denoise")]
        assert all(part.norm() > 0 for part in parts)
        torch.testing.assert_close(sum(parts), whole[name])


@pytest.mark.parametrize("body", ["reference", "auto"])
def test_noise_as_keys_trains_as_its_numbers_do(body, tiny_model, tiny_config, batch, draws):
    def losses_and_gradients(draws: StepDraws) -> tuple[Tensor, dict[str, Tensor]]:
        losses = training_losses(tiny_model, *batch, draws, tiny_config)
        losses.total.backward()
        return torch.stack((losses.total.detach(), losses.l1, losses.flow)), gradients(tiny_model)

    with backend.using(body):
        (got, found), (want, wanted) = map(losses_and_gradients, (draws, with_numbers(draws, (4, 6))))
    torch.testing.assert_close(got, want, rtol=FLOAT32_MODEL, atol=0)
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= FLOAT32_MODEL * (wanted[name].norm() + 1), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_give_the_losses_and_gradients_of_the_whole(size, tiny_model, tiny_config, batch, draws):
    images, labels = batch
    whole = training_losses(tiny_model, images, labels, draws, tiny_config)
    whole.total.backward()
    want = gradients(tiny_model)
    parts = BATCH // size
    sums = torch.zeros(3)
    for positions in torch.arange(BATCH).split(size):
        losses = training_losses(
            tiny_model, images[positions], labels[positions], draws_at(tiny_config, positions), tiny_config
        )
        (losses.total / parts).backward()
        sums += torch.stack((losses.total.detach(), losses.l1, losses.flow)) / parts
    got = gradients(tiny_model)
    torch.testing.assert_close(sums, torch.stack((whole.total.detach(), whole.l1, whole.flow)))
    assert got.keys() == want.keys()
    scale = math.sqrt(sum(g.norm() ** 2 for g in want.values()) / len(want))
    for name in want:
        assert (got[name] - want[name]).norm() <= FLOAT32_MODEL * (want[name].norm() + scale), name


def test_lpips_is_weighted_and_averaged_and_gets_images_reconstruction_and_masks(tiny_model, tiny_config, batch, draws):
    images, labels = batch
    tiny_config.perceptual.weight = 0.7
    masks, seen = [torch.ones(1)], []

    def lpips(target, recon, dropout):
        seen.append((target, recon, dropout))
        return (target - recon).square().mean((1, 2, 3))

    losses = training_losses(tiny_model, images, labels, draws, tiny_config, lpips, masks)
    ((target, recon, dropout),) = seen
    assert target is images and dropout is masks
    assert recon.dtype == torch.float32 and recon.requires_grad
    want = (images - recon).square().mean()
    torch.testing.assert_close(losses.lpips, want.detach())
    torch.testing.assert_close(losses.l1, (images - recon).abs().mean().detach())
    torch.testing.assert_close(losses.total.detach(), losses.l1 + 0.7 * losses.lpips + losses.flow)


def test_autocast_keeps_losses_and_gradients_float32_and_finite(tiny_model, tiny_config, batch, draws):
    want = training_losses(tiny_model, *batch, draws, tiny_config)
    with torch.autocast("cpu", torch.bfloat16):
        losses = training_losses(tiny_model, *batch, draws, tiny_config)
    losses.total.backward()
    for name in ("total", "l1", "flow"):
        value = getattr(losses, name)
        assert value.dtype == torch.float32
        # bfloat16 has 8 bits: 4e-3 a rounding, and a loss averages many.
        assert value.item() == pytest.approx(getattr(want, name).item(), rel=0.02)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in tiny_model.parameters())


def test_draws_do_not_depend_on_the_micro_batch(tiny_config, draws):
    parts = [with_numbers(draws_at(tiny_config, part), (4, 6)) for part in torch.arange(BATCH).split([1, 3, 2])]
    draws = with_numbers(draws, (4, 6))
    for field in dataclasses.fields(StepDraws):
        whole = getattr(draws, field.name)
        axis = 1 if field.name in ("flow_time", "flow_noise", "label_drop") else 0
        assert torch.equal(torch.cat([getattr(part, field.name) for part in parts], axis), whole), field.name


def test_shapes_of_the_draws(draws):
    n, c, f = 4, 6, 3
    draws = with_numbers(draws, (n, c))
    shapes = {field.name: tuple(getattr(draws, field.name).shape) for field in dataclasses.fields(StepDraws)}
    assert shapes == {
        "registers": (BATCH, n, c),
        "recon_time": (BATCH,),
        "decoder_noise_mask": (BATCH,),
        "decoder_noise_time": (BATCH,),
        "decoder_noise": (BATCH, n, c),
        "flow_time": (f, BATCH),
        "flow_noise": (f, BATCH, n, c),
        "label_drop": (f, BATCH),
    }


def test_distributions_of_the_draws():
    count = 20_000
    draws = with_numbers(draw_step(ObjectiveConfig(), Philox(1, 2, torch.arange(count)), (1, 4)), (1, 4))

    def assert_mean(values: Tensor, mean: float, deviation: float) -> None:
        assert abs(values.double().mean().item() - mean) < SIGMAS * deviation / math.sqrt(values.numel())

    for normal in (draws.registers, draws.decoder_noise, *draws.flow_noise):
        assert_mean(normal, 0, 1)
        assert_mean(normal.square(), 1, math.sqrt(2))
    for uniform, low, high in ((draws.recon_time, 0, 0.01), (draws.decoder_noise_time, 0.7, 1)):
        assert low <= uniform.min() and uniform.max() <= high
        width = high - low
        assert_mean((uniform - low) / width, 1 / 2, math.sqrt(1 / 12))
        assert_mean(((uniform - low) / width).square(), 1 / 3, math.sqrt(4 / 45))
    assert_mean(draws.decoder_noise_mask, 0.5, 0.5)
    for f in range(3):
        assert_mean(draws.label_drop[f], 0.1, 0.3)
        t = draws.flow_time[f].double()
        s = 2 * t / (1 + t)  # the inverse of t = 0.5 s / (1 - 0.5 s)
        assert_mean(s.logit(), 0, 1)
        assert_mean(s.logit().square(), 1, math.sqrt(2))


def test_no_two_draws_share_their_numbers():
    draws = with_numbers(draw_step(ObjectiveConfig(), Philox(1, 2, torch.arange(1000)), (1, 1)), (1, 1))
    columns = [draws.registers, draws.decoder_noise, *draws.flow_noise, draws.recon_time, draws.decoder_noise_time]
    columns += [*draws.flow_time, draws.decoder_noise_mask, *draws.label_drop]
    table = torch.stack([column.flatten().double() for column in columns])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert correlation.abs().max() < SIGMAS / math.sqrt(1000)


def test_mean_and_deviation_of_the_times_are_settings():
    config = ObjectiveConfig(time_mean=-0.8, time_std=0.5, time_shift=1.0, flow_draws=1)
    u = draw_step(config, Philox(1, 2, torch.arange(20_000)), (1, 1)).flow_time.double().logit()
    assert u.mean().item() == pytest.approx(-0.8, abs=SIGMAS * 0.5 / math.sqrt(20_000))
    assert u.std().item() == pytest.approx(0.5, rel=SIGMAS / math.sqrt(40_000))


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, BATCH)])
def test_probabilities_of_0_and_1_are_never_and_always(probability, share):
    config = ObjectiveConfig(decoder_noise_probability=probability, label_drop=probability)
    draws = draw_step(config, Philox(1, 2, torch.arange(BATCH)), (1, 1))
    assert draws.decoder_noise_mask.sum() == share
    assert draws.label_drop.sum() == 3 * share
