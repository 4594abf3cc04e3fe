import pytest
import torch
from torch.nn import functional as F

from unite_fast.config import EncoderConfig, ModelConfig
from unite_fast.model.unite import UNITE
from unite_fast.recipes import from_tree


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("preset", "millions"), [("B", 217.64), ("M", 318.82), ("L", 545.53), ("XL", 762.78)])
def test_parameter_counts_match_the_published_sizes(preset, millions):
    config = ModelConfig(encoder=from_tree(EncoderConfig, {"preset": preset}))
    with torch.device("meta"):
        model = UNITE(config)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The released code has one more vector of `width`, a time embedding that it never uses.
    assert round((counted + config.encoder.width) / 1e6, 2) == millions


def test_initialize_reports_a_tensor_that_it_does_not_set(tiny_config, mentions):
    """A norm of a class that `initialize` does not handle would keep uninitialised memory from `to_empty`."""
    with torch.device("meta"):
        model = UNITE(tiny_config.model)
        model.encoder.blocks[0].norm4 = torch.nn.LayerNorm(4)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=mentions("encoder.blocks.0.norm4.weight")):
        model.initialize(0)


def test_tokenize_is_unconditional_and_ends_with_the_shared_norm(tiny_model, tiny_config):
    images, registers, t = draw(2, 3, 8, 8), draw(2, 4, 6), torch.tensor([0.0, 0.01])
    raw = tiny_model.encoder(registers, t, torch.tensor([5, 5]), images)
    norm = tiny_model.latent_norm
    expected = F.layer_norm(raw, (6,), norm.weight, norm.bias, 1e-5)
    assert torch.equal(tiny_model.tokenize(images, registers, t), expected)


def test_denoise_uses_time_and_label_and_ends_with_the_shared_norm(tiny_model):
    x, t, labels = draw(2, 4, 6), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    norm = tiny_model.latent_norm
    out = tiny_model.denoise(x, t, labels)
    assert torch.equal(out, F.layer_norm(tiny_model.encoder(x, t, labels), (6,), norm.weight, norm.bias, 1e-5))
    assert not torch.allclose(out, tiny_model.denoise(x, t.flip(0), labels))
    assert not torch.allclose(out, tiny_model.denoise(x, t, labels.flip(0)))


def test_the_denoising_loss_is_computed_from_the_prediction_of_denoise(tiny_model):
    x_t, z, t = draw(3, 2, 4, 6), draw(2, 4, 6), torch.tensor([[0.2, 0.9], [0.0, 0.99], [0.5, 0.7]])
    labels = torch.tensor([[1, 5], [0, 2], [3, 5]])
    losses = tiny_model.denoising_loss(x_t, t, labels, z)
    for f in range(3):
        for i in range(2):
            prediction = tiny_model.denoise(x_t[f, i : i + 1], t[f, i : i + 1], labels[f, i : i + 1])
            expected = ((z[i] - prediction) / max(1 - t[f, i].item(), 0.05)).square().mean()
            torch.testing.assert_close(losses[f, i], expected, rtol=1e-5, atol=0)


def test_latents_are_float32_under_autocast(tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        z = tiny_model.tokenize(draw(2, 3, 8, 8), draw(2, 4, 6), torch.zeros(2))
        loss = tiny_model.denoising_loss(z[None].detach(), torch.rand(1, 2), torch.zeros(1, 2).long(), z.detach())
    assert z.dtype == loss.dtype == torch.float32


def test_initial_weights_depend_only_on_the_seed(tiny_config):
    def created(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        return UNITE.create(tiny_config.model, seed).state_dict()

    first, again, other = created(3, 0), created(3, 1), created(4, 0)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    drawn = [name for name, value in first.items() if value.std() > 0 and name != "encoder.latent_tokens"]
    assert len(drawn) > 20
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_valid_seed_works(seed, tiny_config):
    UNITE.create(tiny_config.model, seed)


def test_forward_passes_do_not_use_the_global_generator(tiny_model):
    before = torch.get_rng_state()
    z = tiny_model.tokenize(draw(2, 3, 8, 8), draw(2, 4, 6), torch.zeros(2))
    tiny_model.decode(tiny_model.denoise(z, torch.zeros(2), torch.tensor([0, 1])))
    assert torch.equal(torch.get_rng_state(), before)
